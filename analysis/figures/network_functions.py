"""What does each network function forward on one core, and how does it go with the number of flows?"""

from __future__ import annotations

import pandas as pd

from analysis import style
from analysis.answers import digits, listing, missing, times
from analysis.figures import Headline
from analysis.sheet import Sheet
from analysis.summary import typical

EXPERIMENT = "network_functions"
HEADLINES = (Headline("delivered_kpps", {"load": "saturated"}),)


def saturated(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rates measured as fast as the path takes them, the number of flows filled in."""
    load = frame.get("load", pd.Series(index=frame.index, dtype=str))
    rows = frame[(load == "saturated") & (frame["metric"] == "delivered_kpps")]
    return rows.assign(flows=rows["flows"].fillna(10_000) if "flows" in rows else 10_000.0)


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Above: rates at 10,000 flows by network function. Below, where flows were swept: rate against flows."""
    rows = saturated(frame)
    if rows.empty:
        return
    usual = rows[rows["flows"] == 10_000]
    swept = rows[rows["nf"].isin(rows[rows["flows"] != 10_000]["nf"])]
    nfs = {nf: usual[usual["nf"] == nf] for nf in style.order_nfs(usual["nf"])}
    grown = style.order_nfs(swept["nf"])
    above, below = sheet.banner(len(grown), 4.6 if grown else 2.5)
    sheet.bars(above, nfs, "saturated")
    above.set(ylabel="forwarded (kpps)", title="10,000 flows")
    for axes, nf in zip(below, grown):
        for placement in style.order(swept["placement"]):
            of_one = swept[(swept["nf"] == nf) & (swept["placement"] == placement)]
            if not of_one.empty:
                sheet.curve(axes, of_one, "flows", placement, nf)
        axes.set(title=nf, xscale="log", xlabel="flows", ylabel="forwarded (kpps)", ylim=(0, None))
    sheet.legend(style.order(rows["placement"]), bars=True)


def answer(frame: pd.DataFrame) -> str:
    """Say what every function reaches of the one that does nothing, and of the kernel's where that was measured."""
    rows = saturated(frame)
    ours = rows[(rows["placement"] != "nftables") & (rows["flows"] == 10_000)]
    nothing = typical(ours, "delivered_kpps", nf="passthrough")
    said = []
    for nf in style.order_nfs(ours["nf"]):
        rate = typical(ours, "delivered_kpps", nf=nf)
        kernel = typical(rows, "delivered_kpps", nf=nf, placement="nftables")
        beside = [f"{times(rate, other)} {name}" for other, name in ((nothing, "passthrough"), (kernel, "nftables"))
                  if rate and other and nf != name]  # fmt: skip
        if rate:
            said.append(f"{nf.replace('_', ' ')} {digits(rate)} kpps" + (f" ({listing(beside)})" if beside else ""))
    return f"Forwarded on one core: {'; '.join(said)}." if said else missing("a rate of a network function")
