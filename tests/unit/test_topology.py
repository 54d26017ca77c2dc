"""Does every topology load, and is a wrong request refused before anything starts, with the nearest valid names?"""

from __future__ import annotations

from pathlib import Path

import pytest

import topologies
from datastore.base import errors
from datastore.base.errors import NearstateError
from topologies.emulation import topology

RACK = """
        tor = self.switch("tor")
        self.cable(self.host("client", "client"), "net", tor)
        self.cable(self.host("server", "server"), "net", tor)
        nf = self.host("nf1", "nf")
        for interface in ("inside", "outside", "storage"):
            self.cable(nf, interface, tor)
"""
"""A right `build`, to which each test does something wrong."""


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that plans a topology file with this body of `build`."""
    (tmp_path / "topologies").mkdir()
    monkeypatch.setattr(topology, "FOLDER", tmp_path / "topologies")
    monkeypatch.setattr(errors, "ROOT", tmp_path)
    monkeypatch.setattr(topologies, "__path__", [*topologies.__path__, str(tmp_path / "topologies")])

    def plan(body: str, head: str = "class {name}(DataCenter):\n    def build(self):") -> topology.Plan:
        name = f"mine{abs(hash((body, head)))}"
        text = "from topologies.emulation.topology import DataCenter\n\n" + head.format(name=name.capitalize()) + body
        (tmp_path / "topologies" / f"{name}.py").write_text(text)
        return topology.plan(name, {})

    return plan


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
        ("rack", {"nf_hosts": 0}, "nf_hosts=0 is outside 1 to 32"),
        ("rack", {"nf_hosts": -1}, "nf_hosts=-1 is outside 1 to 32"),
        ("rack", {"nf_hosts": 1000}, "outside 1 to 32"),
        ("rack", {"server_hosts": 0}, "server_hosts=0 is outside 1 to 32"),
        ("rack", {"delay_us": -1.0}, "outside 0"),
        ("rack", {"delay_us": float("nan")}, "outside 0"),
        ("rack", {"cpu": {"nff": 0.5}}, "unknown role in cpu of topology rack 'nff': did you mean nf"),
        ("rack", {"cpu": {"nf": 0}}, "cpu of nf is 0"),
        ("rack", {"cpu": 0.5}, "give cores by role"),
        ("back_to_back", {"nf_hosts": 2}, "it has no switch"),
        ("back_to_back", {"nf_hosts": 0}, "it has no switch"),
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


def test_a_right_file_is_planned(planned) -> None:
    plan = planned(RACK + '        self.cable(self.host("control", "control"), "storage", tor, delay_us=2.5)\n')
    assert (plan.hosts("nf"), plan.interfaces("nf1")) == (["nf1"], ["inside", "outside", "storage"])
    assert plan.interfaces("control") == ["storage"]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ('self.cable(nf, "inside", "nosuch")', r"mine\d+\.py:\d+: cable of nf1 inside to nosuch: unknown host"),
        ('self.cable("nf2", "inside", tor)', "cable of nf2 inside to tor: unknown host or switch 'nf2': did you mean nf1"),
        ('self.cable(tor, "net", nf)', "cable of tor net to nf1: its first end is a host's, not a switch's"),
        ('self.cable(nf, "insid", tor)', "unknown interface of a host of role nf 'insid': did you mean inside"),
        ('self.cable(nf, "net", tor)', "unknown interface of a host of role nf 'net'"),
        ('self.cable(nf, "inside", tor)', "inside of nf1 has a cable already"),
        ('self.cable(self.host("nf2", "nf"), "storage", nf, None)', "cable of nf2 storage to nf1: unknown interface"),
        ('self.cable(self.host("store1", "store"), "storage", tor, delay_us=-5)', "storage to tor: delay_us=-5; 0 to 1000000"),
        ('self.cable(self.host("store1", "store"), "storage", tor, delay_us=float("nan"))', "delay_us=nan; 0 to"),
        ('self.cable(self.host("store1", "store"), "storage", tor, delay_us=float("inf"))', "delay_us=inf; 0 to"),
        ('self.cable(self.host("store1", "store"), "storage", tor, delay_us="5us")', "delay_us='5us'; 0 to"),
        ('self.host("nf1", "nf")', "host 'nf1' is there twice"),
        ('self.host("tor", "nf")', "host 'tor' is there twice"),
        ('self.host("wire", "nf")', "host 'wire': a name is"),
        ('self.host("nf 2", "nf")', "host 'nf 2': a name is lower-case letters and digits"),
        ('self.host("nf/2", "nf")', "host 'nf/2': a name is"),
        ('self.host("nf2", "nff")', "unknown role of host nf2 'nff': did you mean nf"),
        ('self.host("firewall", "nf")', "host 'firewall': the device .* called ns0000-firewall[ios], .* a name of 7 at most"),
        ('self.host("datastore", "store")', "called ns0000-datastore, .* store has a name of 8 at most"),
        ('self.switch("spine")', "switch 'spine' beside 'tor'"),
        ('self.host("nf2", "nf")', "host nf2 of role nf has no cable at inside"),
        ('self.host("store1", "store")', "host store1 of role store has no cable at storage"),
        ('self.cable(self.host("manager", "control"), "storage", tor)', "the one host of role control is called 'control'"),
        ('self.cable(self.host("client2", "client"), "net", tor)', "it has 2 hosts of role client"),
        ('one = self.host("store1", "store"); two = self.host("store2", "store"); self.cable(one, "storage", two, "storage")',
         "a cable joins hosts store1 and store2 past switch tor"),
        ("1 / 0", r"mine\d+\.py:\d+: ZeroDivisionError: division by zero"),
        ("for n in range(260): self.cable(self.host(f's{n}', 'server'), 'net', tor)",
         "it has 265 cables, 256 are possible"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_told_before_anything_starts(planned, wrong: str, reason: str) -> None:
    with pytest.raises(NearstateError, match=reason) as raised:
        planned(f"{RACK}        {wrong}\n")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (RACK.replace('"server", "server"', '"served", "server"'), "it has no host 'server' of role 'server'"),
        (RACK.replace('"client", "client"', '"client", "server"'), "it has no host 'client' of role 'client'"),
        (RACK.replace('"nf1", "nf"', '"nf1", "store"').replace('("inside", "outside", "storage")', '("storage",)'),
         "it has no host of role nf"),
        (RACK.replace('"outside", ', ""), "host nf1 of role nf has no cable at outside"),
        ("\n        pass\n", "it has no host 'client'"),
    ],
)  # fmt: skip
def test_what_a_topology_must_have_is_asked_for(planned, body: str, reason: str) -> None:
    with pytest.raises(NearstateError, match=reason):
        planned(body)


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ("class Other(DataCenter):\n    def build(self):", r"mine\d+\.py has no class Mine\d+\(DataCenter\)"),
        ("class {name}:\n    def build(self):", r"has no class Mine\d+\(DataCenter\)"),
        ("class {name}(DataCenter):\n    def build(self, racks):", "build has racks without a default: give racks one"),
        ("class {name}(DataCenter):\n    def build(self:", r"mine\d+\.py:4: SyntaxError"),
    ],
)
def test_a_file_without_its_class_is_told(planned, head: str, reason: str) -> None:
    with pytest.raises(NearstateError, match=reason):
        planned(RACK, head)


def test_the_ports_of_the_largest_rack_have_names_that_linux_takes() -> None:
    plan = topology.plan("rack", {"nf_hosts": 32, "store_hosts": 32, "server_hosts": 32})
    names = [
        topology.port_name("nsk3x9", host, plan.graph.nodeInfo(host)["role"], interface)
        for host in plan.graph.hosts()
        for interface in plan.interfaces(host)
    ]
    assert len(set(names)) == len(names) == len(plan.graph.links())
    assert max(map(len, names)) <= topology.DEVICE_BYTES
