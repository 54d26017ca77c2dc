"""For how long is nothing delivered when an NF host is lost, and what is lost with it?"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from analysis import style
from analysis.answers import digits, listing, missing
from analysis.figures import Headline
from analysis.figures.replication_cost import waits
from analysis.results import time_line
from analysis.sheet import Sheet, title
from analysis.summary import typical

EXPERIMENT = "failover"
HEADLINES = tuple(Headline(metric) for metric in ("outage_ms", "restored_ms", "packets_lost", "connections_broken"))
PARTS = ("detection_ms", "recovery_ms")
COUNTS = {"packets_lost": "packets lost", "broken_ratio": "broken flows (share)", "records_lost": "records lost"}
PIECES = {"host": "host", "function": "NF process", "store": "store process", "link": "link"}
SMALL_PT = 7.5
BIN_MS = 10.0
"""Of the courses: a millisecond of 10 kpps is ten packets, too few for a rate."""
ABREAST = 6


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Pairs of panels, one pair a placement: what the lost host's flows get delivered, and their latency, around the loss at
    time 0; median of the repeats and their range. Below: the outage in its parts, what was lost, and the outage where only a
    part of the host is lost; 95 % intervals."""
    whole = of_hosts(frame)
    lines = whole[whole["metric"] == "delivered"]
    if lines.empty:
        return
    nf = style.order_nfs(lines["nf"])[0]
    shown = cases(lines[lines["nf"] == nf])
    bars = [metric for metric in ("outage_ms", *COUNTS) if (whole["metric"] == metric).any()]
    parts = frame[~frame["lost"].isna() & (frame["nf"] == nf)] if "lost" in frame else frame[:0]
    below = all_courses(sheet, shown, len(bars) + (not parts.empty), "ms after the loss")
    for axes, metric in zip(below, bars):
        lost(sheet, axes, whole[whole["nf"] == nf], shown, metric)
    if not parts.empty:
        lost_parts(sheet, below[-1], pd.concat([whole[whole["nf"] == nf], parts]))
    sheet.legend_of([Patch(facecolor=style.COMPONENTS[part][1], hatch=style.COMPONENTS[part][2], edgecolor="black", linewidth=0.4)
                     for part in PARTS], [style.COMPONENTS[part][0] for part in PARTS])  # fmt: skip


def of_hosts(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of trials that lost a whole host, and whose packets waited for copies."""
    waited = frame[waits(frame)]
    return waited if "lost" not in waited else waited[waited["lost"].isna()]


def updates(frame: pd.DataFrame) -> str:
    """Say how many packets left and are counted nowhere, when they wait for the copies and when they do not."""
    lost = frame[(frame["metric"] == "updates_lost") & frame["valid"] & (frame["replicas"] > 1)]
    if lost.empty:
        return ""
    kept = waits(lost)
    said = [f"{digits(float(rows['value'].median()))} where {packets} for the copies"
            for packets, rows in (("packets wait", lost[kept]), ("they do not wait", lost[~kept])) if len(rows)]  # fmt: skip
    return f" Packets that were delivered and are counted nowhere: {listing(said)}."


def cases(rows: pd.DataFrame) -> list[tuple[str, int, pd.DataFrame]]:
    """Return (placement, replicas, its rows), in the order of the table of styles."""
    found = rows.groupby(["placement", "replicas"])
    order = style.order(rows["placement"])
    return sorted(((str(name), int(replicas), here) for (name, replicas), here in found),
                  key=lambda case: (order.index(case[0]), case[1]))  # fmt: skip


def label(placement: str, replicas: int) -> str:
    """Return a case as a panel's title: with the number of copies, where the placement has any to lose."""
    copies = f", R = {replicas}" if placement.startswith(("integrated", "centralized")) else ""
    return style.look(placement).label + copies


def all_courses(sheet: Sheet, shown: list[tuple[str, int, pd.DataFrame]], others: int, clock: str) -> np.ndarray:
    """Draw every case's courses, in pairs of panels of equal axes, and return a row of `others` panels below them."""
    abreast = math.ceil(len(shown) / math.ceil(len(shown) / ABREAST))
    blocks = [shown[start : start + abreast] for start in range(0, len(shown), abreast)]
    widths = [len(block) for block in blocks for _ in range(2)]
    *grid, below = sheet.ragged([*widths, others], 0.6 + 1.3 * (len(widths) + 1))
    for number, block in enumerate(blocks):
        pair = grid[2 * number : 2 * number + 2]
        for column, (placement, replicas, rows) in enumerate(block):
            courses(sheet, [row[column] for row in pair], placement, label(placement, replicas), rows)
            pair[1][column].set_xlabel(clock)
        for row, unit in zip(pair, ("kpps", "p99 (ms)")):
            row[0].set_ylabel(unit)
            ends = [axes.get_ylim() for axes in row]
            for axes in row:
                axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
    return below


def courses(sheet: Sheet, panels: list[Axes], placement: str, name: str, rows: pd.DataFrame) -> None:
    """Draw goodput above and latency below, of every repeat's watched packets; grey: the rate before time 0."""
    goodput, latency = aligned([time_line(encoded) for encoded in rows["histogram"]])
    above, below = panels
    sheet.band(above, goodput, placement, name, "goodput_kpps")
    sheet.band(below, latency, placement, name, "p99_ms")
    above.axhline(goodput[goodput.index < 0].stack().median(), color="#BBBBBB", linewidth=0.8, zorder=0)
    for axes in panels:
        axes.axvline(0, color="black", linewidth=0.6, linestyle=":")
        axes.set_xlim(goodput.index.min(), goodput.index.max())
    above.set_title(name, fontsize=SMALL_PT)
    above.set_ylim(0, None)
    above.tick_params(labelbottom=False)
    below.set_yscale("log")


def aligned(lines: list[pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return goodput (kpps) and p99 (ms) of the watched packets in bins of BIN_MS: a row a bin, a column a repeat.

    A bin's p99 is the highest of its milliseconds that have a packet; without any it is unknown.
    """
    goodput, latency = {}, {}
    for number, line in enumerate(lines):
        at = (np.floor(line["ms"] / BIN_MS) * BIN_MS).rename("ms")
        whole = line.groupby(at)["watched"].size() * line.attrs["bin_ms"] > 0.9 * BIN_MS  # the first and last may be parts
        goodput[number] = (line.groupby(at)["watched"].sum() / BIN_MS)[whole]
        latency[number] = (line["p99_us"].where(line["watched"] > 0).groupby(at).max() / 1000)[whole]
    return pd.DataFrame(goodput), pd.DataFrame(latency)


def lost(sheet: Sheet, axes: Axes, frame: pd.DataFrame, shown: list[tuple[str, int, pd.DataFrame]], metric: str) -> None:
    """Draw a bar per case: the outage stacked from its parts, or a count; what did not recover says so."""
    recovered = set(frame.loc[(frame["metric"] == "recovered_ratio") & (frame["value"] == 1), "trial"])
    for position, (placement, replicas, _) in enumerate(shown):
        here = frame[(frame["placement"] == placement) & (frame["replicas"] == replicas)]
        name = label(placement, replicas)
        if metric == "outage_ms":
            sheet.stack(axes, position, {part: here[here["metric"] == part] for part in PARTS}, placement, name)
            if here.loc[here["metric"] == "recovered_ratio", "value"].median() < 1:
                axes.text(position, 0.5, "for good", rotation=90, ha="center", va="center", bbox={"color": "white", "pad": 1},
                          transform=axes.get_xaxis_transform())  # fmt: skip
        elif (here["metric"] == metric).any():
            sheet.bar(axes, position, here[here["metric"] == metric], placement, COUNTS[metric], name, 0.7)
    axes.set_xticks(range(len(shown)), [label(placement, replicas) for placement, replicas, _ in shown], rotation=50, ha="right",
                    rotation_mode="anchor", fontsize=6)  # fmt: skip
    axes.grid(axis="x", visible=False)
    axes.set_title("outage (ms)" if metric == "outage_ms" else COUNTS[metric], fontsize=SMALL_PT)
    axes.set_ylim(0, 1.02 if metric == "broken_ratio" else None)
    ended = frame[frame["trial"].isin(recovered) & (frame["metric"] == "outage_ms")]["value"]
    if metric == "outage_ms" and len(ended):  # what does not end would leave no room for what does
        axes.set_ylim(0, 1.15 * ended.max())


def lost_parts(sheet: Sheet, axes: Axes, frame: pd.DataFrame) -> None:
    """Draw the outage by what was lost of the host, for the placement and copies that it was measured for."""
    placement, replicas = frame.loc[~frame["lost"].isna(), ["placement", "replicas"]].iloc[-1]
    here = frame[(frame["placement"] == placement) & (frame["replicas"] == replicas)]
    kinds = [kind for kind in PIECES if (here["lost"].fillna("host") == kind).any()]
    for position, kind in enumerate(kinds):
        rows = here[here["lost"].fillna("host") == kind]
        sheet.stack(axes, position, {part: rows[rows["metric"] == part] for part in PARTS}, placement, f"lost: {kind}")
    axes.set_xticks(range(len(kinds)), [PIECES[kind] for kind in kinds], rotation=50, ha="right", rotation_mode="anchor",
                    fontsize=6)  # fmt: skip
    axes.grid(axis="x", visible=False)
    axes.set_title(f"outage, R = {replicas} (ms)", fontsize=SMALL_PT)
    axes.set_ylim(0, None)


def answer(frame: pd.DataFrame) -> str:
    """Say each case's outage, until the first packet and until the rate is back, and what was lost and broken."""
    uncounted, frame = updates(frame), of_hosts(frame)
    outages = frame[(frame["metric"] == "outage_ms") & frame["valid"]]
    if outages.empty:
        return missing("the loss of a host")
    nf = style.order_nfs(outages["nf"])[0]
    said = []
    for placement, replicas, _ in cases(outages[outages["nf"] == nf]):
        where = {"placement": placement, "replicas": replicas, "nf": nf}
        found = {metric: typical(frame, metric, **where) or 0.0
                 for metric in ("outage_ms", "restored_ms", "recovered_ratio", "packets_lost", "broken_ratio")}  # fmt: skip
        outage = (
            f"{digits(found['outage_ms'])} ms, all {digits(found['restored_ms'])} ms" if found["recovered_ratio"] else "for good"
        )
        said.append(f"{label(placement, replicas)} {outage} ({digits(found['packets_lost'])} packets lost, "
                    f"{found['broken_ratio']:.0%} of connections broken)")  # fmt: skip
    return f"From the loss of an NF host to the first packet of its flows, {title(nf)}: {listing(said)}.{uncounted}"
