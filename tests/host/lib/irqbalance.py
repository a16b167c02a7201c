"""The suite's own irqbalance, and what it says of itself over its socket."""

import array
import os
import re
import socket
import subprocess
from pathlib import Path

import qmpin
from wait import wait_until

UNIT = "qtest-irqbalance.service"
UNIT_PATH = Path("/run/systemd/system") / UNIT
SOCKETS = Path("/run/irqbalance")
# Where irqbalance puts them is its own choice.
PLACED = ["proc/irq/*/smp_affinity_list"]


class Irqbalance:
    """In the sandbox of its own unit, and with an interval of a second."""

    def __init__(self, host):
        self.host = host
        self.pid = 0

    def __enter__(self):
        text = Path("/usr/lib/systemd/system/irqbalance.service").read_text()
        assert "$IRQBALANCE_ARGS" in text, text
        UNIT_PATH.parent.mkdir(parents=True, exist_ok=True)
        UNIT_PATH.write_text(text.replace("$IRQBALANCE_ARGS", "-t 1"))
        qmpin.systemctl("daemon-reload")
        self.restart()
        return self

    def __exit__(self, *_exc):
        qmpin.systemctl("stop", UNIT)
        print(subprocess.run(["journalctl", "-q", "-o", "cat", "-u", UNIT], capture_output=True, text=True).stdout)
        UNIT_PATH.unlink()
        qmpin.systemctl("daemon-reload")

    def restart(self):
        qmpin.systemctl("restart", UNIT)
        self.pid = int(qmpin.systemctl("show", UNIT, "--value", "-p", "MainPID").stdout)
        path = SOCKETS / f"irqbalance{self.pid}.sock"
        wait_until(path.exists, 60, f"the socket of irqbalance ({self.pid})", lambda: list(SOCKETS.glob("*")))
        self.address = str(path)
        # Its first look at the machine is done.
        self.wait_passes(2)

    def say(self, request):
        """One request as irqbalance-ui makes it, and the answer."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            # Without a limit: with one, a full backlog is an error at once.
            line.connect(self.address)
            line.settimeout(30)
            credentials = array.array("i", [os.getpid(), os.getuid(), os.getgid()])
            line.sendmsg([request.encode()], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)])
            return b"".join(iter(lambda: line.recv(4096), b"")).decode()

    def setup(self):
        return self.say("setup")

    def banned(self):
        """The CPUs that it says it keeps interrupts off."""
        mask = int(re.fullmatch(r"SLEEP \d+ .*BANNED ([0-9a-f,]+)", self.setup()).group(1).replace(",", ""), 16)
        return {cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1}

    def wait_banned(self, cpus):
        wait_until(lambda: self.banned() == cpus, 60, f"irqbalance to exclude {sorted(cpus)}", self.setup)

    def wait_passes(self, number):
        """Until it has woken up that often: it does so once for each pass, and is asked nothing meanwhile."""
        start = self.wakeups()
        wait_until(lambda: self.wakeups() >= start + number, 120, f"{number} passes of irqbalance", self.wakeups)

    def wakeups(self):
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"^voluntary_ctxt_switches:\s*(\d+)$", status, re.MULTILINE).group(1))
