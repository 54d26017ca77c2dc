"""Is what was recorded at each interface what was sent, and does a replay of it come through the firewall?"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from scapy.utils import RawPcapReader

from experiments.harness import spec
from experiments.harness.runner import run_trial
from experiments.harness.spec import Experiment
from experiments.workloads.traffic import Traffic, flow_tuple, make_tables, packets_in, scheduled_s
from tests import packets
from tests.unit.test_capture import ETHERNET, right_checksums, save
from topologies.emulation import recordings
from topologies.emulation.journal import Journal
from topologies.emulation.network import Network
from topologies.emulation.processes import Launcher
from topologies.emulation.recorder import Recorder

Emulation = tuple[Journal, Launcher]
FLOWS, PACKETS = 100, 500


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulation]:
    if os.geteuid() != 0:
        pytest.skip("needs root: it builds emulated networks")
    preload = ("experiments.harness.preload",)
    with Journal(f"test-pcap-{os.getpid()}") as journal, Launcher(journal, tmp_path_factory.mktemp("logs"), preload) as launcher:
        yield journal, launcher


def recorded_trial(emulation: Emulation, folder: Path, experiment: Experiment) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """Run an experiment's only trial, recorded; return its line and the frames by host and interface."""
    spec.check("mine", experiment)
    (trial,) = spec.trials("mine", experiment)
    line = run_trial(trial, experiment, *emulation, folder)
    json.dumps(line)  # it must fit into trials.jsonl
    files = {path.stem: path for path in folder.glob("*/*.pcap")}
    assert line["points"], "\n".join(line["invalid_reasons"])
    assert set(line["recorded"]["interfaces"]) == set(files)
    frames = {name: [frame for frame, _ in RawPcapReader(str(path))] for name, path in files.items()}
    for name, counts in line["recorded"]["interfaces"].items():
        assert counts == {"frames": len(frames[name]), "dropped": 0, "full": False}
    return line, frames


def experiment(procedure: str, topology: str, nf: str, traffic: dict[str, Any], **settings: Any) -> Experiment:
    """Return an experiment of one trial that is judged by what arrives, not by how late a busy machine was."""
    grid = {"topology": (topology,), "nf": (nf,), "placement": ("integrated",)}
    patient = {"lateness_limit_us": 0.0, "recorded": True}
    return Experiment("?", procedure, (grid,), settings={**patient, **settings}, traffic=traffic)


def payloads(frames: list[bytes]) -> Counter[bytes]:
    """Return the IP packets, however often each; a network function that routes may change MAC addresses."""
    return Counter(frame[14:] for frame in frames)


def test_every_interface_is_recorded_and_has_the_frames_that_were_sent(emulation: Emulation, tmp_path: Path) -> None:
    """Generator and network function send and take by AF_XDP here: no packet socket on their own interfaces sees that."""
    traffic = {"flows": FLOWS, "frame_bytes": 128}
    mine = experiment(
        "packet_latency", "rack", "traffic_counter", traffic, offered_kpps=2.0, seconds=PACKETS / 2000, warmup_kpps=2.0
    )
    line, frames = recorded_trial(emulation, tmp_path, mine)
    assert set(frames) == {"client-net", "server-net", "control-storage"} | {
        f"{host}-{interface}" for host in ("nf1", "nf2") for interface in ("inside", "outside", "storage")
    }
    assert line["ledger"]["received"] == PACKETS
    sent = [Ether(frame) for frame in frames["client-net"]]
    assert len(sent) == int(0.1 * 2000) + PACKETS, "the warm-up lasts at least a tenth of a second"
    assert {len(packet) for packet in sent} == {124}
    assert {(packet[IP].src, packet.sport, packet.dport) for packet in sent} == {flow_tuple(flow) for flow in range(FLOWS)}
    assert payloads(frames["server-net"]) == payloads(frames["client-net"])
    for side in ("inside", "outside"):
        both = frames[f"nf1-{side}"] + frames[f"nf2-{side}"]
        assert payloads(both) == payloads(frames["client-net"])
        assert min(len(frames["nf1-inside"]), len(frames["nf2-inside"])) > 0


def test_delayed_cables_are_recorded_on_both_sides_of_the_delay(emulation: Emulation, tmp_path: Path) -> None:
    journal, launcher = emulation
    with Network("back_to_back", {"delay_us": 2000.0}, journal.run_id, launcher, journal, recorded=True) as network:
        recorder = Recorder(network, tmp_path / "delayed")
        recorder.start()
        assert network.calibrate().loss == 0.0
        counts = recorder.stop()
    assert set(counts["interfaces"]) == {"client-net", "nf1-inside", "server-net", "nf1-outside"}
    times: dict[str, dict[bytes, int]] = {}
    for name in ("client-net", "nf1-inside"):
        with RawPcapReader(str(tmp_path / "delayed" / f"{name}.pcap")) as reader:
            assert reader.nano
            times[name] = {frame: about.sec * 10**9 + about.usec for frame, about in reader}
    common = set(times["client-net"]) & set(times["nf1-inside"])
    assert len(common) > 50
    gaps_us = sorted((times["nf1-inside"][frame] - times["client-net"][frame]) / 1000 for frame in common)
    assert min(abs(gap) for gap in gaps_us) > 1500, "each frame is seen before and after the delay"


CONNECTIONS = range(50_000, 50_064, 2)
STEPS = (
    lambda port: packets.tcp("S", client_port=port),
    lambda port: packets.tcp("SA", inside=False, client_port=port),
    lambda port: packets.tcp("A", client_port=port),
    lambda port: packets.tcp("PA", payload=b"GET /", client_port=port),
    lambda port: packets.tcp("PA", inside=False, payload=bytes(1000), client_port=port),
    lambda port: packets.udp(client_port=port),
    lambda port: packets.udp(inside=False, client_port=port),
    lambda port: packets.tcp("S", inside=False, client_port=port + 1000),  # nobody asked for it: what a firewall refuses
)


def told_apart(frame: bytes, port: int) -> bytes:
    """Return the frame with an IP identification of its connection: ports are no part of what arrivals are matched by, and of
    frames alike one connection's could be taken for another's."""
    packet = Ether(frame)
    packet[IP].id = port
    del packet[IP].chksum
    return bytes(packet)


def test_a_recording_is_replayed_through_the_firewall(emulation: Emulation, tmp_path: Path) -> None:
    """A made file first; then what was recorded of it at the client is replayed, and is found at the server.

    As fast as possible: an answer then waits for its question, so that a busy machine changes no verdict.
    """
    patient = {"speed": 0.0, "patience_ms": 10_000.0}
    source = save(tmp_path / "made.pcap", [told_apart(step(port), port) for step in STEPS for port in CONNECTIONS])
    made = experiment("replay", "rack", "firewall", {"pcap": source, **patient})
    line, frames = recorded_trial(emulation, tmp_path / "first", made)
    total, refused = len(STEPS) * len(CONNECTIONS), len(CONNECTIONS)
    point, ledger = line["points"][0], line["ledger"]
    assert point["replay"]["lost"] == {"outward": [], "inward": list(range(total - refused + 1, total + 1))}
    assert ledger["nf"]["dropped_by_verdict"] == refused
    assert (ledger["sent"], ledger["lost"], ledger["unaccounted"]) == (total, refused, 0)
    assert point["metrics"]["flow_reordered"] == 0
    assert len(frames["client-net"]) == total - refused, "the client never saw what was refused"
    recording = next((tmp_path / "first").glob("*/client-net.pcap"))
    again = experiment("replay", "rack", "firewall", {"pcap": str(recording), **patient})
    line, second = recorded_trial(emulation, tmp_path / "second", again)
    point = line["points"][0]
    assert point["replay"]["lost"] == {"outward": [], "inward": []}
    assert point["metrics"]["impatient"] == 0
    assert payloads(second["client-net"]) == payloads(second["server-net"]) == payloads(frames["client-net"])


def test_packets_keep_their_times_scaled(emulation: Emulation, tmp_path: Path) -> None:
    """UDP from inside: whatever comes first opens, so only the clock decides when a packet leaves."""
    count, gap_s, speed = 200, 0.004, 2.0
    frames = [packets.udp(client_port=50_000 + number, payload=bytes([number])) for number in range(count)]
    source = save(tmp_path / "made.pcap", frames, [1_700_000_000 + number * gap_s for number in range(count)])
    timed = experiment("replay", "back_to_back", "firewall", {"pcap": source, "speed": speed, "ports": "spread"})
    line, seen = recorded_trial(emulation, tmp_path, timed)
    point = line["points"][0]
    assert point["replay"]["lost"] == {"outward": [], "inward": []}
    assert point["metrics"]["sent_kpps"] <= count / ((count - 1) * gap_s / speed) / 1000, "none leaves before its time"
    assert point["metrics"]["p99_us"] > 0
    assert payloads(seen["server-net"]) == payloads(seen["client-net"])
    mapped = [Ether(frame) for frame in seen["server-net"]]
    assert {packet.sport for packet in mapped} == set(range(1024, 1024 + 2 * count, 2))


def exchange(client: str, port: int) -> list[Packet]:
    """Return what a client and a server say, as seen beside the client.

    TCP to its end, a datagram with an answer in two fragments, a ping, and a router's ICMP error about a TCP segment.
    """
    out: Any = IP(src=client, dst=SERVICE, id=port)
    back: Any = IP(src=SERVICE, dst=client, id=port)
    tcp_out: dict[str, Any] = {"sport": port, "dport": 443}
    tcp_back: dict[str, Any] = {"sport": 443, "dport": port}
    data = out / TCP(**tcp_out, flags="PA", seq=101, ack=501) / b"GET /"
    error = IP(src="203.0.113.1", dst=client, id=port) / ICMP(type=3, code=4) / Raw(bytes(data)[:28])
    return [
        out / TCP(**tcp_out, flags="S", seq=100),
        back / TCP(**tcp_back, flags="SA", seq=500, ack=101),
        out / TCP(**tcp_out, flags="A", seq=101, ack=501),
        data,
        error,
        back / TCP(**tcp_back, flags="PA", seq=501, ack=106) / bytes(range(200)),
        out / UDP(sport=port, dport=53) / port.to_bytes(2, "big"),
        *fragment(back / UDP(sport=53, dport=port) / Raw(bytes(range(250)) * 8), fragsize=1200),
        out / ICMP(type=8, id=port, seq=1) / b"ping",
        back / ICMP(type=0, id=port, seq=1) / b"ping",
        back / TCP(**tcp_back, flags="FA", seq=701, ack=106),
        out / TCP(**tcp_out, flags="FA", seq=106, ack=702),
        back / TCP(**tcp_back, flags="A", seq=702, ack=107),
    ]


SERVICE = "198.51.100.80"
CLIENTS = [(f"192.0.2.{10 + number}", 50_000 + 2 * number) for number in range(24)]
CLIENTS_AT_SERVER = {"nat": "10.64.0.", "nat_symmetric": "10.64.0.", "load_balancer": "10.0.1.", "firewall+nat": "10.64.0."}


@pytest.mark.parametrize("nf", CLIENTS_AT_SERVER)
def test_answers_of_a_replay_reach_their_connection_through_a_translator(emulation: Emulation, tmp_path: Path, nf: str) -> None:
    """The server's packets are aimed at what came out; every one of them arrives, with checksums that a host would accept."""
    steps = list(zip(*(exchange(client, port) for client, port in CLIENTS), strict=True))
    source = save(tmp_path / "made.pcap", [ETHERNET / packet for step in steps for packet in step])
    mine = experiment("replay", "rack", nf, {"pcap": source, "speed": 0.0, "patience_ms": 10_000.0})
    line, seen = recorded_trial(emulation, tmp_path / "trial", mine)
    point = line["points"][0]
    assert point["replay"]["lost"] == {"outward": [], "inward": []}, line["ledger"]
    assert (point["valid"], point["metrics"]["impatient"]) == (True, 0)
    assert line["ledger"]["sent"] == line["ledger"]["received"] == len(steps) * len(CLIENTS)
    at_server = [Ether(frame) for frame in seen["server-net"]]
    clients = {packet[IP].src for packet in at_server if not packet[IP].src.startswith("10.128.")}
    assert all(address.startswith(CLIENTS_AT_SERVER[nf]) for address in clients), "translated"
    for frame in (*seen["client-net"], *seen["server-net"]):
        packet = Ether(frame)
        if not packet[IP].frag and not packet[IP].flags.MF:
            assert right_checksums(packet) == frame, packet.summary()


def test_a_trial_in_which_all_is_dropped_says_so_and_ends(emulation: Emulation, tmp_path: Path) -> None:
    """The middle of connections whose beginning is not in the file: a NAT knows none of them."""
    parts = [exchange(client, port)[step] for step in (2, 5) for client, port in CLIENTS]
    source = save(tmp_path / "made.pcap", [ETHERNET / packet for packet in parts])
    line, _ = recorded_trial(emulation, tmp_path / "trial", experiment("replay", "rack", "nat", {"pcap": source, "speed": 0.0}))
    assert not line["valid"]
    point = line["points"][0]
    assert [reason.partition(":")[0] for reason in point["invalid_reasons"]] == [
        f"of {len(CLIENTS)} packets from {party} 0 arrived (NF processes dropped" for party in ("inside", "outside")
    ]
    assert f"dropped_by_verdict {2 * len(CLIENTS)}" in point["invalid_reasons"][0]
    assert line["ledger"]["unaccounted"] == 0
    assert recordings.is_ours(next((tmp_path / "trial").glob("*/server-net.pcap")))


def test_a_sample_of_random_arrivals_is_no_fault_of_the_machine(emulation: Emulation, tmp_path: Path) -> None:
    """1 kpps for 1 s: the first seed whose gaps make that 3 % longer."""
    traffic = {"flows": FLOWS, "arrivals": "poisson"}
    settings = {"offered_kpps": 1.0, "seconds": 1.0, "warmup_kpps": 2.0, "recorded": False}
    mine = experiment("packet_latency", "back_to_back", "traffic_counter", traffic, **settings)
    warm_up = packets_in(2.0, 0.1)
    drawn = (make_tables(Traffic.of(**traffic, seed=seed)) for seed in itertools.count(1))
    seed = next(seed for seed, tables in enumerate(drawn, 1) if scheduled_s(tables, warm_up, 1000, 1.0) > 1.03)
    (trial,) = spec.trials("mine", replace(mine, seed=seed))
    line = run_trial(trial, mine, *emulation, tmp_path)
    assert line["points"], line["invalid_reasons"]
    assert line["points"][0]["invalid_reasons"] == []
    assert line["points"][0]["metrics"]["sent_kpps"] < 0.98, "as drawn"
