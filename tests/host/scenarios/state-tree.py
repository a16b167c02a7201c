"""The tree of the host's state: a VM and a service that came and went leave no difference; each changed knob is named."""

import os
from pathlib import Path

import state

LIMIT_S = 300
NEEDS = ("kvm",)


def run(host):
    # The first VM of a boot brings qemu.slice and modules with it, which stay. The comparison is for what comes after.
    with host.vm(101) as vm:
        vm.wait_guest()

    before = state.capture()
    kinds = {path.split("/")[0] for path in before.files}
    print(f"  {len(before.files)} files, {len(before.threads)} threads, below {sorted(kinds)}")
    with host.vm(100, disks=2) as vm:
        vm.wait_guest()
        vm.reset()
    host.run("systemd-run", "--quiet", "--wait", "--unit=qtest-passing", "true")
    after = state.capture()
    state.check_same(before, after)

    with host.vm(100, disks=1) as vm:
        vm.wait_guest()
        change_and_see(host, vm)


def change_and_see(host, vm):
    """Changes one thing of each kind, sees exactly that in the difference, and restores it."""
    tid = vm.roles().vcpus[0]
    for what, write, undo, want in changes(host, vm, tid):
        before = state.capture()
        write()
        rows = state.diff(before, state.capture())
        undo()
        paths = [row.path for row in rows]
        assert paths == want, f"{what}: differs in {rows}, not {want}"
        print(f"  {what}: {rows[0]}")
        left = state.diff(before, state.capture())
        assert not left, f"{what}, undone: still differs in {left}"


def changes(host, vm, tid):
    """(what, write, undo, paths that differ)"""
    cpus = os.sched_getaffinity(tid)
    thread = next(key for key in state.capture().threads if key.startswith(f"{tid}@"))
    yield (
        "a vCPU's mask",
        lambda: os.sched_setaffinity(tid, {1}),
        lambda: os.sched_setaffinity(tid, cpus),
        [f"thread/{thread} CPU 0/KVM"],
    )

    kthread = next(key for key, name in state.capture().names.items() if name == "kcompactd0")
    kthread_tid = int(kthread.split("@")[0])
    kthread_cpus = os.sched_getaffinity(kthread_tid)
    yield (
        "a kernel thread's mask",
        lambda: os.sched_setaffinity(kthread_tid, {2}),
        lambda: os.sched_setaffinity(kthread_tid, kthread_cpus),
        [f"thread/{kthread} kcompactd0"],
    )

    irq = next(path for path in sorted(Path("/proc/irq").glob("*/smp_affinity_list")) if writable(path))
    yield knob("an IRQ's mask", irq, "1")
    yield knob("the mask of new IRQs", Path("/proc/irq/default_smp_affinity"), "1")
    yield knob("a sysctl", Path("/proc/sys/vm/stat_interval"), "7")
    yield knob("the watchdog's mask", Path("/proc/sys/kernel/watchdog_cpumask"), "0")
    yield knob("a CPU's idle latency", Path("/sys/devices/system/cpu/cpu1/power/pm_qos_resume_latency_us"), "20")

    numa_balancing = Path("/proc/sys/kernel/numa_balancing")
    yield knob("NUMA balancing", numa_balancing, "1" if host.read(numa_balancing) == "0" else "0")
    # The masks of workers follow, so these come beside it.
    yield knob("the workqueues' mask", Path("/sys/devices/virtual/workqueue/cpumask"), "3", more=True)

    dropin = Path(f"/run/systemd/system/{vm.scope}.d/50-qtest.conf")
    yield made_file("a drop-in", dropin, "[Scope]\nDelegate=cpuset\n")
    yield made_file("qmpin's own files", Path("/run/qmpin/leases/100"), "12-19")

    group = Path("/sys/fs/cgroup/qemu.slice/100.scope/qtest")
    yield "a cgroup", group.mkdir, group.rmdir, Superset([f"{str(group)[1:]}/cgroup.type"])

    # systemd writes a cpuset by itself: the controller comes up in the slice, so each cgroup there gets its files.
    before = state.capture()
    host.run("systemctl", "set-property", "--runtime", vm.scope, f"AllowedCPUs={host.online()}")
    paths = {row.path for row in state.diff(before, state.capture())}
    for path in (
        "sys/fs/cgroup/qemu.slice/cgroup.subtree_control",
        f"sys/fs/cgroup/qemu.slice/{vm.scope}/cpuset.cpus",
        f"run/systemd/transient/{vm.scope}.d/50-AllowedCPUs.conf",
    ):
        assert path in paths, f"a cpuset: {path} is not among {sorted(paths)}"
    print(f"  a scope's cpuset: {len(paths)} rows")
    yield knob("a cgroup's cpuset", Path(f"/sys/fs/cgroup/qemu.slice/{vm.scope}/cpuset.cpus"), "0-1", more=True)


def writable(path):
    """Whether an IRQ's mask can be changed: managed ones and some of the chipset refuse."""
    try:
        path.write_text(path.read_text())
    except OSError:
        return False
    return True


def knob(what, path, value, more=False):
    old = path.read_text()
    assert old.strip() != value, f"{path} is {value} already"
    want = [str(path)[1:]]
    if more:
        # What follows from it: the effective set, and the masks of the threads inside.
        return what, lambda: path.write_text(value), lambda: path.write_text(old), Superset(want)
    return what, lambda: path.write_text(value), lambda: path.write_text(old), want


def made_file(what, path, text):
    def write():
        path.parent.mkdir(parents=True)
        path.write_text(text)

    def undo():
        path.unlink()
        folder = path.parent
        while folder not in (Path("/run"), Path("/run/systemd/system")):
            folder.rmdir()
            folder = folder.parent

    return what, write, undo, [str(path)[1:]]


class Superset(list):
    """Equal to every list that holds all of this one."""

    def __eq__(self, other):
        return set(self) <= set(other)

    __hash__ = None
