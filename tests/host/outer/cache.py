"""The cache outside the repository: each thing built once, named by a hash of what made it.

    KIND-KEY            what was built; its time is that of the last use
    locks/KIND-KEY      held while it is built
    building-*          being built; renamed when whole
    runs/               one folder per run of the test host
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "qmpin-test-host"
    path.mkdir(parents=True, exist_ok=True)
    return path


def key(*parts: str | bytes) -> str:
    """Twelve hex digits over the parts, each with its length so that no two lists collide by joining."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:12]


# A thing that was not used for so long belongs to a state of the repository that is not used.
UNUSED_S = 7 * 24 * 3600
# A build that takes longer than that was killed.
ABANDONED_S = 24 * 3600


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Only one process at a time builds NAME; the others wait and then find it."""
    locks = folder() / "locks"
    locks.mkdir(exist_ok=True)
    with open(locks / name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def built(name: str, build: Callable[[Path], None]) -> Path:
    """The cached NAME, made by `build(path)` when absent. A build that fails or is killed leaves nothing under NAME."""
    final = folder() / name
    if not final.exists():
        with locked(name):
            if not final.exists():
                _sweep()
                scratch = Path(tempfile.mkdtemp(prefix=f"building-{name}.", dir=folder()))
                try:
                    build(scratch / "it")
                    (scratch / "it").rename(final)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    os.utime(final)
    return final


def _sweep() -> None:
    """Removes what no process has used for a long time."""
    now = time.time()
    for path in folder().iterdir():
        age_s = now - path.lstat().st_mtime
        if path.name in ("locks", "runs"):
            continue
        if age_s > (ABANDONED_S if path.name.startswith("building-") else UNUSED_S):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    for run in (folder() / "runs").glob("*"):
        if now - run.lstat().st_mtime > UNUSED_S:
            shutil.rmtree(run, ignore_errors=True)
