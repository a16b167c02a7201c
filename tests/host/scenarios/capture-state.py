"""Captures the state files that the binary under test writes: a VM at `strict` with a partition, one with limits of units, and
one that shares cores inside a limit (with a cookie, where the kernel has core scheduling: suite trixie-sched-core).

Hands back state/; `run --results DIR capture-state` unpacks them. tests/fixtures has those of releases. `QMPIN_BIN=PATH` captures another
version.
"""

import shutil
import subprocess
from pathlib import Path

import qmpin
from wait import wait_until

LIMIT_S = 240
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x",)

RUN = Path("/run/qmpin")


def run(host):
    folder = host.results / "state"
    with host.vm(100, cpus=2) as vm:
        vm.wait_guest()
        with qmpin.Attached(100, isolation="strict", policy='sched = "fifo:1"\n') as attached:
            wait_until(lambda: (RUN / "100.standing").exists(), 60, "its standing", attached.log)
            vm.iothread_add("late")
            attached.settle(vm)
            keep(folder / "strict")
            assert '"partition"' in (folder / "strict/100.journal").read_text()
        stranger = subprocess.Popen(["sleep", "600"])
        try:
            (vm.cgroup / "cgroup.procs").write_text(str(stranger.pid))
            with qmpin.Attached(100, isolation="exclusive") as attached:
                attached.settle(vm)
                keep(folder / "slices")
        finally:
            stranger.kill()
            stranger.wait()
        # 0.1.0 plans past the limit: the kernel cuts the mask of the emulator threads, and the journal says what it made of it.
        host.run("systemctl", "set-property", "--runtime", vm.scope, "AllowedCPUs=2-9,12-19")
        planned = host.run("qmpin", "plan", "100", "--vcpus", "12,14", "--emulator", "0-9", "--share", check=False)
        is_cut = planned.returncode == 0
        halves = f'vcpus = "12,14"\nemulator = "{0 if is_cut else 2}-9"\ncore_scheduling = true\n'
        with qmpin.Attached(100, "--share", isolation="exclusive", policy=halves) as attached:
            journal = lambda: (RUN / "100.journal").read_text()
            wait_until(lambda: not is_cut or '"narrowed"' in journal(), 60, "a mask that was cut", attached.log)
            if not is_cut:
                attached.settle(vm)
            keep(folder / "shared")


def keep(to):
    """Copies what is in the state folder; a file's leading dot is left out, so that no copy is hidden."""
    to.mkdir(parents=True)
    for path in RUN.iterdir():
        shutil.copyfile(path, to / path.name.lstrip("."))
