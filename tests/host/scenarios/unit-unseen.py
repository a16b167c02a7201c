"""A VM whose start its path unit has not seen is attached by the timer; a detach by hand and a failure stay as they are."""

import contextlib
import subprocess
from pathlib import Path

import qmpin
import state
from vm import Vm
from wait import wait_until

LIMIT_S = 600
NEEDS = ("kvm", "qmpin")
RUN = Path("/run/qemu-server")
# The timer's period, its random delay and its accuracy.
TIMER_S = 60 + 30 + 10
START_S = 20


def run(host):
    before = host.before()
    with qmpin.Shipped('isolation = "pinned"') as shipped, qmpin.Service(100) as service:
        vm = Vm(100, **host.fitting())
        shipped.write_policy(100, "isolation = 1")
        qmpin.systemctl("enable", "--now", service.path_unit)
        try:
            with unseen(vm):
                vm.start()
                assert service.show("ActiveState") == "inactive", service.states()
                vm.wait_guest()
                wait_until(lambda: service.show("ActiveState") == "failed", TIMER_S + START_S, "the policy to be refused", service.states)
                failed = service.show("InvocationID")
                ticks(2)
                assert service.show("ActiveState") == "failed", service.states()
                assert service.show("InvocationID") == failed, "a service that failed is not started again and again"
                shipped.write_policy(100, "")
                qmpin.systemctl("reset-failed", service.name)
                wait_until(lambda: service.show("ActiveState") == "active", TIMER_S + START_S, "the timer to attach the VM", service.states)
                service.check(vm, host)
                host.run("qmpin", "detach", "100")
                ticks(2)
                assert service.show("ActiveState") == "inactive", service.states()
                vm.quit()
        finally:
            vm.kill()
            qmpin.systemctl("disable", "--now", service.path_unit)
        timer = qmpin.systemctl("show", "qmpin-running@100.timer", "--value", "-p", "ActiveState").stdout.strip()
        assert timer == "inactive", timer
        command = ["journalctl", "-q", "-o", "cat", "-u", "qmpin-running@100.service", "--since", f"@{service.since_s:.0f}"]
        log = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert not log.stdout, f"ticks that had nothing to do are logged: {log.stdout}"
    state.check_same(before, state.capture(), ignore=["sys/fs/cgroup/system.slice/cgroup.subtree_control"])


@contextlib.contextmanager
def unseen(vm):
    """Files of VMs are made in a file system of their own: inotify, by which systemd watches, has the folder below it."""
    RUN.mkdir(mode=0o755, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", RUN], check=True)
    try:
        yield
    finally:
        vm.kill()
        subprocess.run(["umount", RUN], check=True)


def ticks(count):
    """Until the timer has started its service that often again."""
    when = lambda: qmpin.systemctl("show", "qmpin-running@100.timer", "--value", "-p", "LastTriggerUSec").stdout
    for _ in range(count):
        last = when()
        wait_until(lambda: when() != last, TIMER_S + START_S, "the timer to tick", when)
        wait_until(lambda: qmpin.systemctl("is-active", "qmpin-running@100.service", check=False).stdout.strip() == "inactive", 60, "the tick to end")
