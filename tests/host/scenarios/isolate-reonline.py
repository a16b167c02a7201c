"""`reonline`: a VM's CPUs go offline and come back before its first pin; no thread loses a mask, a thread that would is left alone, and a
CPU that a killed qmpin has left offline is brought back by the next qmpin.
"""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import cpulist
import qmpin
import state
from wait import wait_until

LIMIT_S = 600
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x", "5900x-one-node")

CPUS = Path("/sys/devices/system/cpu")
JOURNAL = Path("/run/qmpin/.host.journal")
MINE = {12, 13, 14, 15}
UNIT = "qtest-narrow.service"


def run(host):
    before = host.before()
    with host.vm(100, cpus=4) as vm, host.vm(101, cpus=2) as other, bystanders(host) as alone_on_15:
        vm.wait_guest()
        other.wait_guest()
        alone = state.capture()
        with attached(101, "pinned", 'vcpus = "8,10"\n') as neighbour:
            earlier = offlines(host)
            with attached(100, "pinned", 'vcpus = "12-15"\nreonline = true\n') as follower:
                went(host, follower, alone_on_15, earlier)
                follower.settle(vm)
                others(alone, vm, other)
                assert not follower.moved(qmpin.by_key())
            assert follower.code == 0
            assert "online CPUs are now" not in neighbour.log(), "another VM's CPUs are none of its business"
            refused(host)
            once_only(host, vm)
        state.check_same(alone, state.capture())
        killed(host, vm, alone)
        strict(host, alone)
        os.kill(alone_on_15.pid, signal.SIGKILL)
    orphaned(host)
    ignore = ["sys/fs/cgroup/system.slice/*", "sys/fs/cgroup/cgroup.subtree_control", "sys/fs/cgroup/*.slice/cpuset.*"]
    ignore += ["sys/fs/cgroup/init.scope/cpuset.*"]
    state.check_same(before, state.capture(), ignore=ignore)


class Policy(qmpin.Attached):
    """`qmpin attach` with a policy file of its own."""

    def __init__(self, vmid, text, isolation):
        self.config = tempfile.TemporaryDirectory(prefix="qmpin-policy-")
        Path(self.config.name, "qmpin.toml").write_text(text)
        super().__init__(vmid, "--config-dir", self.config.name, isolation=isolation)

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self.config.cleanup()


def attached(vmid, isolation, text):
    return Policy(vmid, f"check_interval_s = 1\n{text}", isolation)


@contextlib.contextmanager
def bystanders(host):
    """Processes with CPUs of their own choice: in a cpuset and in none, on some of the VM's, and one on a single one of them."""
    host.run("systemd-run", "--quiet", f"--unit={UNIT}", "-p", "AllowedCPUs=0,12,14", "taskset", "-c", "0,12", "sleep", "900")
    chosen = [subprocess.Popen(["taskset", "-c", cpus, "sleep", "900"]) for cpus in ("12,13", "0,14", "12-15", "15")]
    wait_until(lambda: Path(f"/sys/fs/cgroup/system.slice/{UNIT}/cpuset.cpus").exists(), 20, "the service's cpuset")
    try:
        yield chosen[-1]
    finally:
        for process in chosen:
            process.kill()
            process.wait()
        host.run("systemctl", "stop", UNIT)


def offlines(host):
    """How often each CPU went offline, by the kernel's log."""
    found = {}
    for cpu in re.findall(r"smpboot: CPU (\d+) is now offline", host.run("dmesg").stdout):
        found[int(cpu)] = found.get(int(cpu), 0) + 1
    return found


def went(host, follower, alone_on_15, earlier):
    """Three of four CPUs went; the log names the one that did not, and why."""
    now = offlines(host)
    assert {cpu for cpu in now if now[cpu] > earlier.get(cpu, 0)} == MINE - {15}, (earlier, now)
    assert host.online() == cpulist.write(range(24))
    log = follower.log()
    assert "reonline: CPUs 12-14 were offline and online again" in log, log
    assert f"CPU 15 is left as it is: thread {alone_on_15.pid} (sleep) may run nowhere else" in log, log
    assert "may have lost" not in log, log
    assert "CPU 15 is left as it is" in host.run("qmpin", "status").stdout
    remembered = JOURNAL.read_text() if JOURNAL.exists() else ""
    assert remembered.count('/online"') % 2 == 0, remembered


def others(alone, *vms):
    """No process but these VMs' threads has another mask than before, and no file of the host's has changed."""
    # Its own journals and leases are new, and the VMs' threads are where they belong.
    rows = state.without_ending(state.diff(alone, state.capture(), ignore=["run/qmpin/*"]))
    own = {str(tid) for vm in vms for tid in vm.masks()} | {f"kvm-pit/{vm.pid}" for vm in vms}
    rows = [row for row in rows if not (row.path.startswith("thread/") and is_of(row.path, own))]
    assert not rows, [str(row) for row in rows]


def is_of(path, own):
    key, _, comm = path.removeprefix("thread/").partition(" ")
    return key.split("@")[0] in own or comm in own


def refused(host):
    """A CPU that the kernel does not let go stays, and the rest goes on."""
    # The kernel's own fault injection: the next step of that CPU through this state fails.
    states = Path(CPUS / "hotplug/states").read_text()
    number = re.search(r"^\s*(\d+): sched:active", states, re.MULTILINE).group(1)
    (CPUS / "cpu13/hotplug/fail").write_text(number)
    before = offlines(host)
    with attached(100, "pinned", 'vcpus = "12-15"\nreonline = true\n') as follower:
        assert "reonline: CPU 13 could not be taken offline" in follower.log(), follower.log()
    after = offlines(host)
    assert {cpu for cpu in after if after[cpu] > before.get(cpu, 0)} == {12, 14}, (before, after)


def once_only(host, vm):
    """A qmpin that goes on where another was killed takes nothing offline; nor does a hotplug."""
    with attached(100, "pinned", 'vcpus = "12-15"\nreonline = true\n') as follower:
        follower.stop(signal.SIGKILL)
    before = offlines(host)
    with attached(100, "pinned", 'vcpus = "12-15"\nreonline = true\n') as follower:
        vm.iothread_add("iothread-virtioscsi9")
        follower.settle(vm)
        vm.iothread_delete("iothread-virtioscsi9")
    assert offlines(host) == before


def kill_while_offline(vmid, *more):
    """Starts `qmpin attach`, kills it when a CPU is offline, and does so again until one stays so. Which."""
    everything = (CPUS / "online").read_text()
    for _ in range(40):
        with tempfile.TemporaryDirectory() as config:
            Path(config, "qmpin.toml").write_text('vcpus = "12-14"\nshare = true\nreonline = true\n')
            words = ["qmpin", "attach", str(vmid), "--isolation", "pinned", "--config-dir", config]
            process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 60
            with (CPUS / "online").open() as online:
                while process.poll() is None and time.monotonic() < deadline:
                    online.seek(0)
                    if online.read() != everything:
                        break
            process.kill()
            for pid in more:
                os.kill(pid, signal.SIGKILL)
            process.wait()
        offline = cpulist.parse(everything) - cpulist.parse((CPUS / "online").read_text())
        if offline:
            return offline
        if more:
            return offline
        # A first attach is wanted.
        subprocess.run(["qmpin", "detach", str(vmid)], check=True, stdout=subprocess.DEVNULL)
    raise AssertionError("no CPU stayed offline in 40 tries")


def killed(host, vm, alone):
    """SIGKILL while a CPU is offline: `detach` brings it back, and so does the next attach, which can have it then."""
    offline = kill_while_offline(100)
    assert "online" in JOURNAL.read_text()
    print(f"left offline: {offline}", host.run("qmpin", "detach", "100").stdout)
    state.check_same(alone, state.capture())
    offline = kill_while_offline(100)
    with attached(100, "pinned", 'vcpus = "12-14"\nshare = true\n') as follower:
        follower.settle(vm)
        assert "was left offline: online again" in follower.log(), follower.log()
        assert cpulist.parse(follower.plan()["exclusive"]) == {12, 13, 14}
    state.check_same(alone, state.capture())
    # Beside a VM that is followed: its supervisor's next look is enough.
    with attached(101, "exclusive", 'vcpus = "8,10"\n'):
        offline = kill_while_offline(100)
        all_back = lambda: host.online() == cpulist.write(range(24))
        wait_until(all_back, 30, f"CPUs {offline} to be brought back by VM 101's supervisor", host.online)
        host.run("qmpin", "detach", "100")
    state.check_same(alone, state.capture())


def strict(host, alone):
    """Together with all that strict does, and no trace of it at the end."""
    with attached(100, "strict", 'vcpus = "12-15"\n') as follower:
        verified = host.run("qmpin", "verify", "100", check=False).stdout
        print(verified, host.run("qmpin", "status").stdout)
        assert "BROKEN" not in "\n".join(line for line in verified.splitlines() if "processes" not in line), verified
    assert follower.code == 0
    state.check_same(alone, state.capture())


def orphaned(host):
    """QEMU dies with qmpin while a CPU is offline: the next qmpin for another VM brings it back."""
    offline = set()
    for _ in range(20):
        with host.vm(100, cpus=3) as vm:
            vm.wait_guest()
            offline = kill_while_offline(100, vm.pid)
        if offline:
            break
        host.run("qmpin", "detach", "100")
    assert offline, "no CPU stayed offline in 20 tries"
    with host.vm(101, cpus=1) as other:
        other.wait_guest()
        with attached(101, "pinned", ""):
            assert host.online() == cpulist.write(range(24)), f"{offline} are not back"
    host.run("qmpin", "detach", "--all")
