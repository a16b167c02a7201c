"""Ten VMs start within seconds under their shipped path units: each has its partition, and systemd has reloaded once for all of
them. No file of it is left after the last VM.
"""

import contextlib
import subprocess
import time
from pathlib import Path

import cpulist
import qmpin
import state
from wait import wait_until

LIMIT_S = 900
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x", "epyc-4x")
SUITES = ("trixie", "forky")

VMS = range(100, 110)
# A core of the host for each: vCPUs that are no siblings would take two, and ten VMs would not fit.
SMP = "2,cores=1,threads=2"
DROP_INS = Path("/run/systemd/system")
# What an emulator needs for ten VMs at once.
START_S = 300


def run(host):
    before = host.before()
    with qmpin.Shipped('isolation = "exclusive"\n'):
        for vmid in VMS:
            host.run("systemctl", "start", f"qmpin@{vmid}.path")
        with contextlib.ExitStack() as stack:
            since = now(host)
            begun = time.monotonic()
            vms = [stack.enter_context(host.vm(vmid, smp=SMP)) for vmid in VMS]
            started = time.monotonic()
            services = [stack.enter_context(qmpin.Service(vm.vmid)) for vm in vms]
            try:
                wait_until(lambda: all(partition(vm) == "isolated" for vm in vms), START_S, "ten partitions", lambda: [partition(vm) for vm in vms])
                isolated = time.monotonic()
                for service, vm in zip(services, vms):
                    service.check(vm, host, 120, crowded=True)
                count = len(reloads(host, since))
                host.note(f"{len(vms)} VMs in {started - begun:.0f} s, all isolated {isolated - started:.0f} s later, {count} reload(s)")
                assert count == 1, reloads(host, since)
                own = [cpulist.parse(host.read(vm.cgroup / "vcpus/cpuset.cpus.exclusive.effective")) for vm in vms]
                assert sum(map(len, own)) == len(set().union(*own)), own
                for service in services:
                    for words in ("refused", "would not", "the kernel made it", "externally"):
                        assert words not in service.log(), f"{service.name}: {words!r}: {service.log()}"
                # One that is started anew, and its neighbours stay.
                vms[3].kill()
                wait_unloaded(host, vms[3].scope)
                vms[3] = stack.enter_context(host.vm(VMS[3], smp=SMP))
                wait_until(lambda: partition(vms[3]) == "isolated", START_S, "the partition of a VM that was started anew", services[3].log)
            except AssertionError:
                for service in services:
                    print(f"--- {service.name}: {service.states()}\n{service.log()}")
                print(host.run("qmpin", "status").stdout)
                raise
            since = now(host)
            for vm in vms:
                vm.kill()
            for service in services:
                service.wait_state("inactive")
            # They are gone, so systemd need not reload.
            host.note(f"{len(reloads(host, since))} reloads as they end")
            assert not reloads(host, since), reloads(host, since)
        wait_until(lambda: not list(DROP_INS.glob("*.scope.d")), 60, "the drop-ins to go", lambda: list(DROP_INS.glob("*.scope.d")))
    state.check_same(before, state.capture())


def partition(vm):
    try:
        return (vm.cgroup / "vcpus/cpuset.cpus.partition").read_text().strip()
    except OSError as error:
        return str(error)


def wait_unloaded(host, unit):
    """Until systemd has forgotten a scope: Proxmox waits for that before it starts the VM anew."""
    path = ("busctl", "call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
    wait_until(lambda: host.run(*path, "GetUnit", "s", unit, check=False).returncode != 0, 10, f"{unit} to be unloaded")


def now(host):
    """A cursor of the journal."""
    host.run("journalctl", "--sync")
    done = host.run("journalctl", "-q", "-n", "0", "--show-cursor", "-o", "cat")
    return done.stdout.split("-- cursor: ")[1].strip()


def reloads(host, since):
    """What systemd has said of reloads since then."""
    host.run("journalctl", "--sync")
    command = ["journalctl", "-q", "-o", "cat", "_PID=1", "--after-cursor", since]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    return [line for line in said.splitlines() if line.startswith("Reloading finished")]
