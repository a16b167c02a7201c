"""VMs come and go in random order, and all at the same moment: the host is what the attached ones ask for, then as before."""

import os
import random
import subprocess
import tempfile
from pathlib import Path

import state

LIMIT_S = 600
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x", "5900x-one-node", "epyc-4x", "two-socket-no-smt")
VMIDS = (100, 101, 102)
# With a partition each round reloads systemd, which is what takes the time here.
ROUNDS = 180
ROUNDS_WITH_PARTITIONS = 20
SEED = 20
# Where no VM has its vCPUs, so that the order cannot matter.
HELPERS = 'iothreads = "0-3"\nemulator = "0-3"\n'


def run(host):
    before = host.before()
    with host.vm(100, cpus=2) as one, host.vm(101, cpus=2) as two, host.vm(102, cpus=2) as three:
        for vm in (one, two, three):
            vm.wait_guest()
        alone = state.capture()
        with tempfile.TemporaryDirectory(prefix="qmpin-") as folder:
            config = Path(folder)
            at_once(host, config, alone)
            chance = random.Random(SEED)
            for rounds, partition in ((ROUNDS, False), (ROUNDS_WITH_PARTITIONS, True)):
                (config / "qmpin.toml").write_text(policy(partition))
                in_random_order(host, config, chance, rounds)
                state.check_same(alone, state.capture())
                assert not os.listdir("/run/qmpin"), os.listdir("/run/qmpin")
    state.check_same(before, state.capture())


def policy(partition):
    return f'isolation = "strict"\npartition = {str(partition).lower()}\n'


def command(config, vmid, attach):
    if attach:
        return ["qmpin", "attach", str(vmid), "--once", "--quiet", "--config-dir", str(config)]
    return ["qmpin", "detach", str(vmid), "--quiet"]


def in_random_order(host, config, chance, rounds):
    attached = set()
    for _ in range(rounds):
        vmid = chance.choice(VMIDS)
        host.run(*command(config, vmid, vmid not in attached))
        attached ^= {vmid}
    print(f"{rounds} rounds, then {sorted(attached)} are attached")
    for vmid in attached:
        host.run(*command(config, vmid, attach=False))


def at_once(host, config, alone):
    """All attached at the same moment is the same as one after another, and so is all detached."""
    (config / "qmpin.toml").write_text(policy(partition=False) + HELPERS)
    for vmid in VMIDS:
        (config / f"{vmid}.toml").write_text(f'vcpus = "{2 * (vmid - 95)}-{2 * (vmid - 95) + 1}"\n')
        host.run(*command(config, vmid, attach=True))
    one_by_one = state.capture()
    for vmid in VMIDS:
        host.run(*command(config, vmid, attach=False))
    state.check_same(alone, state.capture())
    together(config, attach=True)
    # Leases and journals say when and in which order; what they are about is the same.
    state.check_same(one_by_one, state.capture(), ignore=["run/qmpin/*"])
    together(config, attach=False)
    state.check_same(alone, state.capture())
    for vmid in VMIDS:
        (config / f"{vmid}.toml").unlink()


def together(config, attach):
    started = [subprocess.Popen(command(config, vmid, attach), stderr=subprocess.PIPE, text=True) for vmid in VMIDS]
    for process in started:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, (process.args, process.returncode, err)
