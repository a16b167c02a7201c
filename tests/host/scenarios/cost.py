"""What supervisors cost while nothing happens does not grow faster than their number."""

import contextlib
import os
import time
from pathlib import Path

import qmpin
import state

LIMIT_S = 900
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x", "epyc-4x")

# How many VMs at once.
NUMBERS = {"5900x": (1, 5, 10), "epyc-4x": (1, 5, 10, 30)}
OVER_S = 30.0
# The emulated host is busy with more than this, so the same work takes longer at times.
SPREAD = 1.4


def run(host):
    before = host.before()
    numbers = NUMBERS[host.shape["name"]]
    vmids = range(100, 100 + max(numbers))
    each_ms = {}
    with contextlib.ExitStack() as vms:
        for vmid in vmids:
            vms.enter_context(host.vm(vmid, cpus=1, disks=0, memory_mib=32, paused=True))
        for number in numbers:
            with contextlib.ExitStack() as followers:
                pids = [
                    followers.enter_context(qmpin.Attached(vmid, isolation="exclusive")).process.pid
                    for vmid in vmids[:number]
                ]
                each_ms[number] = cpu_ms(pids) / number
    for number, ms in each_ms.items():
        host.note(f"{number} VMs: {ms / OVER_S * 60:.0f} ms of CPU time a minute for each, {ms / each_ms[1]:.2f} of one alone")
    assert all(ms < each_ms[1] * SPREAD for ms in each_ms.values()), each_ms
    state.check_same(before, state.capture())


def cpu_ms(pids):
    """The CPU time of these processes over a while, in milliseconds."""
    # A pass of the slow timer, in which the last neighbour is noticed.
    began = time.monotonic()
    while time.monotonic() - began < 6:
        time.sleep(0.5)
    start, began = sum(map(ticks, pids)), time.monotonic()
    time.sleep(OVER_S)
    spent = sum(map(ticks, pids)) - start
    return spent * 1000 / os.sysconf("SC_CLK_TCK") * OVER_S / (time.monotonic() - began)


def ticks(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])
