"""A neighbour that wants all the CPU there is: a scope beside the VMs', full of processes that only compute.

    with Neighbour(101, hogs=48, weight=800) as neighbour:
        with neighbour.noise():
            ...

It is quiet but for `noise()`: on an emulated host everything else takes minutes beside it.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

from vm import CGROUPS
from wait import wait_until

# They are called `hog`, so that a trace shows who they are; the shells forked from this one keep the name.
SCRIPT = 'printf hog >/proc/$$/comm; for i in $(seq "$1"); do while :; do :; done & done; wait'


class Neighbour:
    """The end of the block kills it."""

    def __init__(self, vmid: int, hogs: int, weight: int):
        self.unit = str(vmid)
        self.hogs = hogs
        self.weight = weight
        self.cgroup = CGROUPS / "qemu.slice" / f"{vmid}.scope"

    def __enter__(self) -> "Neighbour":
        scope = ["systemd-run", "--quiet", "--scope", "--slice=qemu.slice", f"--unit={self.unit}"]
        scope += ["-p", f"CPUWeight={self.weight}"]
        command = [*scope, "--", "sh", "-c", SCRIPT, "sh", str(self.hogs)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        # The shell that waits for them is in the scope, too.
        wait_until(lambda: len(self.pids()) > self.hogs, 60, f"{self.hogs} hogs to run", lambda: len(self.pids()))
        self._freeze(True)
        return self

    @contextlib.contextmanager
    def noise(self) -> Iterator[None]:
        self._freeze(False)
        try:
            yield
        finally:
            self._freeze(True)

    def _freeze(self, frozen: bool) -> None:
        (self.cgroup / "cgroup.freeze").write_text(f"{frozen:d}")
        want = f"frozen {frozen:d}"
        wait_until(lambda: want in (self.cgroup / "cgroup.events").read_text(), 60, f"{self.unit}.scope to be {want}")

    def pids(self) -> list[int]:
        try:
            return [int(pid) for pid in (self.cgroup / "cgroup.procs").read_text().split()]
        except FileNotFoundError:
            return []

    def __exit__(self, *_exc: object) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not self.cgroup.exists(), 60, f"{self.unit}.scope to be gone")
