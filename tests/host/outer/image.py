"""Disk images from root file systems."""

import subprocess
from pathlib import Path

from . import cache, rootfs

SIZE = "3G"


def disk(suite: rootfs.Suite) -> Path:
    """The suite's ext4 image; runs write to a snapshot of it, so it never changes."""
    key = cache.key(suite.key(), SIZE, Path(__file__).read_text())
    home = rootfs.root(suite)
    return cache.built(f"disk-{suite.name}-{key}.img", lambda path: _make(home, path))


def _make(home: Path, path: Path) -> None:
    # No journal: the image is thrown away after each run. Lazy tables: the file stays sparse.
    command = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1", "-d", str(home)]
    # Made beforehand, or mke2fs tells about it in spite of -q.
    path.touch()
    subprocess.run([*command, str(path), SIZE], check=True)
