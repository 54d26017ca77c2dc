"""Does the figure of a lost host show its course, its outage in parts and what broke, also of what never recovers?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.redraw import draw_figures
from analysis.results import measurements, read_run, time_line
from analysis.summary import summarize
from datastore.base.errors import NearstateError
from experiments.harness.procedures import failover
from experiments.workloads import timeline
from tests.figures import said

MS = 1_000_000


def course(silent: range) -> str:
    line = timeline.make_time_line({"bin_us": 1000, "seconds": 0.3}, 0)
    for ms in range(300):
        for slot in range(0 if ms in silent else 10):
            timeline.note(line, slot, 7, 200_000, ms * MS + slot)
    return timeline.Told.of(timeline.report(line)).encode(100 * MS, -100, 200)


def trial(placement: str, replicas: int, outage_ms: float | None, broken: float, repeat: int = 0, **sweep: Any) -> dict[str, Any]:
    """Return a trial whose host was lost at 100 ms; outage None: for good."""
    until = 200 if outage_ms is None else outage_ms
    metrics = {"outage_ms": until, "detection_ms": 80, "recovery_ms": until - 80, "restored_ms": until + 20, "packets_lost": 10,
               "broken_ratio": broken, "recovered_ratio": float(outage_ms is not None)}  # fmt: skip
    point = {"sweep": {}, "metrics": metrics, "histograms": {}, "valid": True, "invalid_reasons": [],
             "time_lines": {"delivered": course(range(100, 100 + int(until)))}}  # fmt: skip
    name = f"failover/{placement}/{replicas}/{sweep}/{repeat}"
    return {"trial": name, "experiment": "failover", "topology": "rack", "nf": "nat",
            "placement": placement, "replicas": replicas, "sweep": sweep, "repeat": repeat, "seed": 1, "valid": True,
            "invalid_reasons": [], "points": [point]}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    trials = [trial("integrated", 1, None, 1.0), trial("integrated", 2, 100, 0.0), trial("integrated", 2, 120, 0.0, 1),
              trial("nftables", 1, 110, 0.25), trial("integrated", 2, 90, 0.0, lost="store"),
             trial("integrated", 2, 50, 0.0, lost="link")]  # fmt: skip
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    return tmp_path


def test_the_figure_shows_course_and_parts(run: Path) -> None:
    draw_figures(run, ["failover"])
    points = pd.read_csv(run / "figures" / "failover.csv")
    goodput = points.query("mark == 'course' and y_name == 'goodput_kpps' and panel == 'integrated, R = 2'")
    goodput = goodput.set_index(goodput["x"].astype(float))
    assert goodput["y"].to_dict() == {at: 10.0 * (at < 0 or at >= 120) + 5.0 * (at in (100, 110)) for at in range(-100, 200, 10)}
    assert (goodput.loc[100, "low"], goodput.loc[100, "high"]) == (0, 10), "the repeats' range"
    parts = points.query("mark == 'recovery_ms'").set_index("panel")["y"]
    assert {panel: y for panel, y in parts.items() if not panel.startswith("lost")} == {
        "integrated, R = 1": 120,
        "integrated, R = 2": 30,
        "nftables (kernel)": 30,
    }
    pieces = points[points["panel"].str.startswith("lost")].groupby("panel")["y"].sum()
    assert dict(pieces) == {"lost: host": 110, "lost: store": 90, "lost: link": 50}
    broken = points.query("y_name == 'broken_ratio'").set_index("x")["y"]
    assert dict(broken) == {"integrated, R = 1": 1, "integrated, R = 2": 0, "nftables (kernel)": 0.25}


def test_the_answer_tells_what_never_recovers(run: Path) -> None:
    assert said("failover", run) == (
        "From the loss of an NF host to the first packet of its flows, nat: integrated, R = 1 for good (10 packets lost, 100% of "
        "connections broken), integrated, R = 2 110 ms, all 130 ms (10 packets lost, 0% of connections broken) and nftables "
        "(kernel) 110 ms, all 130 ms (10 packets lost, 25% of connections broken)."
    )


def test_what_is_lost_without_waiting_for_copies_is_told_apart(run: Path) -> None:
    waits, goes = (trial("integrated", 2, 100, 0.0, 9, **sweep) for sweep in ({}, {"asynchronous": True}))
    waits["points"][0]["metrics"]["updates_lost"], goes["points"][0]["metrics"]["updates_lost"] = 0, 12
    with (run / "trials.jsonl").open("a") as file:
        file.write("".join(json.dumps(each) + "\n" for each in (waits, goes)))
    assert said("failover", run).endswith(
        " Packets that were delivered and are counted nowhere: 0 where packets wait for the copies and 12 where they do not wait "
        "for the copies."
    )
    draw_figures(run, ["failover"])
    points = pd.read_csv(run / "figures" / "failover.csv")
    assert len(points.query("mark == 'recovery_ms' and panel == 'integrated, R = 2'")) == 1


def test_a_delivered_packet_that_no_record_counts_is_a_lost_update() -> None:
    flows = np.zeros((3, 7), np.int64)
    flows[:, timeline.SOURCE], flows[:, timeline.PACKETS] = (1, 2, 3), (10, 5, 4)
    before, after = {1: 2, 2: 1}, {1: 9, 2: 8}
    assert failover.updates_lost(flows, before, after) == 3 + 0 + 4, "7 of 10; all, and 2 that were not delivered; none of 4"


def test_time_lines_are_no_scalars(run: Path) -> None:
    frame = measurements([read_run(run)])
    kept = frame[frame["metric"] == "delivered"]
    assert len(kept) == 6
    assert time_line(kept["histogram"].iloc[0])["ms"].tolist() == list(range(-100, 200))
    assert "delivered" not in set(summarize(frame)["metric"])


def test_a_run_without_points_is_answered_too(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text(json.dumps({**trial("local", 1, 100, 0), "points": [], "valid": False}) + "\n")
    with pytest.raises(NearstateError, match="figure 'failover' cannot be drawn"):
        draw_figures(tmp_path, ["failover"])
    assert "Not answered" in said("failover", tmp_path)
