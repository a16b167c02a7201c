"""The administrator's road: the package, one line of policy, the path unit, a VM's whole life, an upgrade, and `apt purge`."""

import errno
import os
import re
import subprocess
from pathlib import Path

import cpulist
import package
import qmpin
import state
import threads
from vm import Vm
from wait import wait_until

LIMIT_S = 500
NEEDS = ("kvm", "qmpin", "package")
# systemd's own words for how much a service may do; 10 is anything.
EXPOSURE_MAX = 5.0


def run(host):
    before = host.before()
    with package.Package(host) as installed, qmpin.Service(100) as service:
        fresh(host, service)
        installed.write_policy(100, 'isolation = "exclusive"')
        host.run("/usr/bin/qmpin", "config", "check")
        # From here on it is forgotten.
        qmpin.systemctl("enable", "--now", service.path_unit)
        assert service.show("ActiveState") == "inactive", service.states()
        vm = Vm(100, **host.fitting(), disks=2, max_cpus=None)
        try:
            vm.start()
            followed(host, vm, service)
            lives(host, vm, service)
            again(host, vm, service)
            alone = stays_stopped(host, vm, service)
            strict(host, vm, service, installed)
            upgraded(host, vm, service)
            purged(host, vm, service, installed, alone)
        finally:
            vm.kill()
    state.check_same(before, state.capture(), ignore=package.IGNORE)


def fresh(host, service):
    """Units are there and not enabled; pages, completions and examples where they belong; how much the service may do."""
    assert package.is_enabled(service.path_unit) in ("disabled", "indirect"), package.is_enabled(service.path_unit)
    assert package.is_enabled("qmpin-sweep.service") == "disabled"
    for path in ("man/man1/qmpin.1.gz", "man/man1/qmpin-attach.1.gz", "man/man5/qmpin.toml.5.gz"):
        # Images of small machines leave out manual pages when they unpack.
        listed = host.run("dpkg", "-L", "qmpin").stdout
        assert f"/usr/share/{path}" in listed, listed
    assert Path("/etc/qmpin/qmpin.toml").exists() and Path("/usr/share/qmpin/qmpin-hook").exists()
    units = [f"/lib/systemd/system/{name}" for name in ("qmpin@.service", "qmpin@.path", "qmpin-sweep.service")]
    said = host.run("systemd-analyze", "verify", "--man=no", *units, check=False)
    wrong = [line for line in (said.stdout + said.stderr).splitlines() if "qmpin" in line]
    assert not wrong, wrong
    said = host.run("systemd-analyze", "security", "--no-pager", service.name, check=False).stdout
    print(said)
    exposure = float(re.search(r"Overall exposure level for .*: ([0-9.]+)", said).group(1))
    host.note(f"systemd-analyze security: exposure {exposure}")
    assert exposure <= EXPOSURE_MAX, said


def followed(host, vm, service):
    """The path unit has seen the start: every thread is in its place, and qmpin itself is nowhere near."""
    service.wait_state("active")
    vm.wait_guest()
    plan = service.check(vm, host)
    exclusive = cpulist.parse(plan["exclusive"])
    own = threads.of_process(service.main_pid())
    wrong = [thread for thread in own.values() if cpulist.parse(thread.allowed) & exclusive]
    assert not wrong, f"qmpin may run on the VM's CPUs {exclusive}: {wrong}"


def lives(host, vm, service):
    """Reset and hotplug."""
    pid = service.main_pid()
    vm.reset()
    service.check(vm, host)
    vm.iothread_add("iothread-virtioscsi9")
    service.check(vm, host)
    vm.iothread_delete("iothread-virtioscsi9")
    service.check(vm, host)
    assert service.main_pid() == pid, "it was restarted"


def again(host, vm, service):
    """`qm reboot`, and QEMU killed: the process is a new one, and is followed as the first was."""
    for end in (vm.quit, vm.kill):
        end()
        service.wait_state("inactive")
        assert service.show("Result") == "success", service.states()
        left = list(Path("/run/qmpin").iterdir())
        assert not left, left
        vm.start()
        service.wait_state("active")
        service.check(vm, host)
    # A QEMU that is killed while Proxmox's own clean-up does not come leaves its pid file; the next start writes over it.
    vm.leave_files()
    service.wait_state("inactive")
    vm.start()
    service.wait_state("active")
    service.check(vm, host)


def stays_stopped(host, vm, service):
    """Stopped by hand it stays stopped, for as long as the VM runs; what the host is like without it."""
    service.stop()
    alone = state.capture()
    assert service.show("ActiveState") == "inactive", service.states()
    assert not list(Path("/run/qmpin").iterdir())
    service.start()
    service.check(vm, host)
    return alone


def strict(host, vm, service, installed):
    """Another line of policy, taken at a restart; nothing that it wants is kept from a service that may do so little."""
    installed.write_policy(100, 'isolation = "strict"\nsched = "fifo:1"')
    qmpin.systemctl("restart", service.name)
    service.check(vm, host)
    said = host.run("/usr/bin/qmpin", "status", "100").stdout
    print(said)
    assert os.strerror(errno.EPERM) not in said and os.strerror(errno.EROFS) not in said, said


def upgraded(host, vm, service):
    """An upgrade leaves the VM to the qmpin that has it: no thread moves, not for a moment."""
    pid = service.main_pid()
    process = subprocess.Popen(["dpkg", "-i", str(package.PACKAGE)], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        assert not service.misplaced(vm), service.misplaced(vm)
    assert process.returncode == 0
    assert (service.main_pid(), service.show("NRestarts")) == (pid, "0"), service.states()
    assert Path("/etc/qmpin/100.toml").exists(), "the administrator's file is his"
    service.check(vm, host)


def purged(host, vm, service, installed, alone):
    """`apt purge` while the VM is attached: everything is put back, and nothing is left."""
    story(service)
    installed.purge()
    assert vm.alive()
    wait_until(lambda: not Path("/run/qmpin").exists(), 30, "/run/qmpin to be gone")
    # The unit's link is gone, too.
    state.check_same(alone, state.capture(), ignore=[*package.IGNORE, "etc/systemd/system/*"])
    for path in ("/etc/qmpin", "/var/lib/qmpin", "/usr/bin/qmpin", "/etc/systemd/system/multi-user.target.wants/qmpin@100.path"):
        assert not Path(path).exists() and not Path(path).is_symlink(), path


def story(service):
    """`journalctl -u` tells what happened in plain words."""
    log = service.log()
    for words in ("VM 100", "vCPU", "QEMU has ended", "told to stop"):
        assert words in log, f"no {words!r} in the log:\n{log}"
    assert "error:" not in log and "bug:" not in log, log
