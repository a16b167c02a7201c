"""Threads of the host: who they are, and where they may run. Read from /proc alone."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


@dataclass(frozen=True)
class Thread:
    """A thread at one moment. (tid, start) names it for its whole life; tids alone are used again."""

    tid: int
    pid: int
    start: int  # clock ticks since boot
    comm: str
    allowed: str  # cpulist
    kernel: bool
    unmovable: bool = False  # only the kernel sets its mask


# Of include/linux/sched.h, in the flags field of /proc/TID/stat.
_PF_KTHREAD = 0x00200000
_PF_NO_SETAFFINITY = 0x04000000
_ALLOWED = "\nCpus_allowed_list:"


def read(pid: int, tid: int) -> Thread | None:
    """The thread, or None when it is gone. A scenario reads hundreds of thousands of them: most of its time was this."""
    folder = f"{PROC}/{pid}/task/{tid}"
    try:
        stat = _text(f"{folder}/stat")
        allowed_cpus = _allowed(_text(f"{folder}/status"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The comm stands in parentheses and may itself hold spaces and parentheses.
    comm, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
    flags = int(rest[6])
    return Thread(tid, pid, int(rest[19]), comm, allowed_cpus, bool(flags & _PF_KTHREAD), bool(flags & _PF_NO_SETAFFINITY))


def _text(path: str) -> str:
    """A short file of /proc, which is whole in one read."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, 1 << 16).decode(errors="replace")
    finally:
        os.close(file)


def _allowed(status: str) -> str:
    start = status.index(_ALLOWED) + len(_ALLOWED)
    return status[start : status.index("\n", start)].strip()


def of_process(pid: int) -> dict[int, Thread]:
    """Every thread of a process by tid; empty when it is gone."""
    try:
        tids = [int(name) for name in os.listdir(PROC / str(pid) / "task")]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    found = (read(pid, tid) for tid in tids)
    return {thread.tid: thread for thread in found if thread is not None}


def of_host() -> Iterator[Thread]:
    for name in os.listdir(PROC):
        if name.isdigit():
            yield from of_process(int(name)).values()


def allowed(tid: int) -> str:
    """The thread's mask as a cpulist. Raises FileNotFoundError when it is gone."""
    return _allowed(_text(f"{PROC}/{tid}/status"))


def cgroup(pid: int) -> str:
    """The cgroup v2 path, as `/qemu.slice/100.scope`; empty when the process is gone."""
    try:
        for line in (PROC / str(pid) / "cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return line[3:]
    except (FileNotFoundError, ProcessLookupError):
        pass
    return ""


def is_bound(thread: Thread) -> bool:
    """Whether it is a kernel thread that belongs to one CPU: `migration/3`, `ksoftirqd/3`, `kworker/3:1`."""
    return thread.kernel and thread.allowed.isdigit()


def is_qmpin(thread: Thread) -> bool:
    """Whether it is one of qmpin's own, which leave the CPUs of every VM: all have its name at the beginning."""
    return thread.comm.startswith("qmpin") and not thread.kernel


def is_rescuer(thread: Thread) -> bool:
    """Whether it is the rescuer of a workqueue: `kworker/R-writeb`, or named like its queue on older kernels."""
    worker = re.match(r"kworker/(u?\d)", thread.comm)
    return thread.kernel and thread.unmovable and not worker and not re.search(r"/\d+$", thread.comm)


class Time(NamedTuple):
    """What a thread had of the CPUs so far."""

    run_ns: int
    delay_ns: int  # it could have run and waited for a CPU


def time_of(pid: int, tid: int) -> Time:
    """By /proc/PID/task/TID/schedstat. A wait counts when it is over: who still waits has no more delay than before."""
    run_ns, delay_ns, _slices = (PROC / str(pid) / "task" / str(tid) / "schedstat").read_text().split()
    return Time(int(run_ns), int(delay_ns))


def last_cpu(pid: int, tid: int) -> int:
    """The CPU on which the thread runs, or ran last."""
    stat = (PROC / str(pid) / "task" / str(tid) / "stat").read_text()
    return int(stat[stat.rindex(")") + 2 :].split()[36])
