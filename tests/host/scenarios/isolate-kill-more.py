"""SIGKILL of qmpin at every position, with everything at once that one VM can have, and with each fallback:
`detach` then leaves the host as it was, and nothing in /run/qmpin. It takes long.
"""

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

import state
from core_scheduling import cookie
from irqbalance import PLACED, Irqbalance
from kills import ATTACH, DETACH, Series, expect

LIMIT_S = 2400
NEEDS = ("kvm", "qmpin")
# On a greater machine it only takes longer.
SHAPES = ("tiny",)


def run(host):
    before = host.before()
    with host.vm(100, cpus=2) as vm, tempfile.TemporaryDirectory(prefix="qmpin-") as folder:
        vm.wait_guest()
        was = scheduling(vm)

        def not_back():
            differ = {tid: now for tid, now in scheduling(vm).items() if now != was.get(tid, was[vm.pid])}
            return f"policy, priority and cookie of {differ}, and before {was}" if differ else None

        series = Series(host, Path(folder), also=not_back)
        whole(series)
        half(host, series)
        limits(vm, series)
        series.check()
    state.check_same(before, state.capture())
    with host.vm(100, cpus=2) as vm, tempfile.TemporaryDirectory(prefix="qmpin-") as folder:
        vm.wait_guest()
        balanced(host, Path(folder))
    state.check_same(before, state.capture(), PLACED)


def scheduling(vm):
    """Policy, priority and cookie of every thread of the VM's."""
    found = {}
    for tid in vm.masks():
        with contextlib.suppress(ProcessLookupError):
            found[tid] = (os.sched_getscheduler(tid), os.sched_getparam(tid).sched_priority, cookie(tid))
    return found


def whole(series):
    """All of `strict` with its partition, and a priority."""
    series.policy(isolation="strict", sched="fifo:1", reonline=False)
    killed = series.everywhere("strict with a partition and a priority, and its own end", ATTACH, ends=True)
    names = ("100.journal partition", "100.journal priorities", "50-qmpin", "rmdir cgroup vcpus", ".host.journal intent", "unlink 100.lease")
    expect(killed, 50, *names)
    killed = series.everywhere("detach of that", DETACH, attached=True)
    expect(killed, 10, "rmdir cgroup vcpus", "unlink .host.journal")


def half(host, series):
    """A VM on half a core has a cookie, where the kernel has such a thing."""
    if cookie(os.getpid()) is None:
        return host.note("no core scheduling in this kernel")
    series.policy(isolation="pinned", vcpus="3", share=True, core_scheduling=True)
    expect(series.everywhere("with a cookie, and its own end", ATTACH, ends=True), 12, "100.journal cookie")
    expect(series.everywhere("detach of that", DETACH, attached=True), 3, "unlink 100.journal")


def limits(vm, series):
    """Another program in the VM's scope: there is no partition, and systemd limits the units beside it."""
    with subprocess.Popen(["sleep", "3600"]) as stranger:
        try:
            (vm.cgroup / "cgroup.procs").write_text(str(stranger.pid))
            series.alone = state.capture()
            series.policy(isolation="exclusive")
            expect(series.everywhere("with limits of units, and its own end", ATTACH, ends=True), 20, "100.journal slices")
            expect(series.everywhere("detach of that", DETACH, attached=True), 4, "unlink .host.journal")
        finally:
            stranger.kill()


def balanced(host, folder):
    """irqbalance is configured, and restored at the end."""
    with Irqbalance(host) as irqbalance:
        was = irqbalance.banned()

        def not_back():
            now = irqbalance.banned()
            return None if now == was else f"irqbalance keeps interrupts off {sorted(now)}, and before off {sorted(was)}"

        series = Series(host, folder, PLACED, not_back)
        series.policy(isolation="pinned", irqs=True)
        # When irqbalance takes the request decides how many writes there are before the last ones.
        last = "unlink .host.journal"
        killed = series.everywhere("with irqbalance, and its own end", ATTACH, ends=True)
        expect(killed, 15, ".host.journal intent")
        expect(series.everywhere("the last of that", ATTACH, since=last, ends=True), 1, last)
        expect(series.everywhere("detach of that", DETACH, attached=True), 3)
        expect(series.everywhere("the last of that", DETACH, since=last, attached=True), 1, last)
        series.check()
