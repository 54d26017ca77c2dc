"""How long does one access to state take, beside the network function and across the network?"""

from __future__ import annotations

import pandas as pd

from analysis.answers import listing, microseconds, missing, times
from analysis.figures import Headline
from analysis.results import decode, merge
from analysis.sheet import Sheet, by_placement

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
    """Say how far the local read-modify-write, alone, lies below the remote ones."""
    rows = frame[(frame["metric"] == "latency_ns") & frame["valid"]]
    where = {"operation": "read_modify_write", "load": "alone"}
    for name, value in where.items():
        rows = rows[rows[name] == value] if name in rows else rows.head(0)
    merged = {name: merge(map(decode, group["histogram"])).quantiles([0.5, 0.99]) / 1000 for name, group in by_placement(rows)}
    absent = [name for name in ("integrated", "centralized") if name not in merged]
    if absent:
        return missing(*absent)
    local_us = merged["integrated"]
    remote = [
        f"{microseconds(p50)} ({times(p50, local_us[0])} as long; p99 {microseconds(p99)}) in {where}"
        for name, where in (("centralized", "the centralized store"), ("redis", "Redis"))
        if name in merged
        for p50, p99 in [merged[name]]
    ]
    return (
        f"One read-modify-write takes {microseconds(local_us[0])} at the median (p99 {microseconds(local_us[1])}) in the "
        f"integrated store, against {listing(remote)} across the emulated rack."
    )
