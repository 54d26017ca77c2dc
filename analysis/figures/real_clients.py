"""What goodput, request rate and latency do real programs get through each placement?"""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from analysis import style
from analysis.answers import digits, listing, microseconds, missing
from analysis.figures import Headline
from analysis.sheet import Sheet, by_placement, title
from analysis.summary import typical

EXPERIMENT = "real_clients"
HEADLINES = (
    Headline("goodput_mbps", {"workload": "tcp"}),
    Headline("goodput_mbps", {"workload": "download"}),
    Headline("requests_kops", {"workload": "requests"}),
    Headline("requests_kops", {"workload": "many_connections"}),
    Headline("requests_kops", {"workload": "new_connections"}),
    Headline("p50_us", {"workload": "requests"}),
    Headline("p99_us", {"workload": "requests"}),
    Headline("p50_us", {"workload": "handshakes"}),
)
STREAMS = {"tcp": "TCP stream", "download": "file download", "udp": "UDP, fixed"}
RATES = {"requests": "kept open", "many_connections": "1,000 open", "new_connections": "one each"}
LATENCIES = {"requests": "connections kept open", "handshakes": "new connection each"}
PANELS = 4


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Rows: network functions. Bars: median of repeats, 95 % confidence interval; CDFs: all repeats' requests."""
    if "workload" not in frame:
        return
    nfs = style.order_nfs(frame["nf"])
    panels = sheet.panels(len(nfs), PANELS, 0.75 + 1.2 * len(nfs), sharex="col", sharey="col")
    for row, nf in zip(panels, nfs):
        here = frame[frame["nf"] == nf]
        for axes, metric, names, label, below in (
            (row[0], "goodput_mbps", STREAMS, "goodput (Mbit/s)", ""),
            (row[1], "requests_kops", RATES, "requests (1000/s)", "connections"),
        ):
            groups = {name: _of(here, metric, workload) for workload, name in names.items()}
            if shown := {name: rows for name, rows in groups.items() if len(rows)}:
                sheet.bars(axes, shown, f"{nf}, {metric}")
            axes.set(xlabel=below if nf == nfs[-1] else "", ylabel=label, title=title(nf))
        for axes, (workload, name) in zip(row[2:], LATENCIES.items()):
            for placement, rows in by_placement(_of(here, "latency_ns", workload)):
                sheet.cdf(axes, rows["histogram"], placement, f"{nf}, {name}")
            axes.set_title(name)
    sheet.cdf_axes(panels[:, 2:], "requests", "latency")
    _same_limits([axes for axes in panels[:, 2:].flat if axes.lines])
    for axes in panels.flat:
        axes.set_visible(bool(axes.lines or axes.patches))
    sheet.legend([placement for placement, _ in by_placement(frame)])


def _same_limits(panels: list[Axes]) -> None:
    limits_us = [axes.get_xlim() for axes in panels]
    for axes in panels:
        axes.set_xlim(min(low for low, _ in limits_us), max(high for _, high in limits_us))


def _of(frame: pd.DataFrame, metric: str, workload: str) -> pd.DataFrame:
    return frame[(frame["metric"] == metric) & (frame["workload"] == workload)]


def answer(frame: pd.DataFrame) -> str:
    """Say what a stream, a kept connection and a new one get from integrated and from centralized state."""
    measured = {nf for nf in set(frame["nf"]) if nf != "passthrough"}
    for nf in style.order_nfs(measured):
        clauses = [
            f"{name} {tell(ours)} against {tell(theirs)}"
            for name, metric, workload, tell in (
                ("a TCP stream gets", "goodput_mbps", "tcp", lambda value: f"{digits(value)} Mbit/s"),
                ("a request takes", "p50_us", "requests", microseconds),
                ("a connection and its first answer take", "p50_us", "handshakes", microseconds),
                ("connections opened per second are", "requests_kops", "new_connections", lambda value: digits(1000 * value)),
            )
            if (ours := typical(frame, metric, nf=nf, workload=workload, placement="integrated"))
            and (theirs := typical(frame, metric, nf=nf, workload=workload, placement="centralized"))
        ]
        if clauses:
            return f"Through the {title(nf)}, integrated against centralized: {listing(clauses)}."
    compared = ("integrated", "centralized")
    return missing(*([name for name in compared if name not in set(frame["placement"])] or ["the same workload under both"]))
