"""After addresses and ports are changed, is every checksum right, is the rest of the frame untouched, and can it be undone?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import UDP

from nfs.dataplane.headers import INSIDE, OUTSIDE
from nfs.dataplane.rewrite import updated, write_back
from tests.packets import checksums_hold, echo, expected, icmp_error, inward, outward, parsed, tcp, udp, well_formed

pytestmark = [pytest.mark.python_mode, pytest.mark.bounds, pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")]
KINDS = ("tcp syn", "tcp data", "tcp padded", "udp", "udp empty", "echo", "vlan", "two vlans", "ip options", "gre",
         "error quoting tcp", "error quoting udp", "error quoting echo", "error quoting options",
         "error from inside")  # fmt: skip


def rewritten(frame: bytes, arrived_from: int, **changes: int) -> bytes:
    """Return the frame with `changes` of the packet's fields written back."""
    packets = parsed(frame, arrived_from)
    assert packets[0]["status"] == 0
    for name, value in changes.items():
        packets[name][0] = value
    memory = np.frombuffer(frame, np.uint8).copy()
    write_back(memory, packets, 0)
    return memory.tobytes()


def side_of(kind: str) -> int:
    return OUTSIDE if kind.startswith("error quoting") else INSIDE


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_when_nothing_was_set(kind: str) -> None:
    frame = well_formed()[kind]
    assert rewritten(frame, side_of(kind)) == frame


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(address=st.integers(0, 2**32 - 1), port=st.integers(0, 65535))
def test_checksums_hold_and_the_change_can_be_undone(kind: str, address: int, port: int) -> None:
    """The party that a NAT replaces: the source of what comes from inside, the destination of what comes from outside."""
    frame = well_formed()[kind]
    side = side_of(kind)
    end = "source" if side == INSIDE else "destination"
    before = parsed(frame, side)[0]
    changes: dict[str, Any] = {f"{end}_address": address}
    if before["has_ports"] or before["protocol"] == 1:
        changes[f"{end}_port"] = port
    changed = rewritten(frame, side, **changes)
    assert checksums_hold(changed) == checksums_hold(frame)
    after = parsed(changed, side)[0]
    assert {name: int(after[name]) for name in changes} == changes
    for name in ("length", "protocol", "tcp_sequence", "tcp_flags", "payload_bytes", "icmp_error", "time_to_live"):
        assert after[name] == before[name]
    assert rewritten(changed, side, **{name: int(before[name]) for name in changes}) == frame


def test_an_error_translated_reads_as_scapy_would_read_it() -> None:
    for about in (tcp("A"), udp(), echo()):
        frame = rewritten(icmp_error(about), OUTSIDE, destination_address=0x0A000909, destination_port=40404)
        fields = expected(frame, OUTSIDE)
        assert (fields["destination_address"], fields["destination_port"]) == (0x0A000909, 40404)
        assert checksums_hold(frame)


def test_a_udp_packet_without_a_checksum_stays_without_one() -> None:
    frame = bytes(outward() / UDP(sport=5, dport=6, chksum=0) / b"none")
    changed = rewritten(frame, INSIDE, source_address=1, source_port=2)
    assert changed[40:42] == b"\0\0"
    assert parsed(changed)[0]["source_port"] == 2


def test_a_udp_sum_of_zero_is_sent_as_all_ones() -> None:
    """RFC 768: an all zero transmitted checksum value means that the transmitter generated no checksum."""
    frame = udp()
    for port in range(65536):
        check = int.from_bytes(frame[40:42], "big")
        if int(updated(check, int.from_bytes(frame[34:36], "big"), port)) == 0:
            assert rewritten(frame, INSIDE, source_port=port)[40:42] == b"\xff\xff"
            return
    raise AssertionError("no port gives a sum of zero")


def test_of_a_later_fragment_only_the_addresses_change() -> None:
    frame = bytes(inward(frag=185, id=7) / bytes(range(64)))
    packets = parsed(frame, OUTSIDE)
    packets["status"][0], packets["destination_address"][0], packets["destination_port"][0] = 0, 0x0A0A0A0A, 99
    memory = np.frombuffer(frame, np.uint8).copy()
    write_back(memory, packets, 0)
    assert memory.tobytes()[34:] == frame[34:]
    assert checksums_hold(memory.tobytes())


def test_the_next_hop_is_the_frames_destination() -> None:
    changed = rewritten(tcp("S"), INSIDE, next_hop=0x020304050607)
    assert changed[:6] == bytes.fromhex("020304050607")
    assert changed[6:] == tcp("S")[6:]
