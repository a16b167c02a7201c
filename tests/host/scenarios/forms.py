"""Where threads go by other words than a set: a CPU for one thread, a set to float over, a core for each vCPU, a CPU for each
iothread, a priority for some vCPUs. What is plugged follows, `verify` holds, and all is as before at the end.
"""

import contextlib
import json
import os

import cpulist
import qmpin
import state
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x",)

FIFO = 1


def run(host):
    before = host.before()
    with host.vm(100, cpus=3, max_cpus=4, guest="hotplug", disks=2) as vm:
        vm.wait_guest()
        alone = state.capture()
        for part in (single_threads, floating, a_core_each, filled):
            part(host, vm)
            state.check_same(alone, state.capture())
    state.check_same(before, state.capture())


def attached(policy):
    return qmpin.Attached(100, isolation="exclusive", policy=f"check_interval_s = 1\n{policy}")


def holds(host):
    """The rest of the host follows a plan that has grown a moment after the VM's own threads."""
    verify = lambda: host.run("qmpin", "verify", "100", check=False)
    wait_until(lambda: verify().returncode == 0, 60, "all to hold", lambda: verify().stdout)


@contextlib.contextmanager
def plugged(follower, vm):
    """With a fourth vCPU, which is in its place."""
    vm.hot_add(3)
    follower.settle(vm)
    yield
    vm.hot_remove(3)
    follower.settle(vm)


def of_vcpu(vm, index):
    return cpulist.parse(vm.masks()[vm.roles().vcpus[index]])


def single_threads(host, vm):
    policy = 'iothreads = "each"\nsched = "fifo:1"\nsched_vcpus = "1-3"\n[vcpu.1]\ncpu = "18"\n[vcpu.3]\ncpu = "16"\n'
    with attached(policy) as follower:
        follower.settle(vm)
        assert of_vcpu(vm, 1) == {18}, vm.masks()
        own = [cpulist.parse(vm.masks()[tid]) for tid in vm.roles().iothreads.values()]
        assert len(own) == 2 and all(len(one) == 1 for one in own) and own[0] != own[1], own
        rest = cpulist.parse(follower.plan()["emulator"])
        assert not rest & (own[0] | own[1]), (rest, own)
        with plugged(follower, vm):
            assert of_vcpu(vm, 3) == {16}, vm.masks()
            late = vm.iothread_add("late")
            follower.settle(vm)
            assert len(cpulist.parse(vm.masks()[late])) == 1, vm.masks()
            vm.iothread_delete("late")
            follower.settle(vm)
            policies = {index: os.sched_getscheduler(tid) for index, tid in vm.roles().vcpus.items()}
            assert {index for index, policy in policies.items() if policy & ~os.SCHED_RESET_ON_FORK == FIFO} == {1, 2, 3}, policies
            holds(host)
    assert follower.code == 0, follower.log()


def floating(host, vm):
    with attached('vcpus = "float:12-17"\n') as follower:
        follower.settle(vm)
        assert all(of_vcpu(vm, index) == cpulist.parse("12-17") for index in range(3)), vm.masks()
        assert follower.plan()["exclusive"] == "12-17", follower.plan()
        with plugged(follower, vm):
            assert of_vcpu(vm, 3) == cpulist.parse("12-17"), vm.masks()
            holds(host)
            status = json.loads(host.run("qmpin", "status", "100", "--json").stdout)["vms"][0]
            assert status["floats"] == "12-17", status
    assert follower.code == 0, follower.log()


def a_core_each(host, vm):
    with attached('smt = "isolate"\n') as follower:
        follower.settle(vm)
        with plugged(follower, vm):
            used = [min(of_vcpu(vm, index)) for index in range(4)]
            assert len({cpu // 2 for cpu in used}) == 4, used
            assert len(cpulist.parse(follower.plan()["exclusive"])) == 8, follower.plan()
            holds(host)
    assert follower.code == 0, follower.log()


def filled(host, vm):
    with attached('smt = "siblings"\n') as follower:
        follower.settle(vm)
        used = sorted(min(of_vcpu(vm, index)) // 2 for index in range(3))
        assert used[0] == used[1] and used[1] + 1 == used[2], used
        with plugged(follower, vm):
            assert of_vcpu(vm, 3) == {min(of_vcpu(vm, 2)) ^ 1}, vm.masks()
            holds(host)
    assert follower.code == 0, follower.log()
