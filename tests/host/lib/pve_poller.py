"""A stand-in for Proxmox's status daemon and for an open browser tab: both ask `<vmid>.qmp` all the time.

pvestatd visits every 10 s and gives up after 3 s; the GUI, with the VM open, every 1 s and gives up after 5 s. Each visit
is a connection of its own: connect without blocking, again after 100 ms while the backlog is full, negotiate, ask, close.
Failures and slow answers here are what an administrator would see.

In a scenario:

    with PvePoller(vm) as poller:
        ...
    poller.report.check()           no failures, and each visitor came at least once

The visitors run in a process of their own, so that what the scenario does cannot delay them.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import qmp
from wait import wait_until

# Of PVE::QemuServer::vmstatus. QEMU without Proxmox's patches does not know query-proxmox-support; it answers with an
# error at once, which costs the socket the same.
QUERIES = ["query-status", "query-proxmox-support", "query-blockstats", "query-machines", "query-version", "query-balloon"]
MAY_FAIL = {"query-proxmox-support", "query-balloon"}


@dataclass(frozen=True)
class Visitor:
    name: str
    every_s: float
    limit_s: float


VISITORS = [Visitor("pvestatd", 10.0, 3.0), Visitor("gui", 1.0, 5.0)]


@dataclass
class Tally:
    visits: int = 0
    failures: int = 0
    retries: int = 0
    slowest_ms: float = 0.0
    total_ms: float = 0.0
    errors: list[str] = field(default_factory=list)


@dataclass
class Report:
    tallies: dict[str, Tally]

    def check(self) -> None:
        """Raises AssertionError when a visit failed or a visitor never came."""
        for name, tally in self.tallies.items():
            assert tally.visits, f"{name} made no visit"
            assert not tally.failures, f"{name}: {tally.failures} of {tally.visits} visits failed, first: {tally.errors[0]}"

    def __str__(self) -> str:
        return "; ".join(
            f"{name}: {t.visits} visits, {t.failures} failed, {t.retries} retries, "
            f"slowest {t.slowest_ms:.0f} ms, mean {t.total_ms / max(t.visits, 1):.0f} ms"
            for name, t in self.tallies.items()
        )


class PvePoller:
    """The two visitors of one VM, from `with` to the end of its block. `report` is there afterwards."""

    def __init__(self, vm: object):
        self.vmid: int = vm.vmid  # type: ignore[attr-defined]
        self.path: Path = vm.qmp_path  # type: ignore[attr-defined]
        self.live = Path(f"/run/qtest/poller-{self.vmid}.json")
        self.process: subprocess.Popen | None = None
        self.report = Report({})

    def __enter__(self) -> "PvePoller":
        self.live.unlink(missing_ok=True)
        command = [sys.executable, __file__, str(self.path), str(self.live)]
        self.process = subprocess.Popen(command)
        self.wait_visits(1)
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        self.report = self.so_far()
        print(f"  poller of VM {self.vmid}: {self.report}", flush=True)

    def so_far(self) -> Report:
        try:
            data = json.loads(self.live.read_text())
        except FileNotFoundError:
            return Report({})
        return Report({name: Tally(**tally) for name, tally in data.items()})

    def wait_visits(self, visits: int, limit_s: float = 120) -> None:
        """Until each visitor has come VISITS times since the start."""

        def enough() -> bool:
            tallies = self.so_far().tallies
            return len(tallies) == len(VISITORS) and all(tally.visits >= visits for tally in tallies.values())

        wait_until(enough, limit_s, f"{visits} visits of each visitor of VM {self.vmid}", self.so_far)


def visit(path: str, limit_s: float, tally: Tally) -> None:
    start = time.monotonic()
    try:
        with qmp.Session(path, limit_s) as session:
            tally.retries += session.retries
            for query in QUERIES:
                try:
                    session.command(query)
                except qmp.QmpError:
                    if query not in MAY_FAIL:
                        raise
    except (qmp.QmpError, qmp.QmpLost) as error:
        tally.failures += 1
        if len(tally.errors) < 10:
            tally.errors.append(str(error))
    tally.visits += 1
    took_ms = (time.monotonic() - start) * 1000
    tally.total_ms += took_ms
    tally.slowest_ms = max(tally.slowest_ms, took_ms)


def main(path: str, live: str) -> None:
    over = threading.Event()
    lock = threading.Lock()
    tallies = {visitor.name: Tally() for visitor in VISITORS}

    def save() -> None:
        with lock:
            scratch = Path(live + ".new")
            scratch.write_text(json.dumps({name: asdict(tally) for name, tally in tallies.items()}))
            scratch.rename(live)

    def come_and_go(visitor: Visitor) -> None:
        while not over.is_set():
            visit(path, visitor.limit_s, tallies[visitor.name])
            save()
            over.wait(visitor.every_s)

    signal.signal(signal.SIGTERM, lambda *_: over.set())
    visitors = [threading.Thread(target=come_and_go, args=(visitor,)) for visitor in VISITORS]
    for thread in visitors:
        thread.start()
    for thread in visitors:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
