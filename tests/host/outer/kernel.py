"""Kernels that Debian does not have: built from Debian's own source with a configuration of ours.

    kernels/NAME.config    what is to be in it; all else is left out
    kernel-NAME-KEY/       boot/vmlinuz-*, usr/lib/modules/*, in the cache
"""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from . import cache

FOLDER = Path(__file__).resolve().parent.parent / "kernels"

# Whose source and compiler. The source package is named in full by its version alone: this one needs the newest.
RELEASE = "trixie"
PACKAGES = ["bc", "bison", "cpio", "flex", "gcc", "kmod", "libc6-dev", "libelf-dev", "linux-source", "make", "perl", "xz-utils"]

BUILD = """\
set -e
cd /usr/src
mkdir linux
tar -C linux --strip-components=1 -xf linux-source-*.tar.xz
cd linux
make -s allnoconfig KCONFIG_ALLCONFIG=/kernel.config
grep '=y' /kernel.config | while read -r line; do
    grep -qx "$line" .config || { echo "$line did not come to be: what it depends on is missing"; exit 1; }
done
make -s -j"$(nproc)" bzImage modules
mkdir -p /out/boot /out/usr
ln -s usr/lib /out/lib
make -s modules_install INSTALL_MOD_PATH=/out
cp arch/x86/boot/bzImage "/out/boot/vmlinuz-$(make -s kernelrelease)"
"""


class BuildFailed(Exception):
    """A kernel could not be built; the text has the last words of what built it."""


def key(name: str) -> str:
    """Changes when anything that goes into the kernel changes, but for the source itself: a cached one is kept."""
    return cache.key((FOLDER / f"{name}.config").read_text(), Path(__file__).read_text())


def home(name: str, bootstrap: Callable[[str, Path, list[str]], None]) -> Path:
    """A folder with the kernel and its list of what is built in, made when it is not in the cache.

    BOOTSTRAP(release, folder, packages) makes the root file system that it is built in.
    """
    def build(path: Path) -> None:
        builder = path.parent / "builder"
        bootstrap(RELEASE, builder, PACKAGES)
        shutil.copy(FOLDER / f"{name}.config", builder / "kernel.config")
        (builder / "out/usr/lib").mkdir(parents=True)
        print(f"building a kernel: {name}", flush=True)
        command = ["nice", "chroot", str(builder), "sh", "-c", BUILD]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise BuildFailed(f"the kernel {name}:\n" + "\n".join(done.stdout.splitlines()[-15:]))
        (builder / "out").rename(path)

    return cache.built(f"kernel-{name}-{key(name)}", build)
