"""Has every metric that a procedure can emit a unit and a direction, and is what has no ratio said without one?"""

from __future__ import annotations

import ast
import csv
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis import metrics
from analysis.compare import Comparison, print_comparison, verdict
from datastore.base import ROOT

PROCEDURES = ROOT / "experiments/harness/procedures"
SUMMARIES = (ROOT / "experiments/harness/accounting.py", ROOT / "experiments/harness/bench.py",
             ROOT / "datastore/compiled/histogram.py", ROOT / "experiments/workloads/table_probe.py")  # fmt: skip
"""Where metrics come from that several procedures share."""
FUNCTIONS = ("metrics", "memory", "_summary_us")
"""Functions there whose dictionaries are metrics."""


def keys(node: ast.AST) -> Iterator[str]:
    """Yield the text keys of dictionaries in an expression, those of metrics that are merged with others included."""
    for part in ast.walk(node):
        if isinstance(part, ast.Dict):
            yield from (key.value for key in part.keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def is_metrics(target: ast.expr) -> bool:
    """Tell whether something is assigned to metrics: `metrics`, `point["metrics"]`, `point["metrics"][...]`."""
    return any(isinstance(part, ast.Constant) and part.value == "metrics" for part in ast.walk(target)) or (
        isinstance(target, ast.Name) and target.id == "metrics"
    )


def emitted(path: Path) -> set[str]:
    """Return the names of the metrics that a file's source emits."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in filter(is_metrics, targets):
                found |= set(keys(node.value))
                if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                    found.add(str(target.slice.value))
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "metrics":
                    found |= set(keys(value))
        elif isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
            found |= {key for part in ast.walk(node) if isinstance(part, (ast.Return, ast.Assign)) for key in keys(part)}
    return found - {"metrics"}


def test_the_search_finds_what_it_should() -> None:
    found = emitted(PROCEDURES / "failover.py")
    assert {"outage_ms", "records_lost", "updates_lost", "connections_broken"} <= found
    assert "success_ratio" in emitted(PROCEDURES / "handshakes.py")
    assert {"p99_us", "delivered_kpps", "nf_rss_mbytes", "packet_ns"} <= set().union(*map(emitted, SUMMARIES))


@pytest.mark.parametrize("path", [*sorted(PROCEDURES.glob("[!_]*.py")), *SUMMARIES], ids=lambda path: path.stem)
def test_every_metric_in_the_code_has_an_entry(path: Path) -> None:
    assert emitted(path) - set(metrics.METRICS) == set(), "give each an entry in analysis/metrics.py"


def test_every_metric_of_the_reference_run_has_an_entry() -> None:
    with (ROOT / "results/reference/summary.csv").open() as file:
        measured = {row["metric"] for row in csv.DictReader(file) if row["metric"]}
    assert len(measured) > 60
    assert measured - set(metrics.METRICS) == set()


def test_directions_are_those_of_the_words() -> None:
    assert metrics.better("success_ratio") == metrics.better("recovered_ratio") == metrics.better("established") == "higher"
    assert metrics.better("loss_ratio") == metrics.better("records_lost") == metrics.better("store_cores") == "lower"
    assert metrics.better("flows") == metrics.better("sent_kpps") == metrics.better("records") == ""
    assert [metrics.better(name) for name in ("mine_us", "mine_kpps", "mine_ratio", "mine")] == ["lower", "higher", "", ""]
    assert [metrics.unit(name) for name in ("mine_us", "mine_kpps", "mine")] == ["us", "kpps", "count"]
    assert all(metric.unit == metrics.UNITS.get(name.rpartition("_")[2], "count") for name, metric in metrics.METRICS.items())


def compared(metric: str, baseline: float, other: float, winner: str, clear: bool = True) -> Comparison:
    ratio = other / baseline if baseline else float("inf")
    return Comparison("failover", "rack", "nat", 1, {}, metric, "count", baseline, other, ratio, winner, clear)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (compared("records_lost", 0.0, 864.0, "centralized"), "centralized: 0 against 864"),
        (compared("records_lost", 864.0, 0.0, "integrated", clear=False), "integrated: 0 against 864 ?"),
        (compared("success_ratio", 0.0, 1.0, "integrated"), "integrated: 1 against 0"),
        (compared("outage_ms", 100.0, 50.0, "integrated"), "integrated 2x"),
        (compared("flows", 100.0, 50.0, ""), "differ"),
        (compared("lost", 5.0, 5.0, ""), "equal"),
    ],
)
def test_a_verdict_without_a_ratio_says_both_values(row: Comparison, said: str) -> None:
    assert verdict(row) == said
    out = io.StringIO()
    print_comparison([row], stream=out)
    assert not {"inf", "infinitely"} & set(out.getvalue().split())
