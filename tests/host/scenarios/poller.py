"""The Proxmox stand-in asks a VM all the while and never fails; a client that holds the socket is what makes it fail."""

import qmp
from pve_poller import PvePoller
from wait import wait_until

LIMIT_S = 180
NEEDS = ("kvm",)


def run(host):
    with host.vm(100) as vm:
        with PvePoller(vm) as poller:
            poller.wait_visits(2)
            # Short visits beside it, as qmpin makes them, do no harm.
            for _ in range(20):
                vm.roles()
            poller.wait_visits(3)
        poller.report.check()

        # And the stand-in does notice a bad neighbour: the status daemon gives up after 3 s.
        with PvePoller(vm) as poller, qmp.held(vm.qmp_path):
            wait_until(lambda: poller.so_far().tallies["gui"].failures, 30, "the GUI to fail", poller.so_far)
        assert poller.report.tallies["gui"].slowest_ms > 4900, poller.report
