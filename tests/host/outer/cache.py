"""The cache outside the repository: each thing built once, named by a hash of what made it."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
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


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Only one process at a time builds NAME; the others wait and then find it."""
    with open(folder() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def built(name: str, build: Callable[[Path], None]) -> Path:
    """The cached NAME, made by `build(path)` when absent. A build that fails or is killed leaves nothing under NAME."""
    final = folder() / name
    if final.exists():
        return final
    with locked(name):
        if final.exists():
            return final
        scratch = Path(tempfile.mkdtemp(prefix=f"building-{name}.", dir=folder()))
        try:
            build(scratch / "it")
            (scratch / "it").rename(final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return final
