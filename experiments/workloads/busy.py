"""Other work on the same box: a process that wants a core all the time, as a neighbour's would."""

from __future__ import annotations

import os
import time
from typing import Any


def main(config: dict[str, Any], control: Any) -> None:
    """Process target: count until told to stop, or for `seconds` at most, at nice 0 like any program that a user starts.

    config: {"seconds"}. Sends {"ready": true}; ends at {"stop": true}.
    """
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    control.send({"ready": True})
    until_s, count = time.monotonic() + config["seconds"], 0
    while time.monotonic() < until_s:
        for _ in range(100_000):
            count += 1
        if control.receive(0):
            return
