"""What other programs were promised: a thread with a mask of its own, a unit with CPUs of its own, a partition. A plan leaves
them alone; CPUs that are given by hand may displace the first two, which are named and come back. A partition is never taken.
"""

import contextlib
import json
import os
import subprocess
from pathlib import Path

import cpulist
import qmpin
import state
from wait import wait_until

LIMIT_S = 500
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x",)

CGROUPS = Path("/sys/fs/cgroup")
UNITS = CGROUPS / "system.slice"
# Seconds for systemd to place a unit, on an emulator.
BACK_S = 60


def run(host):
    before = host.before()
    with host.vm(100, cpus=8) as vm:
        vm.wait_guest()
        with poll_thread(14) as thread, unit_with(16) as unit:
            alone = state.capture()
            avoided(host, vm, thread, unit)
            displaced(host, vm, thread, unit)
            check_same(alone)
    check_same(before)
    # The kernel's threads keep what the partition has left them, where their masks were written meanwhile.
    with host.vm(100, cpus=8) as vm:
        vm.wait_guest()
        with another_partition("12-13") as group:
            alone = state.capture()
            beside_a_partition(host, vm, group)
            check_same(alone)


def check_same(before):
    # systemd leaves the controllers that the units needed, and with them files of cgroups, and the kernel makes a thread for the
    # pressure that it watches: the scenario's own traces.
    traces = ["sys/fs/cgroup/*/cpuset.cpus", "sys/fs/cgroup/*/*/cpuset.cpus", "thread/* psimon"]
    state.check_same(before, state.capture(), ignore=traces)


def avoided(host, vm, thread, unit):
    """The VM fits behind the same cache without their cores."""
    with qmpin.Attached(100, isolation="exclusive") as attached:
        attached.settle(vm)
        plan = attached.plan()
        assert plan["exclusive"] == "12-13,18-23", plan
        assert plan["displaced"] == [], plan["displaced"]
        said = finding(plan)
        assert said["verdict"] == "met", said
        for who in ("qtest-dp.service", "qtest-rt.service (cpuset.cpus)"):
            assert who in said["reason"], said
        assert os.sched_getaffinity(thread) == {14}, os.sched_getaffinity(thread)
        assert effective(host, unit) == {16}, effective(host, unit)
    assert attached.code == 0, attached.log()


def displaced(host, vm, thread, unit):
    """By hand they are taken, and it is said from whom."""
    with qmpin.Attached(100, "--vcpus", "12-19", isolation="exclusive") as attached:
        attached.settle(vm)
        plan = attached.plan()
        lost = {row["what"].split()[0].removeprefix("system.slice/"): row["cpus"] for row in plan["displaced"]}
        assert lost == {"qtest-dp.service": "14", "qtest-rt.service": "16"}, plan["displaced"]
        said = finding(plan)
        assert said["verdict"] == "degraded" and "given by hand" in said["reason"], said
        assert said["reason"] in attached.log(), attached.log()
        status = json.loads(host.run("qmpin", "status", "100", "--json").stdout)["vms"][0]
        assert said in status["findings"], status
        mine = cpulist.parse("12-19")
        wait_until(lambda: not os.sched_getaffinity(thread) & mine, BACK_S, "the thread to be off", attached.log)
        wait_until(lambda: not effective(host, unit) & mine, BACK_S, "the unit to be off", attached.log)
    assert attached.code == 0, attached.log()
    wait_until(lambda: os.sched_getaffinity(thread) == {14}, BACK_S, "the thread to be back", lambda: str(os.sched_getaffinity(thread)))
    wait_until(lambda: effective(host, unit) == {16}, BACK_S, "the unit to be back", lambda: str(effective(host, unit)))


def beside_a_partition(host, vm, group):
    """Another program's partition is planned around, stays in force, and is in the way of CPUs that are given by hand."""
    done = host.run("qmpin", "attach", "100", "--once", "--vcpus", "12-19", check=False)
    assert done.returncode == 1 and "system.slice (cpuset.cpus.exclusive) has CPUs 12-13" in done.stderr, done
    with qmpin.Attached(100, isolation="exclusive") as attached:
        attached.settle(vm)
        plan = attached.plan()
        assert plan["exclusive"] == "14-23", plan
        wait_until(lambda: state_of(vm.cgroup / "vcpus") == "isolated", BACK_S, "the VM's partition", attached.log)
        assert state_of(group) == "isolated", state_of(group)
    assert attached.code == 0, attached.log()
    assert state_of(group) == "isolated", state_of(group)


def finding(plan):
    return next(row for row in plan["report"] if row["rule"] == "promises")


def effective(host, unit):
    return cpulist.parse(host.read(unit / "cpuset.cpus.effective"))


def state_of(group):
    return (group / "cpuset.cpus.partition").read_text().strip()


@contextlib.contextmanager
def poll_thread(cpu):
    """A service whose thread has a mask of its own; hands out its number."""
    start("qtest-dp", f"CPUAffinity={cpu}")
    try:
        pid = subprocess.run(["systemctl", "show", "--value", "-p", "MainPID", "qtest-dp"], check=True, capture_output=True, text=True)
        yield int(pid.stdout)
    finally:
        stop("qtest-dp")


@contextlib.contextmanager
def unit_with(cpu):
    """A service with `AllowedCPUs=`; hands out its cgroup."""
    start("qtest-rt", f"AllowedCPUs={cpu}")
    try:
        yield UNITS / "qtest-rt.service"
    finally:
        stop("qtest-rt")


def start(unit, setting):
    # Once it is what was asked for, it has its mask and its cgroup.
    command = ["systemd-run", "--quiet", f"--unit={unit}", "-p", "Type=exec", "-p", setting, "sleep", "900"]
    subprocess.run(command, check=True)


def stop(unit):
    subprocess.run(["systemctl", "stop", unit], check=False, capture_output=True)
    wait_until(lambda: not (UNITS / f"{unit}.service").exists(), BACK_S, f"{unit} to be gone")


@contextlib.contextmanager
def another_partition(cpus):
    """A service that has made its own delegated group a partition, as container runtimes do; hands out its cgroup."""
    start("qtest-dpdk", "Delegate=cpuset")
    group = UNITS / "qtest-dpdk.service"
    try:
        for path in (UNITS, group):
            (path / "cpuset.cpus.exclusive").write_text(cpus)
        (group / "cpuset.cpus.partition").write_text("isolated")
        assert state_of(group) == "isolated", state_of(group)
        yield group
    finally:
        stop("qtest-dpdk")
        with contextlib.suppress(OSError):  # The controller may have gone with the service.
            (UNITS / "cpuset.cpus.exclusive").write_text("\n")
