"""What a scenario works with: the host it runs on.

    def run(host):
        with host.vm(100, cpus=8, guest="spin") as vm:
            vm.wait_guest()
            ...

See README.md for the whole of it.
"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import cpulist
import state
from vm import CGROUPS, RUN, Vm, qemu_version
from wait import wait_until

JOB = Path("/job/job.json")
# What a scenario writes here is handed to the machine outside (`run --results DIR`).
RESULTS = Path("/results")
# Lines that are shown beside the result, also when all is well.
PACKAGE = Path("/job/qmpin.deb")
NOTES = Path("/run/qtest/notes")


class Skip(Exception):
    """Raised by a scenario that finds that it cannot run here; the text says why."""


class Host:
    def __init__(self, job: dict):
        self.job = job
        self.shape: dict = job["shape"]
        self.suite: str = job["suite"]
        self.results = RESULTS

    @staticmethod
    def from_job() -> "Host":
        return Host(json.loads(JOB.read_text()))

    def lacks(self, need: str) -> str | None:
        """Why a need of a scenario (NEEDS) is not met; None when it is."""
        if need == "qmpin":
            return None if shutil.which("qmpin") else "no qmpin binary was built"
        if need == "package":
            return None if PACKAGE.exists() else "no package was built (integration/debian/build)"
        if need == "kvm":
            subprocess.run(["modprobe", "kvm_amd"], capture_output=True)
            return None if Path("/dev/kvm").exists() else "no KVM on this host"
        if need == "monitor-qmp":
            return None if qemu_version() >= (11, 1) else "QEMU is older than 11.1"
        raise ValueError(f"unknown need {need!r}")

    def vm(self, vmid: int, **options: object) -> Vm:
        """Starts a VM; the end of the `with` block kills it.

        cpus=4            vCPUs at start
        max_cpus=None     makes it hotpluggable up to that many, as Proxmox with `hotplug: cpu`
        smp=None          a whole -smp argument instead, as from Proxmox's `args:` ("8,cores=4,threads=2")
        guest="idle"      idle, spin (all vCPUs), hotplug (acknowledges vCPU plug and unplug), read (disk I/O),
                          msi (turns on MSI of the device 00:10.0)
        accel="kvm"       or "tcg"
        disks=1           one virtio-scsi controller with an iothread each; 0: one disk without iothread
        debug_threads=True, paused=False (-S), memory_mib=64, aio="threads" (or "io_uring", "native"), extra=[...]
        """
        return Vm(vmid, **options).start()  # type: ignore[arg-type]

    def fitting(self) -> dict:
        """Options of a VM that has room behind one last-level cache, off the host's first core, and has SMT where the host
        has it: four cores, or what there is.
        """
        threads = self.shape["threads_per_core"]
        llcs = [cpulist.parse(llc) for llc in self.shape["llcs"]]
        cores = min(4, len(llcs[0]) // threads - (len(llcs) == 1))
        return {"smp": f"{cores * threads},sockets=1,cores={cores},threads={threads}"}

    def before(self) -> state.State:
        """The host's state, for comparison at the end. systemd keeps qemu.slice after the first VM of a boot, and the kernel
        its modules, so there has been one first.
        """
        if not (CGROUPS / "qemu.slice").exists():
            with self.vm(999, cpus=1) as vm:
                vm.wait_guest()
        return state.capture()

    def note(self, text: str) -> None:
        """Shows a line beside the scenario's result."""
        with NOTES.open("a") as notes:
            notes.write(text + "\n")

    def run(self, *command: str, check: bool = True, limit_s: float = 60) -> subprocess.CompletedProcess:
        """Runs a command, captures what it says, and fails with it when its code is not zero."""
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=limit_s)
        if check and done.returncode != 0:
            raise AssertionError(f"`{' '.join(command)}` ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
        return done

    def read(self, path: str | Path) -> str:
        """The text of a file without its last newline."""
        return Path(path).read_text().strip()

    def online(self) -> str:
        """The host's online CPUs as a cpulist."""
        return self.read("/sys/devices/system/cpu/online")

    def clean_up(self) -> list[str]:
        """Between scenarios: detaches and ends every VM that is left; what there was, by name."""
        left = [str(path) for path in sorted(Path("/run/qmpin").glob("*"))]
        if left and shutil.which("qmpin"):
            subprocess.run(["qmpin", "detach", "--all"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        for scope in sorted((CGROUPS / "qemu.slice").glob("*.scope")):
            left.append(scope.name)
            for procs in [scope, *(path for path in scope.rglob("*") if path.is_dir())]:
                for pid in _pids(procs):
                    os.kill(pid, signal.SIGKILL)
        for name in left:
            wait_until(lambda name=name: not (CGROUPS / "qemu.slice" / name).exists(), 60, f"{name} to be gone")
        for path in RUN.glob("*"):
            left.append(str(path))
            path.unlink()
        return left


def _pids(group: Path) -> list[int]:
    """The processes of a cgroup; none for a threaded one, whose processes are those of its parent."""
    try:
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []
