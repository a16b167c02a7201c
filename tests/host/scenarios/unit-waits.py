"""A service whose VM has no room is active and waits: it asks QEMU once, and attaches the VM when another VM goes, the policy changes
or CPUs come online. A reload takes another policy and unpins nothing in between; one that cannot be used leaves the one before."""

import json
import os
import subprocess
import threading
from pathlib import Path

import cpulist
import qmpin
import state
from pve_poller import PvePoller
from wait import wait_until

LIMIT_S = 600
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x",)
SWITCH = Path("/sys/devices/system/cpu/cpu5/online")


def run(host):
    # The kernel moves some of its own threads when a CPU goes, and does not move them back.
    for state_of_cpu in ("0", "1"):
        SWITCH.write_text(state_of_cpu)
    before = host.before()
    with qmpin.Shipped() as shipped, qmpin.Service(100) as first, qmpin.Service(101) as second:
        with host.vm(100, smp="8,cores=4,threads=2") as one:
            one.wait_guest()
            first.start()
            first.check(one, host)
            with host.vm(101, smp="18,cores=9,threads=2", paused=True) as two:
                waits_for_room(host, first, second, two)
                policy(host, shipped, second)
            cpus(host, shipped, 'vcpus = "auto"')
            cpus(host, shipped, 'vcpus = "4-7"')
        reloaded(host, shipped, first)
    state.check_same(before, state.capture(), ignore=["sys/fs/cgroup/system.slice/cgroup.subtree_control"])


def wait_waiting(host, service, vmid):
    """Until `status` lists it as waiting; the reason."""

    def listed():
        rows = json.loads(host.run("qmpin", "status", "--json").stdout)["waiting"]
        return next((row["reason"] for row in rows if row["vm"] == str(vmid)), None)

    return wait_until(listed, 60, f"VM {vmid} to wait", service.states)


def is_waiting(service):
    """Active, without a restart and without a failure, and says why."""
    states = service.states()
    assert (service.show("ActiveState"), service.show("NRestarts"), service.show("Result")) == ("active", "0", "success"), states
    assert service.show("StatusText").startswith("waiting: "), states


def waits_for_room(host, first, second, two):
    """Proxmox's stand-in asks the VM all the while, and is never kept waiting by a service that polls; then the other VM goes."""
    with PvePoller(two) as poller:
        second.start()
        reason = wait_waiting(host, second, 101)
        host.note(f"waits: {reason}")
        is_waiting(second)
        assert "VM 101: its service waits: " in host.run("qmpin", "status").stdout
        # By hand the answer comes at once.
        assert host.run("qmpin", "attach", "101", check=False).returncode == 1
        # A small VM comes and goes, which leaves no room either: it stays active, and logs a line where the reason has changed.
        turns = 2
        with host.vm(103, cpus=2, paused=True), qmpin.Service(103) as third:
            for _ in range(turns):
                third.start()
                third.stop()
        beats(second, 3)
        is_waiting(second)
        log = second.log()
        assert 1 <= log.count("not attached") <= 1 + 2 * turns, log
        first.stop()
        second.wait_log("vCPUs on")
        wait_until(lambda: "waiting" not in second.show("StatusText"), 60, "it to be attached", second.states)
        second.settle(two)
        assert second.show("NRestarts") == "0", second.states()
    poller.report.check()
    second.stop()
    first.start()


def beats(service, count):
    """Until it has notified systemd COUNT times that it lives."""
    seen = set()

    def enough():
        seen.add(service.show("WatchdogTimestampMonotonic"))
        return len(seen) > count

    wait_until(enough, 90, f"{count} signs of life", service.states)


def policy(host, shipped, second):
    """The policy of the VM gets another line."""
    second.start()
    wait_waiting(host, second, 101)
    times = second.log().count("vCPUs on")
    shipped.write_policy(101, "share = true")
    second.wait_log("vCPUs on", times + 1)
    wait_until(lambda: "waiting" not in second.show("StatusText"), 60, "it to be attached", second.states)
    second.stop()
    (shipped.CONFIG / "101.toml").unlink()


def cpus(host, shipped, policy):
    """There is room for the VM but for a CPU that is offline, chosen or named by its policy; then it comes online."""
    vcpus = 4 if "-" in policy else 14
    shipped.write_policy(102, policy)
    with host.vm(102, smp=f"{vcpus},cores={vcpus // 2},threads=2", paused=True), qmpin.Service(102) as third:
        SWITCH.write_text("0")
        try:
            third.start()
            wait_waiting(host, third, 102)
            is_waiting(third)
        finally:
            SWITCH.write_text("1")
        third.wait_log("vCPUs on")
        third.stop()
    (shipped.CONFIG / "102.toml").unlink()


class Masks(threading.Thread):
    """Reads the masks of a VM's vCPUs all the while: none may be free to run anywhere."""

    def __init__(self, vm):
        super().__init__(daemon=True)
        self.pid, self.tids = vm.pid, list(vm.roles().vcpus.values())
        self.seen: set[str] = set()
        self.over = threading.Event()
        self.reads = 0

    def run(self):
        while not self.over.is_set():
            self.seen |= {cpulist.write(os.sched_getaffinity(tid)) for tid in self.tids}
            self.reads += 1

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_exc):
        self.over.set()
        self.join()


def reloaded(host, shipped, service):
    """`systemctl reload`: the CPUs of another die, a level up and down, and policies that cannot be used."""
    with host.vm(100, smp="4,cores=2,threads=2") as vm:
        vm.wait_guest()
        shipped.write_policy(100, 'isolation = "pinned"\nvcpus = "12-15"')
        service.start()
        plan = service.check(vm, host)
        assert plan["exclusive"] == "12-15", plan
        pid = service.main_pid()
        with Masks(vm) as masks:
            for text, vcpus, level in (
                ('isolation = "pinned"\nvcpus = "16-19"', "16-19", "pinned"),
                ('isolation = "exclusive"\nvcpus = "16-19"', "16-19", "exclusive"),
                ('isolation = "exclusive"\nvcpus = "20-23"\nsched = "fifo:1"', "20-23", "exclusive"),
                ('isolation = "pinned"\nvcpus = "20-23"\ncheck_interval_s = 2', "20-23", "pinned"),
            ):
                shipped.write_policy(100, text)
                qmpin.systemctl("reload", service.name)
                wait_until(lambda vcpus=vcpus: service.plan()["exclusive"] == vcpus, 60, f"vCPUs on {vcpus}", service.states)
                plan = service.check(vm, host)
                assert plan["exclusive"] == vcpus, plan
                partition = vm.cgroup / "vcpus"
                wait_until(lambda level=level: partition.exists() == (level == "exclusive"), 60, f"level {level}", service.log)
                lease = json.loads(Path("/run/qmpin/100.lease").read_text())
                assert lease["exclusive"] == vcpus, lease
                for bad in ('isolation = "total"', "vcpus", 'vcpus = "999"', 'isolation = "pinned"\nvcpus = "20"'):
                    refused(host, shipped, service, vm, bad, plan)
        everywhere = [mask for mask in masks.seen if len(cpulist.parse(mask)) > 4]
        host.note(f"{masks.reads} looks at the vCPUs' masks during reloads: {sorted(masks.seen, key=len)[:12]}")
        assert not everywhere, f"a vCPU was free to run on {everywhere}"
        assert service.main_pid() == pid and service.show("NRestarts") == "0", service.states()
        # A reload that nothing waits for.
        times = service.log().count("the policy before stays in force")
        qmpin.systemctl("kill", "-s", "HUP", "--kill-whom=main", service.name)
        service.wait_log("the policy before stays in force", times + 1)
        service.stop()
        assert set(vm.masks().values()) == {host.online()}, vm.masks()


def refused(host, shipped, service, vm, text, plan):
    """The reload fails, says why in the log and in `status`, and everything stays."""
    shipped.write_policy(100, text)
    done = qmpin.systemctl("reload", service.name, check=False)
    assert done.returncode != 0, "a bad policy was taken"
    assert service.show("ActiveState") == "active", service.states()
    roles = vm.roles()
    masks = vm.masks()
    for row in plan["vcpus"]:
        assert masks[roles.vcpus[row["vcpu"]]] == row["cpus"], (masks, plan)
    assert "the policy before stays in force" in service.log(), service.log()
    text = host.run("qmpin", "status", "100").stdout
    assert "policy: " in text, text
    assert subprocess.run(["systemctl", "is-active", "--quiet", service.name]).returncode == 0
