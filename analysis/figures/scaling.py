"""What do packets notice when an NF host joins and takes half of the flows, and when it gives them back?"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.lines import Line2D

from analysis import style
from analysis.answers import digits, listing, missing
from analysis.figures import Headline
from analysis.figures.failover import SMALL_PT, all_courses, cases, label
from analysis.sheet import Sheet, title
from analysis.summary import typical

EXPERIMENT = "scaling"
HEADLINES = tuple(Headline(metric) for metric in ("out_ms", "in_ms", "packets_delayed", "packets_lost", "flow_reordered"))
COSTS = {"out_ms": "move out (ms)", "in_ms": "move in (ms)", "out_highest_ms": "longest delay (ms)",
         "packets_delayed": "delayed over 20 ms", "packets_lost": "lost", "flow_reordered": "out of flow order"}  # fmt: skip
COPIES: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "white", "markeredgewidth": 0.8}
"""What sets several replicas apart from one."""


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Pairs of panels, one pair a placement: goodput and latency of the flows that move, time 0 is the first move; of the most
    flows measured. Below: what the moves take and cost against the flows moved; medians, 95 % intervals."""
    lines = frame[frame["metric"] == "delivered"]
    if lines.empty:
        return
    nf = style.order_nfs(lines["nf"])[-1]
    lines = lines[lines["nf"] == nf]
    most = lines.groupby(["placement", "replicas"])["flows"].transform("max")
    below = all_courses(sheet, cases(lines[lines["flows"] == most]), len(COSTS), "ms after the move")
    for axes, (metric, name) in zip(below, COSTS.items()):
        for placement, replicas, rows in cases(frame[(frame["nf"] == nf) & (frame["metric"] == metric)]):
            changes = COPIES if replicas > 1 else {}
            sheet.curve(axes, rows.assign(flows=rows["flows"] / 2), "flows", placement, f"{name}, R = {replicas}", **changes)
        highest = max(1.0, axes.get_ylim()[1])  # a count of none is no axis of hundredths
        axes.set(xscale="log", xlabel="flows moved", ylim=(0, highest))
        axes.set_title(name, fontsize=SMALL_PT)
    looks = [(style.line(placement) | (COPIES if replicas > 1 else {}), label(placement, replicas))
             for placement, replicas, _ in cases(lines)]  # fmt: skip
    sheet.legend_of([Line2D([], [], **look) for look, _ in looks], [name for _, name in looks])


def answer(frame: pd.DataFrame) -> str:
    """Say for the most flows of each case how long the first move took, and what it cost."""
    moves = frame[(frame["metric"] == "out_ms") & frame["valid"]]
    if moves.empty:
        return missing("a move")
    nf = style.order_nfs(moves["nf"])[-1]
    said = []
    for placement, replicas, rows in cases(moves[moves["nf"] == nf]):
        where = {"placement": placement, "replicas": replicas, "nf": nf, "flows": rows["flows"].max()}
        took, delayed, lost, disordered = (
            digits(typical(frame, metric, **where) or 0.0)
            for metric in ("out_ms", "packets_delayed", "packets_lost", "flow_reordered")
        )
        said.append(f"{label(placement, replicas)} {digits(where['flows'] / 2)} flows in {took} ms ({lost} packets lost, "
                    f"{delayed} delayed by over 20 ms, {disordered} out of order)")  # fmt: skip
    return f"Half of the flows to a host that joins, {title(nf)}, and back: {listing(said)}."
