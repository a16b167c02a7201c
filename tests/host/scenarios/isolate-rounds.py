"""VMs come and go in random order, and all at the same moment: the host is what the attached ones ask for, then as before."""

import contextlib
import os
import random
import subprocess
import tempfile
import time
from pathlib import Path

import cpulist
import qmpin
import state

LIMIT_S = 600
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x", "5900x-one-node", "epyc-4x", "two-socket-no-smt")
VMIDS = (100, 101, 102)
# With a partition each round reloads systemd, which is what takes the time here.
ROUNDS = 190
ROUNDS_WITH_PARTITIONS = 10
SEED = 20
# At the same moment, where the host has the CPUs. Ten that have systemd reload at once take it half a minute here.
AT_ONCE_MAX = 10
AT_ONCE_WITH_PARTITIONS = 3
VCPUS = 2
# Where no VM has its vCPUs, so that the order cannot matter.
HELPERS = 'iothreads = "0-3"\nemulator = "0-3"\n'
HELPERS_CPUS = 4


def run(host):
    before = host.before()
    with tempfile.TemporaryDirectory(prefix="qmpin-") as folder:
        all_at_once(host, Path(folder))
        state.check_same(before, state.capture())
        one_by_one(host, Path(folder))
    state.check_same(before, state.capture())


def one_by_one(host, config):
    with host.vm(100, cpus=2) as one, host.vm(101, cpus=2) as two, host.vm(102, cpus=2) as three:
        for vm in (one, two, three):
            vm.wait_guest()
        alone = state.capture()
        chance = random.Random(SEED)
        for rounds, partition in ((ROUNDS, False), (ROUNDS_WITH_PARTITIONS, True)):
            (config / "qmpin.toml").write_text(policy(partition))
            in_random_order(host, config, chance, rounds)
            same(alone)


def same(alone):
    state.check_same(alone, state.capture())
    assert not os.listdir("/run/qmpin"), os.listdir("/run/qmpin")


def policy(partition):
    # What takes long is done in the few rounds: systemd's reloads, and CPUs that go offline and online.
    few = str(partition).lower()
    return f'isolation = "strict"\npartition = {few}\nreonline = {few}\n'


def command(config, vmid, attach):
    if attach:
        return ["qmpin", "attach", str(vmid), "--once", *flags(config)]
    return ["qmpin", "detach", str(vmid), "--quiet"]


def flags(config):
    return ("--quiet", "--config-dir", str(config))


def in_random_order(host, config, chance, rounds):
    attached = set()
    for _ in range(rounds):
        vmid = chance.choice(VMIDS)
        if vmid in attached:
            host.run(*command(config, vmid, attach=False))
        else:
            qmpin.attach_once(host, vmid, *flags(config))
        attached ^= {vmid}
    print(f"{rounds} rounds, then {sorted(attached)} are attached")
    for vmid in attached:
        host.run(*command(config, vmid, attach=False))


def all_at_once(host, config):
    """Two at the same moment, and ten; some with partitions, too."""
    room = len(cpulist.parse(host.online())) - HELPERS_CPUS
    vmids = range(100, 100 + min(AT_ONCE_MAX, room // VCPUS))
    with contextlib.ExitStack() as stack:
        for vmid in vmids:
            stack.enter_context(host.vm(vmid, cpus=VCPUS, disks=0, memory_mib=32, paused=True))
        alone = state.capture()
        for number, partition in ((2, False), (len(vmids), False), (AT_ONCE_WITH_PARTITIONS, True)):
            began_s = time.monotonic()
            at_once(host, config, alone, vmids[:number], partition)
            what = f"{number} VMs at once{' with partitions' if partition else ''}"
            host.note(f"{what}: {time.monotonic() - began_s:.0f} s")


def at_once(host, config, alone, vmids, partition):
    """All attached at the same moment is the same as one after another, and so is all detached."""
    (config / "qmpin.toml").write_text(policy(partition) + HELPERS)
    for vmid in vmids:
        first = HELPERS_CPUS + VCPUS * (vmid - vmids[0])
        (config / f"{vmid}.toml").write_text(f'vcpus = "{first}-{first + VCPUS - 1}"\n')
        qmpin.attach_once(host, vmid, *flags(config))
    in_order = state.capture()
    together(config, vmids, attach=False)
    same(alone)
    together(config, vmids, attach=True)
    # Leases and journals say when and in which order; what they are about is the same.
    ignore = ["run/qmpin/*"]
    if partition:
        # Workqueues keep off the same CPUs, whoever was first: a partition, or a qmpin that saw the lease of one to come.
        ignore.append("sys/devices/virtual/workqueue/cpumask_requested")
    state.check_same(in_order, state.capture(), ignore)
    together(config, vmids, attach=False)
    same(alone)
    for vmid in vmids:
        (config / f"{vmid}.toml").unlink()


def together(config, vmids, attach):
    waiting = list(vmids)
    for _ in range(qmpin.TRIES):
        done = in_parallel([command(config, vmid, attach) for vmid in waiting])
        for one in done:
            print(one.stderr, end="")
            assert one.returncode == 0 or qmpin.was_late(one), one
        waiting = [vmid for vmid, one in zip(waiting, done) if one.returncode != 0]
        if not waiting:
            return
    raise AssertionError(f"QEMU of {waiting} does not answer")


def in_parallel(commands):
    started = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for words in commands]
    said = [process.communicate(timeout=120)[1] for process in started]
    return [subprocess.CompletedProcess(one.args, one.returncode, "", err) for one, err in zip(started, said)]
