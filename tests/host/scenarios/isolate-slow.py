"""A lock that is kept, a bus that does not answer and an irqbalance that answers late delay what needs them, and nothing else.

Three VMs are attached and detached during each. No watchdog expires, `status` answers, Proxmox's own client never fails, qmpin
holds no monitor longer than QEMU takes to answer, and the host is as before. Times are compared with those without an obstacle:
they are an emulator's. What a visit takes on a real machine is in tests/attached/visits.rs.
"""

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import qmpin
import state
from holds import Holds
from pve_poller import PvePoller
from wait import wait_until

LIMIT_S = 600
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x", "5900x-one-node", "epyc-4x")

VMIDS = (100, 101, 102)
# systemd would end a process that is silent for so long; each obstacle lasts longer.
WATCHDOG_S = 6
OBSTACLE_S = 9
# What `status` may take, and how long qmpin may hold a monitor beyond QEMU's own answers. Where the emulated host alone, without
# an obstacle, comes near that, an obstacle may add half of it.
STATUS_LIMIT_S = 1.0
OWN_HOLD_LIMIT_MS = 50.0
PR_SET_NAME = 15


def run(host):
    before = host.before()
    with contextlib.ExitStack() as stack:
        vms = [stack.enter_context(host.vm(vmid, cpus=2, disks=0, memory_mib=32)) for vmid in VMIDS]
        for vm in vms:
            vm.wait_guest()
        alone = state.capture()
        # What it takes without, and the state folder's locks, which need it to be there.
        usual = everything(host, vms, "nothing", contextlib.nullcontext)
        for name, obstacle in (("locks", locks_kept), ("bus", bus_silent), ("irqbalance", irqbalance_late)):
            everything(host, vms, name, obstacle, usual)
            state.check_same(alone, state.capture())
            assert not os.listdir("/run/qmpin"), os.listdir("/run/qmpin")
    state.check_same(before, state.capture())


def everything(host, vms, name, obstacle, usual=None):
    """Attaches all VMs while there is an OBSTACLE, and detaches them while it is there again. Returns what `status` took at most, and
    how long a monitor was held beyond QEMU's answers; compares both with the USUAL ones.
    """
    followers = [qmpin.Attached(vm.vmid, isolation="exclusive", check_interval_s=1, watchdog_s=WATCHDOG_S) for vm in vms]
    with contextlib.ExitStack() as stack:
        pollers = [stack.enter_context(PvePoller(vm)) for vm in vms]
        holds = stack.enter_context(Holds())
        with obstacle():
            for vm, follower in zip(vms, followers):
                threads = vm.roles().all_tids()
                follower.begin()
                holds.qemus[follower.process.pid] = threads
            slowest_s = ask_status(host)
        for follower in followers:
            wait_until(follower._is_ready, qmpin.LIMIT_S, f"VM {follower.vmid} to be attached", follower.log)
        for vm, follower in zip(vms, followers):
            follower.settle(vm)
        with obstacle():
            for follower in followers:
                follower.process.send_signal(signal.SIGTERM)
            slowest_s = max(slowest_s, ask_status(host))
        for follower in followers:
            code = follower.wait()
            print(f"--- qmpin attach {follower.vmid}, {name}\n{follower.log()}---")
            assert code == 0, f"{name}: VM {follower.vmid}: ended with {code}: {follower.log()}"
    silence_s = max(follower.longest_silence_s() for follower in followers)
    slowest_ms = max(tally.slowest_ms for poller in pollers for tally in poller.report.tallies.values())
    own_ms = max((visit.own_ms for visit in holds.visits), default=0.0)
    held_ms = max((visit.held_ms for visit in holds.visits), default=0.0)
    host.note(
        f"{name}: status within {slowest_s:.1f} s, watchdog silent for {silence_s:.1f} s, slowest answer to Proxmox {slowest_ms:.0f} ms,"
        f" {len(holds.visits)} visits held a monitor for {held_ms:.0f} ms at most, and {own_ms:.1f} ms beyond QEMU's answers"
    )
    for poller in pollers:
        poller.report.check()
    assert {visit.supervisor for visit in holds.visits} == set(holds.qemus), holds.visits
    assert silence_s < WATCHDOG_S, f"{name}: {silence_s:.1f} s without a word to the watchdog"
    if usual is not None:
        usual_s, usual_ms = usual
        most_s = max(STATUS_LIMIT_S, usual_s + STATUS_LIMIT_S / 2)
        most_ms = max(OWN_HOLD_LIMIT_MS, usual_ms + OWN_HOLD_LIMIT_MS / 2)
        assert slowest_s < most_s, f"{name}: status took {slowest_s:.1f} s, else {usual_s:.1f} s"
        assert own_ms < most_ms, f"{name}: held for {own_ms:.0f} ms, else {usual_ms:.0f} ms: {holds.visits}"
    for follower in followers:
        follower.__exit__()
    return slowest_s, own_ms


def ask_status(host):
    """Asks for the status as long as an obstacle lasts; what it took at most, in seconds."""
    slowest_s, end = 0.0, time.monotonic() + OBSTACLE_S
    while time.monotonic() < end:
        began = time.monotonic()
        host.run("qmpin", "status")
        slowest_s = max(slowest_s, time.monotonic() - began)
    return slowest_s


@contextlib.contextmanager
def locks_kept():
    """Another process of root's keeps both locks for a part of the time, and an unprivileged user one on the folder all the time."""
    Path("/run/qmpin").mkdir(mode=0o755, exist_ok=True)
    squatter = subprocess.Popen(["setpriv", "--reuid=65534", "--clear-groups", "flock", "--no-fork", "/run/qmpin", "sleep", "600"])
    files = [os.open(f"/run/qmpin/{name}", os.O_WRONLY | os.O_CREAT, 0o600) for name in (".host.lock", ".leases.lock")]
    for file in files:
        fcntl.flock(file, fcntl.LOCK_EX)
    release = threading.Timer(OBSTACLE_S * 0.8, lambda: [os.close(file) for file in files])
    release.start()
    try:
        yield
    finally:
        release.join()
        squatter.kill()
        squatter.wait()


@contextlib.contextmanager
def bus_silent():
    """The system bus is stopped: no call to systemd is answered."""
    pid = int(qmpin.systemctl("show", "dbus.service", "--value", "-p", "MainPID").stdout)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def irqbalance_late():
    """A process of root's that looks like irqbalance takes every question, and answers when no process listens any more."""
    process = multiprocessing.get_context("fork").Process(target=late, daemon=True)
    process.start()
    wait_until(lambda: list(Path("/run/irqbalance").glob("*.sock")), 30, "the late irqbalance to listen", lambda: "")
    try:
        yield
    finally:
        process.kill()
        process.join()
        for path in Path("/run/irqbalance").glob("*.sock"):
            path.unlink()
        Path("/run/irqbalance").rmdir()


def late():
    ctypes.CDLL(None).prctl(PR_SET_NAME, b"irqbalance", 0, 0, 0)
    folder = Path("/run/irqbalance")
    folder.mkdir(exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(folder / f"irqbalance{os.getpid()}.sock"))
    listener.listen(64)
    while True:
        line, _ = listener.accept()
        threading.Timer(OBSTACLE_S, answer, [line]).start()


def answer(line):
    with contextlib.suppress(OSError):
        line.sendall(b"SLEEP 10 BANNED 00000000")
    line.close()
