"""Does every topology load, and is a wrong request refused before anything starts, with the nearest valid names?"""

import pytest

from datastore.native.errors import NearstateError
from topologies.emulation import topology


def test_every_topology_loads_and_has_both_sides() -> None:
    assert {"rack", "back_to_back"} <= set(topology.names())
    for name in topology.names():
        graph = topology.plan(name, {}).graph
        roles = [graph.nodeInfo(host)["role"] for host in graph.hosts()]
        assert roles.count("client") == roles.count("server") == 1
        assert "nf" in roles
        assert set(roles) <= set(topology.ROLES)


def test_rack_has_the_hosts_and_cables_asked_for() -> None:
    graph = topology.plan("rack", {"nf_hosts": 3, "store_hosts": 2, "delay_us": 10.0}).graph
    assert graph.hosts() == ["client", "control", "nf1", "nf2", "nf3", "server", "store1", "store2"]
    assert len(graph.links()) == 2 + 3 * 3 + 2 + 1
    plan = topology.plan("rack", {"server_hosts": 3})
    assert (plan.hosts("server"), plan.hosts("nf")) == (["server", "server2", "server3"], ["nf1", "nf2"])
    assert {info["delay_us"] for _, _, info in graph.links(withInfo=True)} == {10.0}


@pytest.mark.parametrize(
    ("name", "parameters", "reason"),
    [
        ("rak", {}, "unknown topology 'rak': did you mean rack"),
        ("emulation", {}, "unknown topology"),
        ("rack", {"nf_host": 2}, "unknown parameter of topology rack 'nf_host': did you mean nf_hosts"),
        ("rack", {"nf_hosts": "2"}, "nf_hosts='2' is no int"),
        ("rack", {"nf_hosts": True}, "is no int"),
        ("rack", {"nf_hosts": 0}, "at least one"),
        ("rack", {"nf_hosts": 1000}, "outside 0 to 32"),
        ("rack", {"server_hosts": 0}, "at least one server"),
        ("rack", {"delay_us": -1.0}, "outside 0"),
        ("rack", {"delay_us": float("nan")}, "outside 0"),
        ("rack", {"cpu": {"nff": 0.5}}, "unknown role in cpu of topology rack 'nff': did you mean nf"),
        ("rack", {"cpu": {"nf": 0}}, "cpu of nf is 0"),
        ("rack", {"cpu": 0.5}, "give cores by role"),
        ("back_to_back", {"nf_hosts": 2}, "it has no switch"),
        ("back_to_back", {"store_hosts": 2}, "one cable"),
    ],
)
def test_a_wrong_request_is_refused(name: str, parameters: dict, reason: str) -> None:
    with pytest.raises(NearstateError, match=reason):
        topology.plan(name, parameters)


def test_a_plan_is_frozen() -> None:
    plan = topology.plan("rack", {"cpu": {"nf": 0.5}})
    for frozen in (plan.parameters, plan.cpu):
        with pytest.raises(TypeError):
            frozen["nf"] = 1  # type: ignore[index]
