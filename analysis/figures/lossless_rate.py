"""What is the highest rate each placement forwards without loss (RFC 2544), and what when saturated?"""

from __future__ import annotations

import pandas as pd

from analysis import style
from analysis.sheet import Sheet, by_placement, title

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
        placements = style.order(rows["placement"])
        nfs = style.order_nfs(rows["nf"])
        step = 0.8 / max(3, len(placements))
        for group, nf in enumerate(nfs):
            present = list(by_placement(rows[rows["nf"] == nf]))
            for place, (placement, bars) in enumerate(present):
                position = group + (place - (len(present) - 1) / 2) * step
                sheet.bar(axes, position, bars, placement, f"{topology}, {kind}", nf, 0.92 * step)
        axes.set_xticks(range(len(nfs)), [title(nf).replace(" ", "\n") for nf in nfs])
        axes.grid(axis="x", visible=False)
        axes.set(title=f"{title(topology)}, {kind}", xlim=(-0.5, len(nfs) - 0.5))
    panels[0].set_ylabel("rate (kpps)")
    sheet.legend(style.order(pd.concat([rows for *_, rows in shown])["placement"]), bars=True)
