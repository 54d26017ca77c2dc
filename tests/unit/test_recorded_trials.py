"""Do recorded trials stay apart from others, in names, medians and resumed runs?"""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.results import Run, measurements
from analysis.summary import summarize
from datastore.base.errors import NearstateError
from experiments.harness import runner, spec
from experiments.harness.bench import settings
from experiments.harness.record import Record


def test_every_trial_of_a_recorded_run_is_recorded_and_has_a_name_of_its_own() -> None:
    experiments = runner.select([], "smoke")
    plain, recorded = (runner.planned(experiments, pcap) for pcap in (False, True))
    assert not {trial.name for trial in plain} & {trial.name for trial in recorded}
    for trial in recorded:
        assert settings(trial, experiments[trial.experiment])["recorded"] is True
    assert not any(settings(trial, experiments[trial.experiment])["recorded"] for trial in plain)


def test_no_median_mixes_recorded_trials_with_others() -> None:
    experiments = {"packet_latency": spec.load("packet_latency").for_profile("smoke")}
    lines = []
    for pcap, latency_us in ((False, 100.0), (True, 900.0)):
        trial = runner.planned(experiments, pcap)[0]
        point = {"sweep": {"offered_kpps": 10}, "metrics": {"p50_us": latency_us}}
        lines.append({"trial": trial.name, "experiment": trial.experiment, "topology": trial.topology, "nf": trial.nf,
                      "placement": trial.placement, "sweep": dict(trial.sweep), "points": [point]})  # fmt: skip
    summary = summarize(measurements([Run(Path("run"), {}, {}, tuple(lines), ())]))
    assert sorted(zip(summary["median"], summary["trials"])) == [(100.0, 1), (900.0, 1)]


def test_a_run_is_resumed_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Record.create({"profile": "smoke", "pcap": False, "experiments": {}}, {}, tmp_path)
    monkeypatch.setattr(Record, "open", classmethod(lambda cls, run: begun))
    with pytest.raises(NearstateError, match="began without recording and goes on so"):
        runner.run([], resume=begun.run_id, pcap=True)
