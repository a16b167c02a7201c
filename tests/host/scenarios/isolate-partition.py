"""A VM attached as `exclusive` has its CPUs in an isolated partition: no other program runs there, whatever systemd does, and at
the end, in order or not, the host is as it was.
"""

import itertools
import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import cpulist
import qmpin
import state
import threads
from plain import Plain
from wait import wait_until

LIMIT_S = 900
NEEDS = ("kvm", "qmpin")

CGROUPS = Path("/sys/fs/cgroup")
SLICE = CGROUPS / "qemu.slice"
GROUPS = ("vcpus", "iothreads", "emulator")
RUN_MS = 300


def run(host):
    before = host.before()
    with host.vm(100, cpus=3, max_cpus=6, disks=2, guest="hotplug") as vm:
        vm.wait_guest()
        alone = state.capture()
        with exclusive(100) as attached:
            isolated(host, attached, vm)
            storm(host, attached, vm)
            hotplug(host, attached, vm)
            changed(host, attached, vm)
            pair(host, attached, vm)
        assert attached.code == 0, "it ends in order on SIGTERM"
        same(host, alone, "detached in order")
        crashes(host, vm, alone)
        cpus(host, vm)
        same(host, alone, "detached after a CPU was offline")
        once(host, vm, alone)
        own_masks(host)
        same(host, alone, "two came and went")
        helpers_make_room(host, vm)
        same(host, alone, "one made room for the other")
        with exclusive(100) as attached:
            isolated(host, attached, vm)
            vm.kill()
            assert attached.wait() == 0, "the end of QEMU is the end of attach"
    same(host, before, "QEMU was killed")
    orphans(host)
    same(host, before, "QEMU and qmpin were killed")
    session(host)
    same(host, before, "a VM without a unit of its own")
    service(host)
    same(host, before, "a VM in a service")


def exclusive(vmid):
    return qmpin.Attached(vmid, isolation="exclusive")


def isolated(host, attached, vm):
    """The partition holds, every thread is in its group and place, and no other program may run on its CPUs."""
    attached.settle(vm)
    plan = attached.plan()
    mine = cpulist.parse(plan["exclusive"])
    group = vm.cgroup
    has = lambda: host.read(group / "vcpus/cpuset.cpus.exclusive.effective")
    wait_until(lambda: cpulist.parse(has()) == mine, 20, f"the partition to be {plan['exclusive']}", has)
    wait_until(lambda: partition(group) == "isolated", 20, "the partition", lambda: f"{partition(group)}; {attached.log()}")
    wait_until(lambda: not strays(group, vm), 20, "every thread in its group", lambda: f"{strays(group, vm)}; {attached.log()}")
    assert mine <= cpulist.parse(host.read(CGROUPS / "cpuset.cpus.isolated"))
    assert mine <= cpulist.parse(host.read(group.parent / "cpuset.cpus.exclusive"))
    for path in CGROUPS.rglob("cpuset.cpus.effective"):
        if path.parent != group / "vcpus":
            inside = cpulist.parse(host.read(path)) & mine
            assert not inside, f"{path} has {inside} of VM {vm.vmid}"
    wait_until(lambda: not leaks(mine), 20, "everybody else to be elsewhere", lambda: leaks(mine))
    report = {row["rule"]: row for row in plan["report"]}
    assert report["partition"]["verdict"] == "met", report
    return mine


def stands(host, vm, mine, when):
    """The partition is in force, and no process may run on its CPUs. A kernel thread that is created meanwhile needs a qmpin to move it."""
    assert partition(vm.cgroup) == "isolated", f"{when}: {partition(vm.cgroup)}"
    assert cpulist.parse(host.read(vm.cgroup / "vcpus/cpuset.cpus.exclusive.effective")) == mine, when
    assert not leaks(mine, kernel=False), f"{when}: {leaks(mine, kernel=False)}"


def leaks(mine, kernel=True):
    """Threads that are not an attached VM's and may run on its CPUs, of those that can be moved; the KERNEL's, too."""
    attached = qmpin.leased()
    return [
        thread
        for thread in threads.of_host()
        if thread.pid not in attached
        and not (thread.kernel and (thread.unmovable or not kernel))
        and cpulist.parse(thread.allowed) & mine
    ]


def partition(group):
    try:
        return (group / "vcpus/cpuset.cpus.partition").read_text().strip()
    except OSError as error:
        return str(error)


def members(group):
    return {int(tid) for tid in (group / "cgroup.threads").read_text().split()}


def strays(group, vm):
    """Every thread that is not in its group."""
    roles = vm.roles()
    found = {name: members(group / name) for name in GROUPS}
    wrong = [f"vCPU {index}" for index, tid in roles.vcpus.items() if tid not in found["vcpus"]]
    wrong += [f"iothread {name}" for name, tid in roles.iothreads.items() if tid not in found["iothreads"]]
    wrong += [f"{tid} among the vCPUs" for tid in found["vcpus"] - set(roles.vcpus.values())]
    # A worker of an iothread may stay beside it.
    placed = found["emulator"] | found["iothreads"]
    wrong += [f"{comm} {tid}" for tid, comm in roles.others.items() if tid not in placed and Path(f"/proc/{tid}").exists()]
    return wrong


def storm(host, attached, vm):
    """What undid hand-made groups: reloads, other VMs, services, settings of others. It stands by itself: qmpin is stopped."""
    mine = cpulist.parse(attached.plan()["exclusive"])
    # Less than all, and the VM's CPUs are within.
    some = cpulist.write({0, 1, 2, 3} | mine)
    set_property = ("systemctl", "set-property", "--runtime")

    def step(what, *command):
        host.run(*command)
        stands(host, vm, mine, f"after {what}")

    os.kill(attached.process.pid, signal.SIGSTOP)
    try:
        step("a reload", "systemctl", "daemon-reload")
        step("systemd executed anew", "systemctl", "daemon-reexec")
        with host.vm(101, cpus=1) as other:
            other.wait_guest()
            stands(host, vm, mine, "beside a VM that is not attached")
        stands(host, vm, mine, "after that VM has ended")
        step("a service", "systemd-run", "--quiet", "--wait", "--unit=qtest-storm", "true")
        step("system.slice", *set_property, "system.slice", "AllowedCPUs=0-11")
        step("the VM's weight", *set_property, "100.scope", "CPUWeight=500")
        step("the VM's CPUs", *set_property, "100.scope", f"AllowedCPUs={some}")
        step("the slice's CPUs", *set_property, "qemu.slice", f"AllowedCPUs={some}")
        # The scenario's own traces. systemd leaves the last limit in the cgroup when it is lifted.
        host.run(*set_property, "100.scope", f"AllowedCPUs={host.online()}")
        for unit in ("system.slice", "qemu.slice"):
            host.run(*set_property, unit, f"AllowedCPUs={host.online()}")
            host.run(*set_property, unit, "AllowedCPUs=")
        for path in ("system.control/system.slice.d", "system.control/qemu.slice.d", "transient/100.scope.d"):
            for name in ("50-AllowedCPUs.conf", "50-CPUWeight.conf"):
                if (path, name) != ("transient/100.scope.d", "50-AllowedCPUs.conf"):
                    Path("/run/systemd", path, name).unlink(missing_ok=True)
            if Path("/run/systemd", path).exists() and not any(Path("/run/systemd", path).iterdir()):
                Path("/run/systemd", path).rmdir()
        step("a reload", "systemctl", "daemon-reload")
    finally:
        os.kill(attached.process.pid, signal.SIGCONT)
    isolated(host, attached, vm)
    with host.vm(101, cpus=1) as other:
        other.wait_guest()
        # Its KVM has a kernel thread that is created with all CPUs.
        isolated(host, attached, vm)
    # Another program that asks for these CPUs does not get them.
    done = host.run("taskset", "-c", cpulist.write(mine), "sleep", "0", check=False)
    assert done.returncode != 0, "taskset onto the VM's CPUs alone is refused"
    some = cpulist.write({0, *mine})
    with subprocess.Popen(["taskset", "-c", some, "sh", "-c", "while :; do :; done"]) as hog:
        try:
            wait_ran(hog)
            allowed = threads.allowed(hog.pid)
        finally:
            hog.kill()
    assert allowed == "0", f"{some} asked for, {allowed} granted"


def wait_ran(hog):
    """Until it computes: it is `sh` then, and `taskset` has said where."""

    def ran_ms():
        assert hog.poll() is None, f"the hog ended with {hog.returncode}"
        return threads.time_of(hog.pid, hog.pid).run_ns / 1e6

    def comm():
        return Path(f"/proc/{hog.pid}/comm").read_text().strip()

    wait_until(lambda: comm() == "sh" and ran_ms() > RUN_MS, 60, "the hog to run", lambda: f"{comm()}, {ran_ms():.0f} ms")


def hotplug(host, attached, vm):
    """A vCPU and an iothread that are plugged get their groups, and the partition grows."""
    small = isolated(host, attached, vm)
    for index in (3, 4):
        vm.hot_add(index)
    attached.settle(vm)
    grown = isolated(host, attached, vm)
    assert small < grown, (small, grown)
    vm.iothread_add("iothread-virtioscsi7")
    isolated(host, attached, vm)
    vm.iothread_delete("iothread-virtioscsi7")
    for index in (4, 3):
        vm.hot_remove(index)
    assert isolated(host, attached, vm) == small
    assert cpulist.parse(host.read(SLICE / "cpuset.cpus.exclusive")) == small
    host.note(f"partition {cpulist.write(small)}, with two more vCPUs {cpulist.write(grown)}")


def changed(host, attached, vm):
    """Another program takes the partition down: it is made again, counted, and said."""
    message = "was changed externally: made again"
    assert message not in attached.log(), f"nothing has changed yet: {attached.log()}"
    before = drift_total()
    (vm.cgroup / "vcpus/cpuset.cpus.partition").write_text("member")
    wait_until(lambda: drift_total() > before, qmpin.LIMIT_S, "the change to be counted", attached.log)
    isolated(host, attached, vm)
    assert message in attached.log(), attached.log()


def drift_total():
    [row] = json.loads(subprocess.check_output(["qmpin", "status", "--json"], text=True))["vms"]
    return row["drift_total"]


def pair(host, attached, vm):
    """A second VM has its own beside it, and takes only that away when it goes."""
    with host.vm(101, cpus=2) as other:
        other.wait_guest()
        with exclusive(101) as second:
            mine, theirs = isolated(host, attached, vm), isolated(host, second, other)
            assert not mine & theirs, (mine, theirs)
            assert cpulist.parse(host.read(SLICE / "cpuset.cpus.exclusive")) == mine | theirs
            vm.hot_add(3)
            isolated(host, attached, vm)
            isolated(host, second, other)
            vm.hot_remove(3)
            isolated(host, attached, vm)
        assert second.code == 0
        assert isolated(host, attached, vm) == mine
        assert cpulist.parse(host.read(SLICE / "cpuset.cpus.exclusive")) == mine
        # Killed beside a neighbour: its share goes by itself, the neighbour's stays.
        with exclusive(101) as second:
            isolated(host, second, other)
            other.kill()
            assert second.wait() == 0
        assert isolated(host, attached, vm) == mine
        assert cpulist.parse(host.read(SLICE / "cpuset.cpus.exclusive")) == mine


def crashes(host, vm, alone):
    """SIGKILL of qmpin: the partition stays; a restart takes it over without a change, `detach` takes it back."""
    with exclusive(100) as attached:
        isolated(host, attached, vm)
        attached.stop(signal.SIGKILL)
    assert partition(vm.cgroup) == "isolated"
    with exclusive(100) as attached:
        isolated(host, attached, vm)
        attached.stop(signal.SIGKILL)
    assert host.run("qmpin", "detach", "100").returncode == 0
    same(host, alone, "killed, restarted, killed and detached")
    host.run("qmpin", "detach", "100")
    same(host, alone, "detached twice")


def cpus(host, vm):
    """A CPU of the partition goes offline and comes back: the partition follows the plan."""
    # CPUs come and go without an event, so it is the timer that sees it.
    with qmpin.Attached(100, isolation="exclusive", check_interval_s=1) as attached:
        mine = isolated(host, attached, vm)
        cpu = int(attached.plan()["vcpus"][1]["cpus"])
        switch = Path(f"/sys/devices/system/cpu/cpu{cpu}/online")
        try:
            switch.write_text("0")
            wait_until(lambda: attached.plan()["vcpus"][1]["cpus"] != str(cpu), 60, "a plan without the CPU")
            assert cpu not in isolated(host, attached, vm)
        finally:
            switch.write_text("1")
        wait_until(lambda: cpu in cpulist.parse(host.online()), 60, "the CPU to be online again")
        back = isolated(host, attached, vm)
        host.note(f"partition {cpulist.write(mine)}, without CPU {cpu} and with it again {cpulist.write(back)}")
    assert attached.code == 0


def once(host, vm, alone):
    """--once leaves it; attaching as `pinned` takes it back; detach the rest."""
    host.run("qmpin", "attach", "100", "--once", "--isolation", "exclusive")
    assert partition(vm.cgroup) == "isolated"
    with qmpin.Attached(100) as attached:
        attached.settle(vm)
        assert not (vm.cgroup / "vcpus").exists(), "pinned has no partition"
    assert attached.code == 0
    same(host, alone, "once, then pinned, then detached")


def own_masks(host):
    """The kernel moves threads that work for a VM as partitions come and go: each has its own mask again, whichever VM goes first."""
    with host.vm(101, cpus=2) as other:
        other.wait_guest()
        [pit] = [thread.tid for thread in threads.of_host() if thread.comm == f"kvm-pit/{other.pid}"]
        os.sched_setaffinity(pit, cpulist.parse("0-2"))
        alone = state.capture()
        for coming, going in itertools.product(itertools.permutations((100, 101)), repeat=2):
            for vmid in coming:
                qmpin.attach_once(host, vmid, "--isolation", "exclusive")
            for vmid in going:
                host.run("qmpin", "detach", str(vmid))
            when = f"attached {coming}, detached {going}"
            assert threads.allowed(pit) == "0-2", (when, threads.allowed(pit))
            same(host, alone, when)


def helpers_make_room(host, vm):
    """A VM gets CPUs that another's helpers had: the kernel narrows their masks, and they are known as qmpin's all the same."""
    with host.vm(101, cpus=2) as other, tempfile.TemporaryDirectory(prefix="qmpin-") as folder:
        other.wait_guest()
        alone = state.capture()
        qmpin.attach_once(host, 100, "--isolation", "exclusive")
        taken = sorted(cpulist.parse(threads.allowed(vm.pid)))[-2:]
        (Path(folder) / "101.toml").write_text(f'vcpus = "{taken[0]},{taken[1]}"\n')
        qmpin.attach_once(host, 101, "--isolation", "exclusive", "--config-dir", folder)
        left = cpulist.parse(threads.allowed(vm.pid))
        assert left and not left & set(taken), f"{left} with {taken} taken"
        for vmid in (100, 101):
            print(host.run("qmpin", "detach", str(vmid)).stdout)
        same(host, alone, "the one that made room went first")


def orphans(host):
    """QEMU and qmpin are killed; the next qmpin restores what is left."""
    with host.vm(100, cpus=2) as vm:
        vm.wait_guest()
        with exclusive(100) as attached:
            isolated(host, attached, vm)
            os.kill(attached.process.pid, signal.SIGSTOP)
            vm.kill()
            attached.stop(signal.SIGKILL)
    assert host.read(SLICE / "cpuset.cpus.exclusive")
    with host.vm(101, cpus=1) as other:
        other.wait_guest()
        with exclusive(101) as attached:
            mine = isolated(host, attached, other)
            assert cpulist.parse(host.read(SLICE / "cpuset.cpus.exclusive")) == mine, "what the dead have left is swept"


def session(host):
    """QEMU beside another program's process in its scope: it is pinned, and the log says why there is no more."""
    with host.vm(100, cpus=2) as vm:
        vm.wait_guest()
        sleeper = subprocess.Popen(["sleep", "600"])
        (vm.cgroup / "cgroup.procs").write_text(str(sleeper.pid))
        with exclusive(100) as attached:
            attached.settle(vm)
            assert "no isolated partition" in attached.log() and "(sleep)" in attached.log(), attached.log()
            assert not (vm.cgroup / "vcpus").exists()
        assert attached.code == 0
        sleeper.kill()
        sleeper.wait()


def service(host):
    """QEMU in a service of system.slice has the same there."""
    with Plain("qtest-plain.service", "system.slice").start() as vm:
        alone = state.capture()
        with qmpin.Attached("plain", "--qmp", str(vm.qmp_path), isolation="exclusive") as attached:
            isolated(host, attached, vm)
            host.run("systemctl", "daemon-reload")
            isolated(host, attached, vm)
        assert attached.code == 0
        same(host, alone, "detached from a service")


def same(host, before, when):
    """Everything is as it was."""
    try:
        state.check_same(before, state.capture())
    except AssertionError as error:
        raise AssertionError(f"{when}: {error}") from error
