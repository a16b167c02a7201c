"""qmpin's Debian package, installed as an administrator installs it and purged at the end of the block.

    with Package(host) as package:      # `install=False`: by hand, in the block
        package.write_policy(100, 'isolation = "exclusive"')
        ...
        package.purge()             # before the end of the block, where the scenario wants to look at what is left
"""

import contextlib
import fcntl
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import qmpin
from qtest import PACKAGE
from vm import Vm

LIMIT_S = 120
CONFIG = Path("/etc/qmpin")
CLUSTER = Path("/etc/pve/qmpin")
HOOK = Path("/var/lib/vz/snippets/qmpin-hook")
# Held by Proxmox for as long as `qm start` or `qm stop` takes.
LOCKS = Path("/run/lock/qemu-server")
# systemd keeps the slice of a template after its last instance, and what that needs of the one above.
IGNORE = ["sys/fs/cgroup/system.slice/cgroup.subtree_control"]


class Package:
    def __init__(self, host, install: bool = True):
        self.host = host
        self.wanted = install

    def __enter__(self) -> "Package":
        if self.wanted:
            self.install()
        return self

    def __exit__(self, *_exc: object) -> None:
        if Path("/var/lib/dpkg/info/qmpin.list").exists():
            self.purge()
        HOOK.unlink(missing_ok=True)
        shutil.rmtree(CLUSTER.parent, ignore_errors=True)

    def install(self) -> str:
        """`dpkg -i`, the first time or over what is there."""
        return self.host.run("dpkg", "-i", str(PACKAGE)).stdout

    def purge(self) -> str:
        """`apt purge`, the program that most would use."""
        done = self.host.run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-y", "purge", "qmpin", check=False)
        print(done.stdout, done.stderr)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def write_policy(self, vmid: int, text: str, folder: Path = CONFIG) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{vmid}.toml").write_text(text + "\n")

    def install_hook(self) -> None:
        """As the hook script's own first lines say."""
        HOOK.parent.mkdir(parents=True, exist_ok=True)
        self.host.run("install", "-m", "755", "/usr/share/qmpin/qmpin-hook", str(HOOK.parent))


@contextlib.contextmanager
def locked(vmid: int) -> Iterator[None]:
    """The lock that Proxmox has on a VM's configuration while it does something with it."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    with (LOCKS / f"lock-{vmid}.conf").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def hook(vmid: int, phase: str) -> str:
    """What Proxmox does at a phase. A hook that fails before the start keeps the VM from starting."""
    done = subprocess.run([HOOK, str(vmid), phase], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, f"{phase}: {done.stderr}"
    return done.stderr


def start(vm: Vm) -> None:
    """As `qm start`: the phases of a hook script, where the VM has one, in their order, with the lock held all the while."""
    with locked(vm.vmid):
        phase(vm, "pre-start")
        vm.start()
        phase(vm, "post-start")


def stop(vm: Vm) -> None:
    """As `qm stop`."""
    with locked(vm.vmid):
        phase(vm, "pre-stop")
        vm.quit()
        phase(vm, "post-stop")


def phase(vm: Vm, name: str) -> None:
    if HOOK.exists():
        hook(vm.vmid, name)


def readme(folder: Path) -> list[str]:
    """The commands under "Install, use, remove" in the README that the package has, without what is said of them."""
    subprocess.run(["dpkg-deb", "-x", PACKAGE, folder], check=True)
    text = (folder / "usr/share/doc/qmpin/README.md").read_text()
    block = text.split("## Install, use, remove", 1)[1].split("\n## ", 1)[0]
    return [line.split("  #", 1)[0].strip() for line in block.splitlines() if line.startswith("    ")]


def newer(folder: Path, version: str) -> Path:
    """The same package as a later version of itself."""
    tree = folder / "tree"
    subprocess.run(["dpkg-deb", "-R", PACKAGE, tree], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"^Version: .*$", f"Version: {version}", control.read_text(), flags=re.MULTILINE))
    made = folder / "newer.deb"
    subprocess.run(["dpkg-deb", "-b", tree, made], check=True, stdout=subprocess.DEVNULL)
    return made


def is_enabled(unit: str) -> str:
    return qmpin.systemctl("is-enabled", unit, check=False).stdout.strip()
