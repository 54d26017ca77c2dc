"""Latencies, counted in compiled code in the layout of HdrHistogram (3 significant digits, 1 ns to 60 s), kept in its format.

Values share a bucket only when they differ by less than a thousandth; 27,648 counters cover the whole range.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram

from datastore.compiled import inline
from datastore.compiled.memory import leading_zeros

HIGHEST_NS = 60_000_000_000
DIGITS = 3
HALF = 1024
"""Half the sub-buckets of a bucket: the smallest power of two not below 10 ** DIGITS (HdrHistogram's "sub bucket half count")."""
COUNTERS = 27 * HALF


def make_counts() -> np.ndarray:
    """Return an empty histogram: int64[COUNTERS]."""
    return np.zeros(COUNTERS, np.int64)


@inline
def record_ns(counts: np.ndarray, value_ns: int) -> None:
    """Count one latency; negative ones count as 0, ones over 60 s as 60 s."""
    value = np.uint64(min(max(np.int64(value_ns), 0), HIGHEST_NS))
    bucket = np.int64(53) - np.int64(leading_zeros(value | np.uint64(2 * HALF - 1)))
    counts[bucket * HALF + np.int64(value >> np.uint64(bucket))] += 1


def to_histogram(counts: np.ndarray) -> Any:
    """Return the counts as an `HdrHistogram`; each counter stands for the lowest value of its bucket."""
    histogram = HdrHistogram(1, HIGHEST_NS, DIGITS)
    for index in np.flatnonzero(counts):
        bucket = max(0, int(index) // HALF - 1)
        value = (int(index) - bucket * HALF) << bucket
        histogram.record_value(min(value, HIGHEST_NS), int(counts[index]))
    return histogram


def encode(counts: np.ndarray) -> str:
    """Return the counts in HdrHistogram's V2 format, compressed, as base64 text."""
    return bytes(to_histogram(counts).encode()).decode()


def summary_us(counts: np.ndarray) -> dict[str, float]:
    """Return p50, p99, p99.9, mean and maximum in microseconds; empty for no values."""
    return _summary_us(to_histogram(counts)) if counts.any() else {}


def merge(encoded: Iterable[str]) -> tuple[str, dict[str, float]]:
    """Return histograms, as `encode` makes them, as one, and its summary."""
    merged = HdrHistogram(1, HIGHEST_NS, DIGITS)
    for text in encoded:
        merged.decode_and_add(text)
    return bytes(merged.encode()).decode(), _summary_us(merged) if merged.get_total_count() else {}


def _summary_us(histogram: Any) -> dict[str, float]:
    quantiles = {"p50_us": 50.0, "p99_us": 99.0, "p999_us": 99.9}
    values = {name: histogram.get_value_at_percentile(quantile) / 1e3 for name, quantile in quantiles.items()}
    return values | {"mean_us": histogram.get_mean_value() / 1e3, "max_us": histogram.get_max_value() / 1e3}
