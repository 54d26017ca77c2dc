"""How long does one access to state take, beside the network function and across the network?"""

from __future__ import annotations

import pandas as pd

from analysis.answers import digits, microseconds, missing, times
from analysis.figures import Headline
from analysis.results import decode, merge
from analysis.sheet import Sheet, by_placement
from analysis.summary import typical

EXPERIMENT = "state_access_latency"
HEADLINES = (Headline("p50_us"), Headline("p99_us"), Headline("operations_kops", {"operation": "get"}))
OPERATIONS = ("read", "write", "read_modify_write")
LOADS = ("alone", "loaded")


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Panels: operations across, load down. CDF of all repeats' accesses, each repeat thin; latency on a log axis."""
    latencies = frame[(frame["metric"] == "latency_ns") & frame.get("operation", pd.Series(dtype=str)).isin(OPERATIONS)]
    loads = [load for load in LOADS if (latencies["load"] == load).any()]
    if not loads:
        return
    panels = sheet.panels(len(loads), len(OPERATIONS), 0.75 + 1.25 * len(loads), sharex=True, sharey=True)
    for row, load in zip(panels, loads):
        for axes, operation in zip(row, OPERATIONS):
            here = latencies[(latencies["load"] == load) & (latencies["operation"] == operation)]
            axes.set_visible(len(here) > 0)
            for placement, rows in by_placement(here):
                sheet.cdf(axes, rows["histogram"], placement, f"{operation}, {load}")
            axes.set_title(f"{operation.replace('_', '-')}, {load}")
    sheet.cdf_axes(panels, "accesses", "latency")
    sheet.legend([placement for placement, _ in by_placement(latencies)])


def answer(frame: pd.DataFrame) -> str:
    """Say how far the local read-modify-write, alone, lies below the remote one, and how the remote store compares to Redis."""
    rows = frame[(frame["metric"] == "latency_ns") & frame["valid"]]
    where = {"operation": "read_modify_write", "load": "alone"}
    for name, value in where.items():
        rows = rows[rows[name] == value] if name in rows else rows.head(0)
    merged = {name: merge(map(decode, group["histogram"])).quantiles([0.5, 0.99]) / 1000 for name, group in by_placement(rows)}
    absent = [name for name in ("integrated", "centralized") if name not in merged]
    peer = _against_redis(frame)
    if absent:
        return f"{missing(*absent)} {peer[:1].upper()}{peer[1:]}." if peer else missing(*absent)
    (here_us, here_p99_us), (there_us, there_p99_us) = merged["integrated"], merged["centralized"]
    sentence = (
        f"One read-modify-write takes {microseconds(here_us)} at the median (p99 {microseconds(here_p99_us)}) in the integrated "
        f"store, against {microseconds(there_us)} ({times(there_us, here_us)} as long; p99 {microseconds(there_p99_us)}) "
        "in the centralized store across the emulated rack"
    )
    return f"{sentence}; {peer}." if peer else f"{sentence}."


def _against_redis(frame: pd.DataFrame) -> str:
    """Return how the centralized store's remote gets compare to Redis's, on the same path; "" where one was not measured."""
    (ours_us, redis_us), (ours_kops, redis_kops) = (
        [typical(frame, metric, operation="get", pipeline=depth, placement=name) for name in ("centralized", "redis")]
        for metric, depth in (("p50_us", 1), ("operations_kops", 64))
    )
    said = []
    if ours_us and redis_us:
        said.append(f"takes {microseconds(ours_us)}, {times(ours_us, redis_us)} Redis's {microseconds(redis_us)}")
    if ours_kops and redis_kops:
        said.append(
            f"64 to a frame it answers {digits(ours_kops)} kops, {times(ours_kops, redis_kops)} Redis's {digits(redis_kops)}"
        )
    return f"a remote get {', and '.join(said)}" if len(said) == 2 else f"of remote gets, {said[0]}" if said else ""
