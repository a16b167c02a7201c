"""vCPUs and iothreads that come, go and come again are followed at once, without the slow timer and without thread names."""

import qmpin
import state
from pve_poller import PvePoller
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin")
# Long enough that whatever is in place in time was not found by the timer.
TIMER_S = 3600
LIMIT_TO_FOLLOW_S = 30


def run(host):
    before = host.before()
    tiny = host.shape["name"] == "tiny"
    start, most = (1, 2) if tiny else (3, 4)
    with host.vm(100, cpus=start, max_cpus=most, disks=2, guest="hotplug", debug_threads=False) as vm:
        vm.wait_guest()
        with PvePoller(vm) as poller:
            alone = state.capture()
            with qmpin.Attached(100, check_interval_s=TIMER_S) as attached:

                def check():
                    return attached.check(vm, host, limit_s=LIMIT_TO_FOLLOW_S)

                plan = check()
                first = vm.hot_add(most - 1)
                grown = check()
                assert grown["vcpus"][: len(plan["vcpus"])] == plan["vcpus"], f"the others stay: {plan}, {grown}"

                vm.hot_remove(most - 1)
                wait_until(lambda: first not in vm.masks(), 30, "the thread of the unplugged vCPU to end")
                check()
                second = vm.hot_add(most - 1)
                assert second != first, "a vCPU that is plugged again has a new thread"
                assert check()["vcpus"] == grown["vcpus"], "it gets the place that it had"

                vm.iothread_add("iothread-virtioscsi7")
                assert len(check()["iothreads"]) == 3
                vm.iothread_delete("iothread-virtioscsi7")
                assert len(check()["iothreads"]) == 2

                vm.reset()
                check()
                vm.hot_remove(most - 1)
                wait_until(lambda: second not in vm.masks(), 30, "the thread of the unplugged vCPU to end")
                check()
            assert attached.code == 0
            state.check_same(alone, state.capture())
        poller.report.check()
    state.check_same(before, state.capture())
