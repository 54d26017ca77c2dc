"""A lost host comes back, empty, under a load that fills the path: how long until it is a backup again, and at whose cost?

      load |--two copies--|host lost|--one copy--|store back: refill|--two copies----------|
                                                 |<-- refill_ms --->|

The store comes back alone: only the refill is measured, not the start of an NF process on the same cores. While it lasts the
packets of all partitions are at the survivors, which also read and send the images: each those of the partitions it rules.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from datastore.base.errors import NearstateError
from datastore.coordination.maps import ClusterMap
from experiments.harness.bench import COMMON_SETTINGS, Bench, sleep_until
from experiments.harness.procedures.failover import ends
from experiments.workloads import timeline

if TYPE_CHECKING:
    from experiments.harness.checks import Planned

SETTINGS = {**COMMON_SETTINGS, "capacity": 1 << 18, "victim": "nf2", "offered_kpps": 60.0, "lost_at_s": 0.6, "back_at_s": 1.6,
            "seconds": 4.0, "bin_us": 10000.0, "shown_ms": (1600.0, 2000.0), "lateness_limit_us": 0.0}  # fmt: skip
SAMPLED_EVERY_S = 0.01
PATIENCE_S = 10.0
SETTLED_NS = 100_000_000
"""How long after a change rates are not looked at."""


class Sample(NamedTuple):
    """What is looked at meanwhile: the time, how many partitions have learners, how many hosts teach them, the share of
    partitions with all copies, bytes sent for storage, CPU of the stores."""

    ns: int
    learning: int
    sources: int
    full_ratio: float
    storage_bytes: float
    store_cpu_s: float


def check(planned: Planned) -> None:
    """Check that a backup can be lost and come back, all within the load."""
    planned.need_moves(victim=planned.settings["victim"])
    planned.need_order("lost_at_s", "back_at_s", "seconds")
    if planned.trial.replicas < 2:
        raise planned.refuse(f"procedure='rejoin' with replicas={planned.trial.replicas}: a backup needs at least 2")
    if planned.settings["victim"] not in planned.stores:
        raise planned.refuse(f"procedure='rejoin' with placement={planned.trial.placement!r}: the victim has no store "
                             "that could be filled again; use placement='integrated'")  # fmt: skip


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return one point: how long the refill took, how many records, what packets lost by it; and the time lines around it.

    offered_kpps: 0: as fast as the path takes it. lost_at_s, back_at_s: when within the load of `seconds`. shown_ms: of the time
    lines, how much before and after the store is back is kept. foreground_cost_ratio: by how much less was delivered during
    the refill than afterwards, with as many copies.
    """
    settings = bench.settings
    victim, _ = ends(bench)
    bench.start()
    if not bench.coordinator or bench.trial.replicas < 2:
        raise NearstateError(f"rejoin with replicas={bench.trial.replicas}: a backup needs at least 2")
    bench.warm_up()
    began_ns = bench.offer(settings["offered_kpps"], settings["seconds"], {"bin_us": settings["bin_us"]})
    until_ns = began_ns + int(settings["seconds"] * 1e9)
    sleep_until(began_ns + int(settings["lost_at_s"] * 1e9))
    lost_ns = bench.lose_host(victim)
    sleep_until(began_ns + int(settings["back_at_s"] * 1e9))
    bench.return_host(victim)
    back_ns = time.monotonic_ns()
    samples = watch(bench, until_ns)
    point = bench.finish()
    line = bench.time_line()
    filling = [sample.ns for sample in samples if sample.learning] or [back_ns]
    full = next((sample.ns for sample in samples if sample.full_ratio == 1), 0)
    if not full:
        raise NearstateError(f"{victim} was no backup again {(until_ns - back_ns) / 1e9:.1f} s after it was back")
    records = len(bench.records(victim))
    before, alone, during, after = (line.rate_kpps(*span) for span in (
        (began_ns + SETTLED_NS, lost_ns), (back_ns - 4 * SETTLED_NS, back_ns), (filling[0], full),
        (full + SETTLED_NS, until_ns - SETTLED_NS)))  # fmt: skip
    first = next(sample for sample in samples if sample.ns >= filling[0])
    last = next(sample for sample in samples if sample.ns >= full)
    sent_bytes, cpu_s = last.storage_bytes - first.storage_bytes, last.store_cpu_s - first.store_cpu_s
    refill_s = (full - filling[0]) / 1e9
    point["sweep"] = {}
    point["metrics"] |= {
        "rejoin_ms": (full - back_ns) / 1e6, "refill_ms": refill_s * 1e3, "records": records,
        "sources": max(sample.sources for sample in samples),
        "goodput_before_kpps": before, "goodput_alone_kpps": alone, "goodput_during_kpps": during, "goodput_after_kpps": after,
        "foreground_cost_ratio": 1 - during / max(after, 1e-9), "storage_mbps": sent_bytes * 8e-6 / max(refill_s, 1e-9),
        "store_cores": cpu_s / max(refill_s, 1e-9)}  # fmt: skip
    before_ms, after_ms = settings["shown_ms"]
    point["time_lines"] = {"delivered": line.encode(back_ns, -before_ms, after_ms), "refill": course(samples, back_ns)}
    return [point]


def watch(bench: Bench, until_ns: int) -> list[Sample]:
    """Look every few milliseconds until all partitions have their copies again and for a moment after.

    A map is asked for only when it is news: the whole status took the coordinator a quarter of a core, of two, from the refill.
    """
    samples: list[Sample] = []
    current = ClusterMap(0, ())
    while time.monotonic_ns() < until_ns and not (samples and samples[-1].full_ratio == 1):
        news = bench.ask_coordinator({"map": current.epoch})["map"]
        current = ClusterMap.from_json(news) if news else current
        full = sum(len(group.members) >= bench.trial.replicas for group in current.groups) / len(current.groups)
        teachers = [group.primary for group in current.groups if group.learners]
        sent_bytes = float(sum(bench.network.sent_bytes("storage").values()))
        samples.append(Sample(time.monotonic_ns(), len(teachers), len(set(teachers)), full, sent_bytes,
                              sum(store.cpu_seconds() for store in bench.stores.values())))  # fmt: skip
        time.sleep(SAMPLED_EVERY_S)
    return samples


def course(samples: list[Sample], zero_ns: int) -> str:
    """Return the samples as a time line: share of partitions with all copies, storage network in Mbit/s, stores' CPU in cores."""
    bin_ms = SAMPLED_EVERY_S * 1e3
    at, _, _, full, sent, cpu = np.array(samples).T
    ms = (at - zero_ns) / 1e6
    bins = np.arange(ms[0], ms[-1] + bin_ms, bin_ms)
    sent, cpu = (np.diff(np.interp(bins, ms, values), append=values[-1]) for values in (sent, cpu))
    return timeline.packed(float(bins[0]), bin_ms, {
        "full_ratio": np.interp(bins, ms, full).round(4).tolist(), "storage_mbps": (sent * 8e-3 / bin_ms).round(2).tolist(),
        "store_cores": (cpu * 1e3 / bin_ms).round(3).tolist()})  # fmt: skip
