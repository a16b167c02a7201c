"""Runs inside the test host: each scenario in a process of its own, one after the other.

Usage: runner.py [NAME...]; without names, those of /job/job.json. Says on standard output, for the machine outside:

    @@qtest {"event":"start","name":...,"limit_s":...}
    @@qtest {"event":"end","name":...,"result":"ok|FAILED|skipped","why":...,"seconds":...,"notes":[...]}
    @@qtest {"event":"done"}
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import qtest
from scenario import EXIT_OF_SKIPPED, Scenario, load

# Where a scenario that skips itself, or fails, leaves the reason in one line.
WHY = Path("/run/qtest/why")


def say(**event: object) -> None:
    print("@@qtest " + json.dumps(event), flush=True)


def main(names: list[str]) -> int:
    WHY.parent.mkdir(parents=True, exist_ok=True)
    host = qtest.Host.from_job()
    failed = 0
    for name in names or host.job["scenarios"]:
        try:
            scenario = load(name)
        except Exception as error:  # A broken scenario is one failure, not the end of the run.
            say(event="start", name=name, limit_s=0)
            say(event="end", name=name, result="FAILED", why=f"cannot be loaded: {error!r}", seconds=0)
            failed += 1
            continue
        result = run(host, scenario)
        failed += result == "FAILED"
    say(event="done")
    return 1 if failed else 0


def run(host: qtest.Host, scenario: Scenario) -> str:
    say(event="start", name=scenario.name, limit_s=scenario.limit_s)
    start = time.monotonic()
    why = scenario.why_not(host)
    qtest.NOTES.unlink(missing_ok=True)
    result = "skipped"
    if why is None:
        result, why = run_process(scenario)
        left = host.clean_up()
        if left and result == "ok":
            result, why = "FAILED", f"left behind: {', '.join(left)}"
    notes = qtest.NOTES.read_text().splitlines() if qtest.NOTES.exists() else []
    seconds = round(time.monotonic() - start, 1)
    say(event="end", name=scenario.name, result=result, why=why, seconds=seconds, notes=notes)
    return result


def run_process(scenario: Scenario) -> tuple[str, str]:
    WHY.unlink(missing_ok=True)
    # A session of its own, so that a scenario out of time can be killed with everything it started.
    process = subprocess.Popen(
        [sys.executable, "-u", "/job/lib/scenario.py", scenario.name], stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(scenario.limit_s)
    except subprocess.TimeoutExpired:
        # First a signal that makes Python print where it is (scenario.py registers it), then the end.
        process.send_signal(signal.SIGUSR1)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "FAILED", f"not done after {scenario.limit_s} s"
    why = WHY.read_text().strip() if WHY.exists() else ""
    if code == 0:
        return "ok", ""
    if code == EXIT_OF_SKIPPED:
        return "skipped", why
    return "FAILED", why or f"ended with code {code}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
