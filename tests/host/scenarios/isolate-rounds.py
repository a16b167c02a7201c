"""VMs come and go in random order, and all at the same moment: the host is what the attached ones ask for, then as before."""

import tempfile
from pathlib import Path

import rounds
import state

LIMIT_S = 600
NEEDS = ("kvm", "qmpin")
SHAPES = rounds.SHAPES
# With a partition each round reloads systemd, which is what takes the time here: more of these are in isolate-rounds-more.
SERIES = ((194, False), (6, True))
AT_ONCE_MAX = 10


def run(host):
    before = host.before()
    with tempfile.TemporaryDirectory(prefix="qmpin-") as folder:
        rounds.all_at_once(host, Path(folder), ((min(AT_ONCE_MAX, rounds.room(host)), False), (2, True)))
        state.check_same(before, state.capture())
        rounds.one_by_one(host, Path(folder), SERIES)
    state.check_same(before, state.capture())
