"""A host CPU that goes offline and comes back: each vCPU has a CPU of its own all the while, and siblings are together again."""

import contextlib
from pathlib import Path

import cpulist
import qmpin
import state
from pve_poller import PvePoller
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin")


def run(host):
    before = host.before()
    # Room for a vCPU to move to: the smallest shape has none, and says so.
    tiny = host.shape["name"] == "tiny"
    with host.vm(100, **(host.fitting() if tiny else room(host)), guest="spin") as vm:
        vm.wait_guest()
        alone = state.capture()
        with PvePoller(vm) as poller:
            # CPUs come and go without an event, so it is the timer that sees it.
            with qmpin.Attached(100, check_interval_s=1) as attached:
                plan = attached.check(vm, host)
                cpu = int(plan["vcpus"][1]["cpus"])
                with offline(host, cpu):
                    if not tiny:
                        wait_until(lambda: attached.plan()["vcpus"][1]["cpus"] != str(cpu), 60, "a plan without the CPU")
                        # All that holds otherwise, and the two of its core on another, together.
                        attached.check(vm, host, kernel=False)
                # What its absence has parted is together again.
                wait_until(lambda: not attached.parted(vm, attached.plan()), 60, "siblings on siblings", attached.plan)
                attached.check(vm, host)
                vm.reset()
                attached.check(vm, host)
                # One of the helpers' CPUs. The smallest shape has but one that can go, and the kernel's interrupts on it.
                if not tiny:
                    with offline(host, max(cpulist.parse(attached.plan()["emulator"]))):
                        attached.check(vm, host, kernel=False)
                    attached.check(vm, host)
            assert attached.code == 0
            state.check_same(alone, state.capture())
        poller.report.check()
    state.check_same(before, state.capture())


def room(host):
    """Two cores of the host's, as the guest sees them, where a third is free behind the same cache."""
    threads = host.shape["threads_per_core"]
    return {"smp": f"{2 * threads},sockets=1,cores=2,threads={threads}"}


@contextlib.contextmanager
def offline(host, cpu):
    """The CPU is offline in the block, and online after it."""
    all_online = host.online()
    switch = Path(f"/sys/devices/system/cpu/cpu{cpu}/online")
    switch.write_text("0")
    try:
        yield
    finally:
        switch.write_text("1")
        wait_until(lambda: host.online() == all_online, 60, f"CPU {cpu} to be online again", host.online)
