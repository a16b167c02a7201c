"""The governor and the wake-up latency of a VM's CPUs, by the kernel's own acpi-cpufreq and cpuidle: set, kept while a CPU
or the driver goes and comes, for one VM and for two, refused by name, and back, also where a CPU is away at the end."""

import contextlib
import os
import re
import signal
from pathlib import Path

import cpulist
import qmpin
import state
from wait import wait_until

LIMIT_S = 300
NEEDS = ("kvm", "qmpin")
CPUS = Path("/sys/devices/system/cpu")
DRIVER = "acpi-cpufreq"


def run(host):
    before = host.before()
    host.run("modprobe", DRIVER)
    try:
        of_every_cpu(host)
    finally:
        host.run("modprobe", "-r", DRIVER)
    state.check_same(before, state.capture())


def of_every_cpu(host):
    usual = {cpu: governor(cpu).read_text().strip() for cpu in cpulist.parse(host.online())}
    assert "performance" not in usual.values(), usual
    host.note(f"cpufreq by {host.read(CPUS / 'cpu1/cpufreq/scaling_driver')}, cpuidle by {host.read(CPUS / 'cpuidle/current_driver')}")
    with host.vm(100, cpus=2) as one:
        one.wait_guest()
        alone = state.capture()
        with attached(100) as first:
            mine = exclusive(first)
            awake(host, mine, usual)
            reported(host, mine)
            mine = mended(host, first, mine, usual)
            if host.shape["name"] != "tiny":
                beside(host, mine, usual)
        assert first.code == 0
        state.check_same(alone, state.capture())
        killed(host, usual)
        state.check_same(alone, state.capture())
        ended_offline(host, alone)
        changed_by_others(host, usual)
        state.check_same(alone, state.capture())
        without_driver(host, usual)
        refused(host, alone)
        reonlined(host, alone)
        with attached(100) as last:
            awake(host, exclusive(last), usual)
            one.kill()
            assert last.wait() == 0, "its QEMU was killed"
    assert {cpu: governor(cpu).read_text().strip() for cpu in usual} == usual


def attached(vmid):
    return qmpin.Attached(vmid, check_interval_s=1, policy="power = true")


def exclusive(follower):
    return cpulist.parse(follower.plan()["exclusive"])


def governor(cpu):
    return CPUS / f"cpu{cpu}/cpufreq/scaling_governor"


def latency(cpu):
    return CPUS / f"cpu{cpu}/power/pm_qos_resume_latency_us"


def asleep(mine, usual):
    """Every CPU of the VM's that is not at its best, and every other that was touched."""
    wrong = []
    for cpu, was in usual.items():
        has = governor(cpu).read_text().strip(), latency(cpu).read_text().strip()
        first_state = (CPUS / f"cpu{cpu}/cpuidle/state1/latency").read_text().strip()
        if has != (("performance", first_state) if cpu in mine else (was, "0")):
            wrong.append(f"CPU {cpu}: {has}")
    return wrong


def awake(host, mine, usual):
    wait_until(lambda: not asleep(mine, usual), 30, f"the power of CPUs {cpulist.write(mine)}", lambda: asleep(mine, usual))
    for cpu in mine:
        at = CPUS / f"cpu{cpu}/cpufreq"
        assert host.read(at / "scaling_cur_freq") == host.read(at / "cpuinfo_max_freq"), f"CPU {cpu} is slow"


def reported(host, mine):
    verified = host.run("qmpin", "verify", "100").stdout
    print(verified)
    assert re.search(r"^power\s+holds", verified, re.MULTILINE), verified
    # By the kernel's own files, not by what was meant.
    was = governor(min(mine)).read_text()
    governor(min(mine)).write_text("schedutil")
    broken = host.run("qmpin", "verify", "100", check=False)
    print(broken.stdout)
    # Unless it was mended already.
    assert broken.returncode == 1 or governor(min(mine)).read_text() == was, broken.stdout


def mended(host, follower, mine, usual):
    """Another program sets another governor; a CPU goes and comes; the driver does."""
    governor(max(mine)).write_text("schedutil")
    awake(host, mine, usual)
    assert "governor" in follower.log(), follower.log()
    latency(min(mine)).write_text("n/a")
    awake(host, mine, usual)
    host.run("modprobe", "-r", DRIVER)
    assert not governor(min(mine)).exists()
    host.run("modprobe", DRIVER)
    awake(host, mine, usual)
    with offline(max(mine)):
        seen_offline(follower, 1)
    # Where a vCPU has moved away it may stay there.
    wait_until(lambda: follower.log().count("online CPUs are now") >= 2, 30, "the CPU's return to be seen", follower.log)
    mine = exclusive(follower)
    awake(host, mine, usual)
    return mine


@contextlib.contextmanager
def offline(cpu):
    """A CPU that is away for a while. Its governor answers EBUSY then, and is the same afterwards."""
    switch = CPUS / f"cpu{cpu}/online"
    switch.write_text("0")
    try:
        yield
    finally:
        switch.write_text("1")


def seen_offline(follower, times):
    wait_until(lambda: follower.log().count("online CPUs are now") >= times, 30, "it to be seen", follower.log)


def beside(host, mine, usual):
    """A second VM's CPUs wake up, too, and sleep again while the first's do not."""
    with host.vm(101, cpus=2) as two:
        two.wait_guest()
        with attached(101) as second:
            theirs = exclusive(second)
            assert not mine & theirs
            awake(host, mine | theirs, usual)
        assert second.code == 0
        assert not asleep(mine, usual), asleep(mine, usual)


def killed(host, usual):
    with attached(100) as follower:
        mine = exclusive(follower)
        awake(host, mine, usual)
        follower.stop(signal.SIGKILL)
    assert not asleep(mine, usual)
    print(host.run("qmpin", "detach", "100").stdout)


def ended_offline(host, alone):
    """What cannot be restored while a CPU is away is said, and restore when it is there again."""
    with attached(100) as follower:
        away = max(exclusive(follower))
        with offline(away):
            seen_offline(follower, 1)
            assert follower.stop() == 6, follower.log()
            assert f"{governor(away)} cannot be restored to schedutil now" in follower.log(), follower.log()
            again = host.run("qmpin", "detach", "--all", check=False)
            assert again.returncode == 6 and "Device or resource busy" in again.stdout, again
            status = host.run("qmpin", "status").stdout
            assert f"{governor(away)} was schedutil before" in status, status
    assert host.read(governor(away)) == "performance"
    print(host.run("qmpin", "detach", "--all").stdout)
    state.check_same(alone, state.capture())
    assert host.run("qmpin", "status").stdout == "no VM is attached\n"


def changed_by_others(host, usual):
    """What another program has set meanwhile is left so, and named."""
    with attached(100) as follower:
        path = latency(min(exclusive(follower)))
        qmpin.leaves_alone(host, follower, path, "77")
    path.write_text("0")


def without_driver(host, usual):
    """The driver goes while a VM is attached, and its files with it: nothing to restore there, and no failure."""
    with attached(100) as follower:
        mine = exclusive(follower)
        host.run("modprobe", "-r", DRIVER)
        os.kill(follower.process.pid, signal.SIGTERM)
        assert follower.wait() == 0, follower.log()
    assert {latency(cpu).read_text().strip() for cpu in mine} == {"0"}
    host.run("modprobe", DRIVER)
    # The kernel remembers a CPU's last governor over its driver's absence (drivers/cpufreq/cpufreq.c: last_governor).
    for cpu, was in usual.items():
        governor(cpu).write_text(was)


def reonlined(host, alone):
    """Together with `reonline`: a CPU that was away has the governor that it is to have, and at the end its own."""
    with qmpin.Attached(100, policy="power = true\nreonline = true") as follower:
        assert "offline and online again" in follower.log(), follower.log()
        mine = exclusive(follower)
        assert {governor(cpu).read_text().strip() for cpu in mine} == {"performance"}
    assert follower.code == 0
    state.check_same(alone, state.capture())


def refused(host, alone):
    """A governor that the kernel does not take: what could not be done is said, and the rest is done."""
    path = governor(0).parent
    # Read-only for qmpin alone, as a container's sysfs is.
    command = f"mount --bind {path.parent.parent} {path.parent.parent} && mount -o remount,bind,ro {path.parent.parent} && exec qmpin"
    policy = qmpin.Attached(100, policy="power = true")
    done = host.run("unshare", "--mount", "sh", "-c", f'{command} "$@"', "qmpin", "attach", "100", "--once", *policy.flags, check=False)
    print(done.stderr)
    assert done.returncode == 6, done
    assert re.search(r"scaling_governor.*performance", done.stderr) and "pm_qos_resume_latency_us" in done.stderr, done.stderr
    print(host.run("qmpin", "detach", "100").stdout)
    state.check_same(alone, state.capture())
