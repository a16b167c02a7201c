"""An attach that the host refuses something of: what is said, what goes on, and that `detach` brings everything back."""

import os
import tempfile
import traceback
from pathlib import Path

import cpulist
import qmpin
import state
import threads

RUN = "/run/qmpin"
CGROUPS = "/sys/fs/cgroup/"
DETACH = ("qmpin", "detach", "100")
PARTIAL = 6
# Read-only for one command: its own view of these trees, and of nothing else.
VIEW = """\
while [ "$1" != -- ]; do mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit; shift; done
shift; exec "$@"
"""
KTHREADD = 2


def each(host, vm, parts):
    """Every part by itself; one that fails hides none of the others."""
    with tempfile.TemporaryDirectory(prefix="qmpin-") as folder:
        case = Case(host, vm, Path(folder))
        wrong = []
        for part in parts:
            try:
                part(case)
            except AssertionError as error:
                traceback.print_exc()
                wrong.append(f"{part.__name__}: {error}")
                host.run(*DETACH, check=False)
        assert not wrong, f"{len(wrong)} parts fail, first {wrong[0]}"


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


def where_read_only(folders, command):
    return ("unshare", "--mount", "sh", "-c", VIEW, "sh", *folders, "--", *command)


def named(path, why, said):
    path = path.removeprefix(CGROUPS)
    return any(path in line and why in line for line in said.splitlines())
