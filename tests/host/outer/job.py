"""The job disk: the library, the scenarios and the binary under test as one tar."""

import io
import json
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
REPOSITORY = HERE.parent.parent

# The guest reads the tar from a block device, which ends on a sector; tar itself reads in blocks of 10 KiB past its end.
PADDING_BYTES = 1 << 20

RUN_SH = """\
# The first thing on the wire says that the boot is over; from here on a hang is a finding.
echo '@@qtest {"event":"begun"}'
mkdir -p /run/qtest
export PYTHONPATH=/job/lib PYTHONDONTWRITEBYTECODE=1 PATH=/job/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin
cd /job
"""
RUN_SCENARIOS = RUN_SH + "exec python3 -u /job/lib/runner.py\n"
RUN_SHELL = (
    RUN_SH
    + """\
cat > /dev/ttyS0 <<'TEXT'

A test host. /job has lib/, scenarios/ and bin/; `python3 lib/runner.py NAME...` runs scenarios.
Leave with exit or Ctrl-D; Ctrl-A X ends QEMU at once.
TEXT
stty -F /dev/ttyS0 sane
export HOME=/root TERM=${TERM:-vt220}
setsid -c bash -i </dev/ttyS0 >/dev/ttyS0 2>&1
"""
)


def write(path: Path, run_sh: str, description: dict, binary: Path | None, package: Path | None) -> None:
    """Writes the job disk to PATH. DESCRIPTION becomes /job/job.json."""
    with tarfile.open(path, "w") as tar:
        _add_text(tar, "run.sh", run_sh, 0o755)
        _add_text(tar, "job.json", json.dumps(description, indent=1), 0o644)
        for folder in ("lib", "scenarios"):
            tar.add(HERE / folder, folder, filter=_clean)
        tar.add(REPOSITORY / "tests/capture-host", "bin/capture-host", filter=_clean)
        tar.add(REPOSITORY / "tests/hosts", "hosts", filter=_clean)
        # Unit files and hook scripts, for scenarios that install qmpin as a package would.
        if (REPOSITORY / "integration").is_dir():
            tar.add(REPOSITORY / "integration", "integration", filter=_clean)
        if binary is not None:
            tar.add(binary, "bin/qmpin", filter=_clean)
        if package is not None:
            tar.add(package, "qmpin.deb", filter=_clean)
    with open(path, "ab") as tar_file:
        tar_file.truncate((path.stat().st_size + 511) // 512 * 512 + PADDING_BYTES)


def _add_text(tar: tarfile.TarFile, name: str, text: str, mode: int) -> None:
    data = text.encode()
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = mode
    tar.addfile(info, io.BytesIO(data))


def _clean(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if "__pycache__" in info.name:
        return None
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info
