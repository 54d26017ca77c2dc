"""Does a replay send each packet at its time or after what it answers, and find it again, whatever a network function changes?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from experiments.workloads import replay as replays
from experiments.workloads.capture import Prepared, prepare
from experiments.workloads.replay import Player, make_player
from experiments.workloads.traffic import Replay
from nfs.dataplane.frames import make_frames
from nfs.dataplane.headers import INSIDE, OUTSIDE
from nfs.dataplane.port import closed_port
from tests import packets
from tests.unit.test_capture import ETHERNET, MACS, conversation, frames_of, save


def prepared_of(path: Path, frames: Sequence[Packet], times: list[float] | None = None) -> Prepared:
    return prepare(Replay.of(pcap=save(path, frames, times)), *MACS)


def arrive(player: Player, frame: bytes, now: int = 1) -> None:
    """Let a frame arrive that ends where its memory ends."""
    replays.take(player, np.frombuffer(frame, np.uint8).copy(), 0, len(frame), now, 0, 0.0)


def fingerprint(frame: Packet | bytes) -> int:
    memory = np.frombuffer(bytes(frame), np.uint8).copy()
    return int(replays.fingerprint(memory, 0, memory.size))


def counted(player: Player) -> list[int]:
    """Return received, duplicated, reordered, reordered in a flow, foreign."""
    words = (replays.RECEIVED, replays.DUPLICATED, replays.REORDERED, replays.FLOW_REORDERED, replays.FOREIGN)
    return [int(player.control[word]) for word in words]


def translated(frame: bytes) -> bytes:
    """Return a packet as a NAT and a router would send it on."""
    packet = Ether(frame)
    packet.src = packet.dst = "02:00:00:00:00:77"
    packet[IP].src, packet[IP].dst, packet[IP].ttl = "203.0.113.1", "203.0.113.2", packet[IP].ttl - 1
    if ICMP in packet:
        packet[ICMP].id = 4711
    for layer in (TCP, UDP):
        if layer in packet and not packet[IP].frag:
            packet[layer].sport = 61_000
    for checked in (IP, TCP, UDP, ICMP):
        if checked in packet:
            del packet[checked].chksum
    return bytes(packet)


@pytest.mark.bounds
def test_packets_are_found_after_translation(tmp_path: Path) -> None:
    prepared = prepared_of(tmp_path / "a.pcap", conversation())
    for side in (INSIDE, OUTSIDE):
        player = make_player(prepared, side)
        others = [frame for frame, of in zip(frames_of(prepared), prepared.side, strict=True) if of != side]
        for frame in others:
            arrive(player, translated(frame))
        assert counted(player) == [len(others), 0, 0, 0, 0]
        arrive(player, others[0])
        assert counted(player) == [len(others), 1, 0, 0, 0]


@pytest.mark.bounds
def test_what_differs_in_the_packet_differs_in_its_fingerprint() -> None:
    base = ETHERNET / IP(src="10.0.1.1", dst="10.128.0.1", id=5) / TCP(sport=1, dport=2, seq=7, ack=8) / b"payload"
    changed = []
    for layer, name, value in ((TCP, "seq", 8), (TCP, "ack", 9), (TCP, "flags", "PA"), (TCP, "window", 1), (IP, "id", 6)):
        packet = base.copy()
        setattr(packet[layer], name, value)
        changed.append(packet)
    changed.append(ETHERNET / IP(src="10.0.1.1", dst="10.128.0.1", id=5) / TCP(sport=1, dport=2, seq=7, ack=8) / b"Payload")
    prints = [fingerprint(bytes(packet)) for packet in (base, *changed)]
    assert len(set(prints)) == len(prints)
    assert 0 not in prints


@pytest.mark.bounds
def test_no_frame_is_read_beyond_its_end() -> None:
    for frame in packets.well_formed().values():
        for length in range(len(frame)):
            fingerprint(frame[:length])


def test_strangers_losses_and_reordering_are_counted(tmp_path: Path) -> None:
    frames = [packets.udp(client_port=port, payload=bytes([number])) for number, port in enumerate((1, 1, 2, 2, 1))]
    prepared = prepared_of(tmp_path / "a.pcap", [Ether(frame) for frame in frames])
    player, sent = make_player(prepared, OUTSIDE), frames_of(prepared)
    for number in (0, 3, 2, 1):
        arrive(player, sent[number])
    arrive(player, packets.echo())
    arrive(player, packets.well_formed()["arp"])
    assert counted(player) == [4, 0, 2, 1, 2]
    assert np.flatnonzero(player.arrived_ns == 0).tolist() == [4]


def test_of_equal_packets_each_is_counted_and_the_last_are_the_lost_ones(tmp_path: Path) -> None:
    prepared = prepared_of(tmp_path / "a.pcap", [Ether(packets.udp())] * 5)
    player = make_player(prepared, OUTSIDE)
    for frame in frames_of(prepared)[:3]:
        arrive(player, frame)
    assert np.flatnonzero(player.arrived_ns == 0).tolist() == [3, 4]


def sent_frames(player: Player, speed: float, now: int, patience_ns: int = 0) -> list[bytes]:
    """Let a player that started at 0 queue what may leave at `now`, on a port that never sends; return all it has queued."""
    port = closed_port(ring_slots=256)
    before = int(player.control[replays.SENT])
    frames = make_frames(1024)
    replays.send(player, port, frames, 0, speed, patience_ns, now)
    ring = port.tx_ring.reshape(-1, 2).astype(np.int64)[: int(player.control[replays.SENT]) - before]
    return [frames.memory[at : at + length].tobytes() for at, length in ring]


def test_packets_leave_at_their_times_scaled(tmp_path: Path) -> None:
    frames = [Ether(packets.udp(client_port=port)) for port in range(10)]
    prepared = prepared_of(tmp_path / "a.pcap", frames, [number / 100 for number in range(10)])
    for speed, expected in ((1.0, 5), (0.5, 3), (1000.0, 10)):
        player = make_player(prepared, INSIDE)
        assert sent_frames(player, speed, now=-1) == []
        assert sent_frames(player, speed, now=45_000_000) == frames_of(prepared)[:expected]
        assert sent_frames(player, speed, now=45_000_000) == [], "none leaves before its time"
        assert int(player.lateness.sum()) == expected


def test_at_speed_0_an_answer_waits_for_what_it_answers(tmp_path: Path) -> None:
    prepared = prepared_of(tmp_path / "a.pcap", conversation()[:5])
    player, frames = make_player(prepared, OUTSIDE), frames_of(prepared)
    assert sent_frames(player, 0.0, now=1_000, patience_ns=500_000) == []
    arrive(player, frames[0])
    assert sent_frames(player, 0.0, now=2_000, patience_ns=500_000) == [frames[1]]
    assert sent_frames(player, 0.0, now=501_000, patience_ns=500_000) == []
    assert player.control[replays.IMPATIENT] == 0
    assert sent_frames(player, 0.0, now=502_000, patience_ns=500_000) == [frames[4]], "then it has waited long enough"
    assert player.control[replays.IMPATIENT] == 1
