"""How large, and how sure? Medians over repeats with their 95 % confidence intervals, in summary.csv."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.metrics import unit
from analysis.results import CONFIGURATION, measurements, read_run

COLUMNS = (*CONFIGURATION, "sweep", "metric", "unit", "median", "low", "high", "trials", "invalid_trials")
POINT = [*CONFIGURATION, "sweep", "metric"]

# Student's t, two-sided 95 %, for 1 to 4 degrees of freedom (Abramowitz and Stegun, table 26.10).
STUDENT_T_95 = (12.706, 4.303, 3.182, 2.776)


def confidence_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the median of independent repeats; (nan, nan) for fewer than two.

    From 6 repeats on: order statistics, which assume no shape (Le Boudec, Performance Evaluation of Computer and
    Communication Systems, section 2.2.2). Ranks d and n+1-d with the largest d whose coverage
    1 - 2 P(Binomial(n, 1/2) < d) is at least 95 %; for n = 6 that is the range, at 96.9 %.

    Fewer than 6 cannot reach 95 % that way (5 repeats: 93.8 %), so for 2 to 5: mean -+ t s / sqrt(n), which assumes
    a normal spread, where median and mean are one; widened to hold the median where they differ, and cut at zero for
    values that are never negative. Two repeats say little, and their interval shows it: t is 12.7.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    count = len(ordered)
    if count < 2:
        return math.nan, math.nan
    if count >= 6:
        rank = _lower_rank(count)
        return float(ordered[rank - 1]), float(ordered[count - rank])
    mean, median = float(ordered.mean()), float(np.median(ordered))
    reach = STUDENT_T_95[count - 2] * float(ordered.std(ddof=1)) / math.sqrt(count)
    floor = 0.0 if ordered[0] >= 0 else -math.inf
    return max(floor, min(mean - reach, median)), max(mean + reach, median)


def _lower_rank(count: int) -> int:
    """Return the largest d with P(Binomial(count, 1/2) < d) <= 2.5 %."""
    below, rank = 0.0, 0
    while below <= 0.025:
        below += math.comb(count, rank) * 0.5**count
        rank += 1
    return rank - 1


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per point and metric with the columns `COLUMNS`, from `results.measurements`.

    `median`, `low` and `high` are over the valid repeats, whose number is `trials`; `invalid_trials` were left out.
    """
    scalars = frame[(frame["metric"] != "") & frame["histogram"].isna()]
    rows = [_summary_row(dict(zip(POINT, key)), group) for key, group in scalars.groupby(POINT, sort=False)]
    rows.sort(key=lambda row: [row[name] for name in CONFIGURATION])  # trials are shuffled, points keep their order
    for _, trial in frame[frame["metric"] == ""].iterrows():
        _count_pointless(trial, rows)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _summary_row(point: dict[str, Any], group: pd.DataFrame) -> dict[str, Any]:
    values = group.loc[group["valid"], "value"].to_numpy()
    low, high = confidence_interval(values)
    return {
        **point,
        "unit": unit(point["metric"]),
        "median": float(np.median(values)) if len(values) else math.nan,
        "low": low,
        "high": high,
        "trials": len(values),
        "invalid_trials": int((~group["valid"]).sum()),
    }


def _count_pointless(trial: pd.Series, rows: list[dict[str, Any]]) -> None:
    """Count a trial that ended before its first point against every point it would have measured."""
    swept = json.loads(trial["sweep"]).items()
    missed = [
        row
        for row in rows
        if all(row[name] == trial[name] for name in CONFIGURATION) and swept <= json.loads(row["sweep"]).items()
    ]
    if not missed:
        missed = [
            {
                **{name: trial[name] for name in CONFIGURATION},
                "sweep": trial["sweep"],
                "metric": "",
                "unit": "",
                "median": math.nan,
                "low": math.nan,
                "high": math.nan,
                "trials": 0,
                "invalid_trials": 0,
            }
        ]
        rows.extend(missed)
    for row in missed:
        row["invalid_trials"] += 1


def write_summary(run: Path) -> Path:
    """Write `summary.csv` of a results folder and return its path; six significant digits, no value as an empty field."""
    path = Path(run) / "summary.csv"
    summarize(measurements([read_run(run)])).to_csv(path, index=False, float_format="%.6g")
    return path


def typical(frame: pd.DataFrame, metric: str, **where: Any) -> float | None:
    """Return the median of a metric over the valid rows where the named columns have the given values; None without any."""
    rows = frame[(frame["metric"] == metric) & frame["valid"]]
    for name, value in where.items():
        if name not in rows:
            return None
        rows = rows[rows[name] == value]
    return float(rows["value"].median()) if len(rows) else None
