"""Does the figure of moves show their course and their cost by the flows moved?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.redraw import draw_figures
from datastore.compiled.histogram import encode, make_counts, record_ns
from experiments.harness.procedures.scaling import delayed
from tests.figures import said
from tests.unit.test_failover_figure import course


def trial(placement: str, flows: int, out_ms: float, late: int) -> dict[str, Any]:
    metrics = {"out_ms": out_ms, "in_ms": 2 * out_ms, "packets_delayed": late, "packets_lost": 0, "flow_reordered": 0}
    point = {"sweep": {}, "metrics": metrics, "histograms": {}, "valid": True, "invalid_reasons": [],
             "time_lines": {"delivered": course(range(100, 100 + int(out_ms)))}}  # fmt: skip
    return {"trial": f"scaling/{placement}/{flows}", "experiment": "scaling", "topology": "rack", "nf": "nat", "repeat": 0,
            "placement": placement, "replicas": 1, "sweep": {"flows": flows}, "seed": 1, "valid": True,
            "invalid_reasons": [], "points": [point]}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    trials = [trial("integrated", 200, 30, 1), trial("integrated", 2000, 60, 5), trial("centralized", 2000, 20, 0)]
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    return tmp_path


def test_the_figure_shows_the_cost_by_flows_moved(run: Path) -> None:
    draw_figures(run, ["scaling"])
    points = pd.read_csv(run / "figures" / "scaling.csv")
    moved = points.query("y_name == 'out_ms' and series == 'integrated'").set_index("x")["y"]
    assert {float(flows): ms for flows, ms in moved.items()} == {100: 30, 1000: 60}
    silent = points.query("mark == 'course' and y_name == 'goodput_kpps' and panel == 'integrated, R = 1' and y == 0")
    assert silent["x"].astype(float).tolist() == [0, 10, 20, 30, 40, 50], "of the most flows only"


def test_the_answer_says_what_a_move_costs(run: Path) -> None:
    assert said("scaling", run) == (
        "Half of the flows to a host that joins, nat, and back: integrated, R = 1 1,000 flows in 60 ms (0 packets lost, "
        "5 delayed by over 20 ms, 0 out of order) and centralized, R = 1 1,000 flows in 20 ms (0 packets lost, 0 delayed by "
        "over 20 ms, 0 out of order)."
    )


def test_delayed_packets_are_those_above_the_limit() -> None:
    counts = make_counts()
    for latency_ms in (0.1, 19.9, 20.1, 300):
        record_ns(counts, int(latency_ms * 1e6))
    assert delayed(encode(counts), 20.0) == 2


def test_a_run_without_points_is_answered_too(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text(json.dumps({**trial("local", 200, 1, 0), "points": [], "valid": False}) + "\n")
    assert "Not answered" in said("scaling", tmp_path)
