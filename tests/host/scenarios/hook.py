"""Proxmox's hook phases start and stop qmpin, hold nobody up, and never keep a VM from starting."""

import package
import qmpin
import state
from vm import Vm
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin", "package")


def run(host):
    before = host.before()
    with package.Package(host) as installed, qmpin.Service(100) as service:
        installed.install_hook()
        vm = Vm(100, **host.fitting())
        try:
            phases(host, vm, service)
            bad_policy(host, vm, service, installed)
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
        service.wait_state("inactive")
        assert service.show("Result") == "success", service.states()
    # What no Proxmox of today has, and words that are none.
    for words in ((100, "post-migrate"), ("", "pre-start"), ("100; reboot", "post-start")):
        package.hook(*words)


def bad_policy(host, vm, service, installed):
    """The VM starts; what is wrong is in the task's log; it is pinned by what was good the last time."""
    installed.write_policy(100, 'isolation = "total"')
    said = package.hook(100, "pre-start")
    assert "100.toml:1" in said and "`total`" in said, said
    package.start(vm)
    vm.wait_guest()
    service.wait_state("active")
    assert "as it was good the last time" in service.log(), service.log()
    installed.write_policy(100, 'isolation = "pinned"')
    service.settle(vm)
    package.stop(vm)
    service.wait_state("inactive")


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
