"""How much memory does a store take for its records, and how much of it is the records themselves?"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from analysis import style
from analysis.answers import digits, missing
from analysis.figures import Headline
from analysis.sheet import Sheet, by_placement
from analysis.summary import typical

EXPERIMENT = "store_memory"
HEADLINES = (Headline("store_rss_mbytes"), Headline("table_mbytes"), Headline("table_payload_ratio"))
WIDTH_IN = style.ONE_COLUMN_IN
PAYLOAD_LIMIT = 1.5  # the table's size may be this many times its keys, versions and values
TABLE: dict[str, Any] = {"linestyle": "--", "marker": "s", "markerfacecolor": "white", "markeredgewidth": 0.8}
LIMIT: dict[str, Any] = {"color": "#777777", "linestyle": (0, (1, 1.5)), "linewidth": 1.0, "zorder": 1}


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Left: resident memory of the store process, and its table, on log axes; right: bytes of table per byte of payload."""
    panels = [metrics for metrics in (("store_rss_mbytes", "table_mbytes"), ("table_payload_ratio",)) if _has(frame, *metrics)]
    if not panels or "records" not in frame:
        return
    (row,) = sheet.panels(1, len(panels), 2.0)
    for axes, metrics in zip(row, panels):
        for placement, rows in by_placement(frame):
            for metric in metrics:
                if _has(rows, metric):
                    changes = {} if metric == "store_rss_mbytes" else TABLE
                    sheet.curve(axes, rows[rows["metric"] == metric], "records", placement, metric, **changes)
        axes.set(xscale="log", xlabel="records")
        _memory_axis(axes, frame) if "table_mbytes" in metrics else _ratio_axis(axes, frame)
    _legend(sheet, style.order(frame["placement"]))


def _memory_axis(axes: Axes, frame: pd.DataFrame) -> None:
    table, ratio = (
        frame[frame["metric"] == name].groupby("records")["value"].median() for name in ("table_mbytes", "table_payload_ratio")
    )
    limit = (PAYLOAD_LIMIT * table / ratio).dropna()
    axes.plot(limit.index, limit, **LIMIT)
    axes.set(yscale="log", ylabel="memory (MB)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _ratio_axis(axes: Axes, frame: pd.DataFrame) -> None:
    highest = frame.loc[frame["metric"] == "table_payload_ratio", "value"].max()
    axes.axhline(PAYLOAD_LIMIT, **LIMIT)
    axes.set(ylim=(0, 1.1 * max(highest, PAYLOAD_LIMIT)), ylabel="table / payload")


def _legend(sheet: Sheet, placements: list[str]) -> None:
    shown = [(name, kind, changes) for name in placements for kind, changes in (("store process (RSS)", {}), ("table", TABLE))]
    handles = [Line2D([], [], **{**style.line(name), **changes}) for name, _, changes in shown]
    labels = [kind if len(placements) == 1 else f"{style.look(name).label}, {kind}" for name, kind, _ in shown]
    sheet.legend_of([*handles, Line2D([], [], **LIMIT)], [*labels, f"{PAYLOAD_LIMIT:g}x payload"])


def _has(frame: pd.DataFrame, *metrics: str) -> bool:
    return bool(frame["metric"].isin(metrics).any())


def answer(frame: pd.DataFrame) -> str:
    """Say what the most records measured take, and how that compares to the fewest."""
    measured = frame.loc[frame["valid"] & (frame["metric"] == "store_rss_mbytes")]
    if measured.empty or "records" not in frame:
        return missing("store memory")
    most, fewest = measured["records"].max(), measured["records"].min()
    (process, least), (table, _), (ratio, _) = (
        [typical(frame, metric, records=records) for records in (most, fewest)]
        for metric in ("store_rss_mbytes", "table_mbytes", "table_payload_ratio")
    )
    sentence = f"With {int(most):,} records a store process takes {digits(process or 0)} MB"
    sentence += f", with {int(fewest):,} it takes {digits(least)} MB" if least and most > fewest else ""
    if not table or not ratio:
        return sentence + "."
    return sentence + f"; the table's share is {digits(table)} MB, {digits(ratio)}x the payload (keys, versions and values)."
