"""Who asks for the CPUs of an attached VM by `taskset` does not get them, whether it asked before or after."""

import contextlib
import subprocess

import cpulist
import qmpin
import state
import switches
import threads
from wait import wait_until

LIMIT_S = 240
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x", "5900x-one-node")

# Says its name, by which a trace knows it, and computes.
SPIN = "printf intruder >/proc/$$/comm; while :; do :; done"
RUN_NS = 300_000_000


def run(host):
    before = host.before()
    with host.vm(100, **host.fitting()) as vm:
        vm.wait_guest()
        cpus = qmpin.Follower(100, "--isolation", "exclusive").plan()["exclusive"]
        # A CPU more than the VM has, so that the kernel has something to grant.
        other = max(cpulist.parse(host.online()) - cpulist.parse(cpus))
        wider = cpulist.write({other} | cpulist.parse(cpus))
        with intruder(cpus) as early:
            wait_ran(early)
            alone = state.capture()
            # By hand: without that a plan leaves these CPUs to the intruder.
            with qmpin.Attached(100, "--vcpus", cpus, isolation="exclusive") as attached:
                attached.settle(vm)
                with switches.Switches(cpus) as traced, intruder(wider) as late:
                    wait_ran(late)
                    wait_ran(early)
                    assert allowed_off(cpus, late) == {other}
                    allowed_off(cpus, early)
                    refused(host, cpus)
                host.note(f"on {cpus} with intruders: {switches.table(traced.ran)}")
                intruders, _ = switches.parted(traced.ran, {early.pid, late.pid})
                assert not intruders, intruders
            assert attached.code == 0
            # The kernel kept the wish of the one that was there before, and grants it now.
            assert threads.allowed(early.pid) == cpus
            wait_ran(early)
            assert threads.last_cpu(early.pid, early.pid) in cpulist.parse(cpus)
            state.check_same(alone, state.capture())
    state.check_same(before, state.capture())


@contextlib.contextmanager
def intruder(cpus):
    """A process that computes, started by `taskset -c CPUS`."""
    process = subprocess.Popen(["taskset", "-c", cpus, "sh", "-c", SPIN])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_ran(process):
    """Until it has computed for a while from now on."""
    first = threads.time_of(process.pid, process.pid).run_ns

    def gained_ns():
        assert process.poll() is None, f"the intruder ended with {process.returncode}"
        return threads.time_of(process.pid, process.pid).run_ns - first

    wait_until(lambda: gained_ns() > RUN_NS, 60, "the intruder to run", gained_ns)


def allowed_off(cpus, process):
    """Where the process may run; that is none of CPUS, and it is not there."""
    allowed, last = threads.allowed(process.pid), threads.last_cpu(process.pid, process.pid)
    print(f"  pid {process.pid}: allowed {allowed}, last on {last}")
    assert not cpulist.parse(allowed) & cpulist.parse(cpus), allowed
    assert last not in cpulist.parse(cpus), last
    return cpulist.parse(allowed)


def refused(host, cpus):
    """The kernel refuses a program that wants nothing but these CPUs, and it is not started."""
    done = host.run("taskset", "-c", cpus, "true", check=False)
    print(f"  {done.stderr.strip()}")
    assert done.returncode != 0 and "nvalid argument" in done.stderr, done
