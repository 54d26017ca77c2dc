"""Do the figures of asymmetric paths, connection rate and table size show and say what a run measured, complete or not?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hdrh.histogram import HdrHistogram

from analysis.redraw import draw_figures
from tests.figures import said


def histogram(value_us: float) -> str:
    counted = HdrHistogram(1, 60_000_000_000, 3)
    for share in range(50, 151):
        counted.record_value(int(value_us * 10 * share))
    return str(counted.encode().decode())


def line(experiment: str, placement: str, points: list[dict[str, Any]], nf: str = "firewall") -> dict[str, Any]:
    whole = [{"histograms": {}, "valid": True, "invalid_reasons": [], **point} for point in points]
    return {"trial": f"{experiment}/{placement}/{nf}", "experiment": experiment, "topology": "rack", "placement": placement,
            "nf": nf, "replicas": 1, "sweep": {}, "repeat": 0, "seed": 1, "valid": True, "invalid_reasons": [],
            "points": whole}  # fmt: skip


def handshakes(placement: str, asymmetric_share: float) -> dict[str, Any]:
    points = []
    for paths, share, p50_us in (("symmetric", 1.0, 300.0), ("asymmetric", asymmetric_share, 400.0)):
        found = {"p50_us": p50_us, "p99_us": 3 * p50_us} if share else {}
        histograms = {"handshake_ns": histogram(p50_us)} if share else {}
        points.append({"sweep": {"paths": paths}, "metrics": {"success_ratio": share, **found}, "histograms": histograms})
    return line("asymmetric_paths", placement, points)


def rates(placement: str, kops: float) -> dict[str, Any]:
    return line("connection_rate", placement, [
        {"sweep": {"load": "saturated"}, "metrics": {"opened_kops": 2 * kops}},
        {"sweep": {"offered_kops": 50}, "metrics": {"opened_kops": 50}},
        {"sweep": {"search": "rfc9693"}, "metrics": {"lossless_kops": kops}},
    ])  # fmt: skip


def sizes(nf: str) -> dict[str, Any]:
    points = []
    for flows, state_ns in ((1000, 40), (1_000_000, 200)):
        metrics = {"state_ns": state_ns, "packet_ns": 300 + state_ns, "passthrough_ns": 300, "first_packet_ns": 350 + state_ns,
                   "dependent_access_ns": state_ns / 2, "independent_access_ns": 3}  # fmt: skip
        points.append({"sweep": {"flows": flows}, "metrics": metrics})
    return line("table_size", "local", points, nf)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    trials = [handshakes("local", 0.0), handshakes("integrated", 1.0), rates("local", 100), rates("nftables", 50),
              sizes("firewall"), sizes("traffic_counter")]  # fmt: skip
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    return tmp_path


NAMES = ("asymmetric_paths", "connection_rate", "table_size")


def test_the_figures_show_every_number(run: Path) -> None:
    draw_figures(run, list(NAMES))
    points = {name: pd.read_csv(run / "figures" / f"{name}.csv") for name in NAMES}
    success = points["asymmetric_paths"].query("mark == 'bar'").set_index(["series", "x"])["y"]
    assert dict(success) == {("integrated", "symmetric"): 1.0, ("integrated", "asymmetric"): 1.0,
                             ("local", "symmetric"): 1.0, ("local", "asymmetric"): 0.0}  # fmt: skip
    highest = points["connection_rate"].query("mark == 'bar'").set_index(["series", "x"])["y"]
    assert dict(highest) == {("local", "none failed"): 100, ("local", "saturated"): 200,
                             ("nftables", "none failed"): 50, ("nftables", "saturated"): 100}  # fmt: skip
    growth = points["table_size"].query("panel == 'firewall' and x == 1000000")
    assert dict(growth.set_index("y_name")["y"]) == {
        "state_ns": 200, "first_extra_ns": 250, "dependent_access_ns": 100, "independent_access_ns": 3}  # fmt: skip


def test_the_answers_say_it(run: Path) -> None:
    assert said("asymmetric_paths", run) == (
        "With answers by another instance, local opens 0% of its connections; "
        "median handshake, symmetric to asymmetric: integrated 300 µs to 400 µs."
    )
    assert "without a failed handshake, local 100 (2x nftables)" in said("connection_rate", run)
    assert "state costs a packet of firewall from 40 to 200 ns" in said("table_size", run)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_without_points_is_drawn_and_answered_too(tmp_path: Path, name: str) -> None:
    (tmp_path / "trials.jsonl").write_text(json.dumps({**line(name, "local", []), "valid": False}) + "\n")
    assert "Not answered" in said(name, tmp_path)
