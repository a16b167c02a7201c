"""What supervisors do while nothing happens does not grow faster than their number.

It is counted in system calls that read. CPU time is noted beside it, and means little here: the emulated CPUs share the two of the
machine, and the time in which one waits for its turn counts as its own.
"""

import contextlib
import os
import time
from pathlib import Path

import qmpin
import state
from wait import wait_until

# Thirty VMs with partitions on 64 emulated CPUs, under their shipped path units: systemd reloads once for all of them.
LIMIT_S = 2700
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x", "epyc-4x")

# How many VMs at once.
NUMBERS = {"5900x": (1, 5, 10), "epyc-4x": (1, 5, 10, 30)}
# What an emulator needs for twenty more of them.
START_S = 900
OVER_S = 30.0
# Each VM has a lease that the others read, and kernel threads that they see.
SPREAD = 1.4


def run(host):
    before = host.before()
    numbers = NUMBERS[host.shape["name"]]
    vmids = range(100, 100 + max(numbers))
    each = {}
    with qmpin.Shipped('isolation = "exclusive"\n'), contextlib.ExitStack() as stack:
        for vmid in vmids:
            host.run("systemctl", "start", f"qmpin@{vmid}.path")
        vms, services = [], []
        for number in numbers:
            begun = time.monotonic()
            for vmid in vmids[len(vms) : number]:
                vms.append(stack.enter_context(host.vm(vmid, cpus=1, disks=0, memory_mib=32, paused=True)))
                services.append(stack.enter_context(qmpin.Service(vmid)))
            wait_until(
                lambda: all(partition(vm) == "isolated" for vm in vms),
                START_S,
                f"{number} partitions",
                lambda: {vm.vmid: partition(vm) for vm in vms if partition(vm) != "isolated"},
            )
            since_s = time.monotonic() - begun
            reads, ms = each[number] = [spent / number for spent in spend([one.main_pid() for one in services])]
            line = (
                f"{number} VMs, isolated after {since_s:.0f} s: {reads / OVER_S * 60:.0f} reads a minute for each,"
                f" {reads / each[1][0]:.2f} of one alone; CPU time {ms / OVER_S * 60:.0f} ms, {ms / each[1][1]:.2f}"
            )
            print(line)
            host.note(line)
        for vm in vms:
            vm.kill()
        for service in services:
            service.wait_state("inactive")
    assert all(reads < each[1][0] * SPREAD for reads, _ in each.values()), each
    state.check_same(before, state.capture())


def partition(vm):
    try:
        return (vm.cgroup / "vcpus/cpuset.cpus.partition").read_text().strip()
    except OSError as error:
        return str(error)


def spend(pids):
    """What these processes do over a while: reads, and CPU time in milliseconds."""
    # Two passes of the slow timer after the last change of a plan.
    wait_until(lambda: time.time() - changed_s() > 10, START_S, "plans that stay", changed_s)
    start, began = counts(pids), time.monotonic()
    time.sleep(OVER_S)
    share = OVER_S / (time.monotonic() - began)
    return [(after - before) * share for before, after in zip(start, counts(pids))]


def changed_s():
    """When a lease was last written."""
    leases = Path("/run/qmpin").glob("*.lease")
    return max(lease.stat().st_mtime for lease in leases)


def counts(pids):
    return [sum(map(reads, pids)), sum(map(ticks, pids)) * 1000 / os.sysconf("SC_CLK_TCK")]


def reads(pid):
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("syscr:")).split()[1])


def ticks(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])
