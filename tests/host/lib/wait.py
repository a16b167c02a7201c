"""Waiting for a state: a condition, a limit, and a line that says what is waited for."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.05
STATUS_EVERY_S = 10


class TimedOut(AssertionError):
    """The state did not come. The text says which, after how long, and what was seen last."""


def wait_until(
    condition: Callable[[], T], limit_s: float, what: str, status: Callable[[], object] | None = None
) -> T:
    """Calls CONDITION until it is true and returns what it returned.

    WHAT completes the sentence "waiting for ..."; STATUS, when given, says how far things are. A line is printed every ten
    seconds. Raises TimedOut.
    """
    start = time.monotonic()
    next_line = start + STATUS_EVERY_S
    while True:
        value = condition()
        if value:
            return value
        now = time.monotonic()
        if now - start > limit_s or now > next_line:
            seen = "" if status is None else f"; now: {status()}"
            if now - start > limit_s:
                raise TimedOut(f"{what}: not after {limit_s:.0f} s{seen}")
            print(f"  waiting for {what}, {now - start:.0f} s{seen}", flush=True)
            next_line = now + STATUS_EVERY_S
        time.sleep(POLL_S)
