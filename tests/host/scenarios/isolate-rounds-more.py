"""As isolate-rounds, with a partition each time: 400 attachments and detachments in random order, and ten at the same moment.

It takes long.
"""

import tempfile
from pathlib import Path

import rounds
import state

LIMIT_S = 3000
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x",)
SERIES = ((400, True),)
AT_ONCE_MAX = 10


def run(host):
    before = host.before()
    with tempfile.TemporaryDirectory(prefix="qmpin-") as folder:
        rounds.all_at_once(host, Path(folder), ((min(AT_ONCE_MAX, rounds.room(host)), True),), mixed=True)
        state.check_same(before, state.capture())
        rounds.one_by_one(host, Path(folder), SERIES)
    state.check_same(before, state.capture())
