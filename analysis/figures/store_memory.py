"""How much memory does a store take for its records, and how much of it is the records themselves?"""

from __future__ import annotations

import pandas as pd

from analysis import style
from analysis.answers import digits, missing
from analysis.figures import Headline
from analysis.sheet import Sheet, by_placement
from analysis.summary import typical

EXPERIMENT = "store_memory"
HEADLINES = (Headline("store_rss_mbytes"), Headline("table_payload_ratio"))
WIDTH_IN = style.ONE_COLUMN_IN


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Left: resident memory of the store process; right: the table's bytes per byte of key, version and value."""
    panels = {"store_rss_mbytes": "store process (MB)", "table_payload_ratio": "table / payload"}
    shown = {metric: label for metric, label in panels.items() if (frame["metric"] == metric).any()}
    if not shown or "records" not in frame:
        return
    (row,) = sheet.panels(1, len(shown), 1.9)
    for axes, (metric, label) in zip(row, shown.items()):
        for placement, rows in by_placement(frame[frame["metric"] == metric]):
            sheet.curve(axes, rows, "records", placement, metric)
        axes.set(xscale="log", ylim=(0, None), xlabel="records", ylabel=label)
    sheet.legend(style.order(frame["placement"]))


def answer(frame: pd.DataFrame) -> str:
    """Say what the most records measured take."""
    measured = frame.loc[frame["valid"] & (frame["metric"] == "store_rss_mbytes")]
    if measured.empty or "records" not in frame:
        return missing("store memory")
    most = measured["records"].max()
    process_mbytes, ratio = (typical(frame, metric, records=most) for metric in ("store_rss_mbytes", "table_payload_ratio"))
    sentence = f"With {int(most):,} records the store process takes {digits(process_mbytes or 0)} MB"
    return sentence + (f"; its table is {digits(ratio)}x the records' keys, versions and values." if ratio else ".")
