"""Does the figure of a host that comes back show its refill, and what packets lose by it?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.redraw import draw_figures
from experiments.harness.procedures.rejoin import Sample, course
from experiments.workloads import timeline
from tests.figures import said

MS = 1_000_000
SAMPLES = [Sample(ms * MS, 0, 1, min(max(ms - 50, 0) / 100, 1.0), 1000.0 * ms, 0.0005 * ms) for ms in range(0, 200, 10)]
"""Partitions get their copies from 50 to 150 ms on; 8 Mbit/s, half a core."""


def trial(nf: str, cost: float, replicas: int, sources: int) -> dict[str, Any]:
    metrics = {"rejoin_ms": 150, "refill_ms": 100, "records": 100_000, "foreground_cost_ratio": cost, "storage_mbps": 8,
               "store_cores": 0.5, "goodput_alone_kpps": 200, "goodput_after_kpps": 100}  # fmt: skip
    delivered = timeline.packed(-100, 10, {"received": [2000] * 10 + [900] * 20})
    point = {"sweep": {}, "metrics": metrics | {"sources": sources}, "histograms": {}, "valid": True, "invalid_reasons": [],
             "time_lines": {"delivered": delivered, "refill": course(SAMPLES, 0)}}  # fmt: skip
    return {"trial": f"rejoin/{nf}/{replicas}", "experiment": "rejoin", "topology": "rack", "nf": nf, "repeat": 0,
            "placement": "integrated", "replicas": replicas, "sweep": {}, "seed": 1, "valid": True, "invalid_reasons": [],
            "points": [point]}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "trials.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in (trial("firewall", 0.1, 2, 1), trial("firewall", -0.1, 3, 2)))
    )
    return tmp_path


def test_the_figure_shows_goodput_and_refill(run: Path) -> None:
    draw_figures(run, ["rejoin"])
    points = pd.read_csv(run / "figures" / "rejoin.csv").query("panel == 'firewall, R = 2'")
    goodput = points.query("y_name == 'goodput_kpps'").set_index("x")["y"]
    assert (goodput[-100], goodput[0]) == (200, 90)
    full = points.query("y_name == 'full_ratio'").set_index("x")["y"]
    assert (full[0], full[100], full[190]) == (0, 0.5, 1)
    assert set(points.query("y_name == 'storage_mbps' and x < 190")["y"]) == {8}
    assert set(points.query("y_name == 'store_cores' and x < 190")["y"]) == {0.5}


def test_the_answer_says_what_it_took(run: Path) -> None:
    assert said("rejoin", run) == (
        "From the first copy to the last: firewall with R = 2 100,000 records from 1 host in 100 ms, at 8 Mbit/s and 0.5 cores "
        "of the stores, while packets were delivered 10% slower than afterwards and firewall with R = 3 100,000 records from 2 "
        "hosts in 100 ms, at 8 Mbit/s and 0.5 cores of the stores, while packets were delivered 10% faster than afterwards."
    )
