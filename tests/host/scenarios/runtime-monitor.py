"""QEMU >= 11.1 gets a second monitor while it runs: made in one short visit, gone with the connection that used it."""

from pathlib import Path

import qmp
from wait import wait_until

NEEDS = ("kvm", "monitor-qmp")


def run(host):
    with host.vm(100) as vm:
        path = Path("/run/qemu-server/100.qmpin")
        address = {"type": "unix", "data": {"path": str(path)}}
        backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
        with qmp.Session(vm.qmp_path) as visit:
            visit.command("chardev-add", id="qmpin-chr", backend=backend)
            visit.command("object-add", qom_type="monitor-qmp", id="qmpin-mon", chardev="qmpin-chr", close_action="delete")

        with qmp.Session(path) as monitor:
            vm.stop()
            vm.cont()
            monitor.event("STOP", 10)
            monitor.event("RESUME", 10)
            try:
                monitor.command("object-del", id="qmpin-mon")
            except qmp.QmpError as error:
                assert error.desc == "Cannot delete the current QMP monitor", error
        wait_until(lambda: not path.exists(), 10, "QEMU to remove the socket of the closed monitor")
        labels = {chardev["label"] for chardev in vm.qmp("query-chardev")}
        assert "qmpin-chr" not in labels, labels
