"""A VM that is attached has every thread in its place after each event of its life, and all is as before at the end."""

import os
import signal
import subprocess

import cpulist
import qmpin
import state
from pve_poller import PvePoller
from wait import wait_until

LIMIT_S = 600
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x", "5900x-one-node", "epyc-4x")


def run(host):
    # systemd keeps qemu.slice after its first VM.
    with host.vm(100, cpus=1):
        pass
    before = state.capture()
    with host.vm(100, smp="8,sockets=1,cores=4,threads=2", disks=2, guest="spin") as vm:
        vm.wait_guest()
        alone = state.capture()
        with PvePoller(vm) as poller:
            with qmpin.Attached(100) as attached:
                plan = attached.check(vm, host, threads_per_core=2)
                if host.shape["name"] == "5900x":
                    assert (plan["exclusive"], plan["emulator"]) == ("12-19", "0-11"), plan
                    assert plan["housekeeping"] == "0-11,20-23", plan
                for _ in range(2):
                    vm.reset()
                    attached.check(vm, host, threads_per_core=2)
                vm.stop()
                attached.check(vm, host, threads_per_core=2)
                vm.cont()
                attached.check(vm, host, threads_per_core=2)
                vm.iothread_add("iothread-virtioscsi7")
                attached.check(vm, host, threads_per_core=2)
                vm.iothread_delete("iothread-virtioscsi7")
                drift(attached, vm, host)
                cpu_hotplug(attached, vm, host)
                neighbour(attached, vm, host)
                killed = attached.process.pid
                attached.stop(signal.SIGKILL)
            host.run("qmpin", "detach", "100")
            assert not os.path.exists(f"/proc/{killed}")
            state.check_same(alone, state.capture())
            with qmpin.Attached(100) as attached:
                attached.check(vm, host, threads_per_core=2)
            assert attached.code == 0
            state.check_same(alone, state.capture())
        print(poller.report)
        poller.report.check()
        with qmpin.Attached(100) as attached:
            vm.kill()
            assert attached.wait() == 0, "the end of QEMU is the end of attach, and no failure"
    state.check_same(before, state.capture())


def drift(attached, vm, host):
    """Somebody's taskset is found and mended."""
    tid = vm.roles().vcpus[3]
    subprocess.run(["taskset", "-pc", "0-23", str(tid)], check=True, capture_output=True)
    attached.check(vm, host, threads_per_core=2)

    def counted():
        attached.hear()
        return attached.said.get("STATUS", "").endswith("drift 1")

    wait_until(counted, 60, "the drift to be counted", lambda: attached.said)


def cpu_hotplug(attached, vm, host):
    """A CPU of the VM goes offline and comes back: the vCPU has a place all the while, and the plan holds at the end."""
    cpu = attached.plan()["vcpus"][2]["cpus"]
    online = f"/sys/devices/system/cpu/cpu{cpu}/online"
    with open(online, "w") as file:
        file.write("0")
    wait_until(lambda: attached.plan()["vcpus"][2]["cpus"] != cpu, 60, "a plan without the CPU")
    attached.settle(vm)
    with open(online, "w") as file:
        file.write("1")
    wait_until(lambda: host.online() == f"0-{host.shape['cpus'] - 1}", 60, "the CPU to be online again")
    attached.settle(vm)


def neighbour(attached, vm, host):
    """A second VM gets CPUs of its own, and the first one's helpers leave them."""
    with host.vm(101, cpus=2) as other:
        other.wait_guest()
        with qmpin.Attached(101) as second:
            second.settle(other)
            attached.settle(vm)
            mine, theirs = attached.plan(), second.plan()
            assert not set(cpulist.parse(mine["exclusive"])) & set(cpulist.parse(theirs["exclusive"])), (mine, theirs)
            assert not set(cpulist.parse(mine["emulator"])) & set(cpulist.parse(theirs["exclusive"])), (mine, theirs)
            assert not set(cpulist.parse(theirs["emulator"])) & set(cpulist.parse(mine["exclusive"])), (mine, theirs)
    attached.settle(vm)
