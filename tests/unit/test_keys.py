"""Do both directions of a connection give one key, other connections others, and is the partition the switches' one?"""

from __future__ import annotations

from ipaddress import IPv4Address

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import Ether

from datastore.base.partitioning import PARTITIONS
from datastore.store.partitions import FlowKey
from nfs.dataplane.headers import INSIDE, OUTSIDE
from nfs.dataplane.keys import FLOW, INITIATOR, SOURCE, TUPLE, make_key
from tests.packets import CLIENT, CLIENT_PORT, SERVER, SERVER_PORT, echo, icmp_error, parsed, tcp, udp

pytestmark = [pytest.mark.python_mode, pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")]
KIND = 9
addresses = st.integers(1, 2**32 - 2).map(lambda number: str(IPv4Address(number)))
ports = st.integers(0, 65535)


def key(frame: bytes, arrived_from: int, function: int = FLOW, kind: int = KIND) -> tuple[int, int]:
    """Return a frame's key as (low, high) word; its partition is checked to be the packet's."""
    packets = parsed(frame, arrived_from)
    assert packets[0]["status"] == 0
    make_key(function, kind, packets, 0)
    low, high = int(packets[0]["key_low"]), int(packets[0]["key_high"])
    assert low & 0xFFFF == int(packets[0]["partition"]) < PARTITIONS
    return low, high


def test_a_key_names_the_flow() -> None:
    read = FlowKey.of_words(*key(tcp("S"), INSIDE))
    assert read == FlowKey(IPv4Address(CLIENT), CLIENT_PORT, IPv4Address(SERVER), SERVER_PORT, 6, KIND, CLIENT_PORT >> 1 & 0xFF)


def test_both_directions_meet() -> None:
    assert key(tcp("S"), INSIDE) == key(tcp("SA", inside=False), OUTSIDE)
    assert key(udp(), INSIDE) == key(udp(inside=False), OUTSIDE)
    assert key(echo(), INSIDE) == key(echo(inside=False), OUTSIDE)


def test_an_icmp_error_has_the_key_of_the_flow_it_speaks_of() -> None:
    for about in (tcp("A"), udp(), echo()):
        assert key(icmp_error(about), OUTSIDE) == key(about, INSIDE)
        assert key(icmp_error(about, router="10.99.0.1"), OUTSIDE) == key(about, INSIDE)
    for answer in (tcp("A", inside=False), udp(inside=False)):
        assert key(icmp_error(answer, inside=True), INSIDE) == key(answer, OUTSIDE)


def test_as_seen_on_the_wire_directions_differ_but_share_their_partition() -> None:
    out, back = key(tcp("S"), INSIDE, TUPLE), key(tcp("SA", inside=False), OUTSIDE, TUPLE)
    assert out != back
    assert out[0] & 0xFFFF == back[0] & 0xFFFF


def test_source_keys_count_senders_whatever_they_send() -> None:
    assert key(tcp("S"), INSIDE, SOURCE) == key(udp(), INSIDE, SOURCE) == key(echo(), INSIDE, SOURCE)
    assert key(tcp("S"), INSIDE, SOURCE) != key(tcp("SA", inside=False), OUTSIDE, SOURCE)


@pytest.mark.parametrize("inside", [True, False])
def test_an_attempt_and_its_answer_meet_at_the_initiator(inside: bool) -> None:
    here, there = (INSIDE, OUTSIDE) if inside else (OUTSIDE, INSIDE)
    attempt = key(tcp("S", inside), here, INITIATOR)
    for flags in ("SA", "RA", "R"):
        assert key(tcp(flags, not inside), there, INITIATOR) == attempt
    assert key(icmp_error(tcp("S", inside), inside=not inside, router="10.99.0.1"), there, INITIATOR) == attempt
    for sent in (tcp("A", inside), tcp("PA", inside), udp(inside), echo(inside)):
        assert key(sent, here, INITIATOR) == attempt, "all that the initiator sends"
    assert attempt == key(tcp("S", inside), here, SOURCE)
    assert key(tcp("PA", not inside), there, INITIATOR) != attempt


def test_record_types_do_not_meet() -> None:
    for function in (FLOW, TUPLE, SOURCE):
        assert key(tcp("S"), INSIDE, function, kind=1) != key(tcp("S"), INSIDE, function, kind=2)


@settings(max_examples=150)
@given(addresses, addresses, ports, ports)
def test_the_partition_is_what_the_switches_steer_by(client: str, server: str, client_port: int, server_port: int) -> None:
    out = bytes(Ether() / IP(src=client, dst=server) / UDP(sport=client_port, dport=server_port))
    back = bytes(Ether() / IP(src=server, dst=client) / UDP(sport=server_port, dport=client_port))
    assert key(out, INSIDE) == key(back, OUTSIDE)
    assert key(out, INSIDE)[0] & 0xFFFF == (client_port & 0x1FE) >> 1
    ping = bytes(Ether() / IP(src=client, dst=server) / ICMP(id=client_port))
    assert key(ping, INSIDE)[0] & 0xFFFF == int(IPv4Address(client)) & 0xFF


@settings(max_examples=150)
@given(st.tuples(addresses, addresses, ports, ports), st.tuples(addresses, addresses, ports, ports))
def test_different_flows_have_different_keys(one: tuple[str, str, int, int], other: tuple[str, str, int, int]) -> None:
    keys = [key(bytes(Ether() / IP(src=a, dst=b) / UDP(sport=c, dport=d)), INSIDE) for a, b, c, d in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


def test_senders_spread_evenly_over_the_partitions() -> None:
    counts = np.zeros(PARTITIONS, np.int64)
    frame = bytearray(udp())
    for n in range(2048):
        frame[26:30] = IPv4Address(0x0A000000 + n).packed
        counts[key(bytes(frame), INSIDE, SOURCE)[0] & 0xFFFF] += 1
    assert counts.max() < 8 + 6 * 8**0.5
