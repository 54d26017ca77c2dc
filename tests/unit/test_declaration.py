"""Is every definition of the repository loadable, and is a wrong one refused with the line that is wrong?"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from datastore import placements
from datastore.base.errors import NearstateError
from experiments.harness import spec
from nfs.dataplane import DROP, FLOW, FORWARD, NONE, declaration, network_function, record, requests
from tests.packets import Instance, udp
from topologies.emulation import topology


def test_every_network_function_placement_topology_and_experiment_loads() -> None:
    functions = [declaration.load(name) for name in declaration.names()]
    assert {function.name for function in functions} >= {"firewall", "passthrough", "traffic_counter"}
    assert len({function.kind for function in functions}) == len(functions), "record types do not collide"
    for function in functions:
        assert function.question, f"nfs/{function.name}.py opens with the question it answers"
        assert function.stateless == (function.key == NONE)
        assert function.compiled.address
        assert 1 <= function.kind <= 254
    cluster = placements.Cluster(("nf1", "nf2"), ("store1",), ("nf1", "nf2") * 128)
    for name in placements.names():
        placement = placements.load(name)
        assert placement.store_role is None or len(placement.map(cluster).replicas) == 256
    for name in topology.names():
        assert topology.plan(name, {}).graph.hosts()
    for name in spec.experiment_names():
        experiment = spec.load(name)
        for profile in spec.PROFILES:
            trials = list(spec.trials(name, experiment.for_profile(profile)))
            assert trials
            assert len({trial.name for trial in trials}) == len(trials)


def test_records_are_laid_out_as_in_c_and_padded_to_words() -> None:
    layout = record(state="u1", packets="u4", last_seen_ns="u8")
    assert [layout.fields[name][1] for name in ("state", "packets", "last_seen_ns")] == [0, 4, 8]
    assert layout.itemsize == 16
    assert record(a="u1").itemsize == 8
    assert record(**{f"f{n}": "u8" for n in range(8)}).itemsize == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has 0 bytes; 1 to 64"),
        ({f"f{n}": "u8" for n in range(9)}, "has 72 bytes; 1 to 64"),
        ({"state": "u3"}, "kinds are u1 u2"),
        ({"state": "uint8_t"}, "kinds are u1 u2"),
        ({"state": "O"}, "kinds are u1 u2"),
        ({"name": "U4"}, "kinds are u1 u2"),
    ],
)
def test_a_record_that_cannot_be_kept_is_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(NearstateError, match=message):
        record(**fields)


def test_a_declaration_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(NearstateError, match="a network function with a key needs state"):
        network_function(key=FLOW)
    with pytest.raises(NearstateError, match="key=NONE must have none"):
        network_function(key=NONE, state=record(a="u1"))
    with pytest.raises(NearstateError, match="unknown exception that a network function passes 'not_ipp': did you mean not_ip"):
        network_function(key=NONE, passes=("not_ipp",))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that imports the text of a network function's file and returns what it declares."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body: str) -> declaration.NetworkFunction:
        name = f"nf_{abs(hash(body))}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(body))
        sys.modules.pop(name, None)
        return __import__(name).function

    return write


BROKEN = '''"""A question?"""
from nfs.dataplane import DROP, FLOW, FORWARD, network_function, record


@network_function(key=FLOW, state=record(packets="u4"))
def function(packet, record, env):
    record.packets += 1
    {statement}
    return FORWARD
'''


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("record.pakets += 1", "there is no field 'pakets'"),
        ("record.packets = packet.nothing", "there is no field 'nothing'"),
        ("record.packets = undefined", ".*name 'undefined' is not defined"),
        ("open('/etc/passwd')", ".*'open'"),
    ],
)
def test_a_function_that_does_not_compile_names_its_file_and_line(written, statement: str, reason: str) -> None:
    function = written(BROKEN.format(statement=statement))
    with pytest.raises(NearstateError, match=rf"nf_\d+\.py:8: network function 'function' does not compile: {reason}") as raised:
        _ = function.compiled
    assert "\n" not in str(raised.value)


def test_a_new_function_runs_on_its_record(written) -> None:
    function = written('''
        """Every second packet passes."""
        from nfs.dataplane import DROP, FLOW, FORWARD, network_function, record

        @network_function(key=FLOW, state=record(packets="u4", share="f8"))
        def function(packet, state, env):
            state.packets += 1
            state.share = state.packets / 2
            return FORWARD if state.packets % 2 == 0 else DROP
        ''')  # fmt: skip
    packets, state, env = np.zeros(1, declaration.PACKET), np.zeros(1, function.state), np.zeros(1, requests.ENV)
    assert [function.process(packets, 0, state, env) for _ in range(4)] == [DROP, FORWARD, DROP, FORWARD]
    assert state[0]["share"] == 2.0
    assert function.question == "Every second packet passes."


def test_a_record_of_an_older_layout_is_never_taken_for_one_of_ours() -> None:
    """Its key says what layout it has: a function that changed finds nothing, as for a key never seen; the old record expires."""

    def declared(**fields: str) -> declaration.NetworkFunction:
        @network_function(key=FLOW, state=record(**fields), passes=("not_ip",))
        def changing(packet, state, env):
            state.packets += 1
            return DROP if state.packets > 1 else FORWARD

        return changing

    older = declared(packets="u4")
    for newer in (declared(packets="u8"), declared(opened="u4", packets="u4"), declared(packets="u4", last="u4")):
        assert newer.kind != older.kind
    assert declared(packets="u4").kind == older.kind
    old, new = Instance(older, older.make_env()), Instance(declared(packets="u8"), older.make_env())
    new.records, new.expires_s = old.records, old.expires_s
    assert [old(udp()), old(udp())] == [FORWARD, DROP]
    assert [new(udp()), new(udp())] == [FORWARD, DROP]
    assert len(old.records) == 2


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(NearstateError, match="unknown network function 'firewal': did you mean firewall"):
        declaration.load("firewal")
    with pytest.raises(NearstateError, match="unknown placement 'integrate': did you mean integrated"):
        placements.load("integrate")
    with pytest.raises(NearstateError, match="unknown topology 'rak': did you mean rack"):
        topology.plan("rak", {})
