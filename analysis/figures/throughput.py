"""How much of the offered load does each placement deliver?"""

from __future__ import annotations

import pandas as pd

from analysis import style
from analysis.answers import digits, listing, missing, spread
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
    shown = {
        topology: style.order_nfs(delivered.loc[delivered["topology"] == topology, "nf"])
        for topology in style.order_topologies(delivered["topology"])
    }
    panels = sheet.ragged([len(nfs) for nfs in shown.values()], 0.6 + 1.7 * len(shown), sharey="row", sharex="row")
    for row, (topology, nfs) in zip(panels, shown.items()):
        in_topology = delivered[delivered["topology"] == topology]
        top = 1.08 * max(in_topology.groupby(["nf", "placement", "offered_kpps"])["value"].median())
        for axes, nf in zip(row, nfs):
            axes.axline((0, 0), slope=1, color="#BBBBBB", linewidth=0.8, zorder=0)
            for placement, rows in by_placement(in_topology[in_topology["nf"] == nf]):
                sheet.curve(axes, rows, "offered_kpps", placement, f"{topology}, {nf}")
            axes.set(ylim=(0, top), xlim=(0, 1.04 * in_topology["offered_kpps"].max()), title=f"{title(nf)}, {title(topology)}")
            axes.set_xlabel("offered (kpps)")
        row[0].set_ylabel("delivered (kpps)")
    sheet.legend([placement for placement, _ in by_placement(delivered)])


def answer(frame: pd.DataFrame) -> str:
    """Say how the highest lossless rates compare in the rack, and what the firewall costs beside the kernel's and beside none."""
    rate = frame[frame["metric"] == "lossless_kpps"]

    def ratios(placement: str, against: str) -> list[float]:
        pairs = [
            [typical(rate, "lossless_kpps", topology="rack", nf=nf, placement=name) for name in (placement, against)]
            for nf in sorted(set(rate["nf"]))
            if nf != "passthrough"
        ]
        return [ours / theirs for ours, theirs in pairs if ours and theirs]

    centralized, local = ratios("integrated", "centralized"), ratios("integrated", "local")
    peers = _back_to_back(frame)
    if not centralized:
        unanswered = missing("a lossless rate of integrated and centralized in the rack")
        return f"{unanswered} B{peers[1:]}." if peers else unanswered
    sentence = f"Without loss, integrated forwards {spread(centralized)} the packets of centralized in the rack"
    sentence += f" and {spread(local)} those of local state" if local else ""
    return f"{sentence}; {peers}." if peers else f"{sentence}."


def _back_to_back(frame: pd.DataFrame) -> str:
    """Return what the firewall with local state delivers when saturated, against those who do its job or none; "" without it."""

    def delivered_kpps(placement: str, nf: str) -> float | None:
        return typical(frame, "delivered_kpps", topology="back_to_back", load="saturated", placement=placement, nf=nf)

    firewall = delivered_kpps("local", "firewall")
    against = {"nftables": delivered_kpps("nftables", "firewall"), "passthrough": delivered_kpps("local", "passthrough")}
    said = [f"{digits(firewall / theirs)}x what {name} does" for name, theirs in against.items() if firewall and theirs]
    return f"back to back and saturated, the firewall with local state delivers {listing(said)}" if said else ""
