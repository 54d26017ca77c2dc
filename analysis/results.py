"""What did a run measure? Reads `results/<run id>/` into one pandas frame: a row per (trial, point, metric)."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from hdrh.histogram import HdrHistogram

from analysis.folder import Run, read_run
from datastore.base.errors import NearstateError

__all__ = ["Run", "read_run"]

CONFIGURATION = ("experiment", "topology", "placement", "nf", "replicas")
COUNTED = ("false_failovers",)
"""What points say of their fidelity that is summarised as metrics are: a fault of the system, not of the machine."""
COLUMNS = ("run", "trial", *CONFIGURATION, "repeat", "sweep", "valid", "reasons", "metric", "value", "histogram")


def measurements(runs: Iterable[Run]) -> pd.DataFrame:
    """Return one row per (trial, point, metric), invalid ones included, with the columns `COLUMNS` and one per swept parameter.

    `sweep` is the point's effective sweep as JSON with sorted keys, so equal points of different repeats compare equal.
    A scalar metric has its `value` (a float in the unit its suffix names); a histogram or a time line has its encoded text in
    `histogram` and no value. A trial that ended without a point has one row with an empty `metric`.
    """
    rows = [row for run in runs for trial in run.trials for row in _trial_rows(run.name, trial)]
    frame = pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(COLUMNS))
    return frame.astype({"value": float, "valid": bool})


def _trial_rows(run: str, trial: dict[str, Any]) -> Iterator[dict[str, Any]]:
    base = {
        "run": run,
        "trial": trial["trial"],
        "experiment": trial["experiment"],
        "topology": trial["topology"],
        "placement": trial["placement"],
        "nf": trial.get("nf") or "",
        "replicas": int(trial.get("replicas", 1)),
        "repeat": trial.get("repeat", 0),
    }
    for point in trial.get("points") or [{}]:
        sweep = {name: _whole(value) for name, value in {**trial.get("sweep", {}), **point.get("sweep", {})}.items()}
        reasons = [*trial.get("invalid_reasons", []), *point.get("invalid_reasons", [])]
        common = {
            **sweep,
            **base,
            "sweep": json.dumps(sweep, sort_keys=True),
            "valid": bool(trial.get("valid", True)) and bool(point.get("valid", True)),
            "reasons": "; ".join(reasons),
        }
        counted = {name: count for name, count in point.get("fidelity", {}).items() if name in COUNTED}
        scalars = {
            name: float(value)
            for name, value in {**point.get("metrics", {}), **counted}.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        histograms = {**point.get("histograms", {}), **point.get("time_lines", {})}
        for name, value in scalars.items():
            yield {**common, "metric": name, "value": value, "histogram": None}
        for name, encoded in histograms.items():
            yield {**common, "metric": name, "value": math.nan, "histogram": encoded}
        if not scalars and not histograms:
            yield {**common, "metric": "", "value": math.nan, "histogram": None}


def _whole(value: Any) -> Any:
    """Return 20 for 20.0: JSON writers differ, the point is the same."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def time_line(encoded: str) -> pd.DataFrame:
    """Decode a time line: a row per bin, `ms` its begin, the columns those it was kept with (docs/results.md).

    Raises NearstateError for what is none.
    """
    try:
        content = json.loads(zlib.decompress(base64.b64decode(encoded, validate=True)))
        start_ms, bin_ms = float(content.pop("start_ms")), float(content.pop("bin_ms"))
        frame = pd.DataFrame(content)
    except (ValueError, KeyError, AttributeError, TypeError, zlib.error) as error:
        raise NearstateError(f"a time line of {len(encoded)} characters cannot be read: {error}") from error
    frame.insert(0, "ms", start_ms + bin_ms * np.arange(len(frame)))
    frame.attrs["bin_ms"] = bin_ms
    return frame


@dataclass(frozen=True)
class Distribution:
    """Recorded values: `upper` float64[n], the largest value each non-empty bucket can hold, rising; `counts` int64[n]."""

    upper: np.ndarray
    counts: np.ndarray

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def quantiles(self, fractions: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return float64[n]: the values that the `fractions` (0 to 1) of those recorded do not exceed, within precision."""
        ranks = np.ceil(np.asarray(fractions) * self.total - 1e-9).clip(min=1)  # 0.07 * 100 is a little above 7
        return self.upper[np.searchsorted(np.cumsum(self.counts), ranks)]


def decode(encoded: str) -> Distribution:
    """Decode a base64 HdrHistogram (V2 encoding).

    The bucket arithmetic is HdrHistogram's own (`get_value_from_index`, `get_highest_equivalent_value`), for all
    buckets at once: its Python iterators take 50 ms for the 27,000 buckets that 1 ns to 60 s at 3 digits need.
    """
    try:
        histogram = HdrHistogram.decode(encoded)
    except Exception as error:  # whatever its C part, zlib or base64 raise
        said = f"{type(error).__name__} {error}".strip()
        raise NearstateError(f"a histogram of {len(encoded)} characters is no HdrHistogram: {said}") from error
    counts = np.array(histogram.counts, dtype=np.int64)
    index = np.flatnonzero(counts)
    half = histogram.sub_bucket_half_count
    bucket = (index >> histogram.sub_bucket_half_count_magnitude) - 1
    sub_bucket = np.where(bucket < 0, index & (half - 1), (index & (half - 1)) + half)
    shift = np.maximum(bucket, 0) + histogram.unit_magnitude
    upper = (sub_bucket << shift) + (1 << shift) - 1
    return Distribution(upper.astype(np.float64), counts[index])


def merge(distributions: Iterable[Distribution]) -> Distribution:
    """Return the distribution of all values together, each counted once."""
    parts = list(distributions)
    upper, place = np.unique(np.concatenate([part.upper for part in parts]), return_inverse=True)
    counts = np.zeros(len(upper), dtype=np.int64)
    np.add.at(counts, place, np.concatenate([part.counts for part in parts]))
    return Distribution(upper, counts)
