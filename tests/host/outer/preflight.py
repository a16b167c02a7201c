"""Whether this machine can carry the test host at all, and the packages that building it needs."""

import os
import shutil
import subprocess
from pathlib import Path

# Exit code of "cannot run here", as automake and Debian's autopkgtest count a skipped test.
EXIT_SKIPPED = 77

# Command -> Debian package.
TOOLS = {
    "iasl": "acpica-tools",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "tar": "tar",
    "unshare": "util-linux",
    "mount": "mount",
}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class CannotRun(Exception):
    """The machine lacks what the test host needs; the text says what in one line."""


def check() -> None:
    """Raises CannotRun, or leaves the machine with every tool installed."""
    if os.geteuid() != 0:
        raise CannotRun("not root: building a root file system and chroot need it")
    if not Path("/etc/debian_version").exists():
        raise CannotRun("not a Debian machine: the image is built with mmdebstrap and apt")
    if os.uname().machine != "x86_64":
        raise CannotRun(f"an {os.uname().machine} machine: the shapes are x86_64 only")
    missing = [package for tool, package in TOOLS.items() if not shutil.which(tool)]
    if not KEYRING.exists():
        missing.append("debian-archive-keyring")
    if missing:
        install(missing)


def install(packages: list[str]) -> None:
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    for command in (["apt-get", "-q", "update"], ["apt-get", "-q", "install", "-y", *packages]):
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            last_line = (done.stdout.strip().splitlines() or ["no output"])[-1]
            raise CannotRun(f"`{' '.join(command)}` failed: {last_line}")
