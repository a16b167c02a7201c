"""Who runs on some CPUs, by the kernel's own word: the tracepoint sched_switch in a tracefs instance of our own."""

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cpulist

TRACEFS = Path("/sys/kernel/tracing")
# For each CPU. A switch takes some 80 bytes, and a busy CPU switches a few hundred times a second.
BUFFER_KIB = 2048
IDLE = 0  # the tid of every CPU's idle task

LINE = re.compile(
    r"\[(?P<cpu>\d+)\].* sched_switch: prev_comm=(?P<prev>.*) prev_pid=(?P<prev_tid>\d+) prev_prio=.*"
    r" ==> next_comm=(?P<next>.*) next_pid=(?P<next_tid>\d+) next_prio="
)


class Who(NamedTuple):
    """A thread as the trace tells it; all idle tasks are one."""

    tid: int
    comm: str


Counts = dict[Who, int]


class Switches:
    """with Switches("12-19") as traced: ...; then `traced.ran` says how often each thread got one of these CPUs."""

    def __init__(self, cpus: str):
        self.cpus = cpulist.parse(cpus)
        self.ran: Counter[Who] = Counter()
        self.folder = TRACEFS / "instances" / "qtest-switches"

    def __enter__(self) -> "Switches":
        if not (TRACEFS / "instances").exists():
            subprocess.run(["mount", "-t", "tracefs", "tracefs", str(TRACEFS)], check=True)
        self.folder.mkdir()
        self._write("tracing_on", "0")
        self._write("buffer_size_kb", str(BUFFER_KIB))
        self._write("tracing_cpumask", cpulist.hex_mask(self.cpus))
        self._write("events/sched/sched_switch/enable", "1")
        self._write("tracing_on", "1")
        return self

    def __exit__(self, *_exc: object) -> None:
        self._write("tracing_on", "0")
        self._write("events/sched/sched_switch/enable", "0")
        try:
            self._count()
            # A trace with holes proves nothing.
            lost = {cpu: count for cpu in self.cpus if (count := self._lost(cpu))}
            assert not lost, f"the trace has lost switches, by CPU: {lost}"
        finally:
            self.folder.rmdir()

    def _count(self) -> None:
        begun: set[str] = set()
        with (self.folder / "trace").open(errors="replace") as trace:
            for line in trace:
                seen = LINE.search(line)
                if seen is None:
                    assert line.startswith("#") or not line.strip(), f"no line of sched_switch: {line!r}"
                    continue
                # Who had the CPU when the trace began was not switched to.
                if seen["cpu"] not in begun:
                    begun.add(seen["cpu"])
                    self._add(seen["prev_tid"], seen["prev"])
                self._add(seen["next_tid"], seen["next"])

    def _add(self, tid: str, comm: str) -> None:
        self.ran[Who(IDLE, "idle") if int(tid) == IDLE else Who(int(tid), comm)] += 1

    def _lost(self, cpu: int) -> int:
        stats = (self.folder / "per_cpu" / f"cpu{cpu}" / "stats").read_text()
        values = dict(line.split(": ", 1) for line in stats.splitlines())
        return sum(int(values[name]) for name in ("overrun", "commit overrun", "dropped events"))

    def _write(self, name: str, value: str) -> None:
        (self.folder / name).write_text(value)


def parted(ran: Counts, tids: set[int]) -> tuple[Counts, Counts]:
    """Those with one of these tids, and the others."""
    mine = {who: count for who, count in ran.items() if who.tid in tids}
    return mine, {who: count for who, count in ran.items() if who not in mine}


def table(ran: Counts) -> str:
    """`hog 2345, CPU 0/KVM 33, idle 4`: the most frequent first, threads of one name together."""
    names: Counter[str] = Counter()
    for who, count in ran.items():
        names[who.comm] += count
    return ", ".join(f"{name} {count}" for name, count in names.most_common()) or "no thread"
