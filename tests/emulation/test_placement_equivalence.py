"""One trace, every placement: do the same packets come out, byte for byte, with symmetric and with asymmetric paths?

The trace goes through the rack with two NF hosts in lockstep: a round has at most one packet of each flow, and the next one
starts when no instance has anything of the last one left. What must come out is computed by the network function itself on
records of its own (`tests.packets.Instance`): one set of records for placements that share state, one a host for `local`.
"""

from __future__ import annotations

import itertools
import os
import random
import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Ether

from datastore import placements
from datastore.store.partitions import FlowKey
from experiments.harness.bench import ASYMMETRIC, PATHS, SYMMETRIC, Bench
from experiments.harness.spec import Experiment, Trial
from nfs.dataplane.headers import INSIDE, OUTSIDE
from nfs.dataplane.ledger import imbalance
from nfs.load_balancer import COUNTER_PROTOCOL
from tests.conftest import received
from tests.packets import SERVER, Instance
from tests.rack import ARRIVAL_S, forwarded, open_sockets
from topologies.emulation.journal import Journal
from topologies.emulation.network import Network
from topologies.emulation.processes import Launcher

NFS = ("firewall", "traffic_counter", "load_balancer")
SETTINGS = {"load_balancer": {"virtual_address": SERVER, "backends": ["10.128.0.2", "10.128.0.3 weight 2"], "failure_syns": 0}}
IS_LONG = os.environ.get("NEARSTATE_LONG") == "1"
SEEDS = range(1, 21) if IS_LONG else (1,)
FLOWS, ROUNDS = 64, 16
EXPERIMENT = Experiment(question="Does the same come out everywhere?", procedure="packet_latency", sweeps=())
STRAY_FLAGS = ("S", "SA", "A", "PA", "FA", "R", "RA", "", "SF", "FPU")
Macs = list[str]
TIMES = ("claimed_s",)
"""Fields of records that tell when something happened."""


@dataclass(frozen=True)
class Sent:
    """A packet of the trace. partition: the one the switch steers it by; strayed: an ICMP error steered unlike its flow."""

    frame: bytes
    inside: bool
    partition: int
    strayed: bool

    @property
    def tcp_flags(self) -> str | None:
        """Its flags when it is a TCP segment."""
        packet = Ether(self.frame)
        return str(packet[TCP].flags) if TCP in packet else None

    @property
    def goes_on(self) -> bool:
        """Whether it is a TCP segment that goes on with a connection: neither a first SYN nor a reset."""
        return self.tcp_flags not in (None, "S") and "R" not in str(self.tcp_flags)


class Trace:
    """Packets of many flows, from one seed: each flow follows a script with retransmissions and strays in it."""

    def __init__(self, seed: int, macs: Macs) -> None:
        self.random, self.macs, self.numbers = random.Random(seed), macs, itertools.count(1)
        self.leaves: dict[bytes, bytes] = {}
        """The frame as which one that is forwarded leaves, where it is another."""
        scripts = [getattr(self, kind)(flow) for flow, kind in zip(range(FLOWS), itertools.cycle(("tcp", "tcp", "udp", "echo")))]
        for script in scripts:  # not all flows start together
            script[:0] = [None] * self.random.randint(0, 3)
        self.rounds = [[packet for script in scripts if at < len(script) and (packet := script[at])] for at in range(ROUNDS)]
        self.packets = [packet for packets in self.rounds for packet in packets]

    def ends(self, flow: int) -> tuple[str, int, int]:
        """Return client address, client port and server port. Port and address name partitions of the same NF host."""
        partition = self.random.randrange(256)
        address = IPv4Address("10.0.1.0") + (self.random.randrange(128) * 2 | partition & 1)
        return str(address), 0x4000 | partition << 1 | self.random.randrange(2), 1000 + flow

    def packet(self, client: str, inside: bool, layers: Any, partition: int, strayed: bool = False, **ip: Any) -> Sent:
        """Return a packet between the client and the server; its IP identification makes it unlike all others."""
        source, target = (client, SERVER) if inside else (self.answering(client, layers), client)
        link = Ether(src=self.macs[not inside], dst=self.macs[inside])
        frame = bytes(link / IP(src=source, dst=target, id=next(self.numbers), **ip) / layers)
        return Sent(frame, inside, partition, strayed)

    def error(self, client: str, about: Sent, partition: int | None = None) -> Sent:
        """Return the ICMP error that the other side sends about a packet: by its client's address, as it has no ports."""
        quoted = bytes(Ether(self.leaves.get(about.frame, about.frame))[IP])[:28]
        by_address = int(IPv4Address(client)) & 0xFF
        strayed = partition is not None and (partition ^ by_address) & 1 == 1
        return self.packet(client, not about.inside, ICMP(type=3, code=1) / quoted, by_address, strayed)

    def answering(self, client: str, layers: Any) -> str:
        """Return the address that answers a client's packets."""
        return SERVER

    def disturbed(self, steps: list[Sent], again: Callable[[Sent], Sent], stray: Callable[[], Sent]) -> list[Sent | None]:
        """Return the script with retransmissions and packets out of state put in, cut to the trace's length."""
        script: list[Sent | None] = []
        for step in steps:
            if self.random.random() < 0.12:
                script.append(stray())
            script.append(step)
            if self.random.random() < 0.12:
                script.append(again(step))
        return script[: ROUNDS - 3]

    def tcp(self, flow: int) -> list[Sent | None]:
        client, port, server_port = self.ends(flow)
        if flow % 8 == 1:  # an ICMP error goes by this address, which belongs to the other NF host than the flow's port
            client = str(IPv4Address(client) + (-1 if int(IPv4Address(client)) & 1 else 1))
        partition = port >> 1 & 0xFF

        def segment(flags: str, inside: bool) -> Sent:
            ports = (port, server_port) if inside else (server_port, port)
            payload = self.random.randbytes(self.random.randint(1, 400)) if "P" in flags else b""
            return self.packet(client, inside, TCP(sport=ports[0], dport=ports[1], flags=flags, seq=flow) / payload, partition)

        steps = [segment(*step) for step in (("S", True), ("SA", False), ("A", True))]
        steps += [segment("PA", self.random.random() < 0.5) for _ in range(self.random.randint(1, 4))]
        if flow % 4 == 1:
            steps.append(self.error(client, steps[-1], partition))
        first = self.random.random() < 0.5
        closes: tuple[list[tuple[str, bool]], ...] = (
            [("FA", first), ("A", not first), ("FA", not first), ("A", first)],
            [("RA", first), ("PA", not first)],
            [],
        )
        steps += [segment(*step) for step in self.random.choice(closes)]
        steps += [segment("S", self.random.random() < 0.7)]
        return self.disturbed(
            steps,
            lambda step: self.packet(client, step.inside, Ether(step.frame)[IP].payload, step.partition, step.strayed),
            lambda: segment(self.random.choice(STRAY_FLAGS), self.random.random() < 0.5),
        )

    def udp(self, flow: int) -> list[Sent | None]:
        client, port, server_port = self.ends(flow)
        partition = port >> 1 & 0xFF

        def datagram(inside: bool, other_port: int = 0) -> Sent:
            ports = (port, server_port + other_port) if inside else (server_port + other_port, port)
            layers = UDP(sport=ports[0], dport=ports[1]) / self.random.randbytes(self.random.randint(0, 300))
            return self.packet(client, inside, layers, partition)

        def later_fragment() -> Sent:
            inside = self.random.random() < 0.5
            return self.packet(client, inside, self.random.randbytes(40), int(IPv4Address(client)) & 0xFF, proto=17, frag=9)

        steps = [datagram(self.random.random() < 0.6) for _ in range(self.random.randint(3, 8))]
        steps += [self.error(client, steps[-1], partition), datagram(False, other_port=100)]
        return self.disturbed(steps, lambda step: datagram(step.inside), later_fragment)

    def echo(self, flow: int) -> list[Sent | None]:
        client, identifier, _ = self.ends(flow)
        partition = int(IPv4Address(client)) & 0xFF

        def ping(inside: bool) -> Sent:
            return self.packet(client, inside, ICMP(type=8 if inside else 0, id=identifier, seq=flow) / b"ping", partition)

        steps = [ping(self.random.random() < 0.6) for _ in range(self.random.randint(3, 8))]
        steps.append(self.error(client, steps[0]))
        return self.disturbed(steps, lambda step: ping(step.inside), lambda: ping(False))


class BalancedTrace(Trace):
    """The same with a virtual address for the server's: its backends answer, and errors from their side quote what they saw."""

    def __init__(self, seed: int, macs: Macs) -> None:
        self.balancer = Instance.of("load_balancer", **SETTINGS["load_balancer"])
        super().__init__(seed, macs)

    def packet(self, client: str, inside: bool, layers: Any, partition: int, strayed: bool = False, **ip: Any) -> Sent:
        sent = super().packet(client, inside, layers, partition, strayed, **ip)
        if inside and self.balancer(sent.frame):
            self.leaves[sent.frame] = self.balancer.sent
        return sent

    def answering(self, client: str, layers: Any) -> str:
        """Return the address of the backend that these packets are the answers of."""
        if not isinstance(layers, (TCP, UDP, ICMP)) or (ICMP in layers and layers.type == 3):
            return SERVER
        layers = layers.copy()
        if isinstance(layers, ICMP):
            layers.type = 8
        else:
            layers.sport, layers.dport = layers.dport, layers.sport
        if isinstance(layers, TCP):
            layers.flags = "S"
        chooser = Instance.of("load_balancer", **SETTINGS["load_balancer"])
        chooser(bytes(Ether() / IP(src=client, dst=SERVER) / layers))
        return str(Ether(chooser.sent)[IP].dst)


def trace_of(name: str, seed: int, macs: Macs) -> Trace:
    """Return the trace for a network function."""
    return (BalancedTrace if name == "load_balancer" else Trace)(seed, macs)


def verdicts(trace: Trace, instance_of: Callable[[Sent], Instance]) -> list[bool]:
    """Return for each packet of the trace whether the network function forwards it, and note in the trace as what."""
    passed = []
    trace.leaves.clear()
    for sent in trace.packets:
        instance = instance_of(sent)
        passed.append(bool(instance(sent.frame, INSIDE if sent.inside else OUTSIDE)))
        if passed[-1]:
            trace.leaves[sent.frame] = instance.sent
    return passed


def shared(trace: Trace, name: str) -> tuple[list[bool], Instance]:
    """Return the verdicts where all instances see the same state, and that state."""
    one = Instance.of(name, **SETTINGS.get(name, {}))
    return verdicts(trace, lambda sent: one), one


def apart(trace: Trace, name: str, paths: str) -> list[bool]:
    """Return the verdicts where each of the two instances has a state of its own."""
    hosts = [Instance.of(name), Instance.of(name)]
    shift = int(paths == ASYMMETRIC)
    return verdicts(trace, lambda sent: hosts[(sent.partition + (0 if sent.inside else shift)) % 2])


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    if os.geteuid() != 0:
        pytest.skip("needs root: it builds the emulated rack")
    logs = tmp_path_factory.mktemp("logs")
    run_id = f"test-equivalence-{os.getpid()}"
    with Journal(run_id) as journal, Launcher(journal, logs, ("experiments.harness.preload",)) as launcher, Network(
        "rack", {"nf_hosts": 2, "store_hosts": 1}, run_id, launcher, journal
    ) as network:  # fmt: skip
        yield network


def arrivals(sockets: list[socket.socket], count: int) -> list[list[bytes]]:
    """Return the first `count` frames that arrive on either socket, by socket; fewer when none comes for long."""
    found: list[list[bytes]] = [[] for _ in sockets]
    while sum(map(len, found)) < count:
        ready, _, _ = select.select(sockets, [], [], ARRIVAL_S)
        if not ready:
            break
        for opened in ready:
            frame, (_, _, kind, *_rest) = opened.recvfrom(2048)
            if kind != socket.PACKET_OUTGOING:
                found[sockets.index(opened)].append(frame)
    return found


def through(bench: Bench, trace: Trace, expected: list[bool]) -> list[bool]:
    """Send the trace through the rack; return for each packet whether it came out at the other side, byte for byte as modelled.

    expected: spares a round whose packets all pass the wait for the instances' counters.
    """
    sockets, _ = open_sockets(bench)
    outcome: list[bool] = []
    sent = passed = 0
    for packets in trace.rounds:
        for packet in packets:
            sockets[not packet.inside].send(packet.frame)
        sent, before = sent + len(packets), passed
        all_pass = all(expected[len(outcome) : len(outcome) + len(packets)])
        passed = before + len(packets) if all_pass else forwarded(bench, sent)
        at_client, at_server = arrivals(sockets, passed - before)
        left = [trace.leaves.get(packet.frame, packet.frame) for packet in packets]
        inbound, outbound = ({f for f, p in zip(left, packets, strict=True) if p.inside == inside} for inside in (False, True))
        assert len(set(at_client + at_server)) == len(at_client + at_server) == passed - before, "each arrives once"
        assert set(at_client) <= inbound, "what comes out at the client is what went in at the server"
        assert set(at_server) <= outbound, "what comes out at the server is what went in at the client"
        outcome += [f in (at_server if p.inside else at_client) for f, p in zip(left, packets, strict=True)]
    for opened in sockets:
        assert received(opened, 0.05) == [], "nothing more comes out"
        opened.close()
    return outcome


def contents(key: FlowKey, value: bytes, layout: np.dtype) -> tuple[Any, ...]:
    """Return a record's fields, or a shared counter's words, without times."""
    if key.protocol == COUNTER_PROTOCOL:
        return tuple(np.frombuffer(value, np.uint64).tolist())
    fields = np.frombuffer(value, layout, 1)[0]
    return tuple(fields[name].item() for name in layout.names or () if name not in TIMES)


def stored(bench: Bench, name: str) -> dict[str, Any]:
    """Return what every record of the network function in all stores has, by its key."""
    layout = Instance.of(name).function.state
    found: dict[str, Any] = {}
    for host in bench.stores:
        found |= {str(record.key): contents(record.key, record.value, layout) for record in bench.records(host)}
    return found


def modelled(instance: Instance) -> dict[str, Any]:
    """Return the same of the network function's own records and counters; one that is all zero was never written."""
    values = {key: state.tobytes() for key, state in instance.records.items()}
    counters = {(high, low): np.zeros(4, np.uint64) for high, low, _ in instance.counters}
    for (high, low, word), count in instance.counters.items():
        counters[high, low][word] = count
    values |= {key: words.tobytes() for key, words in counters.items()}
    keys = {key: FlowKey.of_words(key[1], key[0]) for key in values}
    found = {str(keys[key]): contents(keys[key], value, instance.function.state) for key, value in values.items()}
    return {key: fields for key, fields in found.items() if any(fields)}


def run(network: Network, name: str, placement: str, paths: str, trace: Trace, expected: list[bool]) -> tuple[Any, ...]:
    """Send the trace under a placement that starts empty; return what came out, the stores' records and the statistics."""
    functions = {name: SETTINGS[name]} if name in SETTINGS else {}
    trial = Trial("mine", "rack", name, placement, 1, {}, {"paths": paths, "functions": functions}, 0, 1)
    bench = Bench(trial, EXPERIMENT, network, network.launcher)
    try:
        bench.start_state()
        bench.start_functions()
        outcome = through(bench, trace, expected)
        statistics = bench.function_statistics()
        records = stored(bench, name)
    finally:
        bench.stop()
        network.launcher.kill_on(list(network.hosts))  # the network goes on: what ran on it is forgotten here
    for host, counts in statistics.items():
        assert imbalance(counts["ledger"]) == 0
        assert counts["missing_frames"] == 0
        assert counts["ledger"]["received"] > len(trace.packets) / 4, f"{host} had its share of the packets"
    return outcome, records, statistics


def macs_of(network: Network) -> Macs:
    return [network.hosts[name].interfaces["net"].mac for name in ("client", "server")]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NFS)
@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("placement", [name for name in placements.names() if placements.load(name).store_role])
def test_what_comes_out_depends_on_neither_placement_nor_paths(
    network: Network, placement: str, paths: str, name: str, seed: int
) -> None:
    if (name, paths) == ("load_balancer", SYMMETRIC) and not IS_LONG:
        pytest.skip("the balancer on symmetric paths: long mode only: NEARSTATE_LONG=1")
    trace = trace_of(name, seed, macs_of(network))
    expected, model = shared(trace, name)
    outcome, records, statistics = run(network, name, placement, paths, trace, expected)
    assert outcome == expected
    assert records == modelled(model)
    fetches = sum(counts["fetches"] for counts in statistics.values())
    if placement == "integrated" and paths == SYMMETRIC:
        assert 0 < fetches <= sum(sent.strayed for sent in trace.packets), "only strayed errors do not find their record in place"
    else:
        assert fetches > len(trace.packets) / 4, "records were reached over the network"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("paths", PATHS)
def test_local_counts_and_forwards_everything(network: Network, paths: str, seed: int) -> None:
    trace = Trace(seed, macs_of(network))
    outcome, _, _ = run(network, "traffic_counter", "local", paths, trace, [True] * len(trace.packets))
    assert all(outcome)


@pytest.mark.parametrize("seed", SEEDS)
def test_local_loses_only_errors_steered_elsewhere_on_symmetric_paths(network: Network, seed: int) -> None:
    """An ICMP error about a TCP connection goes by the client's address: it may meet the instance without the connection."""
    trace = Trace(seed, macs_of(network))
    (everywhere, _), alone = shared(trace, "firewall"), apart(trace, "firewall", SYMMETRIC)
    outcome, _, _ = run(network, "firewall", "local", SYMMETRIC, trace, alone)
    assert outcome == alone
    different = [sent for sent, here, there in zip(trace.packets, outcome, everywhere, strict=True) if here != there]
    passed_elsewhere = [sent for sent, there in zip(trace.packets, everywhere, strict=True) if there and sent.strayed]
    assert different == passed_elsewhere
    assert different


@pytest.mark.parametrize("seed", SEEDS)
def test_local_loses_all_return_traffic_on_asymmetric_paths(network: Network, seed: int) -> None:
    """The instance that gets the answers has never seen a connection opened, the other one never sees one answered."""
    trace = Trace(seed, macs_of(network))
    (everywhere, _), alone = shared(trace, "firewall"), apart(trace, "firewall", ASYMMETRIC)
    outcome, _, _ = run(network, "firewall", "local", ASYMMETRIC, trace, alone)
    assert outcome == alone
    triples = list(zip(trace.packets, outcome, everywhere, strict=True))
    lost = [sent for sent, here, there in triples if there and not here]
    gained = [sent for sent, here, there in triples if here and not there]
    # the other instance gets all that comes from outside, but of the errors that go by address those from inside
    answers = [sent for sent, _, there in triples if there and sent.inside == sent.strayed]
    unanswered = [sent for sent, _, there in triples if there and sent.inside and sent.goes_on]
    assert lost == [sent for sent in trace.packets if sent in answers or sent in unanswered]
    assert answers
    assert unanswered
    assert all(sent.inside and "R" in str(sent.tcp_flags) for sent in gained), "resets of what an unseen reset had ended"


def test_the_trace_is_passed_and_refused_from_both_sides() -> None:
    trace = Trace(1, ["02:00:00:00:00:01", "02:00:00:00:00:02"])
    expected, _ = shared(trace, "firewall")
    kinds = {(sent.inside, passed) for sent, passed in zip(trace.packets, expected, strict=True)}
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}
    assert len({sent.frame for sent in trace.packets}) == len(trace.packets) > FLOWS * 5
    assert any(sent.strayed for sent in trace.packets)


def test_the_balanced_trace_reaches_two_backends_and_comes_back_from_them() -> None:
    trace = trace_of("load_balancer", 1, ["02:00:00:00:00:01", "02:00:00:00:00:02"])
    expected, model = shared(trace, "load_balancer")
    changed = [sent for sent in trace.packets if trace.leaves.get(sent.frame, sent.frame) != sent.frame]
    assert {Ether(trace.leaves[sent.frame])[IP].dst for sent in changed if sent.inside} == {"10.128.0.2", "10.128.0.3"}
    assert sum(not sent.inside for sent in changed) > 50, "answers come from the virtual address"
    assert any(ICMP in Ether(sent.frame) and Ether(sent.frame)[ICMP].type == 3 for sent in changed if not sent.inside)
    assert 0 < expected.count(False) < len(expected) / 4
    assert len(model.counters) > 4, "load is counted"
