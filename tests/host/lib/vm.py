"""A VM, started exactly as Proxmox starts it.

`/run/qemu-server/VMID.{pid,qmp}`, a transient scope VMID.scope in qemu.slice, QEMU run as `kvm` and daemonized, one
iothread per disk with Proxmox's names (which are too long for a thread name, so those threads are called `kvm`), vCPU
hotplug with Proxmox's device ids (`cpu2` is index 1), a second monitor that calls an event daemon no process runs.
"""

import os
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import guests
import qmp  # the method Vm.qmp hides it in annotations: quote those
import threads
from wait import wait_until

RUN = Path("/run/qemu-server")
# Proxmox runs /usr/bin/kvm, and the name becomes the comm of QEMU's threads.
KVM = Path("/run/qtest/kvm")
DISKS = Path("/var/tmp/qtest")
CGROUPS = Path("/sys/fs/cgroup")

# A start on an emulated host that also runs other things.
START_LIMIT_S = 60


@dataclass
class Roles:
    """Which host thread is which, as QEMU itself says."""

    pid: int
    vcpus: dict[int, int] = field(default_factory=dict)  # index -> tid
    iothreads: dict[str, int] = field(default_factory=dict)  # id -> tid
    others: dict[int, str] = field(default_factory=dict)  # tid -> comm

    def all_tids(self) -> set[int]:
        return {self.pid, *self.vcpus.values(), *self.iothreads.values(), *self.others}


class Vm:
    """Made by Host.vm(); see there for the options."""

    def __init__(
        self,
        vmid: int,
        *,
        cpus: int = 4,
        max_cpus: int | None = None,
        smp: str | None = None,
        guest: str = "idle",
        accel: str = "kvm",
        disks: int = 1,
        debug_threads: bool = True,
        paused: bool = False,
        memory_mib: int = 64,
        aio: str = "threads",
        extra: list[str] | None = None,
    ):
        self.vmid = vmid
        self.cpus = cpus
        self.max_cpus = max_cpus
        self.smp = smp
        self.guest = guest
        self.accel = accel
        self.disks = disks
        self.debug_threads = debug_threads
        self.paused = paused
        self.memory_mib = memory_mib
        self.aio = aio
        self.extra = extra or []
        self.pid = 0

    # --- start and end

    @property
    def qmp_path(self) -> Path:
        return RUN / f"{self.vmid}.qmp"

    @property
    def pid_path(self) -> Path:
        return RUN / f"{self.vmid}.pid"

    @property
    def scope(self) -> str:
        return f"{self.vmid}.scope"

    @property
    def cgroup(self) -> Path:
        return CGROUPS / "qemu.slice" / self.scope

    @property
    def threads_per_core(self) -> int:
        return 2 if self.smp and "threads=2" in self.smp else 1

    @property
    def debugcon(self) -> Path:
        return DISKS / f"{self.vmid}.debugcon"

    def start(self) -> "Vm":
        """Starts it and returns when `-daemonize` has returned, as Proxmox does. Raises AssertionError with QEMU's words."""
        RUN.mkdir(mode=0o750, exist_ok=True)
        DISKS.mkdir(exist_ok=True)
        _make_kvm()
        if self.accel == "kvm":
            load_kvm()
        self.debugcon.write_bytes(b"")
        scope = ["systemd-run", "--quiet", "--scope", "--slice=qemu.slice", f"--unit={self.vmid}"]
        for setting in ("CPUWeight=100", "KillMode=process", "SendSIGKILL=no", "TimeoutStopSec=infinity"):
            scope += ["-p", setting]
        # Proxmox waits for the scope of the VM before to be gone.
        wait_until(lambda: not self.cgroup.exists(), 20, f"the old {self.scope} to be gone")
        done = subprocess.run(
            [*scope, "--", *self.command()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=START_LIMIT_S,
            umask=0o077,
        )
        # TCG on TCG warns of every feature it lacks; on failure the reason is at the end.
        assert done.returncode == 0, f"VM {self.vmid} did not start: {' / '.join(done.stdout.splitlines()[-3:])}"
        self.pid = int(self.pid_path.read_text())
        return self

    def command(self) -> list[str]:
        path = f"/var/run/qemu-server/{self.vmid}"
        # Always when the version is unknown: QEMU 11 takes the option and names threads with or without.
        name = f"win{self.vmid}" + (",debug-threads=on" if self.debug_threads else "")
        reconnect = "reconnect-ms=5000" if qemu_version() >= (9, 2) else "reconnect=5"
        model = "host" if self.accel == "kvm" else "qemu64"
        args = [str(KVM), "-name", name, "-no-shutdown"]
        args += ["-chardev", f"socket,id=qmp,path={path}.qmp,server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
        args += ["-chardev", f"socket,id=qmp-event,path=/var/run/qmeventd.sock,{reconnect}"]
        args += ["-mon", "chardev=qmp-event,mode=control"]
        args += ["-pidfile", f"{path}.pid", "-daemonize"]
        if self.smp:
            args += ["-smp", self.smp]
        elif self.max_cpus:
            args += ["-smp", f"1,sockets=1,cores={self.max_cpus},maxcpus={self.max_cpus}"]
            for index in range(1, self.cpus):
                args += ["-device", f"{model}-x86_64-cpu,{_ids(index)}"]
        else:
            args += ["-smp", f"{self.cpus},sockets=1,cores={self.cpus},maxcpus={self.cpus}"]
        args += ["-nodefaults", "-vga", "none", "-display", "none", "-machine", f"pc,accel={self.accel}"]
        args += ["-cpu", model, "-m", str(self.memory_mib)]
        for disk in range(max(self.disks, 1)):
            image = guests.write(self.guest, DISKS / f"{self.vmid}-disk-{disk}.raw")
            iothread = ""
            if self.disks:
                args += ["-object", f"iothread,id=iothread-virtioscsi{disk}"]
                iothread = f",iothread=iothread-virtioscsi{disk}"
            args += ["-device", f"virtio-scsi-pci,id=virtioscsi{disk}{iothread}"]
            args += ["-drive", f"file={image},if=none,id=drive-scsi{disk},format=raw,cache=none,aio={self.aio}"]
            args += ["-device", f"scsi-hd,bus=virtioscsi{disk}.0,drive=drive-scsi{disk},id=scsi{disk},bootindex={100 + disk}"]
        # The one thing Proxmox does not have: where the guest says that it runs.
        args += ["-debugcon", f"file:{self.debugcon}"]
        if self.paused:
            args += ["-S"]
        return args + self.extra

    def kill(self) -> None:
        """SIGKILL, and waits until the process and its scope are gone."""
        if self.pid and self.alive():
            os.kill(self.pid, signal.SIGKILL)
        self.wait_gone()

    def leave_files(self) -> None:
        """SIGKILL, and nothing cleans up: the pid file and the socket stay."""
        os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: not self.alive(), 60, f"QEMU of VM {self.vmid} to end")

    def quit(self) -> None:
        """`quit` over QMP, as Proxmox's event daemon does after a guest's shutdown."""
        try:
            self.qmp("quit")
        except qmp.QmpLost:
            pass  # It may be gone before it has answered.
        self.wait_gone()

    def wait_gone(self, limit_s: float = 60) -> None:
        wait_until(lambda: not self.alive(), limit_s, f"QEMU of VM {self.vmid} to end")
        wait_until(lambda: not self.cgroup.exists(), limit_s, f"{self.scope} to be gone", self._left_in_scope)
        # As Proxmox's vm_stop_cleanup.
        for path in (self.qmp_path, self.pid_path):
            path.unlink(missing_ok=True)

    def _left_in_scope(self) -> str:
        """Who keeps the scope, where in the kernel they are, and what systemd thinks of it."""
        try:
            tids = [int(tid) for tid in (self.cgroup / "cgroup.threads").read_text().split()]
        except OSError as error:
            return str(error)
        states = []
        for tid in tids:
            try:
                status, stack = (Path(f"/proc/{tid}", name).read_text().splitlines() for name in ("status", "stack"))
            except OSError as error:  # it has ended meanwhile
                states.append(str(error))
                continue
            states += [line for line in status if line.startswith("State:")] + stack
        unit = subprocess.run(["systemctl", "show", self.scope, "-p", "ActiveState,SubState,Job"], capture_output=True, text=True)
        return f"threads {tids} in states {states}; {unit.stdout.split()}"

    def alive(self) -> bool:
        """Whether the QEMU that was started still runs (a zombie does not)."""
        try:
            cmdline = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return f"/{self.vmid}.pid".encode() in cmdline

    # --- what it says

    def qmp(self, execute: str, **arguments: Any) -> Any:
        """One command on a connection of its own, held for milliseconds. Raises qmp.QmpError, qmp.QmpLost."""
        return qmp.visit(self.qmp_path, execute, **arguments)

    def roles(self) -> Roles:
        """Which thread is which; one visit of the socket."""
        with qmp.Session(self.qmp_path) as session:
            return self.roles_over(session)

    def roles_over(self, session: "qmp.Session") -> Roles:
        """Which thread is which, for one who has the socket."""
        vcpus = {cpu["cpu-index"]: cpu["thread-id"] for cpu in session.command("query-cpus-fast")}
        iothreads = {thread["id"]: thread["thread-id"] for thread in session.command("query-iothreads")}
        roles = Roles(self.pid, vcpus, iothreads)
        known = roles.all_tids()
        roles.others = {tid: t.comm for tid, t in threads.of_process(self.pid).items() if tid not in known}
        return roles

    def masks(self) -> dict[int, str]:
        """tid -> cpulist, of every thread of the process now."""
        return {tid: thread.allowed for tid, thread in threads.of_process(self.pid).items()}

    def status(self) -> str:
        return self.qmp("query-status")["status"]

    def guest_boots(self) -> int:
        """How often the boot sector was run."""
        return self.debugcon.read_bytes().count(b"G")

    def wait_guest(self, boots: int = 1, limit_s: float = 60) -> None:
        """Until the boot sector was run BOOTS times since the start."""
        wait_until(
            lambda: self.guest_boots() >= boots,
            limit_s,
            f"boot {boots} of guest {self.guest} in VM {self.vmid}",
            lambda: f"{self.guest_boots()} boots, {self.status()}",
        )

    # --- what happens to it

    def reset(self) -> None:
        """A reset by the host, and until the guest runs again."""
        boots = self.guest_boots()
        self.qmp("system_reset")
        self.wait_guest(boots + 1)

    def stop(self) -> None:
        self.qmp("stop")

    def cont(self) -> None:
        self.qmp("cont")

    def hot_add(self, index: int) -> int:
        """Plugs vCPU INDEX as Proxmox does; its tid. The guest need not notice."""
        with qmp.Session(self.qmp_path) as session:
            return self.hot_add_over(session, index)

    def hot_add_over(self, session: "qmp.Session", index: int) -> int:
        """As hot_add, for one who has the socket."""
        slots = session.command("query-hotpluggable-cpus")
        slot = next(s for s in slots if s["props"]["core-id"] == index and "qom-path" not in s)
        props = {name: value for name, value in slot["props"].items() if name != "node-id"}
        session.command("device_add", driver=slot["type"], id=f"cpu{index + 1}", **props)
        return self.roles_over(session).vcpus[index]

    def hot_remove(self, index: int, limit_s: float = 60) -> None:
        """Unplugs vCPU INDEX, and until it is gone. Needs guest="hotplug" (which acknowledges it) and accel="kvm" (under
        TCG it never completes).
        """
        assert self.guest == "hotplug" and self.accel == "kvm", "only the hotplug guest under KVM lets a vCPU go"
        self.qmp("device_del", id=f"cpu{index + 1}")
        wait_until(lambda: index not in self.roles().vcpus, limit_s, f"vCPU {index} of VM {self.vmid} to be gone")

    def iothread_add(self, name: str) -> int:
        """Adds an iothread; its tid."""
        self.qmp("object-add", qom_type="iothread", id=name)
        return self.roles().iothreads[name]

    def iothread_delete(self, name: str) -> None:
        """Deletes an iothread that no device uses, and until its thread is gone."""
        tid = self.roles().iothreads[name]
        self.qmp("object-del", id=name)
        wait_until(lambda: tid not in self.masks(), 30, f"the thread of iothread {name} to end")

    # --- a context manager ends it

    def __enter__(self) -> "Vm":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()


def qemu_version() -> tuple[int, ...]:
    words = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout.split()
    return tuple(int(part) for part in words[3].split("."))


def load_kvm() -> None:
    """/dev/kvm; the machine's SVM is emulated and works."""
    if not Path("/dev/kvm").exists():
        subprocess.run(["modprobe", "kvm_amd"], check=True)


def _make_kvm() -> None:
    if not KVM.exists():
        KVM.parent.mkdir(parents=True, exist_ok=True)
        # A symlink: the kernel takes the comm from the name that was executed.
        qemu = shutil.which("qemu-system-x86_64")
        assert qemu is not None
        KVM.symlink_to(qemu)


def _ids(index: int) -> str:
    return f"id=cpu{index + 1},socket-id=0,core-id={index},thread-id=0"
