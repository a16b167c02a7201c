"""Root file systems: one per suite, as QEMU's home and as the guest's disk."""

import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from . import cache, kernel, mirror

HERE = Path(__file__).resolve().parent.parent

# What a scenario may use. python3 runs the scenarios, hwloc-nox has lstopo, stress-ng makes noise.
PACKAGES = [
    "dbus",
    "hwloc-nox",
    "irqbalance",
    "kmod",
    "procps",
    "python3",
    "qemu-system-x86",
    "stress-ng",
    "systemd",
    "systemd-sysv",
    "udev",
    "util-linux",
]
KERNEL_PACKAGES = ["initramfs-tools", "linux-image-cloud-amd64"]

# What the initramfs needs to find its root; everything else is loaded from there.
INITRAMFS_MODULES = ["virtio_pci", "virtio_blk", "ext4"]

# Units that no scenario needs and that cost an emulated machine seconds of boot.
MASKED = [
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "irqbalance.service",
    "serial-getty@ttyS0.service",
    "systemd-binfmt.service",
    "systemd-hwdb-update.service",
    "systemd-journal-flush.service",
    "systemd-logind.service",
    "systemd-networkd.service",
    "systemd-random-seed.service",
    "systemd-timesyncd.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-udev-settle.service",
    "systemd-udev-trigger.service",
    "systemd-update-utmp.service",
]

# Documentation and translations: a third of the packages' size, never read here.
UNPACK_OPTIONS = [
    "path-exclude=/usr/share/doc/*",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/info/*",
]

# Mirrors of snapshots and frozen caches serve a Release file past its date. Signatures are still checked; what the date
# protects from, old packages with known holes, does not matter in an image that has no network.
APT_OPTIONS = ['Acquire::Check-Valid-Until "false"']


class BuildFailed(Exception):
    """A root file system could not be built; the text has the tool's last words."""


@dataclass(frozen=True)
class Suite:
    name: str
    release: str
    # Another suite, or a kernel of `kernels/`; neither: its own.
    kernel_from: str | None
    kernel_built: str | None

    @staticmethod
    def load(name: str) -> "Suite":
        path = HERE / "suites" / f"{name}.toml"
        if not path.exists():
            raise LookupError(f"no suite {name!r}; there are: {', '.join(names())}")
        data = tomllib.loads(path.read_text())
        return Suite(name, data["release"], data.get("kernel_from"), data.get("kernel_built"))

    def key(self) -> str:
        """Changes when anything that goes into the root file system changes."""
        parts = [self.release, *PACKAGES, *KERNEL_PACKAGES, *INITRAMFS_MODULES, *MASKED, *UNPACK_OPTIONS]
        parts += [path.read_text() for path in sorted((HERE / "image").iterdir())]
        parts.append(Path(__file__).read_text())
        if self.kernel_from:
            parts.append(Suite.load(self.kernel_from).key())
        if self.kernel_built:
            parts.append(kernel.key(self.kernel_built))
        return cache.key(*parts)


def names() -> list[str]:
    return sorted(path.stem for path in (HERE / "suites").glob("*.toml"))


def root(suite: Suite) -> Path:
    """The suite's root file system as a folder, built when it is not in the cache."""
    return cache.built(f"root-{suite.name}-{suite.key()}", lambda path: _build(suite, path))


def boots_with(suite: Suite) -> tuple[Path, Path | None]:
    """Kernel and initramfs that boot the suite; one that was built by us needs none."""
    home = _kernel_donor(suite) or root(suite)
    [vmlinuz] = home.glob("boot/vmlinuz-*")
    return vmlinuz, next(home.glob("boot/initrd.img-*"), None)


def built_kernel(name: str) -> Path:
    return kernel.home(name, lambda release, path, packages: bootstrap(release, path, packages, [], "essential"))


def _kernel_donor(suite: Suite) -> Path | None:
    if suite.kernel_from is not None:
        return root(Suite.load(suite.kernel_from))
    return built_kernel(suite.kernel_built) if suite.kernel_built is not None else None


def qemu_root(suite: Suite) -> Path:
    """A root file system with the suite's QEMU and nothing that it does not need, for tests on the machine itself."""
    key = cache.key(suite.release, "qemu-system-x86", Path(__file__).read_text())
    return cache.built(
        f"qemu-{suite.name}-{key}", lambda path: bootstrap(suite.release, path, ["qemu-system-x86"], [], "essential")
    )


def bootstrap(release: str, target: Path, packages: list[str], extra: list[str], variant: str = "minbase") -> None:
    """mmdebstrap of RELEASE from this machine's own mirror.

    Raises BuildFailed with the end of mmdebstrap's output.
    """
    print(f"building {release} root file system: {', '.join(packages)}", file=sys.stderr, flush=True)
    command = ["mmdebstrap", f"--variant={variant}", "--mode=root", f"--include={','.join(packages)}"]
    command += [f"--dpkgopt={option}" for option in UNPACK_OPTIONS]
    command += [f"--aptopt={option}" for option in APT_OPTIONS]
    command += [*extra, release, str(target), mirror.debian()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise BuildFailed(f"mmdebstrap of {release} failed:\n" + "\n".join(done.stdout.splitlines()[-15:]))
    # mmdebstrap leaves 0700 from the scratch folder; other users of the root only read it.
    target.chmod(0o755)


def _build(suite: Suite, target: Path) -> None:
    extra = []
    packages = list(PACKAGES)
    donor = _kernel_donor(suite)
    if donor is None:
        packages += KERNEL_PACKAGES
        # Before the packages are configured, so that the one initramfs that is made is already ours.
        extra = [
            "--essential-hook=mkdir -p \"$1/etc/initramfs-tools/conf.d\" \"$1/usr/share/initramfs-tools/modules.d\"",
            "--essential-hook=echo MODULES=list > \"$1/etc/initramfs-tools/conf.d/qtest\"",
            f"--essential-hook=printf '%s\\n' {' '.join(INITRAMFS_MODULES)}"
            " > \"$1/usr/share/initramfs-tools/modules.d/qtest\"",
        ]
    bootstrap(suite.release, target, packages, extra)
    if donor is not None:
        shutil.copytree(donor / "usr/lib/modules", target / "usr/lib/modules", symlinks=True, dirs_exist_ok=True)
    _install_job(target)


def _install_job(target: Path) -> None:
    job = target / "usr/local/lib/qtest/job"
    job.parent.mkdir(parents=True)
    shutil.copy(HERE / "image/qtest-job", job)
    units = target / "etc/systemd/system"
    shutil.copy(HERE / "image/qtest-job.service", units)
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "qtest-job.service").symlink_to("../qtest-job.service")
    default = units / "default.target"
    default.unlink(missing_ok=True)
    default.symlink_to("/usr/lib/systemd/system/multi-user.target")
    for unit in MASKED:
        # By hand: `systemctl mask` refuses units that this suite does not have.
        link = units / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    (target / "etc/hostname").write_text("testhost\n")
    (target / "etc/fstab").write_text("# The kernel's command line names the root; there is nothing else.\n")
    # Fixed, so that the first boot neither asks nor counts as a first boot.
    (target / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (target / "etc/systemd/journald.conf.d").mkdir(parents=True, exist_ok=True)
    (target / "etc/systemd/journald.conf.d/qtest.conf").write_text("[Journal]\nStorage=volatile\n")
