"""Boots a test host once and follows its wire.

    QEMU (Debian 13's, from the root file system through chroot, in a mount namespace of its own)
      disk 1  the suite's image, snapshot=on     every run starts clean
      disk 2  job.tar, read-only                 what to do
      disk 3  results.tar                        what the guest hands back at the end
      ttyS0   console.log                        kernel and systemd
      ttyS1   wire.log                           `@@qtest {json}` events, and between them what the scenarios print

The wire is an append-only file that is read as it grows, so that whatever was said before a crash is there.
"""

import ctypes
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import firmware, image, rootfs, shape

# The suite whose QEMU carries the test host. Its version is part of what was measured to work.
CARRIER = "trixie"

EVENT_MARK = "@@qtest "
# About one boot in twelve hangs before the job begins, an artefact of multi-threaded TCG. That is no finding: boot again.
BOOT_ATTEMPTS = 5
# What the guest's kernel says when the emulator ran into an instruction that was just being patched (a static key: KVM
# and tracing turn some on and off). Hardware cannot; multi-threaded TCG does so once in hours, and on a slow day three
# times in one. No finding either.
HALF_PATCHED = "Oops: int3"
# How often the rest of a run gets another machine for that.
MACHINES = 3
# How long a guest that has said "done" may take to hand its files back and power off.
POWEROFF_LIMIT_S = 120
POLL_S = 0.1
RESULTS_BYTES = 64 << 20


@dataclass
class Event:
    """One thing that the guest said: an event of the runner, or a line that a scenario printed."""

    kind: str
    data: dict = field(default_factory=dict)
    line: str = ""


class Hung(Exception):
    """The guest stopped answering after the job had begun, or died. The text says when."""


class NotBooted(Exception):
    """The job did not begin."""


class Machine:
    """One boot. Use as a context manager: leaving it ends QEMU."""

    def __init__(self, folder: Path, its_shape: shape.Shape, suite: rootfs.Suite, job: Path, interactive: bool = False):
        self.folder = folder
        self.shape = its_shape
        self.suite = suite
        self.job = job
        self.interactive = interactive
        self.wire = folder / "wire.log"
        self.console = folder / "console.log"
        self.results = folder / "results.tar"
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Machine":
        self.wire.write_bytes(b"")
        self.console.write_bytes(b"")
        with open(self.results, "wb") as results:
            results.truncate(RESULTS_BYTES)
        # TCG warns once per CPU and feature that it lacks: hundreds of lines that no process wants to see.
        with open(self.folder / "qemu-stderr.log", "wb") as stderr:
            self.process = subprocess.Popen(
                self.command(),
                stdin=None if self.interactive else subprocess.DEVNULL,
                stdout=None if self.interactive else stderr,
                stderr=stderr,
                preexec_fn=_die_with_parent,
            )
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            # SIGKILL: a wedged TCG thread does not hear SIGTERM, and nothing of a snapshot is worth saving.
            self.process.kill()
        self.process.wait()

    def was_half_patched(self) -> bool:
        """Whether it died of the emulator's own fault."""
        return HALF_PATCHED in self.console.read_text(errors="replace")

    def command(self) -> list[str]:
        """QEMU in its own root, with this machine's /dev and the files of the run mounted in.

        The mount namespace ends with QEMU: nothing is left mounted, whichever way it dies. Every step is an exec, so the
        process that we started *is* QEMU.
        """
        home = rootfs.root(rootfs.Suite.load(CARRIER))
        vmlinuz, initrd = rootfs.boots_with(self.suite)
        inside = "/mnt"
        mounts = [
            f"mount --bind /dev {home}/dev",
            f"mount -t proc proc {home}/proc",
            f"mount -t tmpfs tmpfs {home}/run",
            f"mount -t tmpfs -o size=64k tmpfs {home}{inside}",
        ]
        sources = {
            "run": self.folder,
            "job": self.job,
            "disk": image.disk(self.suite),
            "vmlinuz": vmlinuz,
            "power": firmware.power_table(self.shape.data["cpus"]),
        }
        if initrd is not None:
            sources["initrd"] = initrd
        for name, source in sources.items():
            make = "mkdir" if source.is_dir() else "touch"
            mounts += [f"{make} {home}{inside}/{name}", f"mount --bind '{source}' {home}{inside}/{name}"]
        # snapshot=on writes to TMPDIR: the run's own folder, which is on a disk and is removed with it.
        script = " && ".join([*mounts, f'exec env TMPDIR={inside}/run chroot {home} "$@"'])
        # On a machine of many emulated CPUs an RCU grace period was seen to hang, and whatever ends a VM with it, until the
        # kernel's stall detector looked: after 60 s by default.
        append = "root=/dev/vda rw console=ttyS0 quiet mitigations=off panic=1 oops=panic rcupdate.rcu_cpu_stall_timeout=10"
        append = f"{append} {self.shape.data.get('kernel_parameters', '')}".rstrip()
        if self.interactive:
            serial = ["-serial", "mon:stdio"]
        else:
            serial = ["-monitor", "none", "-serial", f"file:{inside}/run/console.log"]
        return [
            *["unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh"],
            *["qemu-system-x86_64", "-name", "qmpin-test-host", "-accel", "tcg,thread=multi,tb-size=512"],
            *self.shape.qemu_args(),
            *["-acpitable", f"file={inside}/power"],
            *["-kernel", f"{inside}/vmlinuz", "-append", append],
            *(["-initrd", f"{inside}/initrd"] if initrd is not None else []),
            *["-drive", f"file={inside}/disk,if=virtio,format=raw,snapshot=on"],
            *["-drive", f"file={inside}/job,if=virtio,format=raw,readonly=on"],
            *["-drive", f"file={inside}/run/results.tar,if=virtio,format=raw,cache=unsafe"],
            *["-nic", "none", "-display", "none", "-no-reboot"],
            *serial,
            *["-serial", f"file:{inside}/run/wire.log"],
        ]

    def events(self) -> Iterator[Event]:
        """What the guest says, as it says it; ends when QEMU has ended and everything was read.

        Yields an Event of kind "quiet" when there is nothing to say, so that the caller can look at its clock.
        """
        assert self.process is not None
        rest = ""
        with open(self.wire, encoding="utf-8", errors="replace") as wire:
            while True:
                ended = self.process.poll() is not None
                chunk = wire.read()
                if chunk:
                    *lines, rest = (rest + chunk).split("\n")
                    for line in lines:
                        yield _event(line)
                    continue
                if ended:
                    if rest:
                        yield _event(rest)
                    return
                yield Event("quiet")
                time.sleep(POLL_S)

    def wait_begun(self, events: Iterator[Event], limit_s: float) -> float:
        """Seconds until the job began.

        Raises NotBooted when it did not within the limit, or when QEMU ended before.
        """
        assert self.process is not None
        start = time.monotonic()
        for event in events:
            if event.kind == "begun":
                return time.monotonic() - start
            if time.monotonic() - start > limit_s:
                raise NotBooted(f"the job had not begun after {limit_s:.0f} s")
        raise NotBooted(f"QEMU ended with {self.process.returncode} before the job began{self._last_words()}")

    def _last_words(self) -> str:
        """What QEMU printed last, without TCG's warnings of each feature that it lacks."""
        lines = (self.folder / "qemu-stderr.log").read_text(errors="replace").splitlines()
        own = [line for line in lines if ": warning: " not in line]
        return f": {own[-1]}" if own else ""


def _die_with_parent() -> None:
    """Between fork and exec: QEMU shall not outlive a run that was killed. The setting survives the execs that follow."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


def _event(line: str) -> Event:
    mark = line.find(EVENT_MARK)
    if mark >= 0:
        try:
            data = json.loads(line[mark + len(EVENT_MARK) :])
            return Event(data["event"], data)
        except (ValueError, KeyError, TypeError):
            pass
    return Event("line", line=line.rstrip("\r"))
