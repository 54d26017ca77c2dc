"""Are the generator's frames what scapy takes for correct packets, sent at their intended times?"""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from experiments.workloads import sink as sinks
from experiments.workloads.generator import NEXT_FLOW, SENT, STAMP_AT, STEP, Source, generate, make_source, write_frame
from experiments.workloads.traffic import IMIX, Traffic, flow_tuple, make_tables
from nfs.dataplane.frames import make_frames
from nfs.dataplane.headers import INSIDE
from nfs.dataplane.port import PENDING, TX_PRODUCER, closed_port
from tests.packets import parsed

MACS = ("02:00:00:00:00:01", "02:00:00:00:00:04")
SERVER = "10.128.0.1"


def source_of(**traffic: object) -> Source:
    return make_source(Traffic.of(**traffic), *MACS, SERVER)


def written(source: Source, length: int, slot: int, sequence: int = 0, intended_ns: int = 0) -> bytes:
    """Return the frame the generator writes, at the very end of the memory."""
    memory = np.zeros(100 + length, np.uint8)
    write_frame(source, memory, 100, length, slot, sequence, intended_ns)
    assert not memory[:100].any()
    return memory[100:].tobytes()


@pytest.mark.bounds
@pytest.mark.parametrize("frame_bytes", [64, 65, 127, 128, 594, 1517, 1518])
def test_scapy_finds_every_length_and_checksum_right(frame_bytes: int) -> None:
    source = source_of(flows=40_000)
    for slot in (0, 1, 255, 30_719, 30_720, 39_999):
        raw = written(source, frame_bytes - 4, slot)
        packet = Ether(raw)
        assert (packet.src, packet.dst, len(raw)) == (*MACS, frame_bytes - 4)
        checksum = packet[IP].chksum
        del packet[IP].chksum
        assert IP(bytes(packet[IP])).chksum == checksum
        assert packet[IP].len == frame_bytes - 18
        assert packet[UDP].len == frame_bytes - 38
        assert packet[UDP].chksum == 0, "RFC 768: none"
        assert (packet[IP].src, packet[UDP].sport, packet[UDP].dport) == flow_tuple(slot)
        assert packet[IP].dst == SERVER
        assert parsed(raw, INSIDE)[0]["status"] == 0


def test_with_few_ports_several_clients_use_the_same_one() -> None:
    source = source_of(flows=2000, client_ports=256)
    frames = [Ether(written(source, 60, slot)) for slot in range(2000)]
    ends = [(frame[IP].src, frame[UDP].sport, frame[UDP].dport) for frame in frames]
    assert ends == [flow_tuple(flow, 256) for flow in range(2000)]
    assert len(set(ends)) == 2000
    assert sorted({port for _, port, _ in ends}) == list(range(1024, 1536, 2))


@pytest.mark.bounds
def test_the_stamp_holds_step_sequence_time_and_slot() -> None:
    source = source_of(flows=70_000)
    source.control[STEP] = 513
    raw = written(source, 60, 69_999, sequence=2**47 + 5, intended_ns=2**62 + 3)
    word, intended, slot = struct.unpack_from("<QQH", raw, STAMP_AT)
    assert (word >> 48, word & (1 << 48) - 1, intended, slot) == (513, 2**47 + 5, 2**62 + 3, 69_999 & 0xFFFF)


def queued(source: Source, total: int, gap_ns: float, frames_in_all: int = 4096) -> list[bytes]:
    """Let the generator queue packets on a port that never sends; return the frames in order."""
    port, frames = closed_port(ring_slots=4096), make_frames(frames_in_all)
    generate(source, port, frames, time.monotonic_ns(), 0.0, total, gap_ns, time.monotonic_ns() + 5_000_000_000)
    sent = int(source.control[SENT])
    assert port.control[TX_PRODUCER] == sent
    return [
        frames.memory[int(port.tx_ring[2 * i]) : int(port.tx_ring[2 * i] + port.tx_ring[2 * i + 1])].tobytes()
        for i in range(sent)
    ]


def test_the_same_seed_sends_the_same_packets_and_each_flow_of_the_table() -> None:
    traffic = {"flows": 100, "frame_bytes": 0, "arrivals": "poisson", "new_flow_share": 0.05, "seed": 3}

    def without_time(frames: list[bytes]) -> list[bytes]:
        return [frame[: STAMP_AT + 8] + frame[STAMP_AT + 16 :] for frame in frames]

    one, other = (queued(source_of(**traffic), 2000, 100.0) for _ in range(2))
    assert without_time(one) == without_time(other)
    assert [len(frame) for frame in one] == make_tables(Traffic.of(**traffic)).lengths[:2000].tolist()
    assert {len(frame) + 4 for frame in one} == {size for size, _ in IMIX}


def test_new_flows_replace_old_ones_and_are_new() -> None:
    source = source_of(flows=50, new_flow_share=0.5)
    frames = queued(source, 1000, 100.0)
    tuples = [(Ether(frame)[IP].src, Ether(frame)[UDP].sport, Ether(frame)[UDP].dport) for frame in frames]
    new = int(source.tables.new[:1000].sum())
    assert source.control[NEXT_FLOW] == 50 + new
    assert {flow_tuple(flow) for flow in range(50, 50 + new)} <= set(tuples)


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
def test_intended_times_keep_the_rate_and_nothing_leaves_early(arrivals: str) -> None:
    source = source_of(flows=10, arrivals=arrivals)
    started = time.monotonic_ns()
    frames = queued(source, 2000, 50_000.0)
    took = time.monotonic_ns() - started
    intended = np.array([struct.unpack_from("<Q", frame, STAMP_AT + 8)[0] for frame in frames], np.int64)
    gaps = np.diff(intended)
    assert gaps.mean() == pytest.approx(50_000, rel=0.001 if arrivals == "constant" else 0.1)
    assert gaps == pytest.approx(50_000 * source.tables.gaps[:1999], abs=1.5)
    assert took >= intended[-1] - started, "no packet is sent before its time"
    assert source.lateness.sum() == 2000


def test_a_full_ring_blocks_and_loses_no_packet() -> None:
    """Nothing is skipped when the path takes no more: the next attempt sends the same packet."""
    source = source_of(flows=10)
    port, frames = closed_port(ring_slots=64), make_frames(256)
    until = time.monotonic_ns() + 20_000_000
    generate(source, port, frames, time.monotonic_ns(), 0.0, 500, 10.0, until)
    assert source.control[SENT] == 64
    assert port.control[PENDING] == 0
    assert frames.control[0] == 256 - 64


@pytest.mark.bounds
def test_the_sink_counts_loss_duplicates_reordering_and_strangers() -> None:
    source = source_of(flows=4)
    source.control[STEP] = 7
    memory = np.zeros(2048, np.uint8)
    counter = sinks.make_sink(100, 7)

    def arrive(sequence: int, slot: int, late_ns: int = 1000) -> None:
        write_frame(source, memory, 0, 60, slot, sequence, 5_000_000)
        sinks.take(counter, memory, 0, 60, 5_000_000 + late_ns)

    for sequence, slot in ((0, 0), (1, 1), (3, 1), (2, 2), (5, 3), (4, 3), (5, 3)):
        arrive(sequence, slot)
    arrive(100_000, 0)
    source.control[STEP] = 6
    arrive(8, 0)
    for length in (0, 14, 59):
        sinks.take(counter, memory[:length].copy(), 0, length, 0)
    control = counter.control
    assert [int(control[n]) for n in (sinks.RECEIVED, sinks.DUPLICATED, sinks.REORDERED, sinks.FLOW_REORDERED)] == [6, 1, 2, 1]
    assert [int(control[n]) for n in (sinks.FOREIGN, sinks.OUT_OF_RANGE)] == [4, 1]
    assert counter.latency.sum() == 6
