"""A command of qmpin's that is killed at every position in turn, with `detach` after each: the host is then as it was.

    series = Series(host, folder)               # the host as it is now is what it has to be again
    series.policy(isolation="strict")
    killed = series.everywhere("detach", DETACH, attached=True)
    expect(killed, 8, "unlink 100.journal")     # it was killed that often, and there
"""

import json
import os
import signal
import time

import positions
import qmpin
import state

RUN = "/run/qmpin"
ATTACH = ("qmpin", "attach", "100")
DETACH = ("qmpin", "detach", "100")
# More than any command has.
POSITIONS_MAX = 500


class Series:
    """One command again and again, killed at one more position each time; and what was left after it."""

    def __init__(self, host, folder, ignore=(), also=lambda: None):
        """IGNORE are places that another program changes, too; ALSO says what else is not as before, or nothing."""
        self.host = host
        self.folder = folder
        self.ignore = ignore
        self.also = also
        self.flags = ("--config-dir", str(folder))
        self.alone = state.capture()
        self.wrong = []
        self.seen = set()

    def policy(self, **settings):
        text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
        (self.folder / "qmpin.toml").write_text(text)

    def everywhere(self, what, command, attached=False, since=None, until=None, ends=False):
        """Kills COMMAND at every position, from the one that is SINCE, until it comes through or was killed at UNTIL; where
        that was. The VM is ATTACHED before, or not. A command that ENDS would stay, and gets SIGTERM once it has attached.

        Where it waits for another program (irqbalance), it does not come by all positions each time: what has to be among
        them is a SINCE of its own.
        """
        began_s = time.monotonic()
        killed = []
        command = [*command, *self.flags]
        through = False
        while not through and killed[-1:] != [until]:
            assert len(killed) < POSITIONS_MAX, f"{what}: it still does not come through after {killed[-3:]}"
            if attached:
                qmpin.attach_once(self.host, 100, *self.flags)
            tell = end_once_attached if ends else None
            done = qmpin.patiently(lambda: positions.run(command, name_of, len(killed) + 1, since, tell))
            through = done.killed_at is None
            want = 0 if through else -signal.SIGKILL
            assert done.returncode == want, f"{what}, killed before {done.killed_at}: {done}"
            if through and (ends or attached):
                # Before the next `detach`, which would remove it.
                assert not left_behind(), f"{what}: {left_behind()} in {RUN} after {done.made[-3:]}: {done.stdout}"
            self.compare(f"{what}, killed before {done.killed_at}")
            killed += [] if through else [done.killed_at]
        took_s = time.monotonic() - began_s
        self.host.note(f"{what}: killed at {len(killed)} positions in {took_s:.0f} s")
        return killed

    def compare(self, when):
        """Detaches, and takes down what is not as before."""
        said = self.host.run(*DETACH).stdout
        rows = state.without_ending(state.diff(self.alone, state.capture(), self.ignore))
        rows += filter(None, [self.also()])
        print(f"{when}: {'; '.join(said.splitlines())}")
        # What is left stays to be seen after the next ones, too.
        for row in rows:
            if row not in self.seen:
                print(f"  differs: {row}")
                self.wrong.append(f"{when}: {row}")
        self.seen.update(rows)
        assert not left_behind(), f"{when}: {left_behind()} in {RUN}"

    def check(self):
        assert not self.wrong, f"{len(self.wrong)} things are left, first {self.wrong[0]}"


def left_behind():
    """What is in /run/qmpin."""
    return os.listdir(RUN) if os.path.isdir(RUN) else []


def expect(killed, least, *names):
    """It was killed that often, and where it matters."""
    assert len(killed) >= least, f"killed at {len(killed)} positions only: {killed}"
    for name in names:
        assert any(name in position for position in killed), f"not killed at {name}: {killed}"


def name_of(call, path):
    """Positions are the journals and all else in /run/qmpin; what systemd is asked about a partition; groups that go; CPUs' switches."""
    if path.startswith("/sys/devices/system/cpu/cpu") and path.endswith("/online"):
        return path.removeprefix("/sys/devices/system/cpu/")
    if path == RUN:
        return "the folder"
    # One that is opened is cut to the length it has: nothing changes, and a process that waits for irqbalance does so now and then.
    if call == "ftruncate" and path.endswith(".journal"):
        return None
    if path.startswith(f"{RUN}/"):
        return path.removeprefix(f"{RUN}/")
    if path.startswith("/run/systemd/"):
        return path
    return f"cgroup {os.path.basename(path)}" if call == "rmdir" else None


def end_once_attached(pid, position):
    # `qmpin status` reports it when all is done.
    if position == "rename 100.standing.new":
        os.kill(pid, signal.SIGTERM)
