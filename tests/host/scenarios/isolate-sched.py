"""`sched = "fifo:1"`: vCPU threads have it and no other program, also one that is plugged later, and all is as before afterwards.
A VM that shares a core has a core-scheduling cookie, where the kernel has such a thing; else it is said that it has not.
"""

import os
import re
import signal
import tempfile
import time
from pathlib import Path

import cpulist
import qmpin
import state
import threads
from core_scheduling import CREATE, LIBC, PR_SCHED_CORE, SHARE_TO, cookie
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin")

OTHER, FIFO = (0, 0), (1, 1)
RUNTIME = Path("/proc/sys/kernel/sched_rt_runtime_us")


def run(host):
    before, scheduled = host.before(), of_host()
    small = {"cpus": 1, "max_cpus": 2} if host.shape["name"] == "tiny" else {"cpus": 2, "max_cpus": 4}
    with host.vm(100, **small, guest="hotplug", paused=True) as vm:
        alone, alone_scheduled = state.capture(), of_host()
        with attached(isolation="exclusive") as follower:
            # KVM's helper is created when a vCPU first runs, by that vCPU's thread.
            vm.cont()
            vm.wait_guest()
            only_vcpus(follower, vm)
            reported(host)
            if host.shape["name"] != "tiny":
                plugged(follower, vm)
            mended(follower, vm)
        assert follower.code == 0
        state.check_same(alone, state.capture())
        same(alone_scheduled, of_host())
        killed(host, vm, alone, alone_scheduled)
        unthrottled(vm, alone_scheduled)
        if host.shape["name"] == "5900x":
            shared_core(host, vm, alone)
    with host.vm(100, cpus=small["cpus"], guest="spin") as vm:
        vm.wait_guest()
        computing(host, vm)
    state.check_same(before, state.capture())
    same(scheduled, of_host())


class Policy(qmpin.Attached):
    """`qmpin attach` with a policy file of its own."""

    def __init__(self, text, isolation, *flags):
        self.config = tempfile.TemporaryDirectory(prefix="qmpin-policy-")
        Path(self.config.name, "qmpin.toml").write_text(text)
        super().__init__(100, "--config-dir", self.config.name, *flags, isolation=isolation)

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self.config.cleanup()


def attached(isolation, sched="fifo:1"):
    return Policy(f'sched = "{sched}"\ncheck_interval_s = 1\n', isolation)


def of_thread(pid, tid):
    """Policy and real-time priority, and the nice value (`man 5 proc_pid_stat`: 41, 40, 19); None when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/task/{tid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return (int(fields[41 - 3]), int(fields[40 - 3])), int(fields[19 - 3])


def of_host():
    """How every thread of the host is scheduled, by what names it for good."""
    found = {}
    for thread in threads.of_host():
        scheduled = of_thread(thread.pid, thread.tid)
        if scheduled:
            found[(thread.tid, thread.start, re.sub(r"[-+].*", "", thread.comm))] = scheduled
    return found


def same(before, after):
    """Every thread that was there then and is there now is scheduled as it was."""
    differ = {key: (then, after[key]) for key, then in before.items() if after.get(key, then) != then}
    assert not differ, differ


def wrong(vm):
    """Every thread of the VM that is not scheduled as it should be."""
    roles = vm.roles()
    vcpus = set(roles.vcpus.values())
    found = {tid: of_thread(vm.pid, tid) for tid in roles.all_tids()}
    return {tid: one for tid, one in found.items() if one and one[0] != (FIFO if tid in vcpus else OTHER)}


def only_vcpus(follower, vm):
    follower.settle(vm)
    wait_until(lambda: not wrong(vm), 30, "the vCPUs' priority", lambda: f"{wrong(vm)}; {follower.log()}")
    names = [thread.comm for thread in threads.of_process(vm.pid).values()]
    print(f"threads of the VM: {names}")


def reported(host):
    verified = host.run("qmpin", "verify", "100").stdout
    print(verified)
    assert re.search(r"^sched\s+holds", verified, re.MULTILINE), verified
    status = host.run("qmpin", "status").stdout
    assert "fifo:1" in status, status


def plugged(follower, vm):
    """A vCPU that comes later has it where it has a CPU, and gone it leaves no trace."""
    vm.hot_add(2)
    follower.settle(vm)
    only_vcpus(follower, vm)
    vm.hot_remove(2)
    follower.settle(vm)


def mended(follower, vm):
    """Another program takes it from one vCPU; another is reniced, which is no process's business."""
    tid = vm.roles().vcpus[0]
    os.setpriority(os.PRIO_PROCESS, tid, 5)
    os.sched_setscheduler(tid, os.SCHED_OTHER, os.sched_param(0))
    wait_until(lambda: of_thread(vm.pid, tid) == (FIFO, 5), 30, "it to be FIFO again, as nice as it was", follower.log)
    os.setpriority(os.PRIO_PROCESS, tid, 0)


def killed(host, vm, alone, scheduled):
    """SIGKILL leaves it; `detach` takes it back, and once more does no harm."""
    with attached(isolation="exclusive") as follower:
        only_vcpus(follower, vm)
        follower.stop(signal.SIGKILL)
    assert not wrong(vm)
    print(host.run("qmpin", "detach", "100").stdout)
    for _ in range(2):
        state.check_same(alone, state.capture())
        same(scheduled, of_host())
        host.run("qmpin", "detach", "100")


def unthrottled(vm, scheduled):
    """Where nothing protects what is below it, that is said."""
    was = RUNTIME.read_text()
    RUNTIME.write_text("-1")
    try:
        with attached(isolation="pinned") as follower:
            only_vcpus(follower, vm)
            assert "sched_rt_runtime_us = -1" in follower.log(), follower.log()
            findings = {row["rule"]: row for row in follower.plan()["report"]}
            assert findings["sched"]["verdict"] == "degraded", findings
    finally:
        RUNTIME.write_text(was)
    same(scheduled, of_host())


def computing(host, vm):
    """vCPUs that never sleep: the host goes on all the same, and so does the undo."""
    with attached(isolation="exclusive") as follower:
        only_vcpus(follower, vm)
        mine = cpulist.parse(follower.plan()["exclusive"])
        start = time.monotonic()
        # It waits for a kernel thread on each CPU.
        Path("/proc/sys/vm/drop_caches").write_text("1")
        host.note(f"vCPUs as fifo:1 on {cpulist.write(mine)}: the kernel's own work on all CPUs took {time.monotonic() - start:.1f} s")
    assert follower.code == 0


def cookies(vm):
    return {tid: cookie(tid) for tid in vm.roles().all_tids()}


def shared_core(host, vm, alone):
    """The VM has one half of each of two cores, and the host the other."""
    half = lambda *flags: Policy('vcpus = "12,14"\ncore_scheduling = true\ncheck_interval_s = 1\n', "exclusive", *flags)
    findings = lambda follower: {row["rule"]: row for row in follower.plan()["report"]}
    with half() as follower:
        assert "with share = true the kernel would" in findings(follower)["core-scheduling"]["reason"]
        assert not any(cookies(vm).values())
    if cookie(os.getpid()) is None:
        with half("--share") as follower:
            found = findings(follower)["core-scheduling"]
            assert found["verdict"] == "impossible" and "no core scheduling" in found["reason"], found
            assert found["reason"] in follower.log(), follower.log()
            print(host.run("qmpin", "verify", "100").stdout)
        host.note("this kernel has no core scheduling, and that was said")
        return
    with half("--share") as follower:
        one(vm, follower)
        verified = host.run("qmpin", "verify", "100").stdout
        print(verified)
        assert re.search(r"^core-scheduling\s+holds", verified, re.MULTILINE), verified
        vm.iothread_add("iothread-virtioscsi9")
        one(vm, follower)
        vm.iothread_delete("iothread-virtioscsi9")
        # Another program takes it from one thread.
        assert LIBC.prctl(PR_SCHED_CORE, SHARE_TO, vm.roles().vcpus[1], 0, 0) == 0
        one(vm, follower)
        apart(host, vm)
    assert follower.code == 0 and not any(cookies(vm).values()), cookies(vm)
    with half("--share") as follower:
        mine = one(vm, follower)
        follower.stop(signal.SIGKILL)
    assert set(cookies(vm).values()) == {mine}
    print(host.run("qmpin", "detach", "100").stdout)
    assert not any(cookies(vm).values()), cookies(vm)
    # One that was there before is left alone, and named.
    assert LIBC.prctl(PR_SCHED_CORE, CREATE, vm.pid, 1, 0) == 0
    theirs = set(cookies(vm).values())
    with half("--share") as follower:
        assert "of another program" in findings(follower)["core-scheduling"]["reason"]
        assert set(cookies(vm).values()) == theirs
    assert set(cookies(vm).values()) == theirs
    assert LIBC.prctl(PR_SCHED_CORE, SHARE_TO, vm.pid, 1, 0) == 0
    state.check_same(alone, state.capture())
    host.note("core scheduling: made, kept, removed")


def one(vm, follower):
    """All threads of the VM have one cookie."""
    whole = lambda: len(set(cookies(vm).values())) == 1 and all(cookies(vm).values())
    wait_until(whole, 30, "one cookie for the VM", lambda: f"{cookies(vm)}; {follower.log()}")
    return next(iter(cookies(vm).values()))


def apart(host, vm):
    """No process but the VM has its cookie."""
    mine = set(cookies(vm).values())
    others = [thread for thread in threads.of_host() if thread.pid != vm.pid and cookie(thread.tid) in mine]
    assert not others, others
