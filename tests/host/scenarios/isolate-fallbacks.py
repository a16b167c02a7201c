"""A partition that is refused, becomes invalid, or was impossible for a reason that has gone: the next fallback is used, or the
partition comes back, within seconds; the log names the cgroup and its CPUs; nothing of a half-made partition stays.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
import traceback
from pathlib import Path

import cpulist
import qmpin
import state
from wait import wait_until

LIMIT_S = 900
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x",)
SUITES = ("trixie", "bookworm", "forky")

CGROUPS = Path("/sys/fs/cgroup")
SLICE = CGROUPS / "qemu.slice"
VCPUS = "12-19"
MINE = cpulist.parse(VCPUS)
BUS = Path("/run/qtest/bus")
# Seconds on an idle machine: the longest pause between two looks, a reload, and what an emulator adds.
BACK_S = 60


def run(host):
    before = host.before()
    with host.vm(100, cpus=8) as vm:
        vm.wait_guest()
        alone = state.capture()
        wrong = []
        for part in (refused, invalid, stranger, without_bus, limited, limited_later):
            begun = time.monotonic()
            try:
                part(host, vm)
                check_same(alone, part.__name__)
            except (AssertionError, OSError) as error:
                traceback.print_exc()
                wrong.append(f"{part.__name__}: {error}")
                host.run("qmpin", "detach", "100", check=False)
            host.note(f"{part.__name__}: {time.monotonic() - begun:.0f} s")
        assert not wrong, f"{len(wrong)} parts fail: {wrong}"
    check_same(before, "the VM has ended")


def check_same(before, when):
    try:
        # systemd leaves a limit that is lifted in the cgroup: the scenario's own traces.
        state.check_same(before, state.capture(), ignore=["sys/fs/cgroup/*/cpuset.cpus", "sys/fs/cgroup/*/*/cpuset.cpus"])
    except AssertionError as error:
        raise AssertionError(f"{when}: {error}") from error


def attach(*flags):
    return qmpin.Attached(100, *flags, isolation="exclusive", check_interval_s=2)


def refused(host, vm):
    """A slice whose CPUs are all the VM's: the kernel refuses the partition, and grants it once the slice has gone."""
    with slice_with("12-13"):
        with attach("--vcpus", VCPUS) as attached:
            attached.settle(vm)
            if partition(vm) == "isolated":
                host.note(f"Linux {os.uname().release} takes all CPUs of a slice")
            else:
                fallen(host, attached, vm, "rt.slice has CPUs 12-13 (cpuset.cpus)")
                # What has not changed is not tried again, and not said again.
                for row in attached.log().splitlines():
                    assert "would not become" not in row, row
                assert attached.log().count("rt.slice has CPUs") == 1, attached.log()
                reason = finding(attached)["reason"]
                assert "rt.slice has CPUs 12-13" in reason, reason
                stop_slice(host)
                isolated(host, attached, vm)
        assert attached.code == 0, attached.log()
    with slice_with("12-13"):
        done = qmpin.attach_once(host, 100, "--isolation", "exclusive", "--vcpus", VCPUS)
        if partition(vm) != "isolated":
            assert "rt.slice has CPUs 12-13" in done.stdout + done.stderr, done
            kept_off(host)
        host.run("qmpin", "detach", "100")


def invalid(host, vm):
    """Another cgroup takes CPUs of a partition that was in force."""
    with attach("--vcpus", VCPUS) as attached:
        isolated(host, attached, vm)
        other = CGROUPS / "qtest-other"
        os.kill(attached.process.pid, signal.SIGSTOP)
        try:
            (SLICE / "cpuset.cpus.exclusive").write_text("\n")
            other.mkdir()
            (other / "cpuset.cpus.exclusive").write_text("12-13")
        finally:
            os.kill(attached.process.pid, signal.SIGCONT)
        fallen(host, attached, vm, "qtest-other has CPUs 12-13 (cpuset.cpus.exclusive)")
        other.rmdir()
        isolated(host, attached, vm)
    assert attached.code == 0, attached.log()


def stranger(host, vm):
    """A process that is still in the VM's scope when it is attached, and ends later."""
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        try:
            (vm.cgroup / "cgroup.procs").write_text(str(sleeper.pid))
            with attach("--vcpus", VCPUS) as attached:
                attached.settle(vm)
                fallen(host, attached, vm, "(sleep)")
                sleeper.kill()
                sleeper.wait()
                isolated(host, attached, vm)
            assert attached.code == 0, attached.log()
        finally:
            sleeper.kill()


def without_bus(host, vm):
    """systemd does not answer when the VM is attached, and does later."""
    BUS.unlink(missing_ok=True)
    os.environ["DBUS_SYSTEM_BUS_ADDRESS"] = f"unix:path={BUS}"
    try:
        attached = attach("--vcpus", VCPUS)
        attached.__enter__()
    finally:
        del os.environ["DBUS_SYSTEM_BUS_ADDRESS"]
    try:
        attached.settle(vm)
        assert "could not reach systemd" in attached.log(), attached.log()
        assert not (vm.cgroup / "vcpus").exists()
        BUS.symlink_to("/run/dbus/system_bus_socket")
        isolated(host, attached, vm)
    finally:
        attached.__exit__()
        BUS.unlink(missing_ok=True)
    assert attached.code == 0, attached.log()


def limited(host, vm):
    """The VM's own scope has fewer CPUs than the plan needs: it is refused with the cgroup's name, and nothing is written."""
    set_limit(host, "100.scope", "2-9")
    try:
        for flags in (("--vcpus", VCPUS), ()):
            done = host.run("qmpin", "attach", "100", "--once", "--isolation", "exclusive", *flags, check=False)
            assert done.returncode == 1, done
            assert "qemu.slice/100.scope allows only CPUs 2-9 (cpuset.cpus)" in done.stderr, done
            assert "Invalid argument" not in done.stderr, done
            path = CGROUPS / "system.slice/cpuset.cpus.effective"
            assert not path.exists() or cpulist.parse(host.read(path)) >= MINE, host.read(path)
        set_limit(host, "100.scope", "2-11")
        with attach() as attached:
            attached.settle(vm)
            plan = attached.plan()
            used = cpulist.parse(plan["exclusive"]) | cpulist.parse(plan["emulator"])
            assert used <= set(range(2, 12)), plan
            wait_until(lambda: partition(vm) == "isolated", BACK_S, "a partition inside the limit", attached.log)
    finally:
        set_limit(host, "100.scope", host.online())


def limited_later(host, vm):
    """The slice is limited while the VM is attached, and the limit is lifted again."""
    with attach() as attached:
        attached.settle(vm)
        wait_until(lambda: partition(vm) == "isolated", BACK_S, "a partition", attached.log)
        first = attached.plan()["exclusive"]
        inside = "0-11" if min(cpulist.parse(first)) >= 12 else "12-23"
        set_limit(host, "qemu.slice", inside)
        try:
            planned = lambda: attached.plan()["exclusive"]
            wait_until(lambda: cpulist.parse(planned()) <= cpulist.parse(inside), BACK_S, f"a plan inside {inside}", attached.log)
            attached.settle(vm)
            has = lambda: host.read(vm.cgroup / "vcpus/cpuset.cpus.exclusive.effective")
            wait_until(lambda: has() == planned() and partition(vm) == "isolated", BACK_S, "the partition to follow", attached.log)
            # Nothing of it fits: the VM stays where it is, one line says why, and no pin is tried in vain.
            set_limit(host, "qemu.slice", "0-3")
            wait_until(lambda: "qemu.slice allows only CPUs 0-3" in attached.log(), BACK_S, "the limit to be named", attached.log)
            assert attached.log().count("Invalid argument") == 0, attached.log()
        finally:
            set_limit(host, "qemu.slice", host.online())
        attached.settle(vm)
        wait_until(lambda: partition(vm) == "isolated", BACK_S, "the partition again", attached.log)
    assert attached.code == 0, attached.log()


def set_limit(host, unit, cpus):
    """Limits a unit; all CPUs lift the limit, and nothing of the setting stays."""
    host.run("systemctl", "set-property", "--runtime", unit, f"AllowedCPUs={cpus}")
    if cpus == host.online():
        host.run("systemctl", "set-property", "--runtime", unit, "AllowedCPUs=")
        for folder in ("transient", "system.control"):
            path = Path(f"/run/systemd/{folder}/{unit}.d/50-AllowedCPUs.conf")
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()
        host.run("systemctl", "daemon-reload")


def fallen(host, attached, vm, why):
    """systemd keeps the units beside the VM off its CPUs, the log says why, and nothing of a partition is there."""
    wait_until(lambda: why in attached.log(), BACK_S, f"{why!r} to be said", attached.log)
    wait_until(lambda: not (vm.cgroup / "vcpus").exists(), BACK_S, "the groups to go", attached.log)
    wait_for(lambda: kept_off(host), attached)
    for group in (SLICE, vm.cgroup):
        has = host.read(group / "cpuset.cpus.exclusive") if (group / "cpuset.cpus.exclusive").exists() else ""
        assert not has, f"{group}: {has}"
    assert not Path("/run/systemd/system/100.scope.d").exists(), "the drop-in has gone"
    attached.settle(vm)
    status = json.loads(host.run("qmpin", "status", "100", "--json").stdout)["vms"][0]
    assert (status["partition"], status["slices"]) == (None, "qemu.slice/100.scope"), status
    assert finding(attached)["verdict"] == "degraded", finding(attached)


def isolated(host, attached, vm):
    """The partition is in force, and no limit of a unit is left."""
    begun = time.monotonic()
    wait_until(lambda: partition(vm) == "isolated", BACK_S, "the partition", lambda: f"{partition(vm)}; {attached.log()}")
    host.note(f"a partition after {time.monotonic() - begun:.1f} s")
    has = cpulist.parse(host.read(vm.cgroup / "vcpus/cpuset.cpus.exclusive.effective"))
    assert has == MINE, has
    attached.settle(vm)
    limit = Path("/run/systemd/system.control/system.slice.d/50-AllowedCPUs.conf")
    wait_until(lambda: not limit.exists(), BACK_S, "the limits of units to be lifted", attached.log)
    assert finding(attached)["verdict"] == "met", finding(attached)


def kept_off(host):
    for name in ("init.scope", "system.slice"):
        path = CGROUPS / name / "cpuset.cpus.effective"
        assert path.exists(), f"{name} has no limit"
        limited = cpulist.parse(host.read(path))
        assert not limited & MINE, f"{name} has {limited}"


def partition(vm):
    try:
        return (vm.cgroup / "vcpus/cpuset.cpus.partition").read_text().strip()
    except OSError as error:
        return str(error)


def finding(attached):
    return next(row for row in attached.plan()["report"] if row["rule"] == "partition")


@contextlib.contextmanager
def slice_with(cpus):
    """A slice of the administrator's with a process in it, and these CPUs."""
    subprocess.run(["systemd-run", "--quiet", "--slice=rt.slice", "--unit=qtest-rt", "sleep", "600"], check=True)
    subprocess.run(["systemctl", "set-property", "--runtime", "rt.slice", f"AllowedCPUs={cpus}"], check=True)
    try:
        yield
    finally:
        stop_slice(None)
        control = Path("/run/systemd/system.control/rt.slice.d")
        for path in control.glob("*"):
            path.unlink()
        if control.exists():
            control.rmdir()
        subprocess.run(["systemctl", "daemon-reload"], check=True)


def stop_slice(_host):
    subprocess.run(["systemctl", "stop", "qtest-rt", "rt.slice"], check=False, capture_output=True)
    subprocess.run(["systemctl", "reset-failed", "qtest-rt"], check=False, capture_output=True)
    wait_until(lambda: not (CGROUPS / "rt.slice").exists(), 30, "rt.slice to be gone")


def wait_for(check, attached):
    """Waits until a check passes; its last words are the error."""

    def passes():
        try:
            check()
        except AssertionError as error:
            passes.error = error
            return False
        return True

    wait_until(passes, BACK_S, "the others to be excluded", lambda: f"{passes.error}; {attached.log()}")
