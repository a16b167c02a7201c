"""On QEMU >= 11.1 qmpin lives on a monitor of its own: it follows at once while others hold <vmid>.qmp, and leaves nothing."""

import os
import signal

import cpulist
import qmp
import qmpin
import state
from pve_poller import PvePoller
from wait import wait_until

LIMIT_S = 300
NEEDS = ("kvm", "qmpin", "monitor-qmp")
# Neither the slow timer nor its own retries may be what finds it.
TIMER_S = 3600
LIMIT_TO_FOLLOW_S = 30


def run(host):
    before = host.before()
    with host.vm(100, cpus=3, max_cpus=4, guest="hotplug") as vm:
        vm.wait_guest()
        alone, quiet = state.capture(), monitors(vm)
        with PvePoller(vm) as poller:
            with qmpin.Attached(100, check_interval_s=TIMER_S) as attached:
                attached.wait_status("a runtime monitor")
                assert monitors(vm) != quiet, "nothing of a second monitor is to be seen"
                attached.check(vm, host)
                vm.iothread_add("iothread-virtioscsi7")
                attached.check(vm, host, limit_s=LIMIT_TO_FOLLOW_S)
                vm.iothread_delete("iothread-virtioscsi7")
                attached.check(vm, host, limit_s=LIMIT_TO_FOLLOW_S)
            assert attached.code == 0
            nothing_left(vm, quiet)
            state.check_same(alone, state.capture())
        poller.report.check()

        # No other program is served as long as we hold the socket, so this is the other monitor's doing.
        with qmpin.Attached(100, check_interval_s=TIMER_S) as attached:
            attached.wait_status("a runtime monitor")
            plan = attached.check(vm, host)
            with qmp.held(vm.qmp_path) as session:
                boots = vm.guest_boots()
                session.command("system_reset")
                wait_until(lambda: vm.guest_boots() > boots, 60, "the guest to be booted again", vm.guest_boots)
                tid = vm.hot_add_over(session, 3)
                taken = cpulist.parse(plan["emulator"]) | {int(row["cpus"]) for row in plan["vcpus"]}

                def placed():
                    cpus = cpulist.parse(vm.masks()[tid])
                    return len(cpus) == 1 and not cpus & taken

                wait_until(placed, LIMIT_TO_FOLLOW_S, "the new vCPU to have its CPU", lambda: vm.masks()[tid])
            attached.check(vm, host)
            vm.hot_remove(3)
            attached.check(vm, host, limit_s=LIMIT_TO_FOLLOW_S)
            # Killed: the monitor goes with its connection.
            attached.stop(signal.SIGKILL)
        wait_until(lambda: monitors(vm) == quiet, 30, "QEMU to remove the monitor", lambda: monitors(vm))
        host.run("qmpin", "detach", "100")
        nothing_left(vm, quiet)
        state.check_same(alone, state.capture())

        with qmpin.Attached(100) as attached:
            attached.wait_status("a runtime monitor")
            vm.kill()
            assert attached.wait() == 0
        assert not os.listdir("/run/qemu-server"), "a QEMU that is killed cannot remove the socket of its monitor"
    state.check_same(before, state.capture())


def monitors(vm):
    """What QEMU has of chardevs and objects, whether or not they are in use."""
    with qmp.Session(vm.qmp_path) as session:
        chardevs = {row["label"] for row in session.command("query-chardev")}
        objects = {row["name"] for row in session.command("qom-list", path="/objects")}
    return chardevs, objects


def nothing_left(vm, quiet):
    wait_until(lambda: monitors(vm) == quiet, 30, "QEMU to remove the monitor", lambda: monitors(vm))
    left = [name for name in os.listdir("/run/qemu-server") if name not in ("100.qmp", "100.pid")]
    assert not left, f"left in /run/qemu-server: {left}"
