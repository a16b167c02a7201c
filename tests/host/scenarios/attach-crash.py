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
        # QEMU first, then qmpin: no process is left, and the next one sweeps.
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
    """Killed, and started again: nothing moves, and what is restored is what there was before the first."""
    with qmpin.Attached(100) as attached:
        plan = attached.check(vm, host)
        others = attached.others
        attached.stop(signal.SIGKILL)
    masks = vm.masks()
    with qmpin.Attached(100) as attached:
        attached.others = others
        assert attached.check(vm, host) == plan, "the plan of the one before"
        # QEMU's workers come and go by themselves.
        moved = {tid: (masks[tid], now) for tid, now in vm.masks().items() if masks.get(tid, now) != now}
        assert not moved, f"threads moved by a restart: {moved}"
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
        seen(vm, host, attached)
    host.run("qmpin", "detach", "100")
    state.check_same(alone, state.capture())
    host.run("qmpin", "detach", "100")
    state.check_same(alone, state.capture())


def seen(vm, host, attached):
    """While no supervisor runs, the check of these scenarios finds a thread that is not in its place, and one that was moved."""
    tid, own = vm.roles().vcpus[0], os.getpid()
    for who, where in ((tid, {0}), (own, {1})):
        was = os.sched_getaffinity(who)
        os.sched_setaffinity(who, where)
        wrong = attached.misplaced(vm) + attached.moved(qmpin.by_key())
        assert [line.startswith(f"tid {who} ") for line in wrong] == [True], wrong
        os.sched_setaffinity(who, was)
    assert not attached.misplaced(vm) + attached.moved(qmpin.by_key())
