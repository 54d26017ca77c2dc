"""Does the figure of what copies cost tell saturated from light load, and packets that wait from those that do not?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.redraw import draw_figures
from tests.figures import said


def point(sweep: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    return {"sweep": sweep, "metrics": metrics, "histograms": {}, "valid": True, "invalid_reasons": []}


def trial(placement: str, replicas: int, us: float, kpps: float, sweep: dict[str, Any]) -> dict[str, Any]:
    points = [
        point({"offered_kpps": 10.0}, {"p50_us": us, "delivered_kpps": 10, "storage_bytes": 400}),
        point({"load": "saturated"}, {"delivered_kpps": kpps}),
        point({"search": "rfc2544"}, {"lossless_kpps": kpps / 2 if replicas == 1 else kpps / 4}),
    ]
    return {"trial": f"{placement}/{replicas}/{sweep}", "experiment": "replication_cost", "topology": "rack",
            "nf": "traffic_counter", "repeat": 0, "placement": placement, "replicas": replicas, "sweep": sweep, "seed": 1,
            "valid": True, "invalid_reasons": [], "points": points}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    trials = [trial("integrated", 1, 200, 100, {}), trial("integrated", 2, 500, 80, {}), trial("centralized", 2, 1000, 40, {}),
              trial("integrated", 2, 210, 95, {"asynchronous": True})]  # fmt: skip
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(each) + "\n" for each in trials))
    return tmp_path


def test_the_figure_shows_what_is_delivered_when_saturated(run: Path) -> None:
    draw_figures(run, ["replication_cost"])
    points = pd.read_csv(run / "figures" / "replication_cost.csv")
    delivered = points[points["panel"] == "traffic_counter, delivered_kpps"].set_index(["series", "x"])["y"]
    assert dict(delivered) == {("integrated", 1): 100, ("integrated", 2): 80, ("centralized", 2): 40}
    assert set(points.loc[points["panel"] == "traffic_counter, p50_us, asynchronous", "y"]) == {210}


def test_the_answer_says_what_the_second_copy_costs(run: Path) -> None:
    assert said("replication_cost", run) == (
        "With a second copy that every packet waits for, integrated delivers 0.8x for traffic counter (0.4x without loss) of "
        "what it does with one; with two copies each, it delivers 2x of what centralized does, which takes 2x its median latency."
    )


def test_what_waiting_adds_is_told_in_round_trips(run: Path) -> None:
    firewalls = [{**trial(placement, 1, us, 100, {}), "trial": f"firewall/{placement}", "nf": "firewall"}
                 for placement, us in (("integrated", 190), ("centralized", 390))]  # fmt: skip
    with (run / "trials.jsonl").open("a") as file:
        file.write("".join(json.dumps(each) + "\n" for each in firewalls))
    assert said("replication_cost", run).endswith(
        " The second copy adds 300 µs to the median of the traffic counter; a read from a store host adds 200 µs to the "
        "firewall's, 1.5 round trips."
    )


def test_a_run_without_points_is_answered_too(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text(json.dumps(trial("integrated", 2, 1, 1, {})) + "\n")
    assert "integrated with one and with two copies" in said("replication_cost", tmp_path)
