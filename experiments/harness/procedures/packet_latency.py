"""One-way latency of packets at a fixed load: after a warm-up, one step whose every packet is timed."""

from __future__ import annotations

from typing import Any

from experiments.harness.bench import COMMON_SETTINGS, Bench

SETTINGS = {**COMMON_SETTINGS, "offered_kpps": 10.0, "seconds": 2.0}


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return one point: the load's latency histogram."""
    bench.start()
    bench.warm_up()
    point = bench.step(bench.settings["offered_kpps"], bench.settings["seconds"])
    point["metrics"] |= bench.memory()
    return [point]
