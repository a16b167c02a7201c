"""Two VMs attached at once have CPUs of their own and keep their helpers off the other's; either may go first."""

import cpulist
import qmpin
import state
import threads
from pve_poller import PvePoller
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin")


def run(host):
    before = host.before()
    with host.vm(100, **host.fitting(), disks=2) as one, host.vm(101, cpus=2, debug_threads=False) as two:
        one.wait_guest()
        two.wait_guest()
        alone = state.capture()
        with PvePoller(one) as first_poller, PvePoller(two) as second_poller:
            if host.shape["name"] == "tiny":
                no_room(host, one)
            else:
                for first_goes in (True, False):
                    together(host, one, two, first_goes)
                    state.check_same(alone, state.capture())
                aside(host)
                state.check_same(alone, state.capture())
        for poller in (first_poller, second_poller):
            poller.report.check()
    state.check_same(before, state.capture())


def together(host, one, two, first_goes):
    first, second = qmpin.Attached(100), qmpin.Attached(101)
    with first, second:
        mine, theirs = first.check(one, host), second.check(two, host)
        apart(mine, theirs)
        two.reset()
        apart(first.check(one, host), second.check(two, host))
        # One goes: the other stays where it is.
        goes, stays, vm, plan = (first, second, two, theirs) if first_goes else (second, first, one, mine)
        assert goes.stop() == 0
        assert stays.check(vm, host)["vcpus"] == plan["vcpus"]
        gone = one if first_goes else two
        assert set(gone.masks().values()) == {host.online()}, gone.masks()
    assert stays.code == 0


def apart(mine, theirs):
    """No CPU of one VM alone is touched by anything of the other."""
    for a, b in ((mine, theirs), (theirs, mine)):
        exclusive = cpulist.parse(a["exclusive"])
        for cpus in (b["exclusive"], b["emulator"], b["housekeeping"], *(row["cpus"] for row in b["iothreads"])):
            assert not exclusive & cpulist.parse(cpus), (mine, theirs)


def aside(host):
    """Both supervisors leave the CPUs of both VMs, where no partition keeps them out: also the one that has no pass over the host to do."""
    policy = "irqs = true\npartition = false"
    with qmpin.Attached(100, policy=policy, check_interval_s=1) as first, qmpin.Attached(101, policy=policy, check_interval_s=1) as second:
        both = (first, second)
        exclusive = set().union(*(cpulist.parse(follower.plan()["exclusive"]) for follower in both))
        there = lambda: [
            thread for follower in both for thread in threads.of_process(follower.process.pid).values() if cpulist.parse(thread.allowed) & exclusive
        ]
        wait_until(lambda: not there(), qmpin.LIMIT_S, f"both supervisors to leave {cpulist.write(exclusive)}", there)


def no_room(host, one):
    """A machine that is full says so, changes nothing, and the VM that was there keeps its place."""
    with qmpin.Attached(100) as first:
        plan = first.check(one, host)
        masks = state.capture()
        done = host.run("qmpin", "attach", "101", check=False)
        assert done.returncode == 1, done
        print(done.stderr)
        state.check_same(masks, state.capture())
        assert first.check(one, host) == plan
