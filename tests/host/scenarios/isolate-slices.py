"""Where a VM can have no partition, systemd keeps the units beside it off its CPUs, and they come back as they were.

That is so on kernels before 6.7, and for a VM whose unit is not its own: here, with another program's process in its scope.
"""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import cpulist
import qmpin
import state
import threads
from plain import Plain
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x", "5900x-one-node", "epyc-4x", "two-socket-no-smt")

CGROUPS = Path("/sys/fs/cgroup")
# A VM that comes later is seen by the timer.
TIMER_S = 2


def run(host):
    before = host.before()
    with host.vm(100, cpus=3) as vm, host.vm(101, cpus=1) as other:
        vm.wait_guest()
        other.wait_guest()
        with contextlib.ExitStack() as stack:
            if not has_partitions():
                host.note(f"Linux {os.uname().release} has no partitions below a slice")
            else:
                stranger = stack.enter_context(process("taskset", "-c", "0", "sleep", "600"))
                (vm.cgroup / "cgroup.procs").write_text(str(stranger.pid))
            cpus = qmpin.Follower(100, "--isolation", "exclusive").plan()["exclusive"]
            mine = cpulist.parse(cpus)
            # Some kernels forget what they were given.
            partly = stack.enter_context(process("taskset", "-c", cpulist.write({1, *mine}), "sleep", "600"))
            wholly = stack.enter_context(process("taskset", "-c", cpus, "sleep", "600"))
            elsewhere = stack.enter_context(process("taskset", "-c", "2-3", "sleep", "600"))
            wait_until(lambda: threads.allowed(elsewhere.pid) == "2-3", 20, "taskset to be done")
            alone = state.capture()

            def kept_off():
                limited = cpulist.parse(host.read(CGROUPS / "system.slice/cpuset.cpus.effective"))
                assert not limited & mine, limited
                leaks = [one for one in threads.of_host() if one.pid != vm.pid and is_leak(one, mine)]
                assert not leaks, leaks
                assert threads.allowed(partly.pid) == "1", threads.allowed(partly.pid)
                assert threads.allowed(elsewhere.pid) == "2-3", threads.allowed(elsewhere.pid)
                assert not cpulist.parse(threads.allowed(wholly.pid)) & mine
                assert cpulist.parse(host.read(vm.cgroup / "cpuset.cpus.effective")) >= mine

            with attach(cpus) as attached:
                attached.settle(vm)
                assert "systemd keeps the units beside" in attached.log(), attached.log()
                wait_for(kept_off, attached)
                checked(host, attached)
                wait_for(kept_off, attached)
                verified = host.run("qmpin", "verify", "100")
                host.note("; ".join(" ".join(line.split()) for line in verified.stdout.splitlines() if " partition " in f" {line} "))
                with host.vm(102, cpus=1) as late:
                    late.wait_guest()
                    wait_for(kept_off, attached)
                attached.settle(vm)
                host.run("systemctl", "daemon-reload")
                wait_for(kept_off, attached)
                attached.settle(vm)
            assert attached.code == 0, attached.log()
            state.check_same(alone, state.capture())

            with attach(cpus) as attached:
                attached.settle(vm)
                wait_for(kept_off, attached)
                attached.stop(signal.SIGKILL)
            host.run("qmpin", "detach", "100")
            state.check_same(alone, state.capture())

            # A unit that was given CPUs by another program keeps that limit. (To give it one took all masks away, on an old kernel.)
            some = f"0-{max(cpulist.parse(host.online())) - 1}"
            host.run("systemctl", "set-property", "--runtime", "101.scope", f"AllowedCPUs={some}")
            limit = CGROUPS / "qemu.slice/101.scope/cpuset.cpus"
            with attach(cpus):
                wait_until(lambda: not cpulist.parse(host.read(limit)) & mine, 60, "the limit without the VM's CPUs", lambda: host.read(limit))
                assert cpulist.parse(host.read(limit)) == cpulist.parse(some) - mine
            assert host.read(limit) == some
            assert (Path("/run/systemd/transient/101.scope.d") / "50-AllowedCPUs.conf").exists()
        assert not os.listdir("/run/qmpin"), os.listdir("/run/qmpin")
    login(host)
    # The slice of all sessions stays, as it does after any login.
    state.check_same(before, state.capture(), ignore=["sys/fs/cgroup/user.slice/*"])


def checked(host, attached):
    """`verify` and `status` say what fallback it is, and that another program has lifted a limit."""
    status = json.loads(host.run("qmpin", "status", "100", "--json").stdout)["vms"][0]
    assert (status["partition"], status["slices"]) == (None, "qemu.slice/100.scope"), status
    os.kill(attached.process.pid, signal.SIGSTOP)
    host.run("systemctl", "set-property", "--runtime", "system.slice", f"AllowedCPUs={host.online()}")
    verified = host.run("qmpin", "verify", "100", check=False)
    os.kill(attached.process.pid, signal.SIGCONT)
    assert verified.returncode == 1 and "BROKEN" in verified.stdout and "AllowedCPUs of system.slice" in verified.stdout, verified


def login(host):
    """A QEMU that was started from a login shell is in no unit of its own: systemd keeps others off, and the log says why."""
    with Plain("session-c1.scope", "user.slice/user-0.slice").start() as vm:
        alone = state.capture()
        flags = ("--qmp", str(vm.qmp_path))
        with qmpin.Attached("plain", *flags, isolation="exclusive", check_interval_s=TIMER_S) as attached:
            attached.settle(vm)
            of_session = "it was started in session-c1.scope; start it with systemd-run --scope"
            why = of_session if has_partitions() else "the kernel has no cpuset.cpus.exclusive"
            assert why in attached.log(), attached.log()
            mine = cpulist.parse(attached.plan()["exclusive"])

            def kept_off():
                limited = cpulist.parse(host.read(CGROUPS / "system.slice/cpuset.cpus.effective"))
                assert mine and not limited & mine, limited

            wait_for(kept_off, attached)
        assert attached.code == 0, attached.log()
        state.check_same(alone, state.capture())


def has_partitions():
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor.split("-")[0])) >= (6, 7)


def attach(cpus):
    """By hand: left to it, qmpin would choose others than those that `taskset` was given."""
    return qmpin.Attached(100, "--vcpus", cpus, isolation="exclusive", check_interval_s=TIMER_S)


def is_leak(thread, mine):
    """A movable thread of another program's that may run on the VM's CPUs; its own kernel threads are with it."""
    return not thread.kernel and bool(cpulist.parse(thread.allowed) & mine)


def wait_for(check, attached):
    """Waits until a check passes; its last words are the error."""

    def passes():
        try:
            check()
        except AssertionError as error:
            passes.error = error
            return False
        return True

    wait_until(passes, 60, "all others to be excluded", lambda: f"{passes.error}; {attached.log()}")


@contextlib.contextmanager
def process(*command):
    started = subprocess.Popen(command)
    try:
        yield started
    finally:
        started.kill()
        started.wait()
