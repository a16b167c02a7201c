"""A VM that is attached has every thread in its place after each event of its life, and all is as before at the end."""

import subprocess

import qmpin
import state
from pve_poller import PvePoller

LIMIT_S = 600
NEEDS = ("kvm", "qmpin")


def run(host):
    before = host.before()
    # The same life twice, so that the Proxmox stand-in can be compared. The guest is one that sleeps: eight that spin leave
    # an emulated host no time to answer anybody, with or without qmpin.
    with host.vm(100, **host.fitting(), disks=2, paused=True) as vm, PvePoller(vm) as poller:
        live(vm, lambda: None)
        poller.wait_visits(2)
    host.note(f"without qmpin: {poller.report}")
    poller.report.check()

    with host.vm(100, **host.fitting(), disks=2, paused=True) as vm:
        alone = state.capture()
        with PvePoller(vm) as poller:
            with qmpin.Attached(100) as attached:
                plan = attached.check(vm, host)
                if host.shape["name"] == "5900x":
                    assert (plan["exclusive"], plan["emulator"]) == ("12-19", "0-11"), plan
                    assert plan["housekeeping"] == "0-11,20-23", plan
                live(vm, lambda: attached.check(vm, host))
                drift(attached, vm, host)
                neighbour(attached, vm, host)
                assert attached.plan() == plan, "after all that, the plan is the first"
                poller.wait_visits(2)
            assert attached.code == 0, "it ends in order on SIGTERM"
            state.check_same(alone, state.capture())
        host.note(f"with qmpin:    {poller.report}")
        poller.report.check()
        with qmpin.Attached(100) as attached:
            attached.check(vm, host)
            vm.kill()
            assert attached.wait() == 0, "the end of QEMU is the end of attach, and no failure"
    state.check_same(before, state.capture())


def live(vm, check):
    """A start, two resets, a pause, an iothread that comes and goes."""
    vm.cont()
    vm.wait_guest()
    check()
    for _ in range(2):
        vm.reset()
        check()
    vm.stop()
    check()
    vm.cont()
    check()
    vm.iothread_add("iothread-virtioscsi7")
    check()
    vm.iothread_delete("iothread-virtioscsi7")
    check()


def drift(attached, vm, host):
    """Another program's taskset is found and mended, and counted."""
    tid = vm.roles().vcpus[1]
    subprocess.run(["taskset", "-pc", host.online(), str(tid)], check=True, capture_output=True)
    attached.check(vm, host)
    attached.wait_status("drift 1")


def neighbour(attached, vm, host):
    """A VM that is not attached comes and goes beside it, and is left alone."""
    with host.vm(101, cpus=2) as other:
        other.wait_guest()
        attached.check(vm, host)
        assert set(other.masks().values()) == {host.online()}, other.masks()
    attached.check(vm, host)
