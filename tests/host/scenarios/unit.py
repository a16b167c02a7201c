"""qmpin as a unit of systemd: ready, status and watchdog; reload and re-execution; each way to end it restores everything."""

import os
import signal

import qmpin
import state
from pve_poller import PvePoller
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin")


def run(host):
    with qmpin.Unit(100) as unit:
        before_the_vm(unit)
        # systemd keeps the slice of a template after its first instance.
        before = host.before()
        before_the_vm(unit)
        state.check_same(before, state.capture())
        with host.vm(100, **host.fitting(), disks=2) as vm:
            vm.wait_guest()
            unit.remember()
            alone = state.capture()
            with PvePoller(vm) as poller:
                talks(unit, vm, host)
                manager(unit, vm, host)
                stopped(unit, vm, host, alone)
                killed(unit, vm, host)
                frozen(unit, vm, host)
                unit.stop()
                state.check_same(alone, state.capture())
            poller.report.check()
            unit.start()
            unit.check(vm, host)
            vm.kill()
            # The VM is gone before the unit: no failure, and no start again.
            unit.wait_state("inactive")
            assert (unit.show("Result"), unit.show("ExecMainStatus")) == ("success", "0"), unit.states()
            assert unit.show("NRestarts") == "0", unit.states()
        before_the_vm(unit)
        state.check_same(before, state.capture())


def before_the_vm(unit):
    """Started while there is no such VM: it is skipped, which is no failure, and not tried again."""
    unit.start()
    assert (unit.show("ActiveState"), unit.show("Result"), unit.show("NRestarts")) == ("inactive", "success", "0"), unit.states()


def talks(unit, vm, host):
    """`systemctl start` returns when everything is in place; the status says how it stands; it is alive."""
    unit.start()
    assert unit.show("ActiveState") == "active", unit.states()
    wrong = unit.misplaced(vm)
    assert not wrong, f"it was not ready when it said so: {wrong}"
    plan = unit.check(vm, host)
    status = unit.show("StatusText")
    assert f"{len(plan['vcpus'])} vCPUs on {plan['exclusive']}, emulator on {plan['emulator']}" in status, status
    wait_beats(unit, 3)
    assert unit.show("NRestarts") == "0", unit.states()


def wait_beats(unit, beats):
    """Until it has notified systemd BEATS times that it lives."""
    seen = set()

    def enough():
        seen.add(unit.show("WatchdogTimestampMonotonic"))
        return len(seen) > beats

    wait_until(enough, (beats + 1) * unit.watchdog_s(), f"{beats} signs of life", unit.states)


def manager(unit, vm, host):
    """systemd reads its units anew, and executes itself anew: the unit goes on, and is heard."""
    pid, plan = unit.main_pid(), unit.plan()
    for what in ("daemon-reload", "daemon-reexec"):
        qmpin.systemctl(what)
        assert unit.check(vm, host) == plan, what
        wait_beats(unit, 1)
        vm.reset()
        assert unit.check(vm, host) == plan, what
        assert (unit.main_pid(), unit.show("NRestarts")) == (pid, "0"), unit.states()


def stopped(unit, vm, host, alone):
    """`systemctl stop` restores everything."""
    unit.stop()
    assert (unit.show("Result"), unit.show("ExecMainStatus")) == ("success", "0"), unit.states()
    assert set(vm.masks().values()) == {host.online()}, vm.masks()
    state.check_same(alone, state.capture())
    unit.start()


def wait_restored(vm, host):
    """Until the command after the stop has restored the VM. The unit does not start again before RestartSec= has passed."""
    wait_until(lambda: set(vm.masks().values()) == {host.online()}, 90, "the VM to be restored", vm.masks)


def killed(unit, vm, host):
    """SIGKILL: the command after the stop restores everything, and the unit comes up again with the plan that was."""
    plan = unit.check(vm, host)
    os.kill(unit.main_pid(), signal.SIGKILL)
    wait_restored(vm, host)
    unit.wait_state("active", restarts=1)
    assert unit.check(vm, host) == plan


def frozen(unit, vm, host):
    """It hangs: the watchdog ends it, the command after the stop restores everything, and it comes up again."""
    plan = unit.check(vm, host)
    os.kill(unit.main_pid(), signal.SIGSTOP)
    wait_restored(vm, host)
    unit.wait_state("active", restarts=2)
    assert "atchdog" in unit.log(), unit.log()
    assert unit.check(vm, host) == plan
