"""Who goes on serving when a store host is cut off from its peers, who refuses, and does anything diverge?"""

from __future__ import annotations

import pandas as pd

from analysis import style
from analysis.answers import digits, listing, missing
from analysis.figures import Headline
from analysis.figures.failover import all_courses, cases, label
from analysis.sheet import Sheet
from analysis.summary import typical

EXPERIMENT = "partition_from_peers"
HEADLINES = tuple(Headline(metric) for metric in ("outage_ms", "packets_lost", "records_differ"))
BARS = {"outage_ms": "without delivery (ms)", "packets_lost": "packets lost", "served_elsewhere_ratio": "moved (share)",
        "records_differ": "records that differ"}  # fmt: skip


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Pairs of panels, one pair a placement: what the flows of the cut-off host get, around the cut at time 0. Below: for how
    long nothing, what was lost, which share of its partitions another host has afterwards, and whether copies differ."""
    lines = frame[frame["metric"] == "delivered"]
    if lines.empty:
        return
    shown = cases(lines)
    below = all_courses(sheet, shown, len(BARS), "ms after the cut")
    for axes, (metric, name) in zip(below, BARS.items()):
        for position, (placement, replicas, _) in enumerate(shown):
            here = (frame["metric"] == metric) & (frame["placement"] == placement) & (frame["replicas"] == replicas)
            if here.any():
                sheet.bar(axes, position, frame[here], placement, metric, label(placement, replicas), 0.7)
        axes.set_xticks(range(len(shown)), [label(placement, replicas) for placement, replicas, _ in shown], rotation=25,
                        ha="right", rotation_mode="anchor")  # fmt: skip
        axes.set(ylabel=name, ylim=(0, None if frame.loc[frame["metric"] == metric, "value"].max() > 0 else 1))
        axes.grid(axis="x", visible=False)


def answer(frame: pd.DataFrame) -> str:
    """Say for how long nothing was delivered, by placement and copies, and whether copies diverged."""
    said = []
    for placement in style.order(frame["placement"]):
        for replicas in sorted(set(frame.loc[frame["placement"] == placement, "replicas"])):
            outage = typical(frame, "outage_ms", placement=placement, replicas=replicas)
            if outage is not None:
                said.append(f"{digits(outage)} ms with {label(placement, int(replicas))}")
    differ = frame[(frame["metric"] == "records_differ") & frame["valid"]]["value"]
    if not said or differ.empty:
        return missing("a cut-off host")
    end = "no copy differs afterwards" if differ.max() == 0 else f"{differ.max():.0f} RECORDS DIFFER afterwards"
    return f"The flows of the cut-off host get nothing for {listing(said)}; {end}."
