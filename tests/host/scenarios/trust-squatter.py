"""An unprivileged process that listens where irqbalance would is ignored with one warning, and makes no command wait."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import qmpin
import state
from wait import wait_until

LIMIT_S = 300
NEEDS = ("kvm", "qmpin")
NOBODY = 65534
# What a command may take longer than without a squatter, on a busy emulator: one that is waited for costs 10 s or more.
SLOWER_S = 4.0
WARNING = "irqbalance's abstract socket is ignored"

# Named `irqbalance` by the link that runs it; the whole of its address is zeros.
SQUATTER = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(bytes(108))
listener.listen(8)
open(sys.argv[2], "w").close()
kept = []
while True:
    line, _ = listener.accept()
    if sys.argv[1] == "silent":
        kept.append(line)
        continue
    try:
        line.recv(500)
        line.sendall(sys.argv[1].encode())
    except OSError:
        pass  # a client that closes the connection does not end the squatter
    line.close()
"""


def run(host):
    before = host.before()
    with host.vm(100, **host.fitting()) as vm:
        vm.wait_guest()
        took = rounds(host)
        for answer in ("silent", "SLEEP 4294967295 BANNED 00000000", "x" * 100_000):
            with squatter(answer):
                slow = {name: (now, took[name]) for name, now in rounds(host, warned=True).items() if now > took[name] + SLOWER_S}
                assert not slow, f"with a squatter that answers {answer[:40]!r}: {slow}"
    state.check_same(before, state.capture())


def rounds(host, warned=False):
    """How long each command takes, in seconds; WARNED: each names the squatter, once."""
    took = {}
    with qmpin.Attached(100, isolation="exclusive") as follower:
        for words in (["status"], ["verify", "100"], ["doctor"], ["plan", "100"]):
            done, took[words[0]] = timed(host, *words)
            if words[0] != "plan":
                assert done.stderr.count(WARNING) == warned, f"{words}: {done}"
        done, took["detach"] = timed(host, "detach", "100")
        assert done.returncode == 0, done
        wait_until(lambda: follower.process.poll() is not None, 30, "attach to end")
        assert follower.log().count(WARNING) == warned, follower.log()
    return took


def timed(host, *words):
    start = time.monotonic()
    done = host.run("qmpin", *words, check=False)
    assert done.returncode in (0, 1), done
    return done, time.monotonic() - start


@contextlib.contextmanager
def squatter(answer):
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        os.chmod(folder, 0o755)
        ready = Path(folder, "ready")
        link = Path(folder, "irqbalance")
        link.symlink_to(sys.executable)
        process = subprocess.Popen([link, "-c", SQUATTER, answer, ready], user=NOBODY, group=NOBODY, extra_groups=[])
        try:
            wait_until(ready.exists, 30, "the squatter to listen")
            yield
        finally:
            process.kill()
            process.wait()
