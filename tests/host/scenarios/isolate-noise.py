"""Beside a neighbour that wants every CPU, the vCPUs of an attached VM do not wait: their CPUs are theirs alone."""

import json
import time
from typing import NamedTuple

import qmpin
import state
import switches
import threads
from neighbour import Neighbour
from wait import wait_until

LIMIT_S = 300
NEEDS = ("kvm", "qmpin")
# Two hogs for each CPU; on a greater machine they would leave CPUs to the VM.
SHAPES = ("5900x", "5900x-one-node")

HOGS = 48
WEIGHT = 800
WINDOW_S = 10
# How much of the delay without qmpin may be left.
LEFT_PERCENT_MAX = 0.5
# How long each vCPU has to run in the window when it is alone. The kernel counts a wait when it is over: a vCPU that
# never ran would have no delay at all.
RUN_S_MIN = 0.9 * WINDOW_S


class Seen(NamedTuple):
    """One measurement: sums over the vCPU threads, and who had the CPUs how often."""

    window_s: float
    run_s: float
    least_run_s: float  # of one vCPU
    delay_s: float
    vcpus: switches.Counts
    bound: switches.Counts  # kernel threads of one CPU, which no program can move, and the idle tasks
    strangers: switches.Counts

    def delay_percent(self) -> float:
        """Of the window: where everything waits, the one who measures is late, too, and the windows differ."""
        return 100 * self.delay_s / self.window_s


def run(host):
    before = host.before()
    with host.vm(100, smp="8,sockets=1,cores=4,threads=2", guest="spin", paused=True) as vm:
        tids = set(vm.roles().vcpus.values())
        vm.cont()
        wait_until(lambda: vm.guest_boots() > 0, 60, "the guest to be booted")
        wait_spinning(vm, tids)
        # VM and neighbour sleep but for the measurements: beside them an emulated host has no time for anything else.
        stop(vm)
        alone = state.capture()
        cpus = qmpin.Follower(100, "--isolation", "exclusive").plan()["exclusive"]
        with Neighbour(101, HOGS, WEIGHT) as neighbour:
            stock = measure(vm, tids, neighbour, cpus)
            tell(host, "without qmpin", stock)
            with qmpin.Attached(100, isolation="exclusive") as attached:
                attached.settle(vm)
                plan = attached.plan()
                assert plan["exclusive"] == cpus, plan
                exclusive = measure(vm, tids, neighbour, cpus)
                tell(host, f"exclusive on {cpus}", exclusive)
                refused = named(host)
            assert attached.code == 0, "it ends in order on SIGTERM"
        state.check_same(alone, state.capture())
    state.check_same(before, state.capture())

    left_percent = 100 * exclusive.delay_percent() / stock.delay_percent()
    host.note(f"run delay: {left_percent:.3f} % of what it is without qmpin")
    # First that the set-up is as noisy as it is meant to be, and that the trace would show who does not belong there.
    assert stock.delay_s > WINDOW_S, f"the neighbour makes too little noise: {stock}"
    hogs = [who for who in stock.strangers if who.comm == "hog"]
    assert hogs, f"the trace does not see the neighbour: {switches.table(stock.strangers)}"
    assert not exclusive.strangers, f"on {cpus} ran others than the vCPUs: {switches.table(exclusive.strangers)}"
    unnamed = {who for who in exclusive.bound if who.tid != switches.IDLE and who.comm.split("/")[0] not in refused}
    assert not unnamed, f"on {cpus} ran what `qmpin verify` does not name: {unnamed}"
    assert exclusive.least_run_s >= RUN_S_MIN, f"a vCPU with a CPU of its own did not run: {exclusive}"
    assert left_percent <= LEFT_PERCENT_MAX, f"{left_percent:.3f} % of the run delay is left"


def named(host):
    """The kernel's threads of which `qmpin verify` says that no process can move them."""
    checks = json.loads(host.run("qmpin", "verify", "100", "--json").stdout)["checks"]
    reason = next(check["reason"] for check in checks if check["check"] == "bound-kthreads")
    return {words.split()[1] for words in reason.split(": ")[1].split(", ")}


def stop(vm):
    """As vm.stop(), with patience: a VM that spins was seen not to answer for ten seconds on an emulated host."""
    vm.qmp("stop", limit_s=60)


def wait_spinning(vm, tids):
    """Until every vCPU runs: after a start, the boot vCPU has to wake the others."""
    first = {tid: threads.time_of(vm.pid, tid).run_ns for tid in tids}

    def gained_ns():
        return [threads.time_of(vm.pid, tid).run_ns - first[tid] for tid in tids]

    # A vCPU that sleeps is woken for a moment now and then, too.
    wait_until(lambda: min(gained_ns()) > 100_000_000, 60, "all vCPUs to spin", gained_ns)


def measure(vm, tids, neighbour, cpus) -> Seen:
    """What the vCPU threads get in a window of time beside the noise, and who runs on CPUS meanwhile."""
    known = list(threads.of_host())
    # To begin and to end a trace takes long beside the noise, so it lasts longer than the window.
    with switches.Switches(cpus) as traced:
        vm.cont()
        with neighbour.noise():
            wait_spinning(vm, tids)
            begun, first = time.monotonic(), {tid: threads.time_of(vm.pid, tid) for tid in tids}
            # Nothing is waited for here: what happens in this time is the measurement.
            time.sleep(WINDOW_S)
            last, window_s = {tid: threads.time_of(vm.pid, tid) for tid in tids}, time.monotonic() - begun
        stop(vm)
    known += threads.of_host()
    run_s = [(last[tid].run_ns - first[tid].run_ns) / 1e9 for tid in tids]
    delay_s = [(last[tid].delay_ns - first[tid].delay_ns) / 1e9 for tid in tids]
    bound = {switches.IDLE} | {thread.tid for thread in known if threads.is_bound(thread)}
    vcpus, others = switches.parted(traced.ran, tids)
    on_one_cpu, strangers = switches.parted(others, bound)
    return Seen(window_s, sum(run_s), min(run_s), sum(delay_s), vcpus, on_one_cpu, strangers)


def tell(host, what, seen):
    host.note(
        f"{what}: in {seen.window_s:.1f} s the vCPUs ran {seen.run_s:.1f} s, each at least {seen.least_run_s:.1f} s, "
        f"and waited {seen.delay_s:.3f} s"
    )
    for name in ("vcpus", "bound", "strangers"):
        host.note(f"  {name}: {switches.table(getattr(seen, name))}")
