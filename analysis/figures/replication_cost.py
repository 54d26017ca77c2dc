"""How much latency and throughput does each copy of the state cost, and how many bytes on the storage network?"""

from __future__ import annotations

import pandas as pd

from analysis import style
from analysis.answers import digits, listing, missing, spread
from analysis.figures import Headline
from analysis.sheet import Sheet, by_placement, title
from analysis.summary import typical

EXPERIMENT = "replication_cost"
HEADLINES = (Headline("p50_us"), Headline("delivered_kpps", {"load": "saturated"}), Headline("lossless_kpps"),
             Headline("storage_bytes"))  # fmt: skip
ROWS = {"p50_us": "median latency (µs)", "delivered_kpps": "delivered, saturated (kpps)",
        "lossless_kpps": "highest load without loss (kpps)", "storage_bytes": "storage network (bytes per packet)"}  # fmt: skip
NOT_WAITED = {"linestyle": "none", "markerfacecolor": "white", "markeredgewidth": 0.9, "markersize": 4.5}


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Panels: network functions across, latency, throughput and bytes down, against the copies; median, 95 % interval.

    Open marks: packets do not wait for the copies (asynchronous).
    """
    frame = without_light_rate(frame)
    waited = waits(frame)
    nfs = style.order_nfs(frame["nf"])
    if not nfs:
        return
    shown = {metric: name for metric, name in ROWS.items() if (frame["metric"] == metric).any()}
    panels = sheet.panels(len(shown), len(nfs), 0.6 + 1.55 * len(shown), sharex=True)
    for row, (metric, name) in zip(panels, shown.items()):
        for axes, nf in zip(row, nfs):
            here = (frame["metric"] == metric) & (frame["nf"] == nf)
            for placement, rows in by_placement(frame[here & waited]):
                sheet.curve(axes, rows, "replicas", placement, f"{nf}, {metric}")
            for placement, rows in by_placement(frame[here & ~waited]):
                look = NOT_WAITED | {"markeredgecolor": style.look(placement).colour}
                sheet.curve(axes, rows, "replicas", placement, f"{nf}, {metric}, asynchronous", **look)
            axes.set_ylim(0)
            axes.set_title(title(nf))
            axes.set_xticks(sorted(set(frame["replicas"])))
        row[0].set_ylabel(name.replace(" (", "\n("))
    for axes in panels[-1]:
        axes.set_xlabel("copies (open: not waited for)")
    sheet.legend([placement for placement, _ in by_placement(frame)])


def without_light_rate(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows without what was delivered at the light load, which is what was offered."""
    load = frame.get("load", pd.Series(index=frame.index, dtype=str))
    return frame[(frame["metric"] != "delivered_kpps") | (load == "saturated")]


def waits(frame: pd.DataFrame) -> pd.Series:
    """Tell of each row whether its packets waited for the copies."""
    if "asynchronous" not in frame:
        return pd.Series(True, index=frame.index)
    return frame["asynchronous"].astype(float).fillna(0.0) == 0


def answer(frame: pd.DataFrame) -> str:
    """Say what the second copy costs in throughput, and how integrated compares with centralized at two copies."""
    frame = without_light_rate(frame)
    frame = frame[waits(frame)]

    def ratio(metric: str, nf: str, over: tuple[str, int], under: tuple[str, int]) -> float | None:
        both = [typical(frame, metric, nf=nf, placement=placement, replicas=copies) for placement, copies in (over, under)]
        return both[0] / both[1] if both[0] and both[1] else None

    nfs = style.order_nfs(frame["nf"])
    clauses = []
    for nf in nfs:
        two, one = ("integrated", 2), ("integrated", 1)
        kept, lossless = (ratio(metric, nf, two, one) for metric in ("delivered_kpps", "lossless_kpps"))
        if kept:
            clauses.append(f"{digits(kept)}x for {title(nf)}" + (f" ({digits(lossless)}x without loss)" if lossless else ""))
    if not clauses:
        return missing("integrated with one and with two copies")
    sentence = f"With a second copy that every packet waits for, integrated delivers {listing(clauses)} of what it does with one"
    compared = [(ratio("delivered_kpps", nf, ("integrated", 2), ("centralized", 2)),
                 ratio("p50_us", nf, ("centralized", 2), ("integrated", 2))) for nf in nfs]  # fmt: skip
    rates, latencies = ([pair[n] for pair in compared if pair[n]] for n in range(2))
    if rates and latencies:
        sentence += (f"; with two copies each, it delivers {spread([r for r in rates if r])} of what centralized does, which "
                     f"takes {spread([r for r in latencies if r])} its median latency")  # fmt: skip
    return f"{sentence}.{in_round_trips(frame)}"


def in_round_trips(frame: pd.DataFrame) -> str:
    """Say what waiting for a second copy adds to the median, in storage round trips: what one read adds when the state is remote.

    A firewall whose connections are open reads with every packet and hardly writes; a traffic counter writes with every packet.
    """
    medians = [typical(frame, "p50_us", nf=nf, placement=placement, replicas=copies)
               for nf, placement, copies in (("traffic_counter", "integrated", 2), ("traffic_counter", "integrated", 1),
                                             ("firewall", "centralized", 1), ("firewall", "integrated", 1))]  # fmt: skip
    found = [median for median in medians if median is not None]
    if len(found) < 4:
        return ""
    added_us, trip_us = found[0] - found[1], found[2] - found[3]
    share = f", {digits(added_us / trip_us)} round trips" if trip_us > 0 else ""
    return (f" The second copy adds {digits(added_us)} µs to the median of the traffic counter; a read from a store host adds "
            f"{digits(trip_us)} µs to the firewall's{share}.")  # fmt: skip
