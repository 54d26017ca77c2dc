"""Is a live host ever taken for dead? A coordinated rack starts and carries a load while nothing is lost.

      busy processes |-------------------------------------------------|
      rack           |--start--|--warm-up--|--load, nothing is lost----|

Every host that is replaced meanwhile is one too many: `false_failovers` counts them, from the start of the stores on.
"""

from __future__ import annotations

from typing import Any

from experiments.harness.bench import COMMON_SETTINGS, READY_S, Bench

SETTINGS = {**COMMON_SETTINGS, "offered_kpps": 20.0, "seconds": 10.0, "busy_processes": 0, "lateness_limit_us": 0.0}
BUSY_S = 120.0
"""For so long a busy process runs at most, whatever becomes of the runner."""


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return one point: the load's, with the failovers that nothing called for.

    busy_processes: how many processes want a core all the time, beside the rack, from before its start.
    """
    settings = bench.settings
    for number in range(int(settings["busy_processes"])):
        busy = bench.launcher.spawn(f"busy-{number}", None, "experiments.workloads.busy:main", {"seconds": BUSY_S})
        bench.extra.append(busy)
    for busy in bench.extra:
        busy.receive(READY_S)
    bench.start()
    bench.warm_up()
    point = bench.step(settings["offered_kpps"], settings["seconds"])
    point["sweep"] = {"busy_processes": settings["busy_processes"]}
    point["metrics"]["false_failovers"] = point["fidelity"]["false_failovers"]
    return [point]
