"""How long until a host that comes back is a backup again, what bounds it, and what do packets lose by it?"""

from __future__ import annotations

import pandas as pd

from analysis import style
from analysis.answers import digits, listing, missing
from analysis.figures import Headline
from analysis.results import time_line
from analysis.sheet import Sheet, title
from analysis.summary import typical

EXPERIMENT = "rejoin"
HEADLINES = tuple(Headline(metric) for metric in ("refill_ms", "foreground_cost_ratio", "goodput_during_kpps"))
COURSES = {"full_ratio": "all copies (share)", "storage_mbps": "storage (Mbit/s)", "store_cores": "stores' CPU (cores)"}
SHOWN_MS = (-300, 1000)
"""Of the time around the store's return: as much again before and after a refill as it takes."""


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """A column a network function and number of copies: what is delivered, the copies that are complete, and what the refill
    takes of network and CPU, from the moment the store is back (time 0); median of the repeats and their range. Shaded: the
    refill."""
    lines = frame[frame["metric"].isin(("delivered", "refill"))]
    if lines.empty:
        return
    shown = cases(lines)
    grid = sheet.panels(1 + len(COURSES), len(shown), 1.15 * (1 + len(COURSES)), sharex=True)
    for column, (nf, replicas) in enumerate(shown):
        here = frame[(frame["nf"] == nf) & (frame["replicas"] == replicas)]
        panel = f"{title(nf)}, R = {replicas}"
        placement = str(here["placement"].iloc[0])
        delivered, refill = ([time_line(encoded) for encoded in here.loc[here["metric"] == name, "histogram"]]
                             for name in ("delivered", "refill"))  # fmt: skip
        rates = {n: (line["received"] / line.attrs["bin_ms"]).set_axis(binned(line)) for n, line in enumerate(delivered)}
        sheet.band(grid[0, column], pd.DataFrame(rates).dropna().rename_axis("ms"), placement, panel, "goodput_kpps")
        for row, (name, label) in enumerate(COURSES.items(), start=1):
            values = pd.DataFrame({n: line[name].set_axis(binned(line)) for n, line in enumerate(refill)})
            whole = values.ffill() if name == "full_ratio" else values.fillna(0)
            sheet.band(grid[row, column], whole.rename_axis("ms"), placement, panel, name)
            grid[row, 0].set_ylabel(label.replace(" (", "\n("))
        ended = here.loc[here["metric"] == "rejoin_ms", "value"].median()
        began = ended - here.loc[here["metric"] == "refill_ms", "value"].median()
        for axes in grid[:, column]:
            axes.axvspan(began, ended, color="#DDDDDD", zorder=0, linewidth=0)
            axes.set(xlim=SHOWN_MS, ylim=(0, None))
        grid[0, column].set_title(panel)
        grid[-1, column].set_xlabel("ms after the store is back")
    grid[0, 0].set_ylabel("delivered\n(kpps)")


def cases(rows: pd.DataFrame) -> list[tuple[str, int]]:
    """Return (network function, replicas) of the rows, in the order of the table of styles."""
    return [(nf, int(replicas)) for nf in style.order_nfs(rows["nf"])
            for replicas in sorted(set(rows.loc[rows["nf"] == nf, "replicas"]))]  # fmt: skip


def binned(line: pd.DataFrame) -> pd.Series:
    """Return the begin of each row's bin in whole bins, so that repeats fall on each other."""
    width: float = line.attrs["bin_ms"]
    return (line["ms"] / width).round() * width


def answer(frame: pd.DataFrame) -> str:
    """Say how many records were filled in what time, at which cost, and what of network and CPU it took."""
    rejoined = frame[(frame["metric"] == "refill_ms") & frame["valid"]]
    if rejoined.empty:
        return missing("a host that came back")
    said = []
    for nf, replicas in cases(rejoined):
        found = {metric: typical(frame, metric, nf=nf, replicas=replicas) or 0.0 for metric in (
            "refill_ms", "records", "sources", "foreground_cost_ratio", "storage_mbps", "store_cores")}  # fmt: skip
        cost, sources = found["foreground_cost_ratio"], max(int(found["sources"]), 1)
        said.append(f"{title(nf)} with R = {replicas} {digits(found['records'])} records from {sources} "
                    f"host{'s' if sources > 1 else ''} in {digits(found['refill_ms'])} ms, at {digits(found['storage_mbps'])} "
                    f"Mbit/s and {found['store_cores']:.1f} cores of the stores, while packets were delivered {abs(cost):.0%} "
                    f"{'slower' if cost >= 0 else 'faster'} than afterwards")  # fmt: skip
    return f"From the first copy to the last: {listing(said)}."
