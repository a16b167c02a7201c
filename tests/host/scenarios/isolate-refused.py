"""What the host refuses is named with path and value, the rest goes on, and `detach` brings everything back: trees that
are read-only, a full /run, an errno from every write.
"""

import errno
import os
import re

import cpulist
import positions
import qmpin
import state
from refusals import CGROUPS, DETACH, PARTIAL, RUN, each, named, where_read_only
from wait import wait_until

LIMIT_S = 400
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x", "5900x-one-node", "tiny")

READ_ONLY = ("/proc/irq", "/sys/devices/virtual/workqueue")
# Follows from what was asked for, and cannot be written.
DERIVED = "sys/devices/virtual/workqueue/cpumask_requested"
PAGE = 4096
# More than a VM has in /run/qmpin.
PAGES_MAX = 50


def run(host):
    before = host.before()
    with host.vm(100, cpus=2) as vm:
        vm.wait_guest()
        # The first where it can be: a kernel thread that was ever restored keeps to that by itself, whatever a partition does.
        each(host, vm, (without_journal, read_only, full, full_for_a_while, busy, invalid, not_permitted))
    state.check_same(before, state.capture())


def means(value, text):
    """Whether a file with this text holds the value; CPUs are reported as a list, also where the file has a mask."""
    if text == value:
        return True
    try:
        return int(text.replace(",", ""), 16) == sum(1 << cpu for cpu in cpulist.parse(value))
    except ValueError:
        return False


def read_only(case):
    case.policy(partition=False)
    case.attach()
    usual = case.changed()
    case.detach()
    theirs = {path: text for path, text in usual.items() if f"/{path}".startswith(READ_ONLY)}
    assert len(theirs) > 2, usual

    done = qmpin.patiently(lambda: case.host.run(*where_read_only(READ_ONLY, case.command), check=False))
    print(done.stdout, done.stderr)
    assert done.returncode == PARTIAL, done
    said = dict(re.findall(r"/(\S+): \S+ → (\S+) was refused: Read-only file system", done.stderr))
    missing = [path for path, text in theirs.items() if path != DERIVED and not means(said.get(path, ""), text)]
    assert not missing, f"not named as refused: {missing}; {said}"
    rest = {path: text for path, text in usual.items() if path not in theirs}
    assert rest and case.changed() == rest, f"the rest: {case.changed()}, usually {rest}"
    case.rest_goes_on()
    case.detach()

    case.attach()
    done = case.host.run(*where_read_only(READ_ONLY, DETACH), check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == PARTIAL, done
    said = dict(re.findall(r"/(\S+) could not be restored to (\S+): Read-only file system", done.stdout))
    missing = [path for path in theirs if path != DERIVED and not means(said.get(path, ""), case.alone.files[path])]
    assert not missing, f"not named as left: {missing}; {said}"
    assert case.changed() == theirs, f"what can be restored is back: {case.changed()}"
    case.detach()


def full(case):
    """/run/qmpin takes a page more each time, until all that qmpin has to write fits."""
    for partition in (False, True):
        # Each try would take CPUs offline again, which takes its time.
        case.policy(partition, reonline=False)
        said = ""
        for pages in range(1, PAGES_MAX):
            case.host.run("mount", "-t", "tmpfs", "-o", f"mode=0755,size={pages * PAGE}", "tmpfs", RUN)
            try:
                done = qmpin.attach_once(case.host, 100, *case.flags, check=False)
                print(f"{pages} pages: {done.returncode} {done.stderr}")
                # As full as before.
                case.detach()
            finally:
                case.host.run("umount", RUN)
            if done.returncode == 0:
                break
            assert done.returncode == PARTIAL, done
            assert re.search(rf"could not .*{RUN}/[\w.]+[:\n].*No space left on device", done.stderr), done.stderr
            said += done.stderr
        assert done.returncode == 0, f"{pages} pages are not enough: {done.stderr}"
        for name in ("100.journal", "100.lease", ".host.journal"):
            assert partition or re.search(rf"{RUN}/{re.escape(name)}[:\n]", said), f"{name} always had room: {said}"
        case.host.note(f"a full {RUN}{', with a partition' if partition else ''}: {pages - 1} times too small")


def full_for_a_while(case):
    """/run/qmpin has no room for the host's undo: no partition, until it has."""
    case.policy(partition=True, reonline=False)
    for pages in range(1, PAGES_MAX):
        case.host.run("mount", "-t", "tmpfs", "-o", f"mode=0755,size={pages * PAGE}", "tmpfs", RUN)
        try:
            done = qmpin.attach_once(case.host, 100, *case.flags, check=False)
            case.detach()
            if done.returncode == PARTIAL and f"{RUN}/.host.journal" in done.stderr and f"{RUN}/100." not in done.stderr:
                until_there_is_room(case)
                return
        finally:
            case.host.run("umount", RUN)
    raise AssertionError(f"{RUN}/.host.journal always had room")


def until_there_is_room(case):
    parted = case.vm.cgroup / "vcpus/cpuset.cpus.partition"
    policy = (case.folder / "qmpin.toml").read_text()
    with qmpin.Attached(100, isolation="strict", policy=policy, check_interval_s=1) as attached:
        assert "other threads are not excluded from the VM's CPUs" in attached.log(), attached.log()
        assert not parted.exists()
        case.host.run("mount", "-o", "remount,size=1M", RUN)
        wait_until(lambda: parted.exists() and parted.read_text() == "isolated\n", qmpin.LIMIT_S, "a partition", attached.log)
        wait_until(lambda: "are excluded from the VM's CPUs now" in attached.log(), qmpin.LIMIT_S, "that to be logged", attached.log)
    assert attached.code == 0, attached.log()
    state.check_same(case.alone, state.capture(), [f"{RUN.lstrip('/')}/*"])


def busy(case):
    refused(case, errno.EBUSY)


def invalid(case):
    refused(case, errno.EINVAL)


def not_permitted(case):
    refused(case, errno.EPERM)


def refused(case, number):
    """Every write to the kernel's files is."""
    why = os.strerror(number)
    for partition in (False, True):
        case.policy(partition)
        done = qmpin.patiently(lambda: positions.run(case.command, kernel_files, refuse=number))
        print(f"{why}: {done.returncode} {done.stdout}")
        assert done.returncode == PARTIAL, f"{why}, partition {partition}: {done.returncode}, {done.stdout}"
        for path in refused_paths(done):
            # The kernel says so itself of those that it manages, and they are reported by number.
            managed = number == errno.EPERM and re.fullmatch(r"/proc/irq/\d+/smp_affinity_list", path)
            assert managed or named(path, why, done.stdout), f"{path}: {why} is not said: {done.stdout}"
        case.rest_goes_on()
        case.detach()

        case.attach()
        done = positions.run(DETACH, kernel_files, refuse=number)
        print(f"{why}: {done.returncode} {done.stdout}")
        assert done.returncode == PARTIAL, f"{why}: {done.returncode}, {done.stdout}"
        for path in refused_paths(done):
            # A thread that cannot leave a group is reported with the group. And a VM whose partition stays, stays: the rest of
            # the host is kept in line for it.
            in_other_words = path.endswith("/cgroup.threads") or partition and not path.startswith(CGROUPS)
            assert in_other_words or named(path, why, done.stdout), f"{path}: {why} is not said: {done.stdout}"
        case.detach()


def kernel_files(call, path):
    return path if call == "write" and path.startswith(("/proc/irq/", "/proc/sys/", "/sys/")) else None


def refused_paths(done):
    paths = {position.split()[1] for position in done.refused}
    assert len(paths) > 2, done.refused
    return sorted(paths)


def without_journal(case):
    """What the host was like cannot be written down: then nothing is done that could not be undone."""
    case.policy(partition=True)
    is_journal = lambda call, path: path if path == f"{RUN}/.host.journal" else None
    done = qmpin.patiently(lambda: positions.run(case.command, is_journal, refuse=errno.ENOSPC))
    print(done.stdout)
    assert done.refused and done.returncode == PARTIAL, f"{done.returncode}, {done.stdout}"
    # No partition: the kernel would not restored what it changes for one.
    assert not case.changed(), case.changed()
    assert re.search(rf"{RUN}/\.host\.journal[:\n]", done.stdout) and os.strerror(errno.ENOSPC) in done.stdout, done.stdout
    case.detach()
