"""The command under test: `qmpin attach` in the background, and what must hold while it runs.

    with Attached(100) as qmpin:        # returns when systemd would be told READY
        qmpin.check(vm)                 # every thread is where the plan says
        ...
    qmpin.code                          # how it ended
"""

import json
import os
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import cpulist
import threads
from wait import wait_until

LIMIT_S = 60


class Attached:
    """`qmpin attach VMID`, followed as systemd follows a unit of Type=notify."""

    def __init__(self, vmid: int, *flags: str):
        self.vmid = vmid
        self.flags = flags
        self.code: int | None = None
        self.said: dict[str, str] = {}

    def __enter__(self) -> "Attached":
        self._dir = tempfile.TemporaryDirectory(prefix="qmpin-")
        folder = Path(self._dir.name)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(folder / "notify"))
        self._notify.setblocking(False)
        self.log_path = folder / "log"
        self._log = self.log_path.open("wb")
        self.process = subprocess.Popen(
            ["qmpin", "attach", str(self.vmid), *self.flags],
            stdin=subprocess.DEVNULL,
            stderr=self._log,
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify")},
        )
        wait_until(self._is_ready, LIMIT_S, f"qmpin to have attached VM {self.vmid}", self.log)
        return self

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"qmpin attach ended with {self.process.returncode}: {self.log()}"
        self.hear()
        return "READY" in self.said

    def hear(self) -> None:
        """Takes in what it has told systemd since."""
        while True:
            try:
                message = self._notify.recv(4096).decode()
            except BlockingIOError:
                return
            self.said.update(line.split("=", 1) for line in message.splitlines() if "=" in line)

    def log(self) -> str:
        return self.log_path.read_text()

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

    def plan(self) -> dict:
        """The plan in force, as `qmpin plan --json` tells it."""
        done = subprocess.run(
            ["qmpin", "plan", str(self.vmid), "--json", *self.flags], capture_output=True, text=True, timeout=LIMIT_S
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def settle(self, vm) -> None:
        """Waits until everything is where the plan says."""
        wait_until(lambda: not self.misplaced(vm), LIMIT_S, "every thread to be in place", lambda: self.misplaced(vm))

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
        wrong = []
        for index, tid in roles.vcpus.items():
            if index not in planned:
                wrong.append(f"vCPU {index} has no place in the plan")
            else:
                want[tid] = planned[index]
        for tid, mask in masks.items():
            if mask != want[tid]:
                wrong.append(f"tid {tid} ({threads.read(vm.pid, tid).comm}): on {mask}, planned {want[tid]}")
        return wrong

    def check(self, vm, host, threads_per_core: int = 1) -> dict:
        """The invariant of a VM that fits: all in place, vCPUs 1:1, guest siblings on host siblings, vCPUs and
        helpers behind different caches. Returns the plan."""
        self.settle(vm)
        plan = self.plan()
        places = {row["vcpu"]: cpulist.parse(row["cpus"]) for row in plan["vcpus"]}
        used = [cpu for place in places.values() for cpu in place]
        assert all(len(place) == 1 for place in places.values()), plan
        assert len(set(used)) == len(used), f"two vCPUs on one CPU: {plan}"
        if threads_per_core == 2:
            for index in range(0, len(places) - 1, 2):
                first, second = (next(iter(places[at])) for at in (index, index + 1))
                assert first // 2 == second // 2, f"vCPUs {index} and {index + 1} are no siblings: {plan}"
        llcs = [cpulist.parse(llc) for llc in host.shape["llcs"]]
        helpers = set(cpulist.parse(plan["emulator"]))
        for llc in map(set, llcs):
            assert not (llc & set(used) and llc & helpers), f"vCPUs and helpers behind one cache: {plan}"
        return plan
