"""A second NF host joins under load and leaves again: what does a packet notice of its flow's move?

      load |----------|out: half of the partitions to the second host|----------|in: all back to the first|----------|
                      |<- move ->|                                              |<- move ->|

Where a coordinator keeps the map, a move takes the state along and the packets follow (`Bench.move`); elsewhere the state is on
a store host, or stays behind, and only the switch is told.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hdrh.histogram import HdrHistogram

from datastore.base.errors import NearstateError
from datastore.base.partitioning import PARTITIONS
from experiments.harness.bench import COMMON_SETTINGS, Bench, sleep_until
from experiments.workloads import timeline

if TYPE_CHECKING:
    from experiments.harness.checks import Planned

SETTINGS = {**COMMON_SETTINGS, "flows": 0, "offered_kpps": 20.0, "out_at_s": 0.6, "in_at_s": 1.4, "seconds": 2.2,
            "bin_us": 1000.0, "shown_ms": (300.0, 1500.0), "delayed_ms": 20.0, "lateness_limit_us": 0.0}  # fmt: skip
AFTERMATH_NS = 50_000_000
"""How long after a move packets count as touched by it."""
PATIENCE_S = 5.0
"""How long a move may take: twenty times what it should."""


def check(planned: Planned) -> None:
    """Check that there is a host to join, and that it joins and leaves within the load."""
    planned.need_moves()
    planned.need_order("out_at_s", "in_at_s", "seconds")


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return one point: how long the moves took, what was delayed by more than `delayed_ms`, lost or put out of order, and the
    time line from `shown_ms` before the first move on."""
    settings, hosts = bench.settings, [host.name for host in bench.nf_hosts]
    if len(hosts) < 2:
        raise NearstateError(f"scaling with NF host {', '.join(hosts)} only: it needs a second one to join")
    bench.start()
    home, joining = hosts[:2]
    steered = bench.network.steering()
    move(bench, [partition for partition in range(PARTITIONS) if steered[partition] != home], home)
    bench.warm_up()
    half = list(range(0, PARTITIONS, 2))
    began_ns = bench.offer(settings["offered_kpps"], settings["seconds"], {"bin_us": settings["bin_us"], "watch": half})
    moves = []
    for at_s, target in ((settings["out_at_s"], joining), (settings["in_at_s"], home)):
        sleep_until(began_ns + int(at_s * 1e9))
        moves.append(move(bench, half, target))
    point = bench.finish()
    line = bench.time_line()
    point["sweep"] = {}
    point["metrics"] |= {
        "flows_moved": int(bench.traffic.get("flows", 1000)) * len(half) // PARTITIONS,
        "connections_broken": int((line.flows_watched()[:, timeline.CHANGES] > 0).sum()),
        "packets_lost": point["metrics"]["lost"],
        "packets_delayed": delayed(point["histograms"]["latency_ns"], settings["delayed_ms"])}  # fmt: skip
    for name, (begin_ns, end_ns) in zip(("out", "in"), moves):
        point["metrics"][f"{name}_ms"] = (end_ns - begin_ns) / 1e6
        point["metrics"][f"{name}_highest_ms"] = line.highest_within_ns(begin_ns, end_ns + AFTERMATH_NS) / 1e6
    before_ms, after_ms = settings["shown_ms"]
    point["time_lines"] = {"delivered": line.encode(moves[0][0], -before_ms, after_ms)}
    return [point]


def move(bench: Bench, partitions: list[int], target: str) -> tuple[int, int]:
    """Move partitions, their state where it can, to a host; returns begin and end in ns of CLOCK_MONOTONIC."""
    begin_ns = time.monotonic_ns()
    if not partitions:
        return begin_ns, begin_ns
    if bench.coordinator:
        bench.move(partitions, target, PATIENCE_S)
    else:
        bench.network.steer(partitions, target)
    return begin_ns, time.monotonic_ns()


def delayed(encoded: str, limit_ms: float) -> int:
    """Return how many latencies of a histogram (ns) are above a limit."""
    recorded = HdrHistogram.decode(encoded).get_recorded_iterator()
    return sum(item.count_at_value_iterated_to for item in recorded if item.value_iterated_to > limit_ms * 1e6)
