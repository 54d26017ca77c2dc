"""What does a packet's state cost as the table grows, beside what a cache miss takes on the machine?"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.lines import Line2D

from analysis import style
from analysis.answers import digits, listing, missing
from analysis.figures import Headline
from analysis.sheet import Sheet, title
from analysis.summary import typical

EXPERIMENT = "table_size"
HEADLINES = (Headline("state_ns"), Headline("packet_ns"))
PLACEMENT = "local"
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "state_ns": ("state: with it minus without", {}),
    "first_extra_ns": ("the same, first packet of a flow", {"marker": "D", "linestyle": (0, (4, 1.5)), "color": "#0072B2"}),
    "dependent_access_ns": ("one cache line, dependent", {"marker": "s", "linestyle": "-", "color": "#999999"}),
    "independent_access_ns": ("one cache line, independent", {"marker": "v", "linestyle": (0, (1, 1.2)), "color": "#999999"}),
}


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Panels: network functions. Median of repeats, 95 % confidence interval; grey: the machine's floor; both axes log."""
    costs = pd.concat([frame[frame["metric"].isin(LINES)], _first_extra(frame)])
    nfs = style.order_nfs(costs["nf"])
    if not nfs:
        return
    (panels,) = sheet.panels(1, len(nfs), 2.3, sharey=True)
    for axes, nf in zip(panels, nfs):
        for metric, (_, changes) in LINES.items():
            rows = costs[(costs["nf"] == nf) & (costs["metric"] == metric)]
            if not rows.empty:
                sheet.curve(axes, rows, "flows", PLACEMENT, nf, **changes)
        axes.set(xscale="log", yscale="log", xlabel="flows", title=title(nf))
    panels[0].set_ylabel("ns per packet, ns per access")
    handles = [Line2D([], [], **{**style.line(PLACEMENT), **changes}) for _, changes in LINES.values()]
    sheet.legend_of(handles, [label for label, _ in LINES.values()])


def _first_extra(frame: pd.DataFrame) -> pd.DataFrame:
    """Return what the first packet of a flow costs beyond one without state."""
    first, bare = (frame[frame["metric"] == metric] for metric in ("first_packet_ns", "passthrough_ns"))
    without = bare.set_index(["trial", "sweep"])["value"]
    keys = pd.MultiIndex.from_frame(first[["trial", "sweep"]])
    return first.assign(metric="first_extra_ns", value=first["value"] - without.reindex(keys).to_numpy())


def answer(frame: pd.DataFrame) -> str:
    """Say what state costs a packet with the fewest and the most flows, and what one dependent cache line takes there."""
    if "flows" not in frame or frame.empty:
        return missing("the cost of state")
    ends = [frame["flows"].min(), frame["flows"].max()]
    said = []
    for nf in style.order_nfs(frame["nf"]):
        few, many = (typical(frame, "state_ns", nf=nf, flows=flows) for flows in ends)
        if few and many:
            said.append(f"{title(nf)} from {digits(few)} to {digits(many)} ns")
    line = typical(frame, "dependent_access_ns", flows=ends[1])
    if not said:
        return missing("the cost of state")
    floor = f"; one dependent access to an area as large takes {digits(line)} ns" if line else ""
    return f"From {ends[0]:,.0f} to {ends[1]:,.0f} flows, state costs a packet of {listing(said)}{floor}."
