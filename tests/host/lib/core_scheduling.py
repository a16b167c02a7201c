"""Core-scheduling cookies, as `prctl(2)` has them."""

import ctypes

# include/uapi/linux/prctl.h.
PR_SCHED_CORE, GET, CREATE, SHARE_TO = 62, 0, 1, 2
LIBC = ctypes.CDLL(None, use_errno=True)


def cookie(tid):
    """A thread's core-scheduling cookie, 0 for none; None where the kernel knows of no such thing."""
    found = ctypes.c_uint64()
    if LIBC.prctl(PR_SCHED_CORE, GET, tid, 0, ctypes.byref(found)) == 0:
        return found.value
    return None
