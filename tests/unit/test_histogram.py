"""Do the compiled histogram's percentiles agree with NumPy's, over the whole range, and survive HdrHistogram's format?"""

from __future__ import annotations

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram

from datastore.compiled import jit
from datastore.compiled.histogram import COUNTERS, HIGHEST_NS, encode, make_counts, record_ns, summary_us, to_histogram


@jit
def record_all(counts: np.ndarray, values: np.ndarray) -> None:
    for i in range(len(values)):
        record_ns(counts, values[i])


def counted(values: np.ndarray) -> np.ndarray:
    counts = make_counts()
    record_all(counts, values.astype(np.int64))
    return counts


@pytest.mark.bounds
@pytest.mark.parametrize("name", ["lognormal", "uniform", "bimodal", "tiny"])
def test_percentiles_are_numpys_within_a_thousandth(name: str) -> None:
    random = np.random.default_rng(7)
    values = {
        "lognormal": random.lognormal(10, 2, 100_000),
        "uniform": random.uniform(0, HIGHEST_NS, 50_000),
        "bimodal": np.concatenate([random.normal(9_000, 300, 99_000), random.normal(5e6, 1e5, 1_000)]),
        "tiny": random.integers(0, 3000, 50_000),
    }[name].astype(np.int64).clip(0, HIGHEST_NS)  # fmt: skip
    histogram = to_histogram(counted(values))
    assert histogram.get_total_count() == len(values)
    for percentile in (1, 25, 50, 90, 99, 99.9, 100):
        rank = max(1, int(percentile / 100 * len(values) + 0.5))  # HdrHistogram's rule; NumPy has nine others
        exact = np.sort(values)[rank - 1]
        assert histogram.get_value_at_percentile(percentile) == pytest.approx(exact, rel=1.1e-3, abs=1)
    summary = summary_us(counted(values))
    assert summary["mean_us"] == pytest.approx(values.mean() / 1e3, rel=1.1e-3, abs=1e-3)
    assert summary["max_us"] == pytest.approx(values.max() / 1e3, rel=1.1e-3, abs=1e-3)


@pytest.mark.bounds
def test_every_value_has_a_counter_that_differs_by_less_than_a_thousandth() -> None:
    edges = [0, 1, 2047, 2048, 2049, HIGHEST_NS - 1, HIGHEST_NS, *(2**n + d for n in range(1, 36) for d in (-1, 0, 1))]
    for value in edges:
        counts = counted(np.array([value]))
        assert counts.sum() == 1
        kept = to_histogram(counts).get_max_value()
        assert abs(kept - min(value, HIGHEST_NS)) <= max(1, value / 1000), value


@pytest.mark.bounds
def test_values_out_of_range_count_at_its_ends() -> None:
    counts = counted(np.array([-5, -(2**62), 2**62, HIGHEST_NS + 1]))
    assert counts[0] == 2
    assert counts[:-1][counts[:-1] > 0].sum() == counts.sum() == 4
    assert to_histogram(counts).get_max_value() == pytest.approx(HIGHEST_NS, rel=1e-3)
    assert len(counts) == COUNTERS


def test_the_encoded_histogram_is_read_back_by_hdrhistogram() -> None:
    counts = counted(np.random.default_rng(3).exponential(50_000, 10_000))
    read = HdrHistogram.decode(encode(counts))
    written = to_histogram(counts)
    assert read.get_total_count() == 10_000
    for percentile in (50, 99, 99.9):
        assert read.get_value_at_percentile(percentile) == written.get_value_at_percentile(percentile)


def test_no_values_have_no_summary() -> None:
    assert summary_us(make_counts()) == {}
