"""Plain QEMU, without Proxmox's folder and slice: in a service of its own, or in a login session."""

import subprocess
from pathlib import Path

import qmpin
from vm import CGROUPS, Vm, load_kvm
from wait import wait_until

PID = Path("/run/qtest/plain.pid")


class Plain(Vm):
    """with Plain("session-c1.scope", "user.slice/user-0.slice").start() as vm: ..."""

    qmp_path = Path("/run/qtest/plain.qmp")
    cgroup = Path()

    def __init__(self, unit: str, above: str):
        super().__init__("plain", cpus=2)
        self.unit = unit
        self.above = Path(above)
        self.cgroup = CGROUPS / above / unit

    def start(self) -> "Plain":
        load_kvm()
        PID.unlink(missing_ok=True)
        command = ["systemd-run", "--quiet", f"--unit={self.unit}", f"--slice={self.above.name}"]
        qemu = ["qemu-system-x86_64", "-machine", "pc,accel=kvm", "-m", "64", "-smp", "2", "-nodefaults", "-display", "none"]
        qemu += ["-qmp", f"unix:{self.qmp_path},server=on,wait=off", "-pidfile", str(PID)]
        # In a scope it is the child of who starts it, and outlives him.
        scope = self.unit.endswith(".scope")
        subprocess.run([*command, *(["--scope"] if scope else []), "--", *qemu, *(["-daemonize"] if scope else [])], check=True)
        wait_until(lambda: self.qmp_path.exists() and PID.exists() and PID.read_text().strip(), 30, "plain QEMU")
        self.pid = int(PID.read_text())
        return self

    def __exit__(self, *_exc: object) -> None:
        qmpin.systemctl("stop", self.unit)
        wait_until(lambda: not self.cgroup.exists(), 60, f"{self.unit} to be gone")
        self.qmp_path.unlink(missing_ok=True)
        PID.unlink(missing_ok=True)
