"""One figure in the making: its panels, what is drawn in them, and the number behind every mark."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis import style
from analysis.results import Distribution, decode, merge
from analysis.summary import confidence_interval

MARKED_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# A curve of a few hundred points is indistinguishable on paper from one of 10,000 buckets, and keeps the PDF small.
CURVE = np.unique(np.concatenate([np.linspace(0, 0.99, 199), 1 - np.logspace(-2, -5, 31), [1.0]]))
PNG_DPI = 200
POINT_COLUMNS = ("panel", "series", "mark", "x_name", "x", "y_name", "y", "low", "high", "repeats")


class Sheet:
    """A figure of `width_in` inches with panels; the drawing methods note each point they draw in `points`."""

    def __init__(self, width_in: float) -> None:
        self.width_in = width_in
        self.figure = Figure(layout="constrained")
        self.points: list[dict[str, Any]] = []

    def panels(self, rows: int, columns: int, height_in: float, **sharing: Any) -> np.ndarray:
        """Return a (rows, columns) array of axes on a figure `height_in` inches high, narrower for one or two columns."""
        self.width_in = min(self.width_in, max(style.ONE_COLUMN_IN, 2.35 * columns))
        self.figure.set_size_inches(self.width_in, height_in)
        panels: np.ndarray = self.figure.subplots(rows, columns, squeeze=False, **sharing)
        return panels

    def cdf(self, axes: Axes, encoded: Sequence[str], placement: str, panel: str) -> None:
        """Draw the distribution of latencies (histograms of ns, one per repeat) in us: all merged, and each repeat thin."""
        repeats = [part for part in map(decode, encoded) if part.total]
        if not repeats:
            return
        look = style.line(placement)
        if len(repeats) > 1:
            for repeat in repeats:
                axes.step(*_curve(repeat), where="post", color=look["color"], linewidth=0.4, alpha=0.45)
        merged = merge(repeats)
        value_us, fraction = _curve(merged)
        marked = np.searchsorted(fraction, MARKED_QUANTILES).clip(max=len(fraction) - 1)
        axes.step(value_us, fraction, where="post", markevery=[int(at) for at in np.unique(marked)], **look)
        by_repeat = np.array([_curve(repeat)[0] for repeat in repeats])
        for value, at, values in zip(value_us, fraction, by_repeat.T):
            low, high = confidence_interval(values)
            self._note(panel, placement, "cdf", ("latency_us", value), ("fraction", at), low, high, len(repeats))

    def curve(self, axes: Axes, rows: pd.DataFrame, x: str, placement: str, panel: str, **changes: Any) -> None:
        """Draw a metric against the swept parameter `x`: median of the repeats, 95 % confidence interval as bars.

        `changes` to the placement's line set a second metric apart in the same panel.
        """
        points = [(at, *self._median(group, panel, placement, "line", x, at)) for at, group in rows.groupby(x)]
        at, median, low, high = np.array(points, dtype=float).T
        axes.errorbar(at, median, yerr=[median - low, high - median], elinewidth=0.7, **{**style.line(placement), **changes})

    def band(self, axes: Axes, values: pd.DataFrame, placement: str, panel: str, y: str) -> None:
        """Draw a course over time: the median of the repeats (columns) at each time (index, named), and the range they span."""
        look = style.line(placement) | {"marker": "", "linestyle": "-", "linewidth": 0.9}
        low, median, high = values.min(axis=1), values.median(axis=1), values.max(axis=1)
        axes.plot(values.index, median, **look)
        if values.shape[1] > 1:
            axes.fill_between(values.index, low, high, color=look["color"], alpha=0.2, linewidth=0)
        for at, value in median.items():
            spread = float(low[at]), float(high[at])
            self._note(panel, placement, "course", (str(values.index.name), at), (y, float(value)), *spread, values.shape[1])

    def bar(self, axes: Axes, position: float, rows: pd.DataFrame, placement: str, panel: str, group: str, width: float) -> None:
        """Draw one metric's median as a bar in the placement's colour and hatch, 95 % confidence interval on top."""
        median, low, high = self._median(rows, panel, placement, "bar", "group", group)
        look = style.look(placement)
        axes.bar(position, median, width, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0)
        axes.errorbar(position, median, yerr=[[median - low], [high - median]], color="black", elinewidth=0.7)

    def bars(self, axes: Axes, groups: dict[str, pd.DataFrame], panel: str) -> None:
        """Draw a group of bars for each entry, one bar a placement; the entries' names stand below, a word a line."""
        placements = {placement for rows in groups.values() for placement in rows["placement"]}
        step = 0.8 / max(3, len(placements))
        for group, (name, rows) in enumerate(groups.items()):
            present = list(by_placement(rows))
            for place, (placement, bars) in enumerate(present):
                position = group + (place - (len(present) - 1) / 2) * step
                self.bar(axes, position, bars, placement, panel, name, 0.92 * step)
        axes.set_xticks(range(len(groups)), [title(name).replace(" ", "\n").replace("+", "\n+ ") for name in groups])
        axes.grid(axis="x", visible=False)
        axes.set_xlim(-0.5, len(groups) - 0.5)

    def stack(self, axes: Axes, position: float, parts: dict[str, pd.DataFrame], placement: str, panel: str) -> None:
        """Draw the medians of several metrics on top of each other, each in its component's shade and hatch."""
        below, high_above = 0.0, np.zeros(2)
        for metric, rows in parts.items():
            _, colour, hatch = style.COMPONENTS[metric]
            median, low, high = self._median(rows, panel, placement, metric, "position", position)
            axes.bar(position, median, 0.7, bottom=below, color=colour, hatch=hatch, edgecolor="black", linewidth=0.4)
            below += median
            high_above += np.array([median - low, high - median]) ** 2  # independent spreads add in squares
        axes.errorbar(position, below, yerr=np.sqrt(high_above)[:, None], color="black", elinewidth=0.7)

    def cdf_axes(self, panels: np.ndarray, of: str, latency: str) -> None:
        """Give panels of CDFs their scales and labels: fraction of `of` at the left, `latency` below, on a log axis in us."""
        drawn_us = [point["x"] for point in self.points if point["mark"] == "cdf" and point["x"] > 0]
        decades = math.log10(max(drawn_us) / min(drawn_us)) if drawn_us else 0
        for axes in panels.flat:
            log_latency_axis(axes, decades)
            axes.set_ylim(0, 1.02)
        for axes in panels[:, 0]:
            axes.set_ylabel(f"fraction of {of}")
        for axes in panels[-1]:
            axes.set_xlabel(f"{latency} (µs)")

    def ragged(self, columns: Sequence[int], height_in: float, **sharing: Any) -> list[np.ndarray]:
        """Return a row of axes for each of `columns`, that many long from the left, in a grid of equal panels."""
        grid = self.panels(len(columns), max(columns), height_in, **sharing)
        for row, used in zip(grid, columns):
            for axes in row[used:]:
                axes.remove()
        return [row[:used] for row, used in zip(grid, columns)]

    def banner(self, columns: int, height_in: float) -> tuple[Axes, list[Axes]]:
        """Return a panel as wide as the figure and, below it, `columns` panels side by side; 0: none."""
        self.figure.set_size_inches(self.width_in, height_in)
        grid = self.figure.add_gridspec(1 + bool(columns), max(columns, 1))
        return self.figure.add_subplot(grid[0, :]), [self.figure.add_subplot(grid[1, n]) for n in range(columns)]

    def legend(self, placements: Sequence[str], bars: bool = False) -> None:
        """Put the placements' legend above the panels, where it covers no data."""
        looks = [style.look(name) for name in placements]
        handles: list[Any] = [Line2D([], [], **style.line(name)) for name in placements]
        if bars:
            handles = [Patch(facecolor=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0) for look in looks]
        self.legend_of(handles, [look.label for look in looks])

    def legend_of(self, handles: Sequence[Any], labels: Sequence[str]) -> None:
        """Put any legend above the panels, as many entries abreast as the width holds."""
        if not labels:
            return
        rows = math.ceil(sum(0.6 + 0.05 * len(label) for label in labels) / self.width_in)  # inches at 8 points
        abreast = math.ceil(len(labels) / rows)
        self.figure.legend(handles, labels, loc="outside upper center", ncols=abreast, borderaxespad=0.2, columnspacing=1.5)

    def save(self, stem: Path) -> list[Path]:
        """Write `stem`.pdf, .png and .csv (the points drawn) and return their paths."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        pdf, png, csv = (stem.with_name(f"{stem.name}.{kind}") for kind in ("pdf", "png", "csv"))
        self.figure.savefig(pdf, metadata={"CreationDate": None})  # without a date, the same data gives the same file
        self.figure.savefig(png, dpi=PNG_DPI)
        pd.DataFrame(self.points, columns=list(POINT_COLUMNS)).to_csv(csv, index=False, float_format="%.6g")
        return [pdf, png, csv]

    def _median(self, rows: pd.DataFrame, panel: str, series: str, mark: str, x_name: str, x: Any) -> tuple[float, float, float]:
        values = rows["value"].to_numpy()
        median, (low, high) = float(np.median(values)), confidence_interval(values)
        self._note(panel, series, mark, (x_name, x), (str(rows["metric"].iloc[0]), median), low, high, len(values))
        return median, low, high

    def _note(
        self, panel: str, series: str, mark: str, x: tuple[str, Any], y: tuple[str, float], low: float, high: float, repeats: int
    ) -> None:
        self.points.append(dict(zip(POINT_COLUMNS, (panel, series, mark, *x, *y, low, high, repeats))))


def _curve(distribution: Distribution) -> tuple[np.ndarray, np.ndarray]:
    """Return (values in us, fraction of values up to each), rising, from the smallest at 0 to the largest at 1."""
    return distribution.quantiles(CURVE) / 1000, CURVE


def log_latency_axis(axes: Axes, decades: float) -> None:
    """Make the x axis logarithmic with plain numbers at it, as many as the span in decades leaves room for."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(LogLocator(subs=range(2, 10)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def by_placement(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield (placement, its rows) in the order of the table of styles."""
    for placement in style.order(rows["placement"]):
        yield placement, rows[rows["placement"] == placement]


def title(name: str) -> str:
    """Return a name from the results as a person writes it: `traffic_counter` -> `traffic counter`."""
    return name.replace("_", " ")


@contextlib.contextmanager
def paper() -> Iterator[None]:
    """Draw and save a paper's figures within this: matplotlib's own defaults and `style.PAPER`, whatever matplotlibrc, style or
    backend the user has chosen for other work, and what was chosen again afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"backend": "agg", **style.PAPER})
        yield
