"""Threads that work for a fraction of a millisecond at a time, and are not to wait behind processes that work for longer."""

from __future__ import annotations

import contextlib
import os
import threading

PRIORITY = 10
"""Above all ordinary processes, below the kernel's own threads of real time (50)."""


def take_precedence() -> None:
    """Have the calling thread run whenever it can (SCHED_RR, sched(7)), and what it starts not.

    For threads that work for a fraction of a millisecond at a time. Where the box does not allow it (no CAP_SYS_NICE, a control
    group without real time) the thread gets a better nice value, and where not even that, it stays as it is.
    """
    thread = threading.get_native_id()
    try:
        os.sched_setscheduler(thread, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY))
    except OSError:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, -10)
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
