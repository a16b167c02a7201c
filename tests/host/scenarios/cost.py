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

# Thirty attachments and detachments with partitions on 64 emulated CPUs.
LIMIT_S = 1800
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x", "epyc-4x")

# How many VMs at once.
NUMBERS = {"5900x": (1, 5, 10), "epyc-4x": (1, 5, 10, 30)}
OVER_S = 30.0
# Each VM has a lease that the others read, and kernel threads that they see.
SPREAD = 1.4


def run(host):
    before = host.before()
    numbers = NUMBERS[host.shape["name"]]
    vmids = range(100, 100 + max(numbers))
    each = {}
    with contextlib.ExitStack() as vms:
        for vmid in vmids:
            vms.enter_context(host.vm(vmid, cpus=1, disks=0, memory_mib=32, paused=True))
        for number in numbers:
            with contextlib.ExitStack() as followers:
                pids = [
                    followers.enter_context(qmpin.Attached(vmid, isolation="exclusive")).process.pid
                    for vmid in vmids[:number]
                ]
                reads, ms = each[number] = [spent / number for spent in spend(pids)]
                line = (
                    f"{number} VMs: {reads / OVER_S * 60:.0f} reads a minute for each, {reads / each[1][0]:.2f} of one alone;"
                    f" CPU time {ms / OVER_S * 60:.0f} ms, {ms / each[1][1]:.2f}"
                )
                print(line)
                host.note(line)
    assert all(reads < each[1][0] * SPREAD for reads, _ in each.values()), each
    state.check_same(before, state.capture())


def spend(pids):
    """What these processes do over a while: reads, and CPU time in milliseconds."""
    # A pass of the slow timer, in which the last neighbour is noticed.
    began = time.monotonic()
    while time.monotonic() - began < 6:
        time.sleep(0.5)
    start, began = counts(pids), time.monotonic()
    time.sleep(OVER_S)
    share = OVER_S / (time.monotonic() - began)
    return [(after - before) * share for before, after in zip(start, counts(pids))]


def counts(pids):
    return [sum(map(reads, pids)), sum(map(ticks, pids)) * 1000 / os.sysconf("SC_CLK_TCK")]


def reads(pid):
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("syscr:")).split()[1])


def ticks(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])
