"""SIGKILL of qmpin at every position of its journals in turn, as it attaches and as it restores: `detach` then leaves the
host as it was, and nothing in /run/qmpin.
"""

import tempfile
from pathlib import Path

import state
from kills import ATTACH, DETACH, Series, expect

LIMIT_S = 900
NEEDS = ("kvm", "qmpin")
# On a greater machine it only takes longer.
SHAPES = ("5900x", "5900x-one-node", "tiny")


def run(host):
    before = host.before()
    with host.vm(100, cpus=2) as vm, tempfile.TemporaryDirectory(prefix="qmpin-") as folder:
        vm.wait_guest()
        series = Series(host, Path(folder))
        series.policy(isolation="strict", partition=False, reonline=False)
        killed = series.everywhere("attach, and its own end", ATTACH, ends=True)
        expect(killed, 25, "100.journal baseline", ".host.journal original", ".host.journal intent", "100.standing")
        killed = series.everywhere("detach", DETACH, attached=True)
        expect(killed, 8, "unlink 100.journal", "unlink 100.lease", "unlink .host.journal")
        # CPUs that go offline and online take their time in each round, so that is by itself.
        series.policy(isolation="pinned", reonline=True)
        first, last = "write .host.journal original", "write 100.journal intent"
        killed = series.everywhere("attach with reonline", (*ATTACH, "--once"), since=first, until=last)
        expect(killed, 8, ".host.journal original", ".host.journal intent", "/online")
        # With a partition systemd reloads twice in each round, which is what takes the time here. So these leave out what is
        # the same without one.
        series.policy(isolation="exclusive")
        first, last = "write 100.journal partition", "unlink 100.journal"
        killed = series.everywhere("attach with a partition", (*ATTACH, "--once"), since=first)
        expect(killed, 12, "fdatasync 100.journal", "50-qmpin", ".host.journal intent")
        killed = series.everywhere("detach with a partition", DETACH, attached=True, until=last)
        expect(killed, 6, "rmdir cgroup vcpus", "50-qmpin", last)
        series.check()
    state.check_same(before, state.capture())
