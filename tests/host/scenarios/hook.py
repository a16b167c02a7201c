"""Proxmox's hook phases start and stop qmpin, hold no process up, and never keep a VM from starting."""

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import package
import qmpin
import state
from vm import Vm
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin", "package")
# Its own limit for each of two calls is 5 s.
HOOK_LIMIT_S = 40


def run(host):
    before = host.before()
    with package.Package(host) as installed, qmpin.Service(100) as service:
        installed.install_hook()
        vm = Vm(100, **host.fitting())
        try:
            phases(host, vm, service)
            bad_policy(host, vm, service, installed)
            hangs(vm)
            uninstalled(host, vm, service, installed)
        finally:
            vm.kill()
    state.check_same(before, state.capture(), ignore=package.IGNORE)


def phases(host, vm, service):
    """All four, in their order, twice: the second is a new process."""
    for _ in range(2):
        package.start(vm)
        vm.wait_guest()
        service.wait_state("active")
        service.check(vm, host)
        package.stop(vm)
        service.wait_over()
    # What no Proxmox of today has, and words that are none.
    for words in ((100, "post-migrate"), ("", "pre-start"), ("100; reboot", "post-start")):
        package.hook(*words)


def bad_policy(host, vm, service, installed):
    """The VM starts; what is wrong is in the task's log; it is pinned by what was good the last time."""
    installed.write_policy(100, 'isolation = "total"')
    said = package.hook(100, "pre-start")
    assert "100.toml:1" in said and '"total"' in said, said
    package.start(vm)
    vm.wait_guest()
    service.wait_state("active")
    assert "the last good one is in force" in service.log(), service.log()
    # The last good one is no file: the default level, which holds in full.
    verify = lambda: host.run("/usr/bin/qmpin", "verify", "100", check=False)
    wait_until(lambda: verify().returncode == 0, 60, "all to hold", lambda: verify().stdout)
    assert "irqs" in json.loads(Path("/run/qmpin/100.lease").read_text())["knobs"]
    assert "the last good one is in force" in host.run("/usr/bin/qmpin", "status", "100").stdout
    assert host.run("/usr/bin/qmpin", "plan", "100", check=False).returncode == 2, "what would be done now cannot be said"
    package.stop(vm)
    service.wait_state("inactive")


def hangs(vm):
    """systemd does not answer, and neither does qmpin: the VM waits for some seconds, and starts."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("systemctl", "qmpin"):
            program = Path(folder, name)
            program.write_text("#!/bin/sh\nexec sleep 600\n")
            program.chmod(0o755)
        for phase in ("pre-start", "post-stop"):
            start = time.monotonic()
            done = subprocess.run([package.HOOK, str(vm.vmid), phase], env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"})
            assert done.returncode == 0 and time.monotonic() - start < HOOK_LIMIT_S, f"{phase}: {done}, {time.monotonic() - start:.0f} s"


def uninstalled(host, vm, service, installed):
    """With the package gone the script is still there, and the VM starts and stops."""
    installed.purge()
    said = package.hook(100, "pre-start")
    assert "not installed" in said, said
    package.start(vm)
    vm.wait_guest()
    assert set(vm.masks().values()) == {host.online()}, vm.masks()
    package.stop(vm)
    wait_until(lambda: not vm.alive(), 30, "the VM to end")
