"""Is an experiment checked completely, with the nearest valid names, before anything starts?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import experiments
from datastore.base import errors
from datastore.base.errors import NearstateError
from experiments.harness import runner, spec
from experiments.harness.spec import Experiment, check, trials

LOCAL = {"nf": ("firewall",), "placement": ("local",)}
RIGHT = Experiment(
    question="Is this right?",
    procedure="packet_latency",
    sweeps=({"topology": ("rack",), "nf": ("firewall",), "placement": ("local", "centralized")},),
    settings={"offered_kpps": 5.0},
    traffic={"flows": 10},
    repeats=2,
    seed=11,
    profiles={"smoke": {"repeats": 1, "settings": {"seconds": 0.1}, "traffic": {"frame_bytes": 128}}},
)


def test_a_right_experiment_passes() -> None:
    check("right", RIGHT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"procedure": "packet_latensy"}, "unknown procedure of experiment 'mine' 'packet_latensy': did you mean packet_latency"),
        ({"repeats": 0}, "experiment 'mine': repeats=0; at least 1"),
        ({"sweeps": ({"nf": ("firewall",), "repeats": 0},)}, "experiment 'mine': repeats=0; at least 1"),
        ({"settings": {"ofered_kpps": 1}}, "unknown setting of experiment 'mine' 'ofered_kpps': did you mean offered_kpps"),
        ({"traffic": {"flow": 1}}, "unknown traffic parameter 'flow': did you mean flows"),
        ({"traffic": {"frame_bytes": 9000}}, "traffic frame_bytes=9000: 64 to 1518"),
        ({"sweeps": ({"placement": ("centralised",)},)}, "unknown placement 'centralised': did you mean centralized"),
        ({"sweeps": ({"placement": ("integrated:hash",)},)}, "did you mean integrated:hashed"),
        ({"sweeps": ({"nf": ("firewal",)},)}, "unknown network function 'firewal': did you mean firewall"),
        ({"sweeps": ({"topology": ("racks",)},)}, "unknown topology 'racks': did you mean rack"),
        (
            {"sweeps": ({"ofered_kpps": (1, 2)},)},
            "unknown sweep parameter of experiment 'mine' 'ofered_kpps': did you mean offered",
        ),
        ({"sweeps": ({"placement": "local"},)}, r"'mine': placement='local' is no list of values; write placement=\('local',\)"),
        ({"sweeps": ({"chain": "firewall"},)}, r"chain='firewall' is no list of values; write chain=\('firewall',\)"),
        ({"sweeps": ({"placement": ()},)}, r"placement=\(\) is no list of values"),
        ({"sweeps": {"placement": ("local",)}}, r"is no list of grids; write sweeps=\("),
        ({"sweeps": ()}, r"sweeps=\(\) is no list of grids"),
        ({"settings": {"offered_kpps": "5"}}, "'mine': offered_kpps='5' is no number from 0; the default is 10.0"),
        ({"settings": {"offered_kpps": -1}}, "offered_kpps=-1 is no number from 0"),
        ({"settings": {"seconds": float("nan")}}, "seconds=nan is no number from 0"),
        ({"settings": {"capacity": 1.5}}, "capacity=1.5 is no whole number from 0; the default is 65536"),
        ({"settings": {"capacity": True}}, "capacity=True is no whole number from 0"),
        ({"settings": {"functions": ("nat",)}}, "is no mapping; the default is {}"),
        ({"settings": {"paths": 1}}, "paths=1 is no text"),
        ({"settings": {"paths": "asymetric"}}, "unknown value of setting paths 'asymetric': did you mean asymmetric"),
        ({"settings": {"port_kind": "afpaket"}}, "unknown value of setting port_kind 'afpaket': did you mean afpacket"),
        ({"sweeps": ({"port_kind": ("auto", "xdp")},)}, "unknown value of setting port_kind 'xdp': did you mean afxdp"),
        ({"sweeps": ({"settings": {"paths": "both"}},)}, "unknown value of setting paths 'both'"),
        ({"sweeps": ({"replicas": (1, 0)},)}, "replicas=0; at least 1 is needed"),
        ({"sweeps": ({"offered_kpps": (1, "2")},)}, "offered_kpps='2' is no number from 0"),
        ({"sweeps": ({"replicas": ("1",)},)}, "replicas='1' is no whole number from 0"),
        ({"sweeps": ({"placement": (1,)},)}, "placement=1 is no text"),
        ({"sweeps": ({"placement": ("local",), "settings": {"seconds": "1"}},)}, "seconds='1' is no number from 0"),
        ({"repeats": "2"}, "repeats='2' is no whole number"),
        (
            {"procedure": "throughput", "settings": {"ladder_kpps": ("20",)}},
            r"ladder_kpps=\('20',\) is no list of numbers from 0",
        ),
        ({"procedure": "throughput", "settings": {"ladder_kpps": 20}}, "ladder_kpps=20 is no list of numbers from 0"),
        ({"procedure": "throughput", "settings": {"saturate": 1}}, "saturate=1 is no True or False"),
        ({"sweeps": ({"nf": ("firewall|",)},)}, "unknown network function ''"),
        ({"sweeps": ({"nf": ("firewall|natt",)},)}, "unknown network function 'natt': did you mean nat"),
        (
            {"sweeps": ({**LOCAL, "nf": ("firewall|nat",)},), "network": {"nf_hosts": 3}},
            r"over 3 NF hosts: each of its 2 stages needs",
        ),
        (
            {"sweeps": ({**LOCAL, "nf": ("firewall|nat",), "topology": ("back_to_back",)},)},
            "over 1 NF host: each of its 2 stages needs",
        ),
        ({"network": {"nf_hosts": "two"}}, "topology rack: nf_hosts='two' is no int"),
        ({"sweeps": ({**LOCAL, "nf_hosts": ("two",)},)}, "topology rack: nf_hosts='two' is no int"),
        ({"sweeps": ({**LOCAL, "nf": ("firewall|nat",), "nf_hosts": (2, 3)},)}, r"over 3 NF hosts: each of its 2 stages needs"),
        (
            {"sweeps": ({**LOCAL, "topology": ("back_to_back",), "nf_hosts": (3,)},)},
            "back_to_back: nf_hosts=3; it has no switch, so 1",
        ),
        ({"network": {"nf_host": 2}}, "unknown parameter of topology rack 'nf_host': did you mean nf_hosts"),
    ],
)
def test_what_is_wrong_is_refused_with_the_nearest_names(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(NearstateError, match=message) as raised:
        check("mine", replace(RIGHT, **changes))
    assert "\n" not in str(raised.value)


def test_what_may_stand_for_a_default_passes() -> None:
    settings = {"ladder_kpps": [2.5, 40], "saturate": True, "seconds": 1, "functions": {"firewall": {}}}
    check("mine", replace(RIGHT, procedure="throughput", settings=settings))
    check("mine", replace(RIGHT, procedure="throughput", settings={}, sweeps=({**LOCAL, "ladder_kpps": ((1, 2), (3,))},)))


def test_a_chain_is_told_by_its_stages_and_the_hosts_divide_among_them() -> None:
    assert spec.stages("firewall+traffic_counter|nat") == [["firewall", "traffic_counter"], ["nat"]]
    assert spec.staged(["nf1", "nf2", "nf3", "nf4"], "firewall|nat") == [["nf1", "nf2"], ["nf3", "nf4"]]
    assert spec.staged(["nf1", "nf2"], "firewall+nat") == [["nf1", "nf2"]]
    assert spec.staged(["nf1"], "") == [["nf1"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("EXPERIMENT = Experiment(\n", "experiments/{name}.py:1: SyntaxError: '(' was never closed"),
        ("\nEXPERIMENT = Experiment(qestion='?')\n", "experiments/{name}.py:2: NameError: name 'Experiment' is not defined"),
        ("import nothing_of_that_name\n", "experiments/{name}.py:1: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("EXPERIMENT = None\n", "experiments/{name}.py declares no EXPERIMENT = Experiment(...)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    (tmp_path / "experiments").mkdir()
    name = f"broken_{abs(hash(text))}"
    (tmp_path / "experiments" / f"{name}.py").write_text(text)
    monkeypatch.setattr(spec, "FOLDER", tmp_path / "experiments")
    monkeypatch.setattr(errors, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(tmp_path / "experiments")])
    with pytest.raises(NearstateError) as raised:
        spec.load(name)
    assert str(raised.value) == message.format(name=name)


def test_unknown_experiments_and_profiles_are_refused() -> None:
    with pytest.raises(NearstateError, match="unknown experiment 'packet_latensy': did you mean packet_latency"):
        runner.select(["packet_latensy"], "quick")
    with pytest.raises(NearstateError, match="unknown profile 'quik': did you mean quick"):
        runner.select([], "quik")
    for name in ("../harness/spec", "__main__", "harness", ""):
        with pytest.raises(NearstateError, match="unknown experiment"):
            spec.load(name)


def test_a_profile_changes_what_it_names_and_keeps_the_rest() -> None:
    smoke = RIGHT.for_profile("smoke")
    assert smoke.repeats == 1
    assert smoke.settings == {"offered_kpps": 5.0, "seconds": 0.1}
    assert smoke.traffic == {"flows": 10, "frame_bytes": 128}
    assert smoke.sweeps == RIGHT.sweeps
    assert RIGHT.for_profile("quick") == RIGHT
    wrong = replace(RIGHT, profiles={"smoke": {"repeat": 1}})
    with pytest.raises(NearstateError, match="unknown key of profile 'smoke' 'repeat': did you mean repeats"):
        wrong.for_profile("smoke")


def test_trials_are_the_product_of_every_grid_named_once_and_seeded_apart() -> None:
    sweeps = (
        *RIGHT.sweeps,
        {"topology": ("back_to_back",), "nf": ("", "firewall"), "offered_kpps": (1, 2, 3), "replicas": (1, 2)},
    )
    found = list(trials("mine", replace(RIGHT, sweeps=sweeps)))
    assert len(found) == (2 + 2 * 3 * 2) * 2
    assert len({trial.name for trial in found}) == len(found)
    assert {trial.seed for trial in found} == {11, 12}
    assert [trial.name for trial in found] == [trial.name for trial in trials("mine", replace(RIGHT, sweeps=sweeps))]
    assert found[0].name == "mine/rack/local/firewall/r1/0"
    assert found[4].sweep == {"offered_kpps": 1}


def test_a_grid_may_have_repeats_of_its_own() -> None:
    grids = ({"placement": ("local",), "repeats": 3}, {"placement": ("centralized",)})
    found = [trial.placement for trial in trials("mine", replace(RIGHT, sweeps=grids))]
    assert found == ["local"] * 3 + ["centralized"] * 2


def test_a_grid_may_sweep_the_topology() -> None:
    grid = {"topology": ("rack",), "nf": ("firewall",), "placement": ("centralized",), "nf_hosts": (1, 3), "replicas": (2,)}
    experiment = replace(RIGHT, sweeps=(grid,), network={"nf_hosts": 2, "delay_us": 5.0}, repeats=1)
    check("mine", experiment)
    assert [runner.network_parameters(trial, experiment) for trial in trials("mine", experiment)] == [
        {"store_hosts": 2, "nf_hosts": hosts, "delay_us": 5.0} for hosts in (1, 3)
    ]
