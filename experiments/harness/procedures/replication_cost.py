"""What copies cost: latency at a light load, throughput saturated and without loss, and what crosses the storage network for it.

The highest load without loss hangs on the one worst moment of a step; on a busy box single searches differ by half. What is
delivered when saturated is steadier, so ratios are better taken from it.
"""

from __future__ import annotations

from typing import Any

from experiments.harness.bench import Bench
from experiments.harness.procedures import throughput

SETTINGS = {**throughput.SETTINGS, "offered_kpps": 10.0, "seconds": 1.0, "ladder_kpps": ()}

check = throughput.check


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return points: at `offered_kpps`, with its latencies; saturated; the search for the highest load without loss."""
    bench.start()
    bench.warm_up()
    light = bench.step(bench.settings["offered_kpps"], bench.settings["seconds"])
    full = bench.step(0.0, bench.settings["seconds"])
    full["metrics"] = {name: full["metrics"][name] for name in ("delivered_kpps", "loss_ratio")}
    full["histograms"] = {}
    found = throughput.search(bench)
    found["metrics"].pop("p99_us", None)
    return [light, full, found]
