"""From events to lines: who passed, who failed, and the log of those that did."""

import time
from collections.abc import Iterable
from pathlib import Path

from .boot import POWEROFF_LIMIT_S, Event

# On top of a scenario's own limit: the guest enforces that limit itself, this is for a guest that cannot any more.
MARGIN_S = 120
CONSOLE_LINES = 60


class Report:
    def __init__(self, wanted: list[str], folder: Path):
        self.wanted = wanted
        self.folder = folder
        self.results: dict[str, str] = {}
        self.logs: dict[str, list[str]] = {}
        self.finished = False
        self.broken: str | None = None
        # The scenario under way when it broke.
        self.current: str | None = None

    @property
    def ok(self) -> bool:
        return self.finished and all(result in ("ok", "skipped") for result in self.results.values())

    def follow(self, events: Iterable[Event]) -> None:
        """Reads to the end of the run, or gives up when the guest is silent for longer than it may be."""
        self.current = None
        deadline = time.monotonic() + MARGIN_S
        for event in events:
            if event.kind == "start":
                self.current = event.data["name"]
                self.logs[self.current] = []
                deadline = time.monotonic() + event.data["limit_s"] + MARGIN_S
            elif event.kind == "end":
                self._end(event.data)
                self.current = None
                deadline = time.monotonic() + MARGIN_S
            elif event.kind == "done":
                self.finished = True
                deadline = time.monotonic() + POWEROFF_LIMIT_S
            elif event.kind == "line":
                self.logs.setdefault(self.current or "", []).append(event.line)
            if time.monotonic() > deadline:
                where = f"in scenario {self.current}" if self.current else "between scenarios" if not self.finished else "at power-off"
                self.broken = f"the test host hung {where}"
                break
        else:
            if not self.finished:
                where = f"in scenario {self.current}" if self.current else "outside of any scenario"
                self.broken = f"the test host died {where}"
        if self.broken:
            self.finished = False

    def left(self) -> list[str]:
        """The scenarios that have no result yet."""
        return [name for name in self.wanted if name not in self.results]

    def give_up(self) -> None:
        """Those without a result have failed."""
        for name in self.left():
            self.results[name] = "FAILED"
            why = self.broken if name == self.current else "not reached"
            print(f"FAILED {name}: {why}", flush=True)

    def _end(self, data: dict) -> None:
        name, result = data["name"], data["result"]
        self.results[name] = result
        if result == "ok":
            print(f"ok {name} {data['seconds']:.0f} s", flush=True)
        elif result == "skipped":
            print(f"skipped {name}: {data['why']}", flush=True)
        else:
            print(f"FAILED {name}: {data['why']}", flush=True)
        for note in data.get("notes", []):
            print(f"    {note}", flush=True)
        (self.folder / f"{name}.log").write_text("\n".join(self.logs.get(name, [])) + "\n")

    def print_end(self, console: Path) -> None:
        """The log of each failure, the console when the machine itself broke, and the last line."""
        for name in self.wanted:
            if self.results[name] == "FAILED" and self.logs.get(name):
                print(f"--- log of {name}")
                print(*(f"    {line}" for line in self.logs[name]), sep="\n")
        if self.logs.get("") and not self.ok:
            print("--- outside of any scenario")
            print(*(f"    {line}" for line in self.logs[""]), sep="\n")
        if self.broken:
            print(f"--- {self.broken}; the end of its console")
            lines = console.read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
            print(*(f"    {line}" for line in lines), sep="\n")
        counts = [list(self.results.values()).count(result) for result in ("ok", "FAILED", "skipped")]
        print("{} passed, {} failed, {} skipped".format(*counts), flush=True)
