"""`tests/host/run`: builds what is missing, boots, runs scenarios, tells the result."""

import argparse
import fnmatch
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from . import boot, cache, image, job, kernel, preflight, rootfs, shape
from .report import Report

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/host/run", description="Run scenarios in the test host")
    parser.add_argument(
        "scenarios", nargs="*", metavar="SCENARIO", help="names, or patterns such as 'attach*'; all when absent; `shell` for a console"
    )
    parser.add_argument("--shape", default="5900x", choices=shape.names(), help="the machine to be (default: 5900x)")
    parser.add_argument("--suite", default="trixie", choices=rootfs.names(), help="its Debian (default: trixie)")
    parser.add_argument("--keep", action="store_true", help="keep the run's folder, with all logs, also on success")
    parser.add_argument("--results", type=Path, metavar="DIR", help="unpack what the scenarios handed back into DIR")
    parser.add_argument("--list", action="store_true", help="list scenarios, shapes and suites")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    # So that the context managers end what they began.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return run_from(arguments(argv))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def run_from(args: argparse.Namespace) -> int:
    if args.list:
        print("scenarios:", *scenario_names())
        print("shapes:", *shape.names())
        print("suites:", *rootfs.names())
        return EXIT_OK
    known = [*scenario_names(), "shell"]
    unknown = [pattern for pattern in args.scenarios if not fnmatch.filter(known, pattern)]
    if unknown:
        print(f"error: no scenario {', '.join(unknown)}; there are: {', '.join(scenario_names())}", file=sys.stderr)
        return EXIT_USAGE
    # In the order in which they are asked for: what an earlier one has done to kernel threads can be seen by a later one.
    wanted = list(dict.fromkeys(name for pattern in args.scenarios for name in known if fnmatch.fnmatchcase(name, pattern)))
    wanted = wanted or scenario_names()
    its_shape = shape.Shape.load(args.shape)
    suite = rootfs.Suite.load(args.suite)
    try:
        preflight.check()
        start = time.monotonic()
        rootfs.root(rootfs.Suite.load(boot.CARRIER))
        rootfs.boots_with(suite)
        image.disk(suite)
        built_s = time.monotonic() - start
        if built_s > 1:
            print(f"built in {built_s:.0f} s", flush=True)
    except (preflight.CannotRun, LookupError) as why:
        print(f"skipped: the test host cannot run here: {why}")
        return preflight.EXIT_SKIPPED
    except (rootfs.BuildFailed, kernel.BuildFailed) as why:
        print(f"error: {why}", file=sys.stderr)
        return EXIT_FAILED

    runs = cache.folder() / "runs"
    runs.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{args.shape}-{args.suite}-", dir=runs))
    job_tar = folder / "job.tar"
    description = {"shape": {"name": args.shape, **its_shape.data}, "suite": args.suite, "scenarios": wanted}
    keep = True
    try:
        if wanted == ["shell"]:
            job.write(job_tar, job.RUN_SHELL, description, binary(), package())
            keep = args.keep
            return shell(folder, its_shape, suite, job_tar)

        def write_job(scenarios: list[str]) -> Path:
            job.write(job_tar, job.RUN_SCENARIOS, {**description, "scenarios": scenarios}, binary(), package())
            return job_tar

        report = run(folder, its_shape, suite, write_job, wanted)
        if args.results and report.finished:
            args.results.mkdir(parents=True, exist_ok=True)
            shutil.unpack_archive(folder / "results.tar", args.results, "tar", filter="data")
        keep = args.keep or not report.ok
        return EXIT_OK if report.ok else EXIT_FAILED
    finally:
        if keep:
            print(f"logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def scenario_names() -> list[str]:
    return sorted(path.stem for path in (job.HERE / "scenarios").glob("*.py"))


def binary() -> Path | None:
    """The qmpin under test, as the sources are now. Scenarios that need it are skipped where there is none and it cannot be built."""
    named = os.environ.get("QMPIN_BIN")
    path = Path(named) if named else job.REPOSITORY / "target/release/qmpin"
    if named and not path.is_file():
        raise SystemExit(f"error: QMPIN_BIN={named}: no such file")
    if not named and shutil.which("cargo"):
        built = subprocess.run(["cargo", "build", "--quiet", "--release", "--locked"], cwd=job.REPOSITORY)
        if built.returncode != 0:
            raise SystemExit("error: qmpin cannot be built: QMPIN_BIN=PATH names one that is")
    return path if path.is_file() else None


def package() -> Path | None:
    """The Debian package under test, as integration/debian/build makes it. Scenarios that need it are skipped where there is none."""
    package = next((job.REPOSITORY / "target/debian").glob("qmpin_*.deb"), None)
    its_binary = job.REPOSITORY / "target/release/qmpin"
    if package and its_binary.is_file() and package.stat().st_mtime < its_binary.stat().st_mtime:
        print(f"{package.name} is older than the binary, and not used: integration/debian/build makes it anew", flush=True)
        return None
    return package


def run(folder: Path, its_shape: shape.Shape, suite: rootfs.Suite, write_job: Callable, wanted: list[str]) -> Report:
    """Runs the scenarios, on another machine from where one died of its emulator's fault."""
    report = Report(wanted, folder)
    for machine in range(1, boot.MACHINES + 1):
        report.broken = None
        is_last = machine == boot.MACHINES
        if not run_on_one(folder, its_shape, suite, write_job(report.left()), report) or is_last:
            break
        saved = folder / f"console-machine-{machine}.log"
        shutil.copy(folder / "console.log", saved)
        print(f"{report.broken}, of an instruction that was half patched: the rest is run on another machine", flush=True)
    report.give_up()
    report.print_end(folder / "console.log")
    return report


def run_on_one(folder: Path, its_shape: shape.Shape, suite: rootfs.Suite, job_tar: Path, report: Report) -> bool:
    """Boots until a job begins, at most BOOT_ATTEMPTS times, and follows that job to its end. Whether that was its
    emulator's fault."""
    for attempt in range(1, boot.BOOT_ATTEMPTS + 1):
        with boot.Machine(folder, its_shape, suite, job_tar) as machine:
            events = machine.events()
            try:
                boot_s = machine.wait_begun(events, its_shape.boot_limit_s)
            except boot.NotBooted as why:
                saved = folder / f"console-boot-{attempt}.log"
                shutil.copy(machine.console, saved)
                print(f"boot {attempt} of {boot.BOOT_ATTEMPTS}: {why}", flush=True)
                continue
            tries = "" if attempt == 1 else f", at try {attempt}"
            print(f"booted {its_shape.name} with {suite.name} in {boot_s:.0f} s{tries}", flush=True)
            report.follow(events)
            return report.broken is not None and machine.was_half_patched()
    report.broken = f"no boot of {boot.BOOT_ATTEMPTS} came as far as the job"
    return False


def shell(folder: Path, its_shape: shape.Shape, suite: rootfs.Suite, job_tar: Path) -> int:
    with boot.Machine(folder, its_shape, suite, job_tar, interactive=True) as machine:
        assert machine.process is not None
        return machine.process.wait()
