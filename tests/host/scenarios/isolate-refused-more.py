"""What else may be refused, one thing at a time: each write that makes a partition, systemd, /run/systemd, all cgroups; and a
host that has no cgroups. It takes long.
"""

import errno
import os

import positions
import qmpin
import state
from refusals import CGROUPS, DETACH, PARTIAL, each, named, where_read_only

LIMIT_S = 900
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x", "tiny")
DROP_INS = "/run/systemd/system"
# A view of one's own of a folder that is full.
FULL = """\
folder=$1; shift
mount -t tmpfs -o mode=0755,size=4096 tmpfs "$folder" && head -c 4096 /dev/zero > "$folder/full" || exit
exec "$@"
"""


def run(host):
    before = host.before()
    with host.vm(100, cpus=2) as vm:
        vm.wait_guest()
        each(host, vm, (without_cgroups, without_bus, without_room, read_only, one_by_one))
    state.check_same(before, state.capture())


def attach(case, *before):
    case.policy(partition=True, reonline=False)
    done = qmpin.patiently(lambda: case.host.run(*before, *case.command, check=False))
    print(done.stdout, done.stderr)
    assert done.returncode == PARTIAL, done
    case.rest_goes_on()
    assert not (case.vm.cgroup / "vcpus").exists(), "there is no partition"
    return done.stdout + done.stderr


def without_cgroups(case):
    """A host without cgroup v2: masks alone, and that is said. Nothing is refused, since nothing better was to be expected."""
    case.policy(partition=True, reonline=False)
    hidden = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /sys/fs/cgroup && exec "$@"', "sh")
    done = qmpin.patiently(lambda: case.host.run(*hidden, *case.command, check=False))
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done
    assert "the VM's threads are pinned and others may run on its CPUs: there is no cgroup v2 tree at /sys/fs/cgroup" in done.stderr, done
    case.rest_goes_on()
    case.detach()


def without_bus(case):
    """systemd cannot be asked: the VM is pinned and the rest of the host is excluded, and detach can do without it, too."""
    said = attach(case, "env", "DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent")
    assert "could not reach systemd over the system bus" in said, said
    case.detach()


def without_room(case):
    said = attach(case, "unshare", "--mount", "sh", "-c", FULL, "sh", DROP_INS)
    assert f"{DROP_INS}/100.scope.d" in said and os.strerror(errno.ENOSPC) in said, said
    case.detach()


def read_only(case):
    """The whole tree of cgroups, for attach and then for detach."""
    case.policy(partition=True, reonline=False)
    view = lambda command: where_read_only((CGROUPS.rstrip("/"),), command)
    done = qmpin.patiently(lambda: case.host.run(*view(case.command), check=False))
    print(done.stdout, done.stderr)
    assert done.returncode == PARTIAL, done
    assert named(f"{CGROUPS}qemu.slice/100.scope/vcpus", os.strerror(errno.EROFS), done.stdout + done.stderr), done
    case.rest_goes_on()
    case.detach()
    case.attach()
    done = case.host.run(*view(DETACH), check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == PARTIAL, done
    assert named(f"{CGROUPS}qemu.slice/100.scope/vcpus", os.strerror(errno.EROFS), done.stdout), done
    case.detach()


def one_by_one(case):
    """Each file of the partition's, and each group, in turn."""
    case.policy(partition=True, reonline=False)
    usual = positions.run(case.command, of_partition)
    assert usual.returncode == 0, usual
    case.detach()
    places = sorted({place for place in usual.made})
    assert len(places) > 8, places
    for place in places:
        done = qmpin.patiently(lambda: positions.run(case.command, only(place), refuse=errno.EBUSY))
        print(f"{place}: {done.returncode} {done.stdout}")
        # What is renamed is known by the name it gets.
        path = place.split()[1].replace(".new", ".conf")
        assert done.returncode == PARTIAL, f"{place}: {done.returncode}, {done.stdout}"
        assert named(path, os.strerror(errno.EBUSY), done.stdout), f"{place} is not named: {done.stdout}"
        case.detach()
    case.host.note(f"{len(places)} places, each refused by itself")


def of_partition(call, path):
    return path if path.startswith((CGROUPS, DROP_INS)) else None


def only(place):
    call, path = place.split()
    return lambda of, at: at if (of, at) == (call, path) else None
