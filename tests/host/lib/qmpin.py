"""The command under test, and what must hold while it runs.

    with Attached(100) as qmpin:        # `qmpin attach 100` in the background, from the moment it says READY
        qmpin.check(vm, host)           # every thread is where the plan says, and no other program was moved
        ...
    qmpin.code                          # how it ended

    with Unit(100) as unit:             # the same as a unit of systemd
        unit.start()
        unit.check(vm, host)
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import cpulist
import threads
from wait import wait_until

T = TypeVar("T")

LIMIT_S = 60
# `man 7 socket`: when the kernel had a message. Python has no name for it.
SO_TIMESTAMP = 29
# The exit code where QEMU cannot be asked, and how often that is tried.
NO_ANSWER = 5
TRIES = 5
# The kernel's threads for one QEMU process, outside of it.
KERNEL_THREAD = re.compile(r"(?:kvm-pit/|kvm-nx-lpage-recovery-|vhost-)(\d+)")


class Follower:
    """What must hold for a VM that is followed, a process that runs `qmpin attach`."""

    def __init__(self, vmid: int, *flags: str):
        self.vmid = vmid
        self.flags = flags
        self.remember()

    def remember(self) -> None:
        """Takes down where every thread of the host is that is no attached VM's: there it has to stay."""
        attached = leased()
        self.others = {key: thread for key, thread in by_key().items() if vm_of(thread) not in attached}

    def plan(self) -> dict:
        """The plan in force, as `qmpin plan --json` tells it."""
        done = subprocess.run(
            ["qmpin", "plan", str(self.vmid), "--json", *self.flags], capture_output=True, text=True, timeout=LIMIT_S
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def log(self) -> str:
        raise NotImplementedError

    def settle(self, vm, limit_s: float = LIMIT_S) -> None:
        """Waits until everything is where the plan says."""
        wait_until(
            lambda: not self.misplaced(vm),
            limit_s,
            "every thread to be in place",
            lambda: f"{self.misplaced(vm)}; qmpin says: {self.log().splitlines()[-3:]}",
        )

    def misplaced(self, vm) -> list[str]:
        """Every thread that is not where the plan says, by the kernel's own files and QEMU's own word."""
        plan = self.plan()
        roles = vm.roles()
        masks = vm.masks()
        want: dict[int, str] = {tid: plan["emulator"] for tid in masks}
        for row in plan["iothreads"]:
            if row["iothread"] in roles.iothreads:
                want[roles.iothreads[row["iothread"]]] = row["cpus"]
        planned = {row["vcpu"]: row["cpus"] for row in plan["vcpus"]}
        wrong = [f"vCPU {index} has no place in the plan" for index in roles.vcpus if index not in planned]
        wrong += [f"vCPU {index} is in the plan and not in the VM" for index in planned if index not in roles.vcpus]
        want.update({tid: planned[index] for index, tid in roles.vcpus.items() if index in planned})
        # The kernel shows a mask with the offline CPUs in it that it was given before.
        online = online_cpus()
        for tid, mask in masks.items():
            thread = threads.read(vm.pid, tid)
            if cpulist.parse(mask) & online != cpulist.parse(want[tid]) and thread is not None:
                wrong.append(f"tid {tid} ({thread.comm}): on {mask}, planned {want[tid]}")
        return wrong

    def parted(self, vm, plan: dict) -> list[str]:
        """Every two siblings of the guest that are none on the host."""
        if vm.threads_per_core != 2:
            return []
        cores = [min(cpulist.parse(row["cpus"])) // 2 for row in plan["vcpus"]]
        pairs = zip(range(0, len(cores), 2), cores[::2], cores[1::2])
        return [f"vCPUs {at} and {at + 1} are no siblings" for at, first, second in pairs if first != second]

    def moved(self, now: dict[tuple[int, int], threads.Thread], kernel: bool = True) -> list[str]:
        """Every thread of the host, of no attached VM, that is not where it was before; without the KERNEL's own, those alone that
        are of processes. Rescuers do not count: the kernel moves them as they help (see lib/state.py).
        """
        attached = leased()
        # The kernel takes an offline CPU out of some masks by itself.
        online = online_cpus()
        same = lambda one, other: cpulist.parse(one.allowed) & online == cpulist.parse(other.allowed) & online
        return [
            f"tid {then.tid} ({then.comm}): was on {then.allowed}, is on {now[key].allowed}"
            for key, then in self.others.items()
            if key in now
            and not same(now[key], then)
            and vm_of(then) not in attached
            and not threads.is_qmpin(then)
            and not threads.is_rescuer(then)
            and (kernel or not then.kernel)
        ]

    def check(self, vm, host, limit_s: float = LIMIT_S, kernel: bool = True, crowded: bool = False) -> dict:
        """The invariant of a VM that fits. Returns the plan. Without KERNEL its own threads do not count: it has moved some by itself,
        as it does when a CPU goes offline. On a CROWDED host other VMs leave no cache for the helpers, and the plan says so.

        Every thread is in its place; a CPU for each vCPU; guest siblings on host siblings; vCPUs and helpers behind
        different caches, where the host has more than one; no other thread of the host has moved.
        """
        self.settle(vm, limit_s)
        plan = self.plan()
        places = {row["vcpu"]: cpulist.parse(row["cpus"]) for row in plan["vcpus"]}
        used = [cpu for place in places.values() for cpu in place]
        assert all(len(place) == 1 for place in places.values()), plan
        assert len(set(used)) == len(used), f"two vCPUs on one CPU: {plan}"
        parted = self.parted(vm, plan)
        assert not parted, f"{parted}: {plan}"
        exclusive = cpulist.parse(plan["exclusive"])
        assert set(used) <= exclusive, plan
        helpers = cpulist.parse(plan["emulator"]).union(*(cpulist.parse(row["cpus"]) for row in plan["iothreads"]))
        assert not helpers & exclusive, f"helpers on CPUs of vCPUs: {plan}"
        llcs = [cpulist.parse(llc) for llc in host.shape["llcs"]]
        for llc in llcs if len(llcs) > 1 else []:
            is_shared = bool(llc & set(used) and llc & helpers)
            is_named = any(row["rule"] == "emulator" and row["verdict"] == "degraded" for row in plan["report"])
            assert not is_shared or crowded and is_named, f"vCPUs and helpers behind one cache: {plan}"
        now = by_key()
        for thread in now.values():
            if thread.kernel and vm_of(thread) == vm.pid:
                on = cpulist.parse(thread.allowed) & online_cpus()
                assert on == cpulist.parse(plan["emulator"]), f"{thread.comm} is on {thread.allowed}: {plan}"
        moved = self.moved(now, kernel)
        assert not moved, f"threads that are none of VM {self.vmid}'s were moved: {moved}"
        return plan


class Attached(Follower):
    """`qmpin attach VMID`, followed as systemd follows a unit of Type=notify.

    CHECK_INTERVAL_S is qmpin's own setting: 1 to be quick where only its slow timer can see what happened, a great one to
    show that it does not need the timer. ISOLATION is its level: with "pinned" nothing of the host changes but the VM. POLICY
    is what else its policy file says.
    """

    def __init__(
        self,
        vmid: int,
        *flags: str,
        check_interval_s: int | None = None,
        isolation: str = "pinned",
        policy: str = "",
        watchdog_s: float | None = None,
    ):
        self._dir = tempfile.TemporaryDirectory(prefix="qmpin-")
        self.folder = Path(self._dir.name)
        if check_interval_s is not None:
            policy += f"\ncheck_interval_s = {check_interval_s}\n"
        if policy:
            (self.folder / "qmpin.toml").write_text(policy)
            flags = (*flags, "--config-dir", str(self.folder))
        super().__init__(vmid, "--isolation", isolation, *flags)
        self.code: int | None = None
        self.said: dict[str, str] = {}
        self.watchdog_s = watchdog_s
        # When the kernel had its words to the watchdog, in seconds of the epoch.
        self.beats: list[float] = []

    def __enter__(self) -> "Attached":
        self.begin()
        wait_until(self._is_ready, LIMIT_S, f"qmpin to have attached VM {self.vmid}", self.log)
        return self

    def begin(self) -> None:
        """Starts it, and does not wait for READY."""
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMP, 1)
        self._notify.bind(str(self.folder / "notify"))
        self._notify.setblocking(False)
        self._log = (self.folder / "log").open("wb")
        self.process = subprocess.Popen(
            ["qmpin", "attach", str(self.vmid), *self.flags],
            stdin=subprocess.DEVNULL,
            stderr=self._log,
            env={**os.environ, "NOTIFY_SOCKET": str(self.folder / "notify"), **self._watchdog()},
        )

    def _watchdog(self) -> dict[str, str]:
        return {} if self.watchdog_s is None else {"WATCHDOG_USEC": str(int(self.watchdog_s * 1e6))}

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"qmpin attach ended with {self.process.returncode}: {self.log()}"
        self.hear()
        return "READY" in self.said

    def hear(self) -> None:
        """Reads what it has notified systemd of since."""
        while True:
            try:
                data, beside, _, _ = self._notify.recvmsg(4096, 256)
            except BlockingIOError:
                return
            message = data.decode()
            if "WATCHDOG=1" in message.splitlines():
                self.beats += [sum(struct.unpack("ll", data)[i] / (1, 1e6)[i] for i in (0, 1)) for _, _, data in beside]
            self.said.update(line.split("=", 1) for line in message.splitlines() if "=" in line)

    def longest_silence_s(self) -> float:
        """The longest time between two words to the watchdog."""
        self.hear()
        return max((later - sooner for sooner, later in zip(self.beats, self.beats[1:])), default=0.0)

    def wait_status(self, words: str) -> None:
        """Until its status line has these words."""

        def there() -> bool:
            self.hear()
            return words in self.said.get("STATUS", "")

        wait_until(there, LIMIT_S, f"qmpin to say {words!r}", lambda: self.said)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Ends it and returns its code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.code = self.process.wait(LIMIT_S)
        return self.code

    def wait(self) -> int:
        """Waits for it to end by itself."""
        self.code = self.process.wait(LIMIT_S)
        return self.code

    def __exit__(self, *_exc: object) -> None:
        self.stop()
        print(f"--- qmpin attach {self.vmid}\n{self.log()}---")
        self._log.close()
        self._notify.close()
        self._dir.cleanup()


class Service(Follower):
    """`qmpin@VMID.service` as it is shipped: enabled, started and stopped by the scenario, and left alone here."""

    def __init__(self, vmid: int):
        super().__init__(vmid)
        self.name = f"qmpin@{vmid}.service"
        self.path_unit = f"qmpin@{vmid}.path"
        self.since_s = time.time()

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_exc: object) -> None:
        print(f"--- {self.name}\n{self.log()}---")

    def start(self, check: bool = True) -> int:
        """Starts it as an administrator does; returns systemctl's code."""
        return systemctl("start", self.name, check=check).returncode

    def stop(self) -> None:
        systemctl("stop", self.name)

    def show(self, setting: str) -> str:
        return systemctl("show", self.name, "--value", "-p", setting).stdout.strip()

    def states(self) -> str:
        names = ("ActiveState", "SubState", "Result", "ExecMainStatus", "NRestarts", "StatusText")
        return ", ".join(f"{name} {self.show(name)}" for name in names)

    def wait_state(self, state: str, restarts: int | None = None) -> None:
        """Until it is `active`, `inactive`, `failed`, and, where given, was restarted that often."""

        def there() -> bool:
            return self.show("ActiveState") == state and restarts in (None, int(self.show("NRestarts")))

        wait_until(there, LIMIT_S, f"{self.name} to be {state}", self.states)

    def wait_log(self, words: str, times: int = 1) -> None:
        """Until its log has these words that often."""
        wait_until(lambda: self.log().count(words) >= times, LIMIT_S, f"{self.name} to log {words!r}", self.log)

    def main_pid(self) -> int:
        return int(self.show("MainPID"))

    def log(self) -> str:
        """What it has logged since this object was made; unlike `systemctl show` it knows nothing of systemd's own messages."""
        command = ["journalctl", "-q", "-o", "cat", "-u", self.name, "--since", f"@{self.since_s:.0f}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S).stdout

    def check(self, vm, host, limit_s: float = LIMIT_S, kernel: bool = True, crowded: bool = False) -> dict:
        plan = super().check(vm, host, limit_s, kernel, crowded)
        verify = lambda: host.run("qmpin", "verify", str(self.vmid), check=False)
        wait_until(lambda: verify().returncode == 0, limit_s, f"all to hold for VM {self.vmid}", lambda: verify().stdout)
        return plan

    def moved(self, now: dict[tuple[int, int], threads.Thread], kernel: bool = True) -> list[str]:
        """No thread counts: at its level others are moved. Where they may be is what `verify` looks at."""
        return []

    def wait_over(self) -> None:
        """Until it has ended with its VM, without a failure and without a restart that systemd made by itself."""
        self.wait_state("inactive")
        assert self.show("Result") in ("success", "exec-condition"), self.states()


class Shipped:
    """The files of the repository, where the package has them: units, and the binary under test. Removed at the end of the block.

    POLICY is the text of /etc/qmpin/qmpin.toml, for all VMs of the block.
    """

    UNITS = Path("/job/integration/systemd")
    UNIT_FOLDER = Path("/usr/lib/systemd/system")
    HOOK = Path("/job/integration/proxmox/qmpin-hook")
    BINARY = Path("/usr/bin/qmpin")
    CONFIG = Path("/etc/qmpin")

    def __init__(self, policy: str = ""):
        self.policy = policy

    def __enter__(self) -> "Shipped":
        shutil.copy(shutil.which("qmpin", path="/job/bin"), self.BINARY)
        for unit in self.UNITS.iterdir():
            shutil.copy(unit, self.UNIT_FOLDER)
        self.write_policy("qmpin", self.policy)
        systemctl("daemon-reload")
        return self

    def __exit__(self, *_exc: object) -> None:
        for pattern in ("qmpin@*.path", "qmpin-running@*", "qmpin@*.service"):
            systemctl("stop", pattern)
        systemctl("reset-failed", "qmpin*", check=False)
        subprocess.run(["qmpin", "detach", "--all"], stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S)
        for mark in Path("/run/qmpin").glob("*.detached"):
            mark.unlink()
        for unit in self.UNITS.iterdir():
            (self.UNIT_FOLDER / unit.name).unlink()
        self.BINARY.unlink()
        shutil.rmtree(self.CONFIG)
        shutil.rmtree("/var/lib/qmpin", ignore_errors=True)
        systemctl("daemon-reload")

    def write_policy(self, name: str | int, text: str) -> None:
        """/etc/qmpin/NAME.toml; renamed over what is there, as an editor does."""
        self.CONFIG.mkdir(exist_ok=True)
        new = self.CONFIG / "new"
        new.write_text(text + "\n")
        new.rename(self.CONFIG / f"{name}.toml")


class Unit(Service):
    """The shipped `qmpin@VMID.service` at the level "pinned", where nothing of the host changes but the VM."""

    def __init__(self, vmid: int):
        super().__init__(vmid)
        self._shipped = Shipped('isolation = "pinned"')

    def __enter__(self) -> "Unit":
        self._shipped.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._shipped.__exit__(*exc)

    def watchdog_s(self) -> float:
        """How long systemd waits for a sign of life."""
        text = self.show("WatchdogUSec")
        units = {"min": 60.0, "s": 1.0, "ms": 0.001}
        parts = re.findall(r"(\d+)(min|ms|s)", text)
        assert parts, text
        return sum(float(number) * units[unit] for number, unit in parts)

    def moved(self, now: dict[tuple[int, int], threads.Thread], kernel: bool = True) -> list[str]:
        """At this level no thread of the host may move."""
        return Follower.moved(self, now, kernel)


def attach_once(host, vmid: int, *flags: str, check: bool = True) -> subprocess.CompletedProcess:
    """`qmpin attach --once`, patiently."""
    done = patiently(lambda: host.run("qmpin", "attach", str(vmid), "--once", *flags, check=False))
    assert done.returncode == 0 or not check, f"attach --once of VM {vmid} ended with {done.returncode}: {done.stderr}"
    return done


def leaves_alone(host, follower: Attached, path: Path, value: str) -> None:
    """Another program writes VALUE where qmpin has written, and qmpin is killed: `detach` leaves that so, and names it."""
    # Stopped, so that it cannot apply it again.
    os.kill(follower.process.pid, signal.SIGSTOP)
    path.write_text(value)
    follower.stop(signal.SIGKILL)
    said = host.run("qmpin", "detach", str(follower.vmid)).stdout
    assert f"{path} was changed externally to {value}" in said, said
    assert host.read(path) == value, host.read(path)


def patiently(attach: Callable[[], T]) -> T:
    """What ATTACH returns, once more where QEMU was late: on a very busy emulated host it may be."""
    for _ in range(TRIES):
        done = attach()
        if not was_late(done):
            break
        print(f"once more: {done.stderr or done.stdout}", end="")
    return done


def was_late(done) -> bool:
    """Whether QEMU did not answer in time. Then nothing was done."""
    return done.returncode == NO_ANSWER and "did not come within" in (done.stderr or done.stdout)


def systemctl(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0 or not check, f"systemctl {' '.join(words)}: {done.stderr.strip()}"
    return done


def online_cpus() -> set[int]:
    return cpulist.parse(Path("/sys/devices/system/cpu/online").read_text())


def leased() -> set[int]:
    """The QEMU processes of all attached VMs."""
    pids = set()
    for path in Path("/run/qmpin").glob("*.lease"):
        with contextlib.suppress(FileNotFoundError):
            pids.add(json.loads(path.read_text())["qemu"]["pid"])
    return pids


def by_key() -> dict[tuple[int, int], threads.Thread]:
    """Every thread of the host by (tid, start time)."""
    return {(thread.tid, thread.start): thread for thread in threads.of_host()}


def vm_of(thread: threads.Thread) -> int:
    """The process whose thread it is; that of the VM for a kernel thread that serves one."""
    served = KERNEL_THREAD.fullmatch(thread.comm) if thread.kernel else None
    return int(served.group(1)) if served else thread.pid
