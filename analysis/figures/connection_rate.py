"""How many TCP connections open per second, without a failed handshake and when saturated?"""

from __future__ import annotations

import pandas as pd

from analysis import style
from analysis.answers import digits, listing, missing, times
from analysis.figures import Headline
from analysis.sheet import Sheet, by_placement
from analysis.summary import typical

EXPERIMENT = "connection_rate"
HEADLINES = (Headline("lossless_kops", {"search": "rfc9693"}), Headline("opened_kops", {"load": "saturated"}))


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Left: opened against offered load, grey: all of them. Right: highest rates. Median of repeats, 95 % confidence interval."""
    opened = frame[frame["metric"] == "opened_kops"]
    ladder = opened[opened.get("offered_kops", pd.Series(index=opened.index, dtype=float)).notna()]
    rates = {
        "none failed": frame[frame["metric"] == "lossless_kops"],
        "saturated": opened[opened.get("load", pd.Series(index=opened.index, dtype=str)) == "saturated"],
    }
    placements = style.order(pd.concat([ladder, *rates.values()])["placement"])
    if not placements:
        return
    ((curves, bars),) = sheet.panels(1, 2, 2.2)
    curves.axline((0, 0), slope=1, color="#BBBBBB", linewidth=0.8, zorder=0)
    for placement, rows in by_placement(ladder):
        sheet.curve(curves, rows, "offered_kops", placement, "offered")
    curves.set(xlim=(0, None), ylim=(0, None), xlabel="offered (1000 connections/s)", ylabel="opened (1000 connections/s)")
    step = 0.8 / max(3, len(placements))
    for group, (kind, rows) in enumerate(rates.items()):
        for place, (placement, measured) in enumerate(by_placement(rows)):
            sheet.bar(bars, group + (place - (len(placements) - 1) / 2) * step, measured, placement, "highest", kind, 0.92 * step)
    bars.set_xticks(range(len(rates)), list(rates))
    bars.grid(axis="x", visible=False)
    bars.set(ylabel="1000 connections/s", xlim=(-0.5, len(rates) - 0.5))
    sheet.legend(placements, bars=True)


def answer(frame: pd.DataFrame) -> str:
    """Say the highest rates of the firewall under each placement, and how they compare to the kernel's."""
    said = []
    for metric, where, how in (
        ("lossless_kops", {"search": "rfc9693"}, "without a failed handshake"),
        ("opened_kops", {"load": "saturated"}, "saturated"),
    ):
        rates = {name: typical(frame, metric, placement=name, **where) for name in style.order(frame["placement"])}
        kernel = rates.pop("nftables", None)
        ours = [
            f"{style.look(name).label} {digits(rate)}" + (f" ({times(rate, kernel)} nftables)" if kernel else "")
            for name, rate in rates.items()
            if rate
        ]
        if ours:
            said.append(f"{how}, {listing(ours)}")
    return f"Thousand connections a second: {'; '.join(said)}." if said else missing("a rate of the firewall")
