"""SIGKILL of qmpin, of QEMU, of both: a restart finds the plan that was, and the end finds the host as it was."""

import os
import signal

import qmpin
import state
from pve_poller import PvePoller

LIMIT_S = 400
NEEDS = ("kvm", "qmpin")


def run(host):
    before = host.before()
    with host.vm(100, **host.fitting(), disks=2) as vm:
        vm.wait_guest()
        alone = state.capture()
        with PvePoller(vm) as poller:
            restart(host, vm, alone)
            detach(host, vm, alone)
        poller.report.check()
        # QEMU first, then qmpin: nobody is left, and the next one sweeps.
        with qmpin.Attached(100) as attached:
            attached.check(vm, host)
            os.kill(attached.process.pid, signal.SIGSTOP)
            vm.kill()
            attached.stop(signal.SIGKILL)
    assert os.path.exists("/run/qmpin/100.lease")
    with host.vm(101, cpus=1) as other:
        other.wait_guest()
        with qmpin.Attached(101) as attached:
            attached.check(other, host)
            assert not os.path.exists("/run/qmpin/100.lease"), "what the dead have left is swept"
        assert attached.code == 0
    host.run("qmpin", "detach", "--all")
    state.check_same(before, state.capture())


def restart(host, vm, alone):
    """Killed, and started again: nothing moves, and what is put back is what there was before the first."""
    with qmpin.Attached(100) as attached:
        plan = attached.check(vm, host)
        others = attached.others
        attached.stop(signal.SIGKILL)
    masks = vm.masks()
    with qmpin.Attached(100) as attached:
        attached.others = others
        assert attached.check(vm, host) == plan, "the plan of the one before"
        assert vm.masks() == masks, "and nothing has moved"
        vm.reset()
        vm.iothread_add("iothread-virtioscsi7")
        attached.check(vm, host)
        vm.iothread_delete("iothread-virtioscsi7")
        attached.check(vm, host)
    assert attached.code == 0
    state.check_same(alone, state.capture())


def detach(host, vm, alone):
    """Killed, and detached by hand; twice does no harm."""
    with qmpin.Attached(100) as attached:
        attached.check(vm, host)
        attached.stop(signal.SIGKILL)
    host.run("qmpin", "detach", "100")
    state.check_same(alone, state.capture())
    host.run("qmpin", "detach", "100")
    state.check_same(alone, state.capture())
