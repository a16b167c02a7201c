"""Interrupts, kernel threads, workqueues and kernel noise leave a VM's CPUs, for one VM and for two, and all come back."""

import json
import os
import re
import signal
import tempfile
from pathlib import Path

import cpulist
import qmpin
import state
import threads
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin")
IRQS = Path("/proc/irq")
KTHREADD = 2
# `PF_NO_SETAFFINITY`: bound to its CPUs by the kernel itself.
PF_NO_SETAFFINITY = 0x04000000


def run(host):
    before = host.before()
    small = {"cpus": 2}
    with host.vm(100, **(small if host.shape["name"] == "tiny" else host.fitting())) as one:
        one.wait_guest()
        alone = state.capture()
        # First: what was restored once has a mask that was asked for, and the kernel keeps to it ever after.
        each_knob(host, alone)
        with attached(100) as first:
            mine = exclusive(first)
            excluded(host, mine)
            print(host.run("qmpin", "verify", "100").stdout)
            reported(host, first, mine)
            drift(host, first, alone, mine)
            if host.shape["name"] != "tiny":
                beside(host, first, mine)
                excluded(host, mine)
        assert first.code == 0
        state.check_same(alone, state.capture())
        killed(host, alone)
        changed_by_others(host, alone)
        with attached(100) as last:
            excluded(host, exclusive(last))
            one.kill()
            assert last.wait() == 0, "its QEMU was killed"
        state.check_same(before, state.capture())


def reported(host, follower, mine):
    """`status` and the log tell of the partition, and of what stays: interrupts with their counts, bound threads by name."""
    text = host.run("qmpin", "status").stdout
    print(text)
    vm = json.loads(host.run("qmpin", "status", "100", "--json").stdout)["vms"][0]
    assert (vm["partition"]["state"], cpulist.parse(vm["partition"]["cpus"])) == ("isolated", mine), vm
    unmet = {check["check"]: check for check in vm["unmet"]}
    assert unmet["bound-kthreads"]["verdict"] == "refused", unmet
    names = unmet["bound-kthreads"]["reason"]
    assert f"{len(mine)} ksoftirqd" in names and f"{len(mine)} migration" in names, names
    assert names in text, text
    kept = [irq for irq in irqs() if cpulist.parse(host.read(irq)) & mine and not can_be_written(irq)]
    said = re.findall(r"\b([\d-]+)(?: \([^)]+\))?: \d+", unmet["irqs"]["reason"]) if kept else []
    numbers = set().union(*map(cpulist.parse, said))
    missing = {int(irq.parent.name) for irq in kept} - numbers
    assert not missing, f"interrupts {missing}: {unmet}"
    host.note(f"{len(kept)} interrupts and {names.removeprefix('the kernel binds them to their CPUs: ')} stay")
    log = follower.log()
    assert "kthreads: the kernel binds them to their CPUs:" in log, log
    assert not kept or "stay where the kernel keeps them, fired there so far:" in log or len(kept) == 1, log


def drift(host, follower, alone, mine):
    """Another program changes what was set: it is set again, counted, and in the log."""
    total = lambda: json.loads(host.run("qmpin", "status", "100", "--json").stdout)["vms"][0]["drift_total"]
    before = total()
    irq = moved_irq(host, alone)
    ours = host.read(irq)
    irq.write_text(str(min(mine)))
    wait_until(lambda: host.read(irq) == ours, 30, f"{irq} to be as before", lambda: host.read(irq))
    wait_until(lambda: total() == before + 1, 30, "the drift to be counted", total)
    assert f"{irq}: changed externally to {min(mine)}; restored to {ours}" in follower.log(), follower.log()


def attached(vmid):
    return qmpin.Attached(vmid, isolation="strict", check_interval_s=1)


def exclusive(follower):
    return cpulist.parse(follower.plan()["exclusive"])


def excluded(host, cpus):
    """Nothing that can be moved may run on these CPUs, by the kernel's own files."""
    assert cpus
    default = int(host.read("/proc/irq/default_smp_affinity").replace(",", ""), 16)
    assert not any(default >> cpu & 1 for cpu in cpus), f"{default:x}"
    held = [irq for irq in irqs() if cpulist.parse(host.read(irq)) & cpus and can_be_written(irq)]
    assert not held, f"interrupts on {cpus}: {held}"
    held = [
        thread for thread in threads.of_host() if thread.kernel and cpulist.parse(thread.allowed) & cpus and not bound(thread)
    ]
    assert not held, f"kernel threads on {cpus}: {held}"
    workqueues = int(host.read("/sys/devices/virtual/workqueue/cpumask").replace(",", ""), 16)
    assert not any(workqueues >> cpu & 1 for cpu in cpus), f"{workqueues:x}"
    assert host.read("/proc/sys/vm/stat_interval") == "120"
    watchdog = Path("/proc/sys/kernel/watchdog_cpumask")
    assert not watchdog.exists() or not cpulist.parse(host.read(watchdog)) & cpus
    balancing = Path("/proc/sys/kernel/numa_balancing")
    assert not balancing.exists() or host.read(balancing) == "0"


# Where the files are that a knob changes, and one that it changes on every host, a CPU of the VM's for `{cpu}`.
KNOBS = {
    "partition": (("sys/", "run/systemd/"), "sys/fs/cgroup/qemu.slice/100.scope/vcpus/cpuset.cpus.partition"),
    "irqs": ("proc/irq/", "proc/irq/default_smp_affinity"),
    "workqueues": ("sys/devices/virtual/workqueue/", "sys/devices/virtual/workqueue/cpumask"),
    "power": ("sys/devices/system/cpu/", "sys/devices/system/cpu/cpu{cpu}/power/pm_qos_resume_latency_us"),
    "noise": ("proc/sys/", "proc/sys/vm/stat_interval"),
    "kthreads": (None, None),
}


def each_knob(host, alone):
    """Each by itself changes what is its own, and that comes back."""
    wrong = []
    for knob, (own, always) in KNOBS.items():
        with tempfile.TemporaryDirectory(prefix="qmpin-") as config:
            Path(config, "qmpin.toml").write_text(f'isolation = "pinned"\n{knob} = true\n')
            done = qmpin.attach_once(host, 100, "--config-dir", config, check=False)
            mine = exclusive(qmpin.Follower(100, "--config-dir", config))
        rows = state.diff(alone, state.capture())
        files = [row.path for row in rows if not row.path.startswith(("thread/", "run/qmpin/"))]
        kthreadd = cpulist.parse(threads.allowed(KTHREADD))
        said = host.run("qmpin", "detach", "100").stdout
        left = state.without_ending(state.diff(alone, state.capture()))
        print(f"{knob}: {len(files)} files, {len(rows) - len(files)} others; {done.stderr}{said}")
        if done.returncode != 0:
            wrong.append(f"{knob}: attach ended with {done.returncode}")
        wrong += [f"{knob} has changed {path}" for path in files if own is None or not path.startswith(own)]
        if always is not None and (always := always.format(cpu=min(mine))) not in files:
            wrong.append(f"{knob} has not changed {always}")
        # The kernel itself keeps its threads off a partition.
        if knob in ("kthreads", "partition") and kthreadd & mine:
            wrong.append(f"{knob}: kthreadd is on {cpulist.write(kthreadd)}")
        wrong += [f"{knob}, undone: {row}" for row in left]
    for line in wrong:
        print(f"  {line}")
    assert not wrong, f"{len(wrong)} times, first {wrong[0]}"


def irqs():
    return sorted(IRQS.glob("*/smp_affinity_list"))


def can_be_written(irq):
    """Whether the kernel takes what it says itself; where it manages the interrupt it refuses even that."""
    try:
        irq.write_text(irq.read_text())
    except OSError:
        return False
    return True


def moved_irq(host, alone):
    """One that qmpin has moved."""
    return next(irq for irq in irqs() if host.read(irq) != alone.files[str(irq).removeprefix("/")])


def bound(thread):
    try:
        stat = Path(f"/proc/{thread.tid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return bool(int(stat[stat.rindex(")") + 2 :].split()[6]) & PF_NO_SETAFFINITY)


def beside(host, first, mine):
    """A second VM takes its part away, too, and gives it back while the first keeps its own."""
    with host.vm(101, cpus=2) as two:
        two.wait_guest()
        with attached(101) as second:
            theirs = exclusive(second)
            assert not mine & theirs
            excluded(host, mine | theirs)
        assert second.code == 0
        default = int(host.read("/proc/irq/default_smp_affinity").replace(",", ""), 16)
        assert all(default >> cpu & 1 for cpu in theirs), f"{default:x}: {theirs} are not the host's again"


def killed(host, alone):
    """SIGKILL at any moment of the start, and then `qmpin detach`."""
    with attached(100) as follower:
        follower.stop(signal.SIGKILL)
    assert os.path.exists("/run/qmpin/.host.journal")
    print(host.run("qmpin", "detach", "100").stdout)
    state.check_same(alone, state.capture())


def changed_by_others(host, alone):
    """What another program has set meanwhile is left so, and named."""
    with attached(100) as follower:
        mine = exclusive(follower)
        irq = moved_irq(host, alone)
        other = str(min(cpulist.parse(host.read(irq))))
        qmpin.leaves_alone(host, follower, irq, other)
    path = str(irq).removeprefix("/")
    state.check_same(alone, state.capture(), ignore=[path])
    irq.write_text(alone.files[path])
    assert not mine & cpulist.parse(other)
