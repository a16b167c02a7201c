"""VMs that come and go in random order, and all at the same moment: the host is what the attached ones ask for, then as before."""

import contextlib
import os
import random
import subprocess
import time

import cpulist
import qmpin
import state

SHAPES = ("5900x", "5900x-one-node", "epyc-4x", "two-socket-no-smt")
VMIDS = (100, 101, 102)
SEED = 20
VCPUS = 2
# Where no VM has its vCPUs, so that the order cannot matter.
HELPERS = 'iothreads = "0-3"\nemulator = "0-3"\n'
HELPERS_CPUS = 4


def one_by_one(host, config, series):
    """Three VMs; each of the SERIES is a number of rounds, and whether with partitions."""
    with host.vm(100, cpus=2) as one, host.vm(101, cpus=2) as two, host.vm(102, cpus=2) as three:
        for vm in (one, two, three):
            vm.wait_guest()
        alone = state.capture()
        chance = random.Random(SEED)
        for rounds, partition in series:
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


def all_at_once(host, config, numbers, mixed=False):
    """So many VMs at the same moment, each with or without a partition."""
    vmids = range(100, 100 + max(number for number, _ in numbers))
    with contextlib.ExitStack() as stack:
        for vmid in vmids:
            stack.enter_context(host.vm(vmid, cpus=VCPUS, disks=0, memory_mib=32, paused=True))
        alone = state.capture()
        for number, partition in numbers:
            began_s = time.monotonic()
            at_once(host, config, alone, vmids[:number], partition, mixed)
            what = f"{number} VMs at once{' with partitions' if partition else ''}"
            host.note(f"{what}: {time.monotonic() - began_s:.0f} s")


def room(host):
    """How many VMs the host has CPUs for."""
    return (len(cpulist.parse(host.online())) - HELPERS_CPUS) // VCPUS


def at_once(host, config, alone, vmids, partition, mixed):
    """All attached at the same moment is the same as one after another, and so is all detached; where it is MIXED, so are some
    that come while others go.
    """
    (config / "qmpin.toml").write_text(policy(partition) + HELPERS)
    for vmid in vmids:
        first = HELPERS_CPUS + VCPUS * (vmid - vmids[0])
        (config / f"{vmid}.toml").write_text(f'vcpus = "{first}-{first + VCPUS - 1}"\n')
        qmpin.attach_once(host, vmid, *flags(config))
    in_order = state.capture()
    together(config, going=vmids)
    same(alone)
    # Leases and journals say when and in which order; what they are about is the same.
    ignore = ["run/qmpin/*"]
    if partition:
        # Workqueues exclude the same CPUs, whichever came first: a partition, or a qmpin that saw the lease of a VM whose partition follows.
        ignore.append("sys/devices/virtual/workqueue/cpumask_requested")
    together(config, vmids)
    state.check_same(in_order, state.capture(), ignore)
    if mixed:
        some, others = vmids[::2], vmids[1::2]
        together(config, going=some)
        together(config, some, others)
        together(config, others)
        state.check_same(in_order, state.capture(), ignore)
    together(config, going=vmids)
    same(alone)
    for vmid in vmids:
        (config / f"{vmid}.toml").unlink()


def together(config, coming=(), going=()):
    waiting = [(vmid, True) for vmid in coming] + [(vmid, False) for vmid in going]
    for _ in range(qmpin.TRIES):
        done = in_parallel([command(config, vmid, attach) for vmid, attach in waiting])
        for one in done:
            print(one.stderr, end="")
            assert one.returncode == 0 or qmpin.was_late(one), one
        waiting = [one for one, ended in zip(waiting, done) if ended.returncode != 0]
        if not waiting:
            return
    raise AssertionError(f"QEMU of {waiting} does not answer")


def in_parallel(commands):
    started = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for words in commands]
    said = [process.communicate(timeout=120)[1] for process in started]
    return [subprocess.CompletedProcess(one.args, one.returncode, "", err) for one, err in zip(started, said)]
