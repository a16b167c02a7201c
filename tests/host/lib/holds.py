"""How long a QMP monitor is held by qmpin, beyond what QEMU itself takes to answer: the kernel is asked who sends what when.

    with Holds() as holds:
        holds.qemus[supervisor] = threads of its QEMU
        ...
    holds.visits                    one for each connection on which QEMU sent something

```
 qmpin    connect ······ write ─────────── write ─────────── close
 QEMU          greeting ┄┄┄┄┄ answer, answer ┄┄┄┄ answer ┄┄┄┄
         qmpin's part: ├────┤              ├────┤           ├───┤
```

Tracepoints of its own instance of tracefs: calls of processes that are named qmpin, and what anybody sends to a socket.
"""

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

TRACEFS = Path("/sys/kernel/tracing")
OWN_NAME = "qmpin"
CALLS = ("connect", "close", "write", "sendto", "sendmsg")
LINE = re.compile(
    r"-(?P<pid>\d+)\s+\[\d+\].*?\s(?P<at>\d+\.\d+): (?:sys_(?P<call>\w+)\(fd: (?P<fd>[0-9a-f]+)|(?P<send>sock_send_length): )"
)


@dataclass
class Visit:
    supervisor: int
    # From QEMU's first word to the close, and qmpin's part of it.
    held_ms: float
    own_ms: float


@dataclass
class Open:
    """A connection that is under way."""

    supervisor: int
    own_ms: float = 0.0
    greeted_ms: float | None = None
    # When QEMU sent last, where qmpin has not answered since.
    answered_ms: float | None = None
    spoke_first: bool = False

    def writes(self, at_ms: float) -> None:
        # QEMU greets first; a connection on which the client speaks first is another program's, such as the bus.
        self.spoke_first |= self.greeted_ms is None
        self.own_ms += 0.0 if self.answered_ms is None else at_ms - self.answered_ms
        self.answered_ms = None

    def hears(self, at_ms: float) -> None:
        self.greeted_ms = at_ms if self.greeted_ms is None else self.greeted_ms
        self.answered_ms = at_ms

    def over(self, at_ms: float) -> Visit | None:
        if self.greeted_ms is None or self.spoke_first:
            return None
        self.writes(at_ms)
        return Visit(self.supervisor, at_ms - self.greeted_ms, self.own_ms)


@dataclass
class Holds:
    """Visits from `with` to the end of its block, by supervisors that may be added meanwhile."""

    qemus: dict[int, set[int]] = field(default_factory=dict)
    visits: list[Visit] = field(default_factory=list)
    folder: Path = TRACEFS / "instances" / "qtest-holds"

    def __enter__(self) -> "Holds":
        if not (TRACEFS / "instances").exists():
            subprocess.run(["mount", "-t", "tracefs", "tracefs", str(TRACEFS)], check=True)
        self.folder.mkdir()
        self._write("trace_clock", "mono")
        self._write("buffer_size_kb", "4096")
        for call in CALLS:
            self._write(f"events/syscalls/sys_enter_{call}/filter", f'COMM == "{OWN_NAME}"')
            self._write(f"events/syscalls/sys_enter_{call}/enable", "1")
        self._write("events/sock/sock_send_length/enable", "1")
        return self

    def __exit__(self, *_exc: object) -> None:
        self._write("tracing_on", "0")
        self._write("events/enable", "0")
        try:
            lost = sum(
                int(line.split()[1])
                for stats in self.folder.glob("per_cpu/cpu*/stats")
                for line in stats.read_text().splitlines()
                if line.startswith("overrun:")
            )
            assert not lost, f"the trace has lost {lost} events"
            with (self.folder / "trace").open(errors="replace") as trace:
                self._read(trace)
        finally:
            self.folder.rmdir()

    def _read(self, trace) -> None:
        open_: dict[tuple[int, int], Open] = {}
        for line in trace:
            seen = LINE.search(line)
            if seen is None:
                continue
            pid, at_ms = int(seen["pid"]), float(seen["at"]) * 1000
            if seen["send"]:
                for (supervisor, _), one in open_.items():
                    if pid in self.qemus.get(supervisor, ()):
                        one.hears(at_ms)
                continue
            at = pid, int(seen["fd"], 16)
            if seen["call"] == "connect":
                open_[at] = Open(pid)
            elif at in open_ and seen["call"] == "close":
                visit = open_.pop(at).over(at_ms)
                self.visits += [visit] if visit else []
            elif at in open_:
                open_[at].writes(at_ms)

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
