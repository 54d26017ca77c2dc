"""How much does each placement of the state delay a packet on its way through the network function?"""

from __future__ import annotations

import pandas as pd

from analysis import style
from analysis.answers import digits, microseconds, missing, spread
from analysis.figures import Headline
from analysis.sheet import Sheet, by_placement, title
from analysis.summary import typical

EXPERIMENT = "packet_latency"
HEADLINES = (Headline("p50_us"), Headline("p99_us"))
MOST_LOADS = 3


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Panels: network functions across, offered load down. CDF of all repeats' packets, each repeat thin; log axis."""
    latencies = frame[frame["metric"] == "latency_ns"]
    if latencies.empty:
        return
    nfs = style.order_nfs(latencies["nf"])
    loads = sorted(set(latencies["offered_kpps"]))
    loads = loads if len(loads) <= MOST_LOADS else [loads[0], loads[len(loads) // 2], loads[-1]]
    panels = sheet.panels(len(loads), len(nfs), 0.95 + 1.25 * len(loads), sharex=True, sharey=True)
    for row, load in zip(panels, loads):
        for axes, nf in zip(row, nfs):
            here = latencies[(latencies["nf"] == nf) & (latencies["offered_kpps"] == load)]
            axes.set_visible(len(here) > 0)
            for placement, rows in by_placement(here):
                sheet.cdf(axes, rows["histogram"], placement, f"{nf}, {load:g} kpps")
            axes.set_title(f"{title(nf)}, {load:g} kpps")
    sheet.cdf_axes(panels, "packets", "one-way latency")
    sheet.legend([placement for placement, _ in by_placement(latencies)])


def answer(frame: pd.DataFrame) -> str:
    """Say by what factor the integrated store shortens the median and the tail, and how near that is to local state."""
    loads = sorted(frame["offered_kpps"].dropna().unique()) if "offered_kpps" in frame else []
    nfs = [nf for nf in style.order_nfs(frame["nf"]) if nf != "passthrough"]
    absent = {"integrated", "centralized"} - set(frame.loc[frame["valid"] & (frame["metric"] == "p50_us"), "placement"])
    if absent or not loads:
        return missing(*(sorted(absent) or ["packet latency"]))

    def median_us(placement: str, nf: str, metric: str) -> float | None:
        return typical(frame, metric, placement=placement, nf=nf, offered_kpps=loads[0])

    def ratios(over: str, under: str, metric: str) -> list[float]:
        pairs = [(median_us(over, nf, metric), median_us(under, nf, metric)) for nf in nfs]
        return [high / low for high, low in pairs if high and low]

    clauses = []
    for nf in nfs:
        remote_us, beside_us = median_us("centralized", nf, "p50_us"), median_us("integrated", nf, "p50_us")
        if remote_us and beside_us:
            clauses.append(f"{title(nf)} {microseconds(beside_us)} against {microseconds(remote_us)}")
    if not clauses:
        return missing("the same network function under both placements")
    tail, local = ratios("centralized", "integrated", "p99_us"), ratios("integrated", "local", "p50_us")
    sentence = f"At {digits(loads[0])} kpps the median packet takes, integrated against centralized: {'; '.join(clauses)}"
    sentence += f"; the centralized p99 is {spread(tail)} the integrated one" if tail else ""
    return sentence + (f", and integrated takes {spread(local)} the time of local state." if local else ".")
