"""The shipped units through a VM's life: a detach by hand lasts until the VM is started anew or asked for, a stop that times out
leaves the VM pinned, a VM that has ended starts nothing, and one that is started anew is followed."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import qmpin
import state
from vm import Vm
from wait import wait_until

LIMIT_S = 600
NEEDS = ("kvm", "qmpin")
MARK = Path("/run/qmpin/100.detached")
NOBODY = 65534
EXIT_NOT_ATTACHED, EXIT_PERMISSION = 1, 4
# Its own limit for an answer of systemd is 3 s, and there are two questions at most.
BUS_LIMIT_S = 30


def run(host):
    before = host.before()
    with qmpin.Shipped('isolation = "pinned"') as shipped, qmpin.Service(100) as service:
        vm = Vm(100, **host.fitting())
        try:
            qmpin.systemctl("enable", "--now", service.path_unit)
            vm.start()
            followed(host, vm, service)
            detached(host, vm, service)
            starts_by_itself(host, vm, service)
            asked_for(host, vm, service)
            with_systemd_hung(host, vm, service)
            in_the_gap(host, vm, service)
            unprivileged(host, vm, service)
            two(host, vm, service)
            anew(host, vm, service)
            times_out(host, vm, service, shipped)
            ended(host, vm, service)
        finally:
            vm.kill()
            qmpin.systemctl("disable", "--now", service.path_unit)
    state.check_same(before, state.capture(), ignore=["sys/fs/cgroup/system.slice/cgroup.subtree_control"])


def followed(host, vm, service):
    vm.wait_guest()
    service.wait_state("active")
    service.check(vm, host)


def said(host, vmid=100):
    """What `status` says of a VM that is detached by hand, in both of its faces."""
    text = host.run("qmpin", "status").stdout
    assert f"VM {vmid}: detached by hand" in text, text
    document = json.loads(host.run("qmpin", "status", "--json").stdout)
    assert [row["vm"] for row in document["detached"]] == [str(vmid)], document
    assert str(vmid) not in [row["vm"] for row in document["vms"]], document
    one = host.run("qmpin", "status", str(vmid), check=False)
    assert one.returncode == EXIT_NOT_ATTACHED and "detached by hand" in one.stdout, one
    return document


def is_detached(host, vm, service):
    """Nothing is pinned, no unit is about to change that, and `status` says why."""
    # A start that is skipped goes through `ExecStopPost=`.
    wait_until(lambda: service.show("ActiveState") != "deactivating", 60, "a skipped start to be over", service.states)
    assert service.show("ActiveState") == "inactive", service.states()
    assert service.show("Job") in ("", "0"), service.states()
    assert set(vm.masks().values()) == {host.online()}, vm.masks()
    [row] = said(host)["detached"]
    assert row["pid"] == vm.pid, row


def detached(host, vm, service):
    """`qmpin detach` while the service runs: the service is stopped, and is not started again."""
    started = service.show("ExecMainStartTimestampMonotonic")
    done = host.run("qmpin", "detach", "100")
    assert "detached by hand" in done.stdout and service.name in done.stdout, done.stdout
    is_detached(host, vm, service)
    # A restart that systemd waits for would be the state "activating".
    assert (service.show("NRestarts"), service.show("ExecMainStartTimestampMonotonic")) == ("0", started), service.states()


def starts_by_itself(host, vm, service):
    """Whatever systemd starts without being asked leaves the VM detached: the path unit, triggered or started; reloads."""
    skipped = "stays detached"
    seen = service.log().count(skipped)
    vm.pid_path.write_text(vm.pid_path.read_text())
    service.wait_log(skipped, seen + 1)
    is_detached(host, vm, service)
    runs = qmpin.Service(100)
    runs.name = "qmpin-running@100.service"
    qmpin.systemctl("restart", service.path_unit)
    runs.wait_log(skipped)
    is_detached(host, vm, service)
    for what in ("daemon-reload", "daemon-reexec"):
        qmpin.systemctl(what)
    host.run("qmpin", "detach", "--dead")
    is_detached(host, vm, service)


def asked_for(host, vm, service):
    """`systemctl start` attaches it, and so does `qmpin attach`."""
    service.start()
    assert not MARK.exists()
    service.check(vm, host)
    host.run("qmpin", "detach", "--all")
    is_detached(host, vm, service)
    qmpin.attach_once(host, 100)
    assert not MARK.exists()
    host.run("qmpin", "detach", "100")
    service.start()
    service.check(vm, host)


def with_systemd_hung(host, vm, service):
    """The bus does not answer: the supervisor is ended by a signal, within a limit, and systemd does not start it again."""
    bus = int(qmpin.systemctl("show", "dbus.service", "--value", "-p", "MainPID").stdout)
    os.kill(bus, signal.SIGSTOP)
    try:
        start = time.monotonic()
        done = host.run("qmpin", "detach", "100", limit_s=BUS_LIMIT_S)
        host.note(f"detach with a bus that does not answer: {time.monotonic() - start:.1f} s")
        assert "systemd" in done.stderr, done.stderr
        assert set(vm.masks().values()) == {host.online()}, vm.masks()
    finally:
        os.kill(bus, signal.SIGCONT)
    service.wait_state("inactive")
    is_detached(host, vm, service)
    service.start()
    service.check(vm, host)


def in_the_gap(host, vm, service):
    """The supervisor was killed and systemd is about to start it again: a detach in between lasts, too."""
    for words in (["100"], ["--all"]):
        os.kill(service.main_pid(), signal.SIGKILL)
        wait_until(lambda: service.show("SubState") == "auto-restart", 30, "systemd to wait for the restart", service.states)
        host.run("qmpin", "detach", *words)
        is_detached(host, vm, service)
        service.start()
        service.check(vm, host)


def unprivileged(host, vm, service):
    """Another user can neither detach the VM nor mark it."""
    pid = service.main_pid()
    for words in (["detach", "100"], ["detach", "--all"]):
        done = subprocess.run(
            ["setpriv", f"--reuid={NOBODY}", "--clear-groups", "qmpin", *words], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == EXIT_PERMISSION, done
    assert not MARK.exists()
    assert service.main_pid() == pid, service.states()
    service.check(vm, host)


def two(host, vm, service):
    """`detach --all` detaches both, and both stay so; each is asked for by itself."""
    if host.shape["name"] == "tiny":
        return
    with host.vm(101, cpus=2) as other, qmpin.Service(101) as second:
        other.wait_guest()
        second.start()
        second.check(other, host)
        host.run("qmpin", "detach", "--all")
        document = json.loads(host.run("qmpin", "status", "--json").stdout)
        assert [row["vm"] for row in document["detached"]] == ["100", "101"], document
        second.start()
        second.check(other, host)
        other.quit()
        second.wait_over()
    said(host)
    service.start()
    service.check(vm, host)


def anew(host, vm, service):
    """A new QEMU process is followed again, by the path unit alone; the old mark goes."""
    host.run("qmpin", "detach", "100")
    is_detached(host, vm, service)
    vm.quit()
    vm.start()
    followed(host, vm, service)
    assert not MARK.exists()
    # And where nothing starts anew, the mark of a VM that has ended is swept.
    host.run("qmpin", "detach", "100")
    vm.quit()
    assert "detached by hand" not in host.run("qmpin", "status").stdout
    host.run("qmpin", "detach", "--dead")
    assert not MARK.exists()
    vm.start()
    followed(host, vm, service)


def hook(shipped, phase):
    done = subprocess.run(["sh", shipped.HOOK, "100", phase], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done


def times_out(host, vm, service, shipped):
    """`qm shutdown` of a guest that ignores the power button: `pre-stop`, and "got timeout". The VM runs on, pinned."""
    plan = service.check(vm, host)
    was = service.main_pid(), service.show("NRestarts")
    hook(shipped, "pre-stop")
    vm.qmp("system_powerdown")
    # Nothing is under way that would unpin it.
    assert (service.show("ActiveState"), service.show("Job")) in (("active", ""), ("active", "0")), service.states()
    assert service.check(vm, host) == plan
    vm.reset()
    assert service.check(vm, host) == plan
    assert (service.main_pid(), service.show("NRestarts")) == was, service.states()
    # Then it is stopped the hard way.
    hook(shipped, "pre-stop")
    vm.quit()
    hook(shipped, "post-stop")
    over(service)
    vm.start()
    hook(shipped, "post-start")
    followed(host, vm, service)


def over(service):
    """It has ended with its VM: no failure, and no start that systemd has made or is about to make."""
    service.wait_over()
    assert (service.show("Result"), service.show("NRestarts")) == ("success", "0"), service.states()


def ended(host, vm, service):
    """QEMU ends in either way: nothing starts, also where its pid file stays; a VM that comes meanwhile is followed."""
    vm.quit()
    over(service)
    vm.start()
    followed(host, vm, service)
    vm.leave_files()
    over(service)
    vm.start()
    followed(host, vm, service)
    pid = service.main_pid()
    os.kill(pid, signal.SIGSTOP)
    vm.quit()
    vm.start()
    os.kill(pid, signal.SIGCONT)
    service.wait_log("has been started anew")
    followed(host, vm, service)
    assert (service.main_pid(), service.show("NRestarts")) == (pid, "0"), service.states()
