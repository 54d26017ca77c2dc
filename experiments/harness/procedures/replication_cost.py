"""What copies cost: latency at a light load, the highest load without loss, and what crosses the storage network for it."""

from __future__ import annotations

from typing import Any

from experiments.harness.bench import Bench
from experiments.harness.procedures import throughput

SETTINGS = {**throughput.SETTINGS, "offered_kpps": 10.0, "seconds": 1.0, "ladder_kpps": ()}


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return a point at `offered_kpps`, with its latencies, and the one of the search for the highest load (`throughput`)."""
    bench.start()
    bench.warm_up()
    light = bench.step(bench.settings["offered_kpps"], bench.settings["seconds"])
    found = throughput.search(bench)
    found["metrics"].pop("p99_us", None)
    return [light, found]
