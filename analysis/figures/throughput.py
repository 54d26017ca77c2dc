"""How much of the offered load does each placement deliver?"""

from __future__ import annotations

import pandas as pd

from analysis import style
from analysis.answers import digits, missing, spread
from analysis.figures import Headline
from analysis.sheet import Sheet, by_placement, title
from analysis.summary import typical

EXPERIMENT = "throughput"
HEADLINES = (
    Headline("lossless_kpps", {"search": "rfc2544"}),
    Headline("delivered_kpps", {"load": "saturated"}),
    Headline("nf_cpu_us", carried=True),
)


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Panels: network functions across, topologies down. Median of repeats, 95 % confidence interval; grey: no loss."""
    delivered = frame[(frame["metric"] == "delivered_kpps") & frame.get("offered_kpps", pd.Series(dtype=float)).notna()]
    if delivered.empty:
        return
    nfs = style.order_nfs(delivered["nf"])
    topologies = style.order_topologies(delivered["topology"])
    panels = sheet.panels(len(topologies), len(nfs), 0.85 + 1.45 * len(topologies), sharey="row", sharex="row")
    for row, topology in zip(panels, topologies):
        in_topology = delivered[delivered["topology"] == topology]
        top = 1.08 * max(in_topology.groupby(["nf", "placement", "offered_kpps"])["value"].median())
        for axes, nf in zip(row, nfs):
            axes.set_visible((in_topology["nf"] == nf).any())
            axes.axline((0, 0), slope=1, color="#BBBBBB", linewidth=0.8, zorder=0)
            for placement, rows in by_placement(in_topology[in_topology["nf"] == nf]):
                sheet.curve(axes, rows, "offered_kpps", placement, f"{topology}, {nf}")
            axes.set(ylim=(0, top), xlim=(0, 1.04 * in_topology["offered_kpps"].max()), title=f"{title(nf)}, {title(topology)}")
        row[0].set_ylabel("delivered (kpps)")
    for axes in panels[-1]:
        axes.set_xlabel("offered (kpps)")
    sheet.legend([placement for placement, _ in by_placement(delivered)])


def answer(frame: pd.DataFrame) -> str:
    """Say how the highest lossless rates compare in the rack, and the firewall with the kernel's where both ran."""
    rate = frame[frame["metric"] == "lossless_kpps"]

    def ratios(placement: str, against: str) -> list[float]:
        pairs = [
            [typical(rate, "lossless_kpps", topology="rack", nf=nf, placement=name) for name in (placement, against)]
            for nf in sorted(set(rate["nf"]))
            if nf != "passthrough"
        ]
        return [ours / theirs for ours, theirs in pairs if ours and theirs]

    centralized, local = ratios("integrated", "centralized"), ratios("integrated", "local")
    if not centralized:
        return missing("a lossless rate of integrated and centralized in the rack")
    sentence = f"Without loss, integrated forwards {spread(centralized)} the packets of centralized in the rack"
    sentence += f" and {spread(local)} those of local state" if local else ""
    ours, kernel = (
        typical(frame, "delivered_kpps", topology="back_to_back", nf="firewall", load="saturated", placement=name)
        for name in ("local", "nftables")
    )
    if ours and kernel:
        sentence += "; back to back and saturated, the firewall with local state delivers "
        sentence += f"{digits(ours / kernel)}x what nftables does"
    return sentence + "."
