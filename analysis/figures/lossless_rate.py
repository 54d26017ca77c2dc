"""What is the highest rate each placement forwards without loss (RFC 2544), and what when saturated?"""

from __future__ import annotations

import pandas as pd

from analysis import style
from analysis.sheet import Sheet, title

EXPERIMENT = "throughput"


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Panels: topology and kind of rate. Bars: median of repeats, 95 % confidence interval."""
    saturated = frame[frame.get("load", pd.Series(index=frame.index, dtype=str)) == "saturated"]
    kinds = {
        "without loss": frame[frame["metric"] == "lossless_kpps"],
        "saturated": saturated[saturated["metric"] == "delivered_kpps"],
    }
    shown = [
        (topology, kind, rows[rows["topology"] == topology])
        for topology in style.order_topologies(frame["topology"])
        for kind, rows in kinds.items()
        if (rows["topology"] == topology).any()
    ]
    if not shown:
        return
    (panels,) = sheet.panels(1, len(shown), 2.1)
    for axes, (topology, kind, rows) in zip(panels, shown):
        nfs = {nf: rows[rows["nf"] == nf] for nf in style.order_nfs(rows["nf"])}
        sheet.bars(axes, nfs, f"{topology}, {kind}")
        axes.set_title(f"{title(topology)}, {kind}")
    panels[0].set_ylabel("rate (kpps)")
    sheet.legend(style.order(pd.concat([rows for *_, rows in shown])["placement"]), bars=True)
