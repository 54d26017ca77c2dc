"""Does the parser read what scapy wrote, refuse what contradicts itself, and never look beyond the frame?"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.compiled import allocating, jit
from nfs.dataplane.headers import (
    FRAGMENT,
    INSIDE,
    MALFORMED,
    MAX_FRAME_BYTES,
    NOT_IP,
    OUTSIDE,
    OVERSIZED,
    PACKET,
    TRUNCATED,
    make_packets,
    parse,
)  # fmt: skip
from nfs.dataplane.ledger import UNREADABLE
from tests import packets
from tests.packets import expected, icmp_error, outward, parsed, tcp, udp

FRAMES = packets.well_formed()
STATUSES = {0, FRAGMENT, MALFORMED, NOT_IP, OVERSIZED, TRUNCATED, UNREADABLE}
KEY_FIELDS = {"frame", "key_high", "key_low", "partition", "verdict"}


def fields(packet: np.ndarray) -> dict[str, int]:
    return {name: int(packet[0][name]) for name in PACKET.names if name not in KEY_FIELDS}


@pytest.mark.python_mode
@pytest.mark.bounds
@pytest.mark.parametrize("arrived_from", [INSIDE, OUTSIDE])
@pytest.mark.parametrize("name", FRAMES)
def test_every_field_is_what_scapy_says(name: str, arrived_from: int) -> None:
    wanted = {key: value for key, value in expected(FRAMES[name], arrived_from).items() if key not in KEY_FIELDS}
    assert fields(parsed(FRAMES[name], arrived_from, before=b"\xff" * 37)) == wanted


@pytest.mark.python_mode
def test_nothing_of_the_packet_before_stays() -> None:
    """The engine parses into the same element again and again: every field must be set anew."""
    memory = np.frombuffer(b"".join(frame.ljust(2048, b"\0") for frame in FRAMES.values()), np.uint8)
    reused = make_packets(1)
    for before in ("tcp syn", "error quoting tcp", "udp later fragment"):
        for number, (name, frame) in enumerate(FRAMES.items()):
            parse(memory, list(FRAMES).index(before) * 2048, len(FRAMES[before]), INSIDE, reused, 0)
            parse(memory, number * 2048, len(frame), OUTSIDE, reused, 0)
            assert fields(reused) == fields(parsed(frame, OUTSIDE)), (before, name)


@pytest.mark.python_mode
@pytest.mark.bounds
@pytest.mark.parametrize("name", FRAMES)
def test_a_truncated_packet_is_told_at_every_length(name: str) -> None:
    """Cut anywhere inside what its headers announce, an IP packet is truncated; padding behind it may go."""
    frame = FRAMES[name]
    whole = expected(frame)
    network = whole["network_offset"]
    if whole["ip_version"] == 6:
        announced = network + 40 + int.from_bytes(frame[network + 4 : network + 6], "big")
    elif whole["status"] == NOT_IP:
        announced = 14
    else:
        announced = network + int.from_bytes(frame[network + 2 : network + 4], "big")
    for length in range(len(frame)) if len(frame) < 200 else (*range(100), *range(len(frame) - 100, len(frame))):
        status = int(parsed(frame[:length])[0]["status"])
        assert status == (TRUNCATED if length < announced else whole["status"]), length


@pytest.mark.python_mode
@pytest.mark.bounds
@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({14: 0x55}, MALFORMED),  # IP version 5 behind EtherType 0x0800
        ({14: 0x44}, MALFORMED),  # header shorter than 20 bytes
        ({14: 0x4F}, MALFORMED),  # header longer than the packet
        ({16: 0, 17: 19}, MALFORMED),  # total length shorter than the header
        ({16: 0xFF, 17: 0xFF}, TRUNCATED),
        ({17: 39}, TRUNCATED),  # no room for the TCP header
        ({46: 0x40}, MALFORMED),  # TCP header of 16 bytes
        ({46: 0xF0}, TRUNCATED),  # TCP header beyond the segment
    ],
)
def test_contradicting_headers_have_their_cause(change: dict[int, int], status: int) -> None:
    frame = bytearray(tcp("S"))
    for at, value in change.items():
        frame[at] = value
    assert parsed(bytes(frame))[0]["status"] == status


@pytest.mark.python_mode
def test_udp_lengths() -> None:
    for announced, status in ((0, MALFORMED), (7, MALFORMED), (8, 0), (16, 0), (17, MALFORMED), (65535, MALFORMED)):
        packet = parsed(bytes(outward() / packets.UDP(sport=1, dport=2, len=announced) / bytes(8)))
        assert packet[0]["status"] == status, announced
    assert parsed(bytes(outward(flags="MF") / packets.UDP(sport=1, dport=2, len=4000) / bytes(8)))[0]["has_ports"] == 1


@pytest.mark.python_mode
def test_the_largest_frames() -> None:
    largest = udp(payload=bytes(MAX_FRAME_BYTES - 42))
    assert parsed(largest)[0]["status"] == 0
    assert parsed(largest + b"\0")[0]["status"] == OVERSIZED


@pytest.mark.python_mode
def test_an_error_goes_to_whom_the_quoted_packet_is_from_and_is_not_about_an_error() -> None:
    """RFC 792; RFC 1122, section 3.2.2."""
    astray = packets.Ether(icmp_error(udp()))
    astray[packets.IP].dst = "10.0.1.8"
    assert parsed(bytes(astray))[0]["status"] == MALFORMED
    assert parsed(icmp_error(icmp_error(udp()), inside=True))[0]["status"] == MALFORMED


@pytest.mark.python_mode
def test_an_error_about_a_later_fragment_has_no_flow() -> None:
    """Where ports would be in the quote there is data: it must not be taken for ports."""
    about = bytes(outward(frag=20) / (b"\x12\x34\x56\x78" * 4))
    error = packets.Ether(icmp_error(about))
    error[packets.IPerror].proto = 17
    assert parsed(bytes(error))[0]["status"] == FRAGMENT


@pytest.mark.python_mode
@pytest.mark.bounds
@settings(max_examples=300)
@given(st.binary(max_size=120), st.sampled_from([b"", b"\x08\x00", b"\x08\x00\x45", b"\x81\x00\x00\x01\x08\x00\x45"]))
def test_random_bytes_never_crash(body: bytes, start: bytes) -> None:
    frame = bytes(12) + start + body
    assert int(parsed(frame)[0]["status"]) in STATUSES


@pytest.mark.python_mode
@pytest.mark.bounds
@settings(max_examples=300)
@given(st.data())
def test_mutated_packets_never_crash(data: st.DataObject) -> None:
    frame = bytearray(data.draw(st.sampled_from(list(FRAMES.values()))))
    for _ in range(data.draw(st.integers(1, 6))):
        frame[data.draw(st.integers(0, min(len(frame), 90) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    assert int(parsed(bytes(frame[:cut]))[0]["status"]) in STATUSES


@jit
def _random(state: np.ndarray) -> int:
    """xorshift64 (G. Marsaglia, Xorshift RNGs, 2003)."""
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return np.int64(x >> np.uint64(1))


@jit
def _mutate(frame: np.ndarray, length: int, state: np.ndarray) -> int:
    """Change up to 8 bytes, most of them in the headers, sometimes to values at the edges, and cut; return the new length."""
    for _ in range(_random(state) % 9):
        span = min(length, 60 if _random(state) % 4 else length)
        kind = _random(state) % 4
        value = 0xFF if kind == 0 else 0 if kind == 1 else _random(state) & 0xFF
        frame[_random(state) % span] = value
    return _random(state) % (length + 1) if _random(state) % 3 == 0 else length


@allocating
def _fuzz(templates: np.ndarray, lengths: np.ndarray, count: int, seed: int, found: np.ndarray, statuses: np.ndarray) -> int:
    """Parse `count` mutated packets twice: at the end of the memory, and with other bytes behind. Return the number that
    came out differently, or claims more than its frame holds. statuses: int64[16], how often each status came out."""
    state = np.full(1, seed, np.uint64)
    frame = np.zeros(2048, np.uint8)
    roomy = np.full(4096, 0xA5, np.uint8)
    wrong = 0
    for _ in range(count):
        number = _random(state) % len(lengths)
        length = lengths[number]
        frame[:length] = templates[number, :length]
        if _random(state) % 64 == 0:
            for i in range(14, length):
                frame[i] = _random(state) & 0xFF
        length = _mutate(frame, length, state)
        tight = frame[:length].copy()
        roomy[:length] = tight
        roomy[length : length + 64] = _random(state) & 0xFF
        status = parse(tight, 0, length, 0, found, 0)
        wrong += parse(roomy, 0, length, 0, found, 1) != status
        first, second = found[0], found[1]
        wrong += first.source_address != second.source_address or first.destination_address != second.destination_address
        wrong += first.source_port != second.source_port or first.destination_port != second.destination_port
        wrong += first.tcp_flags != second.tcp_flags or first.tcp_sequence != second.tcp_sequence
        wrong += first.payload_bytes != second.payload_bytes or first.icmp_error != second.icmp_error
        wrong += status == 0 and first.transport_offset + np.int64(first.payload_bytes) > length
        statuses[status] += 1
    return wrong


@pytest.mark.bounds
def test_300_000_mutated_packets_show_no_read_beyond_the_frame() -> None:
    templates, lengths = np.zeros((len(FRAMES) + 1, 2048), np.uint8), np.zeros(len(FRAMES) + 1, np.int64)
    for number, frame in enumerate([*FRAMES.values(), bytes(1600)]):
        templates[number, : len(frame)], lengths[number] = np.frombuffer(frame, np.uint8), len(frame)
    statuses = np.zeros(16, np.int64)
    assert _fuzz(templates, lengths, 300_000, 88172645463325252, make_packets(2), statuses) == 0
    assert set(np.flatnonzero(statuses)) == STATUSES, "every way the parser can end is reached"
    assert statuses.sum() == 300_000
