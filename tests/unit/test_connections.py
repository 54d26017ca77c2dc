"""Are the segments of both ends right to scapy, and does each end count what happens to a connection?"""

from __future__ import annotations

import numpy as np
import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from experiments.workloads import connections
from experiments.workloads.connections import COMPLETED, FOREIGN, REPEATED, SYNS, UNANSWERED
from experiments.workloads.traffic import flow_tuple
from nfs.dataplane.frames import make_frames, take_frame
from nfs.dataplane.port import closed_port

MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02")
SERVER = "10.128.0.1"


def syn(number: int) -> bytes:
    memory = np.zeros(64, np.uint8)
    connections.write_syn(connections.make_initiator(*MACS, SERVER), memory, 0, number)
    return memory[:60].tobytes()


def turned(frame: bytes, sequence: int, acknowledgment: int, flags: int) -> bytes:
    memory = np.frombuffer(frame, np.uint8).copy()
    connections.turn_around(memory, 0, sequence, acknowledgment, flags)
    return memory.tobytes()


def assert_checksums(frame: bytes) -> None:
    """Compare with what scapy computes when it has to."""
    packet = Ether(frame)
    fresh = Ether(frame)
    del fresh[IP].chksum, fresh[TCP].chksum
    again = Ether(bytes(fresh))
    assert (packet[IP].chksum, packet[TCP].chksum) == (again[IP].chksum, again[TCP].chksum)


@pytest.mark.parametrize("number", [0, 1, 30_719, 30_720, 99_999, 2**31 + 7, 2**32 - 1])
def test_a_handshake_of_any_number_is_what_scapy_expects(number: int) -> None:
    client, client_port, server_port = flow_tuple(number)
    opens = syn(number)
    packet = Ether(opens)
    assert (packet.src, packet.dst) == MACS
    assert (packet[IP].src, packet[IP].dst, packet[IP].ttl, packet[IP].len) == (client, SERVER, 64, 40)
    assert (packet[TCP].sport, packet[TCP].dport, packet[TCP].flags, packet[TCP].seq) == (client_port, server_port, "S", number)
    answer = turned(opens, 0xFFFFFFFF, number + 1, 0x12)
    packet = Ether(answer)
    assert (packet.src, packet.dst, packet[IP].src, packet[IP].dst) == (*MACS[::-1], SERVER, client)
    assert (packet[TCP].sport, packet[TCP].dport, packet[TCP].flags) == (server_port, client_port, "SA")
    assert (packet[TCP].seq, packet[TCP].ack) == (0xFFFFFFFF, (number + 1) % 2**32)
    for frame in (opens, answer, turned(answer, number + 1, 0, 0x10)):
        assert_checksums(frame)


def test_connections_have_4_tuples_of_their_own() -> None:
    found = {syn(number)[26:38] for number in range(0, 200_000, 7)}
    assert len(found) == len(range(0, 200_000, 7))


def test_the_responder_counts_each_connection_once_and_nothing_else() -> None:
    responder, frames, port = connections.make_responder(100, 64), make_frames(128), closed_port()

    def arrives(frame: bytes) -> None:
        at = int(take_frame(frames))
        frames.memory[at : at + len(frame)] = np.frombuffer(frame, np.uint8)
        connections.answer(responder, port, frames, at, len(frame), 1)

    acknowledged = turned(turned(syn(110), 5, 111, 0x12), 111, 6, 0x10)
    for frame in (syn(110), acknowledged, acknowledged, turned(syn(110), 0, 0, 0x04), bytes(60), syn(110)[:53]):
        arrives(frame)
    arrives(turned(syn(99), 100, 1, 0x10))  # of a connection before the step
    counts = responder.control
    assert (counts[SYNS], counts[COMPLETED], counts[REPEATED], counts[FOREIGN]) == (1, 1, 1, 4)
    for _ in range(64):
        arrives(syn(111))
    assert counts[UNANSWERED] == 1, "what does not fit into the ring is counted"
