"""The state of the host as a flat tree, `path -> value`, and the difference of two.

What is in it is everything that qmpin may touch:

    thread/TID@START COMM               Cpus_allowed_list of every thread of the host
    sys/fs/cgroup/**                    cpuset.*, cgroup.type, cgroup.subtree_control of every cgroup
    proc/irq/*/smp_affinity_list        and default_smp_affinity
    proc/sys/...                        vm.stat_interval, kernel.watchdog_cpumask, kernel.numa_balancing
    sys/devices/system/cpu/cpu*/...     online, cpufreq/scaling_governor and energy_performance_preference,
                                        power/pm_qos_resume_latency_us
    sys/devices/virtual/workqueue/...   the cpumasks
    run/systemd/**, etc/systemd/**      unit files and drop-ins, with their text
    run/qmpin/**                        qmpin's own, with their text

What is sound to compare:

- A thread that lives through both captures, (tid, start time), has to have the same mask. Per-CPU kworkers too.
- A thread that is gone is no difference: processes end. A thread that is new is one when its mask is not an *ordinary* one,
  so that something created while CPUs were excluded, and still excluded from them, is seen. Ordinary is: the effective CPUs of its
  cgroup, one CPU of a per-CPU kernel thread, or the mask of a thread of the same kind (name without its numbers) before.
- Workqueue rescuers (`kworker/R-...`, and the older ones named like their queue) have the mask of the pool that they
  helped last, whatever that is by now, and only the kernel can set it: they are left out.
- A worker of a CPU (`kworker/4:1`) that has had nothing to do for long may run anywhere just before it ends
  (kernel/workqueue.c: unbind_worker): one that ends in a moment is no difference.
- qmpin itself, where one runs, is no part of the host. What is in `.host.lock` is the time of its last pass.
- Cgroups, unit files and IRQs that come or go are differences. So capture `before` with the same units running as `after`;
  `diff(..., ignore=[...])` takes glob patterns for what a scenario means to leave.
- The slices that systemd keeps for all instances of qmpin@.service and qmpin-running@.service come with the first and go some time
  after the last.
- The `cpu` controller is not in the value of a subtree_control: each VM's own scope asks for it (CPUWeight=), and systemd
  leaves it on in the root after the scope until something else makes it look at the root again, whenever that is. qmpin
  asks for `cpuset` alone.
"""

import fnmatch
import glob
import os
import re
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import cpulist
import threads

# Globs below /, as all paths here. Each match is one entry, its text the value.
FILES = [
    "proc/irq/*/smp_affinity_list",
    "proc/irq/default_smp_affinity",
    "proc/sys/vm/stat_interval",
    "proc/sys/kernel/watchdog_cpumask",
    "proc/sys/kernel/numa_balancing",
    "sys/devices/system/cpu/cpu[0-9]*/online",
    "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor",
    "sys/devices/system/cpu/cpu[0-9]*/cpufreq/energy_performance_preference",
    "sys/devices/system/cpu/cpu[0-9]*/power/pm_qos_resume_latency_us",
    "sys/devices/virtual/workqueue/cpumask",
    "sys/devices/virtual/workqueue/cpumask_requested",
    "sys/devices/virtual/workqueue/cpumask_isolated",
    "sys/devices/virtual/workqueue/*/cpumask",
]
# Folders of which every file is an entry; a symlink's value is its target.
TREES = ["run/systemd/system", "run/systemd/system.control", "run/systemd/transient", "etc/systemd/system", "run/qmpin"]
CGROUPS = "sys/fs/cgroup"
UNITS_SLICES = {"system-qmpin.slice", r"system-qmpin\x2drunning.slice"}
HOST_LOCK = "/run/qmpin/.host.lock"
# And all that are called cpuset.*
CGROUP_FILES = ["cgroup.type", "cgroup.subtree_control"]
# How big a file of a tree may be to be worth its text.
TEXT_BYTES = 4096

ABSENT = "(absent)"
# How long a worker may take to end, once it may run anywhere.
ENDING_S = 5


class Row(NamedTuple):
    """One difference."""

    path: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}: {self.before!r} -> {self.after!r}"


class Entry(NamedTuple):
    """A thread's mask, and what is needed to judge it when it is new."""

    mask: str
    kind: str
    kernel: bool
    cgroup_cpus: str


class State:
    def __init__(self, files: dict[str, str], threads_seen: dict[str, Entry], names: dict[str, str]):
        self.files = files
        self.threads = threads_seen  # "TID@START" -> entry
        self.names = names  # "TID@START" -> comm


def capture() -> State:
    found: list[str] = []
    for pattern in FILES:
        found += glob.iglob(f"/{pattern}")
    for tree in TREES:
        found += _walk(f"/{tree}")
    for folder, names, members in os.walk(f"/{CGROUPS}"):
        names[:] = [name for name in names if name not in UNITS_SLICES]
        found += (f"{folder}/{name}" for name in members if name.startswith("cpuset.") or name in CGROUP_FILES)
    files: dict[str, str] = {}
    for path in found:
        value = _read(path)
        if path == HOST_LOCK and value is not None:
            value = "(when the host was last looked at)"
        if path.endswith("/cgroup.subtree_control") and value is not None:
            value = " ".join(word for word in value.split() if word != "cpu")
        if value is not None:
            files[path.removeprefix("/")] = value

    seen: dict[str, Entry] = {}
    names: dict[str, str] = {}
    effective: dict[int, str] = {}
    for thread in threads.of_host():
        if threads.is_rescuer(thread) or threads.is_qmpin(thread):
            continue
        if thread.pid not in effective:
            group = "" if thread.kernel else threads.cgroup(thread.pid)
            effective[thread.pid] = files.get(f"{CGROUPS}{group}/cpuset.cpus.effective", "") or _inherited(files, group)
        key = f"{thread.tid}@{thread.start}"
        seen[key] = Entry(thread.allowed, _kind(thread), thread.kernel, effective[thread.pid])
        names[key] = thread.comm
    return State(files, seen, names)


def diff(before: State, after: State, ignore: Iterable[str] = ()) -> list[Row]:
    """The differences that count, sorted by path; see the top of this file for what does not."""
    rows = []
    for path in before.files.keys() | after.files.keys():
        a, b = before.files.get(path, ABSENT), after.files.get(path, ABSENT)
        if a != b:
            rows.append(Row(path, a, b))
    ordinary: dict[str, set[str]] = {}
    for entry in before.threads.values():
        ordinary.setdefault(entry.kind, set()).add(entry.mask)
    for key, entry in after.threads.items():
        path = f"thread/{key} {after.names[key]}"
        old = before.threads.get(key)
        if old is not None:
            if old.mask != entry.mask:
                rows.append(Row(path, old.mask, entry.mask))
        elif not _is_ordinary(entry, ordinary.get(entry.kind, set())):
            rows.append(Row(path, ABSENT, entry.mask))
    patterns = list(ignore)
    return sorted(row for row in rows if not any(fnmatch.fnmatchcase(row.path, pattern) for pattern in patterns))


def without_ending(rows: list[Row]) -> list[Row]:
    """Without workers that are about to end: they get the time for it."""
    workers = {row: int(found.group(1)) for row in rows if (found := re.match(r"thread/(\d+)@\d+ kworker/\d", row.path))}
    limit = time.monotonic() + ENDING_S
    while time.monotonic() < limit and any(Path(f"/proc/{tid}").exists() for tid in workers.values()):
        time.sleep(0.1)
    return [row for row in rows if row not in workers or Path(f"/proc/{workers[row]}").exists()]


def without_moving(rows: list[Row]) -> list[Row]:
    """Without interrupts that are just being moved: the kernel does that when one fires (kernel/irq/migration.c), and tells now of
    the one place and now of the other until it is done. They get the time for it.
    """
    moving = {row: Path("/", row.path) for row in rows if re.fullmatch(r"proc/irq/\d+/smp_affinity_list", row.path)}
    is_back = lambda row: moving[row].exists() and moving[row].read_text().strip() == row.before
    limit = time.monotonic() + ENDING_S
    while time.monotonic() < limit and not all(is_back(row) for row in moving):
        time.sleep(0.1)
    return [row for row in rows if row not in moving or not is_back(row)]


def check_same(before: State, after: State, ignore: Iterable[str] = ()) -> None:
    """Raises AssertionError with each difference on a line."""
    rows = without_moving(without_ending(diff(before, after, ignore)))
    for row in rows:
        print(f"  differs: {row}")
    assert not rows, f"the host differs in {len(rows)} places, first {rows[0]}"


def _is_ordinary(entry: Entry, masks_before: set[str]) -> bool:
    if entry.mask in masks_before or entry.mask == entry.cgroup_cpus:
        return True
    return entry.kernel and len(cpulist.parse(entry.mask)) == 1


def _kind(thread: threads.Thread) -> str:
    """What threads of one kind have in common: `kworker/u#:#`, `kworker/#:#H`, `CPU #/KVM`."""
    name = thread.comm
    if thread.kernel and name.startswith("kworker/"):
        # The kernel appends what the worker does just now: `kworker/0:1-events`.
        name = re.split(r"[-+]", name, maxsplit=1)[0] if not name.startswith("kworker/R-") else name
    return re.sub(r"\d+", "#", name)


def _inherited(files: dict[str, str], group: str) -> str:
    """The effective CPUs of the nearest cgroup above that has the controller."""
    while True:
        value = files.get(f"{CGROUPS}{group}/cpuset.cpus.effective", "")
        if value or not group:
            return value
        group = group.rpartition("/")[0]


def _walk(folder: str) -> Iterable[str]:
    for name, folders, members in os.walk(folder):
        # A symlink to a folder is listed among the folders.
        for member in [*members, *(one for one in folders if os.path.islink(f"{name}/{one}"))]:
            yield f"{name}/{member}"


def _read(path: str) -> str | None:
    """The text of a file; None when it vanished or is nothing to read (a cgroup may end while the tree is walked)."""
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            return f"-> {os.readlink(path)}"
        if not stat.S_ISREG(mode):
            return None
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(file, TEXT_BYTES)
        finally:
            os.close(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        # EOPNOTSUPP of a threaded group, EIO of a managed IRQ: that it refuses is its state.
        return f"(errno {error.errno})"
    return data.decode(errors="replace").strip()
