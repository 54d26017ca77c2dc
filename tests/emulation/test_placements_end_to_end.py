"""In the rack, wherever the state lives: does the firewall let inside open and outside answer, with the same verdicts?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.l2 import Ether

from datastore import placements
from experiments.harness.bench import Bench
from experiments.harness.runner import network_parameters
from experiments.harness.spec import Experiment, Trial
from nfs.dataplane.headers import INSIDE
from nfs.dataplane.ledger import imbalance
from tests.conftest import received
from tests.packets import Instance, echo, icmp_error, tcp, udp
from tests.rack import ARRIVAL_S, forwarded, open_sockets
from topologies.emulation.journal import Journal
from topologies.emulation.network import Network
from topologies.emulation.processes import Launcher

EXPERIMENT = Experiment(question="Are verdicts the same everywhere?", procedure="packet_latency", sweeps=())
PORTS = (40_002, 40_004, 40_006, 50_000, 50_010)
"""Client ports in partitions of both NF hosts."""

# Each step: what it is, the side it comes from, and the frame for a client port.
STEPS = (
    ("SYN from outside", False, lambda port: tcp("S", inside=False, client_port=port)),
    ("data from outside", False, lambda port: tcp("PA", inside=False, client_port=port)),
    ("UDP from outside", False, lambda port: udp(inside=False, client_port=port)),
    ("data from inside before any SYN", True, lambda port: tcp("PA", client_port=port)),
    ("SYN from inside", True, lambda port: tcp("S", client_port=port)),
    ("SYN ACK", False, lambda port: tcp("SA", inside=False, client_port=port)),
    ("ACK", True, lambda port: tcp("A", client_port=port)),
    ("request", True, lambda port: tcp("PA", payload=b"GET /", client_port=port)),
    ("answer", False, lambda port: tcp("PA", inside=False, payload=b"200 OK", client_port=port)),
    ("answer to another port", False, lambda port: tcp("PA", inside=False, client_port=port + 1)),
    ("UDP question", True, lambda port: udp(client_port=port)),
    ("UDP answer", False, lambda port: udp(inside=False, client_port=port)),
    ("UDP answer from elsewhere", False, lambda port: udp(inside=False, client_port=port, server_port=54)),
    ("ping", True, lambda port: echo(identifier=port)),
    ("pong", False, lambda port: echo(inside=False, identifier=port)),
    ("pong nobody asked for", False, lambda port: echo(inside=False, identifier=port + 1)),
    ("error about the ping", False, lambda port: icmp_error(echo(identifier=port))),
    ("inside closes", True, lambda port: tcp("FA", client_port=port)),
    ("last data from outside", False, lambda port: tcp("PA", inside=False, client_port=port)),
    ("outside closes", False, lambda port: tcp("FA", inside=False, client_port=port)),
    ("the last acknowledgement", True, lambda port: tcp("A", client_port=port)),
    ("SYN from outside after the end", False, lambda port: tcp("S", inside=False, client_port=port)),
    ("SYN from inside again", True, lambda port: tcp("S", client_port=port)),
    ("reset", False, lambda port: tcp("RA", inside=False, client_port=port)),
    ("data after the reset", False, lambda port: tcp("PA", inside=False, client_port=port)),
)  # fmt: skip


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, Launcher]]:
    if os.geteuid() != 0:
        pytest.skip("needs root: it builds the emulated rack")
    logs: Path = tmp_path_factory.mktemp("logs")
    preload = ("experiments.harness.preload",)
    with Journal(f"test-placements-{os.getpid()}") as journal, Launcher(journal, logs, preload) as launcher:
        yield journal, launcher


def expected_verdicts() -> list[tuple[str, int, bool]]:
    """Return (step, client port, passed) as the function itself says, without engine, store and network."""
    firewall = Instance.of("firewall")
    return [(name, port, bool(firewall(make(port), INSIDE) if inside else firewall.outside(make(port))))
            for name, inside, make in STEPS for port in PORTS]  # fmt: skip


def verdicts(bench: Bench) -> list[tuple[str, int, bool]]:
    """Send every step's packets through the rack and return which of them came out at the other side, as they went in."""
    sockets, macs = open_sockets(bench)
    found, sent, passed = [], 0, 0
    for name, inside, make in STEPS:
        source, target = sockets if inside else sockets[::-1]
        frames = {}
        for port in PORTS:
            frame = Ether(make(port))
            frame.src, frame.dst = macs if inside else macs[::-1]
            frames[port] = bytes(frame)
            source.send(frames[port])
        sent, before = sent + len(PORTS), passed
        passed = forwarded(bench, sent)
        arrived = received(target, ARRIVAL_S, passed - before)
        assert len(arrived) == len(set(arrived)) == passed - before, f"{name}: each forwarded packet arrives once"
        assert set(arrived) <= set(frames.values()), f"{name}: something else came out"
        found += [(name, port, frame in arrived) for port, frame in frames.items()]
    for opened in sockets:
        assert received(opened) == [], "nothing more comes out"
        opened.close()
    return found


@pytest.mark.parametrize("placement", placements.names())
def test_verdicts_do_not_depend_on_where_the_state_is(emulation: tuple[Journal, Launcher], placement: str) -> None:
    journal, launcher = emulation
    trial = Trial("mine", "rack", "firewall", placement, 1, {}, {}, 0, 1)
    network = Network("rack", network_parameters(trial, EXPERIMENT), journal.run_id, launcher, journal)
    bench = Bench(trial, EXPERIMENT, network, launcher)
    try:
        network.start()
        bench.start_state()
        bench.start_functions()
        assert verdicts(bench) == expected_verdicts()
        statistics = bench.function_statistics()
    finally:
        bench.stop()
        network.stop()
    for name, counts in statistics.items():
        assert imbalance(counts["ledger"]) == 0
        assert counts["missing_frames"] == 0
        assert counts["ledger"]["received"] > len(STEPS), f"{name} had its share of the packets"
        assert (counts["fetches"] > 0) == (placement not in ("local", "integrated")), "state is where the placement says"
    assert sum(counts["ledger"]["received"] for counts in statistics.values()) == len(STEPS) * len(PORTS)


def test_the_steps_are_both_passed_and_refused() -> None:
    passed = {name for name, _, out in expected_verdicts() if out}
    assert {"SYN from inside", "SYN ACK", "answer", "UDP answer", "pong", "error about the ping"} <= passed
    assert not passed & {"SYN from outside", "UDP from outside", "answer to another port", "pong nobody asked for"}
