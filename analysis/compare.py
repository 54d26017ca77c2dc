"""Which of two placements is better, by how much, and is it more than chance?"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
from rich.console import Console
from rich.table import Table

from analysis.answers import digits
from analysis.figures import Headline, definitions, highest_carried_kpps
from analysis.metrics import HIGHER, NEITHER, better
from analysis.results import measurements, read_run
from analysis.style import PLACEMENTS, order_nfs, order_topologies
from analysis.summary import summarize
from datastore.base.errors import NearstateError, unknown

SETTING = ["experiment", "topology", "nf", "replicas", "sweep", "metric", "unit"]


@dataclass(frozen=True)
class Comparison:
    """One metric at one point under two placements: medians of the repeats, `ratio` = other / baseline.

    `winner` is the better one's name ("" when equal, or when the metric ranks nothing). `clear` says that the 95 % confidence
    intervals do not meet: more than chance; False also where there is but one repeat and so no interval.
    """

    experiment: str
    topology: str
    nf: str
    replicas: int
    sweep: dict[str, Any]
    metric: str
    unit: str
    baseline: float
    other: float
    ratio: float
    winner: str
    clear: bool

    @property
    def factor(self) -> float:
        """How many times better the winner is (at least 1); infinity where one side is 0."""
        return max(self.ratio, 1 / self.ratio) if self.ratio else math.inf


def compare(
    runs: Path | Iterable[Path],
    baseline: str = "centralized",
    other: str = "integrated",
    experiments: Sequence[str] | None = None,
) -> list[Comparison]:
    """Compare two placements by the headline metrics of each experiment; repeats of several runs are pooled.

    An experiment the runs do not hold and a placement nobody knows are refused with the nearest valid names. Points
    measured under only one of the two placements are left out, so runs without one of them give no rows.
    """
    paths = [runs] if isinstance(runs, (str, Path)) else list(runs)
    frame = measurements(read_run(Path(path)) for path in paths)
    for name in experiments or ():
        if name not in set(frame["experiment"]):
            raise unknown("experiment in these results", name, set(frame["experiment"]))
    for name in (baseline, other):
        if name not in {*frame["placement"], *PLACEMENTS}:
            raise unknown("placement in these results", name, set(frame["placement"]))
    if baseline == other:
        raise NearstateError(f"placement {baseline!r} cannot be compared with itself: name two different ones")
    chosen = frame[frame["experiment"].isin(experiments)] if experiments else frame
    return comparisons(chosen, baseline, other)


def comparisons(frame: pd.DataFrame, baseline: str, other: str) -> list[Comparison]:
    """Return the headline comparisons of measurements already read, experiment by experiment, headline by headline."""
    headlines = [(figure.experiment, headline) for figure in definitions().values() for headline in figure.headlines]
    # A peer store has no network function in front of it: what is measured of state access is the same for all of them.
    without_nf = frame.loc[frame["nf"] == "", "experiment"].unique()
    frame = frame.assign(nf=frame["nf"].mask(frame["experiment"].isin(without_nf), ""))
    frame = frame[frame["placement"].isin((baseline, other))]
    summary = summarize(frame[frame["metric"].isin({headline.metric for _, headline in headlines}) & frame["histogram"].isna()])
    sides = [summary[(summary["placement"] == name) & (summary["trials"] > 0)] for name in (baseline, other)]
    pairs = sides[0].merge(sides[1], on=SETTING, suffixes=("_baseline", "_other"))
    topologies, nfs = order_topologies(pairs["topology"]), order_nfs(pairs["nf"])
    ranks = pairs["topology"].map(topologies.index), pairs["nf"].map(nfs.index)
    pairs = pairs.assign(topology_rank=ranks[0], nf_rank=ranks[1]).sort_values(["topology_rank", "nf_rank"], kind="stable")
    return [
        _comparison(pair, baseline, other)
        for experiment, headline in headlines
        for _, pair in pairs.iterrows()
        if pair["experiment"] == experiment and _matches(headline, pair, frame)
    ]


def _matches(headline: Headline, pair: pd.Series, frame: pd.DataFrame) -> bool:
    sweep = json.loads(pair["sweep"])
    if pair["metric"] != headline.metric or not headline.where.items() <= sweep.items():
        return False
    if not headline.carried:
        return True
    here = frame[
        (frame["experiment"] == pair["experiment"])
        & (frame["topology"] == pair["topology"])
        & (frame["nf"] == pair["nf"])
        & (frame["replicas"] == pair["replicas"])
    ]
    load = highest_carried_kpps(here, [pair["placement_baseline"], pair["placement_other"]])
    return load is not None and sweep.get("offered_kpps") == load


def _comparison(pair: pd.Series, baseline: str, other: str) -> Comparison:
    before, after = pair["median_baseline"], pair["median_other"]
    ratio = after / before if before else (1.0 if after == before else math.inf)
    direction = better(pair["metric"])
    ranked = after != before and direction != NEITHER
    winner = "" if not ranked else other if (after > before) == (direction == HIGHER) else baseline
    clear = bool(pair["low_baseline"] > pair["high_other"] or pair["low_other"] > pair["high_baseline"])
    return Comparison(
        pair["experiment"],
        pair["topology"],
        pair["nf"],
        int(pair["replicas"]),
        json.loads(pair["sweep"]),
        pair["metric"],
        pair["unit"],
        float(before),
        float(after),
        float(ratio),
        winner,
        clear,
    )


def point(row: Comparison) -> str:
    """Return where a comparison was measured, as said in a table: `firewall, rack, offered 20 kpps`."""
    return place(row.topology, row.nf, row.replicas, row.sweep)


def place(topology: str, nf: str, replicas: int, sweep: dict[str, Any]) -> str:
    """Return a point of an experiment in words, its placement left out."""
    swept = [_swept(name, value) for name, value in sweep.items() if name != "search"]
    alike = [f"{replicas} replicas"] if replicas > 1 else []
    return ", ".join(filter(None, [nf.replace("_", " "), topology.replace("_", " "), *alike, *swept]))


def _swept(name: str, value: Any) -> str:
    text, _, suffix = name.rpartition("_")
    if isinstance(value, str):
        return value.replace("_", " ")
    return f"{text.replace('_', ' ')} {value:,.10g} {suffix}" if text else f"{name} {value:,.10g}"


def verdict(row: Comparison) -> str:
    """Return which placement is better and by what factor, `?` where the confidence intervals meet or are missing.

    Where one of them is 0 there is no factor: both values are said, the winner's first.
    """
    if not row.winner:
        return "equal" if row.baseline == row.other else "differ"
    if math.isfinite(row.factor):
        said = f" {digits(row.factor)}x"
    else:
        ends = sorted((row.baseline, row.other), reverse=better(row.metric) == HIGHER)
        said = f": {digits(ends[0])} against {digits(ends[1])}"
    return f"{row.winner}{said}{'' if row.clear else ' ?'}"


def ratio(row: Comparison) -> str:
    """Return the ratio as said in a table: none where the baseline is 0."""
    return digits(row.ratio) if math.isfinite(row.ratio) else "-"


def print_comparison(
    rows: Sequence[Comparison], baseline: str = "centralized", other: str = "integrated", stream: TextIO | None = None
) -> None:
    """Print comparisons as a table on a terminal, as aligned plain lines elsewhere."""
    stream = stream or sys.stdout
    if not rows:
        print(f"no point was measured validly under both {baseline} and {other}", file=stream)
        return
    header = ("experiment", "measured at", "metric", baseline, other, "ratio", "better")
    lines = [
        (row.experiment, point(row), row.metric, digits(row.baseline), digits(row.other), ratio(row), verdict(row))
        for row in rows
    ]
    note = "" if all(row.clear for row in rows) else "? the 95 % confidence intervals meet, or one repeat gives none"
    if stream.isatty():
        _print_table(header, lines, note, stream)
    else:
        widths = [max(map(len, column)) for column in zip(header, *lines)]
        for line in (header, *lines):
            print(
                "  ".join(
                    cell.rjust(width) if 3 <= at <= 5 else cell.ljust(width) for at, (cell, width) in enumerate(zip(line, widths))
                ).rstrip(),
                file=stream,
            )
        print(note, end="\n" if note else "", file=stream)


def _print_table(header: Sequence[str], lines: Sequence[Sequence[str]], note: str, stream: TextIO) -> None:
    table = Table(caption=note, caption_justify="left", header_style="bold")
    for at, name in enumerate(header):
        table.add_column(name, justify="right" if 3 <= at <= 5 else "left", overflow="fold")
    shown = ""
    for line in lines:
        if shown and line[0] != shown:
            table.add_section()
        table.add_row(line[0] if line[0] != shown else "", *line[1:])
        shown = line[0]
    Console(file=stream).print(table)
