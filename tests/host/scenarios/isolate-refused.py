"""What the host refuses is named with path and value, the rest goes on, and `detach` brings everything back: trees that
are read-only, a full /run, an errno from every write.
"""

import errno
import os
import re
import tempfile
import traceback
from pathlib import Path

import cpulist
import positions
import qmpin
import state
import threads

LIMIT_S = 400
NEEDS = ("kvm", "qmpin")
SHAPES = ("5900x", "5900x-one-node", "tiny")

RUN = "/run/qmpin"
CGROUPS = "/sys/fs/cgroup/"
DETACH = ("qmpin", "detach", "100")
PARTIAL = 6
# Read-only for one command: its own view of these trees, and of nothing else.
VIEW = """\
while [ "$1" != -- ]; do mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit; shift; done
shift; exec "$@"
"""
READ_ONLY = ("/proc/irq", "/sys/devices/virtual/workqueue")
# Follows from what was asked for, and cannot be written.
DERIVED = "sys/devices/virtual/workqueue/cpumask_requested"
PAGE = 4096
# More than a VM has in /run/qmpin.
PAGES_MAX = 50
KTHREADD = 2


def run(host):
    before = host.before()
    with host.vm(100, cpus=2) as vm, tempfile.TemporaryDirectory(prefix="qmpin-") as folder:
        vm.wait_guest()
        case = Case(host, vm, Path(folder))
        wrong = []
        # The first where it can be: a kernel thread that was ever put back keeps to that by itself, whatever a partition does.
        for part in (without_journal, read_only, full, busy, invalid, not_permitted):
            try:
                part(case)
            except AssertionError as error:
                # One that fails hides none of the others.
                traceback.print_exc()
                wrong.append(f"{part.__name__}: {error}")
                host.run(*DETACH, check=False)
        assert not wrong, f"{len(wrong)} parts fail, first {wrong[0]}"
    state.check_same(before, state.capture())


class Case:
    """A VM to be attached by `attach`, and what is there before."""

    def __init__(self, host, vm, folder):
        self.host = host
        self.vm = vm
        self.folder = folder
        self.alone = state.capture()
        self.flags = ("--config-dir", str(folder))
        self.command = ("qmpin", "attach", "100", "--once", *self.flags)

    def policy(self, partition, reonline=True):
        text = f'isolation = "strict"\npartition = {str(partition).lower()}\nreonline = {str(reonline).lower()}\n'
        (self.folder / "qmpin.toml").write_text(text)

    def attach(self):
        qmpin.attach_once(self.host, 100, *self.flags)

    def changed(self):
        """The files of the host that are not as before, and what they are now."""
        rows = state.without_ending(state.diff(self.alone, state.capture()))
        return {row.path: row.after for row in rows if not row.path.startswith(("thread/", "run/qmpin/"))}

    def rest_goes_on(self):
        """Threads are neither in the folders nor files that are refused here."""
        exclusive = set()
        for tid in self.vm.roles().vcpus.values():
            pinned = cpulist.parse(threads.allowed(tid))
            assert len(pinned) == 1, f"vCPU thread {tid} is on {pinned}"
            exclusive |= pinned
        kernel = cpulist.parse(threads.allowed(KTHREADD))
        assert not kernel & exclusive, f"kthreadd is on {kernel}, the vCPUs on {exclusive}"

    def detach(self):
        """Brings everything back."""
        print(self.host.run(*DETACH).stdout)
        state.check_same(self.alone, state.capture())
        assert not os.listdir(RUN), os.listdir(RUN)


def means(value, text):
    """Whether a file with this text holds the value; CPUs are told as a list, also where the file has a mask."""
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

    done = qmpin.patiently(lambda: case.host.run(*where_read_only(case.command), check=False))
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
    done = case.host.run(*where_read_only(DETACH), check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == PARTIAL, done
    said = dict(re.findall(r"/(\S+) could not be put back to (\S+): Read-only file system", done.stdout))
    missing = [path for path in theirs if path != DERIVED and not means(said.get(path, ""), case.alone.files[path])]
    assert not missing, f"not named as left: {missing}; {said}"
    assert case.changed() == theirs, f"what can be put back is back: {case.changed()}"
    case.detach()


def where_read_only(command):
    return ("unshare", "--mount", "sh", "-c", VIEW, "sh", *READ_ONLY, "--", *command)


def full(case):
    """/run/qmpin takes a page more each time, until all that qmpin has to write fits."""
    for partition in (False, True):
        # Each try would take CPUs offline again, which takes its time.
        case.policy(partition, reonline=False)
        said = ""
        for pages in range(1, PAGES_MAX):
            case.host.run("mount", "-t", "tmpfs", "-o", f"size={pages * PAGE}", "tmpfs", RUN)
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
            # The kernel says so itself of those that it manages, and they are told by number.
            managed = number == errno.EPERM and re.fullmatch(r"/proc/irq/\d+/smp_affinity_list", path)
            assert managed or named(path, why, done.stdout), f"{path}: {why} is not said: {done.stdout}"
        case.rest_goes_on()
        case.detach()

        case.attach()
        done = positions.run(DETACH, kernel_files, refuse=number)
        print(f"{why}: {done.returncode} {done.stdout}")
        assert done.returncode == PARTIAL, f"{why}: {done.returncode}, {done.stdout}"
        for path in refused_paths(done):
            # A thread that cannot leave a group is told with the group. And a VM whose partition stays, stays: the rest of
            # the host is kept in line for it.
            told = path.endswith("/cgroup.threads") or partition and not path.startswith(CGROUPS)
            assert told or named(path, why, done.stdout), f"{path}: {why} is not said: {done.stdout}"
        case.detach()


def kernel_files(call, path):
    return path if call == "write" and path.startswith(("/proc/irq/", "/proc/sys/", "/sys/")) else None


def refused_paths(done):
    paths = {position.split()[1] for position in done.refused}
    assert len(paths) > 2, done.refused
    return sorted(paths)


def named(path, why, said):
    path = path.removeprefix(CGROUPS)
    return any(path in line and why in line for line in said.splitlines())


def without_journal(case):
    """What the host was like cannot be written down: then nothing is done that could not be undone."""
    case.policy(partition=True)
    is_journal = lambda call, path: path if path == f"{RUN}/.host.journal" else None
    done = qmpin.patiently(lambda: positions.run(case.command, is_journal, refuse=errno.ENOSPC))
    print(done.stdout)
    assert done.refused and done.returncode == PARTIAL, f"{done.returncode}, {done.stdout}"
    # No partition: the kernel would not put back what it changes for one.
    assert not case.changed(), case.changed()
    assert re.search(rf"{RUN}/\.host\.journal[:\n]", done.stdout) and os.strerror(errno.ENOSPC) in done.stdout, done.stdout
    case.detach()
