"""Is IPv6 read, keyed, filtered and counted as IPv4 is, extension headers and fragments included?"""

from __future__ import annotations

import itertools
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)  # fmt: skip

from datastore.base.errors import NearstateError
from datastore.base.partitioning import PARTITIONS
from datastore.compiled.siphash import KEY_0, KEY_1, siphash
from datastore.store.partitions import FINGERPRINT, FlowKey, hashed_partition
from nfs.dataplane import DROP, FORWARD, RATE_EXCEEDED, REFUSED_BY_RULE, declaration
from nfs.dataplane.fragments import FRAGMENT_NS, find_flow, make_fragments, remember_first
from nfs.dataplane.headers import FRAGMENT, INSIDE, MALFORMED, NOT_IP, OUTSIDE, TRUNCATED
from nfs.dataplane.keys import ENDPOINT, FLOW, INITIATOR, SOURCE, TUPLE, make_key
from nfs.heavy_hitters import estimates, item_of, snapshot, top
from tests.packets import (
    CLIENT_6,
    SERVER_6,
    TCP,
    UDP,
    Ether,
    Instance,
    echo6,
    ethernet,
    fragments6,
    icmp6_error,
    outward6,
    parsed,
    tcp,
    tcp6,
    udp6,
    well_formed_ipv6,
)  # fmt: skip

pytestmark = [pytest.mark.python_mode, pytest.mark.bounds,
              pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")]  # fmt: skip
KIND = 9
addresses = st.integers(0, 2**128 - 1).map(lambda number: str(IPv6Address(number)))
ports = st.integers(0, 65535)


def status(frame: bytes) -> int:
    return int(parsed(frame)[0]["status"])


# ---- headers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "wanted"),
    [({14: 0x40}, MALFORMED), ({18: 0xFF}, TRUNCATED), ({19: 19}, TRUNCATED), ({66: 0x40}, MALFORMED), ({66: 0xF0}, TRUNCATED),
     ({20: 0}, TRUNCATED), ({20: 44}, 0), ({20: 6}, 0)],
)  # fmt: skip
def test_contradicting_headers_have_their_cause(change: dict[int, int], wanted: int) -> None:
    frame = bytearray(tcp6("S"))
    frame[54:62] = bytes((59, 0xFF, 0, 0, 0, 0, 0, 0))  # read as an extension header: nothing follows; as hop-by-hop: too long
    for at, value in change.items():
        frame[at] = value
    assert status(bytes(frame)) == wanted


def test_extension_headers_have_an_end() -> None:
    """RFC 8200, section 4.1: at most six; eight are walked."""
    for count, wanted in ((6, 0), (8, 0), (9, MALFORMED), (100, MALFORMED)):
        frame = outward6()
        for _ in range(count):
            frame /= IPv6ExtHdrDestOpt()
        assert status(bytes(frame / UDP())) == wanted, count


def test_hop_by_hop_options_stand_first_and_there_is_one_fragment_header() -> None:
    assert status(bytes(outward6() / IPv6ExtHdrHopByHop() / UDP())) == 0
    assert status(bytes(outward6() / IPv6ExtHdrDestOpt() / IPv6ExtHdrHopByHop() / UDP())) == MALFORMED
    assert status(bytes(outward6() / IPv6ExtHdrFragment() / UDP())) == 0
    assert status(bytes(outward6() / IPv6ExtHdrFragment() / IPv6ExtHdrFragment() / UDP())) == MALFORMED


def test_an_error_goes_to_whom_the_quoted_packet_is_from_and_is_not_about_an_error() -> None:
    """RFC 4443, sections 2.2 and 2.4."""
    for changed in (1 << 127, 1 << 40, 1):
        astray = Ether(icmp6_error(udp6()))
        astray[IPv6].dst = str(IPv6Address(int(IPv6Address(CLIENT_6)) ^ changed))
        assert status(bytes(astray)) == MALFORMED
    assert status(icmp6_error(icmp6_error(udp6()))) == MALFORMED


@pytest.mark.parametrize("hop_limit", [0, 1, 64, 254, 255])
def test_messages_for_the_link_are_told_by_type_and_hop_limit(hop_limit: int) -> None:
    frame = bytearray(bytes(outward6(hlim=hop_limit) / ICMPv6EchoRequest()))
    on_link = {255: {*range(133, 138), 141, 142, 148, 149}, 1: {130, 131, 132, 143, 151, 152, 153}}
    for kind in range(127, 256):
        frame[54] = kind
        assert status(bytes(frame)) == (NOT_IP if kind in on_link.get(hop_limit, ()) else 0), kind


def test_what_is_for_the_link_comes_in_no_fragments() -> None:
    """RFC 6980."""
    frame = bytes(outward6(hlim=255) / IPv6ExtHdrFragment(m=1) / ICMPv6ND_NS())
    assert status(frame) == 0
    assert Instance.of("firewall")(frame) == DROP


# ---- fragments ----------------------------------------------------------------------------------------------------------


def flow_of(first: bytes, later: bytes, side: int = INSIDE, wait_ns: int = 1) -> Any:
    """Return what is known of a later fragment after a first one was seen, or None."""
    table, packets = make_fragments(), parsed(first)
    remember_first(table, packets, 0, np.frombuffer(first, np.uint8), 1000)
    packets = parsed(later, side)
    assert packets[0]["status"] == FRAGMENT
    found = find_flow(table, packets, 0, np.frombuffer(later, np.uint8), 1000 + wait_ns)
    return packets[0] if found else None


def test_a_later_fragment_belongs_to_the_flow_of_its_first() -> None:
    """Also where the fragment header says that options follow: of what really does only the first one tells."""
    upper = UDP(sport=4000, dport=53) / bytes(3000)
    for parts in (fragments6(upper), fragments6(upper, IPv6ExtHdrDestOpt())):
        for part in parts[1:]:
            packet = flow_of(parts[0], part)
            assert (packet["protocol"], packet["source_port"], packet["destination_port"], packet["has_ports"]) == (
                17,
                4000,
                53,
                1,
            )
            assert packet["status"] == 0
        assert flow_of(parts[0], parts[1], OUTSIDE) is None, "the same datagram cannot come from the other side"
        assert flow_of(parts[0], parts[1], wait_ns=FRAGMENT_NS + 1) is None
        other = bytearray(parts[1])
        other[61] ^= 1  # its identification
        assert flow_of(parts[0], bytes(other)) is None
        other = bytearray(parts[1])
        other[22] ^= 1  # its sender
        assert flow_of(parts[0], bytes(other)) is None


def test_a_later_fragment_of_an_echo_has_its_identifier_and_no_ports() -> None:
    parts = fragments6(ICMPv6EchoRequest(id=99, data=bytes(3000)))
    packet = flow_of(parts[0], parts[1])
    assert (packet["protocol"], packet["source_port"], packet["has_ports"]) == (58, 99, 0)


def test_an_error_about_a_later_fragment_has_no_flow() -> None:
    parts = fragments6(UDP(sport=4000, dport=53) / bytes(3000))
    assert flow_of(parts[0], icmp6_error(parts[1][:110])) is None


# ---- keys ---------------------------------------------------------------------------------------------------------------


def reference_siphash(words: tuple[int, ...]) -> tuple[int, int]:
    """SipHash-1-3 with its answer of 128 bits, spelled out after the paper in integers."""
    mask = (1 << 64) - 1
    v = [KEY_0 ^ 0x736F6D6570736575, KEY_1 ^ 0x646F72616E646F6D ^ 0xEE, KEY_0 ^ 0x6C7967656E657261, KEY_1 ^ 0x7465646279746573]

    def rotate(x: int, b: int) -> int:
        return (x << b | x >> (64 - b)) & mask

    def sipround() -> None:
        v[0] = v[0] + v[1] & mask
        v[1] = rotate(v[1], 13) ^ v[0]
        v[0] = rotate(v[0], 32)
        v[2] = v[2] + v[3] & mask
        v[3] = rotate(v[3], 16) ^ v[2]
        v[0] = v[0] + v[3] & mask
        v[3] = rotate(v[3], 21) ^ v[0]
        v[2] = v[2] + v[1] & mask
        v[1] = rotate(v[1], 17) ^ v[2]
        v[2] = rotate(v[2], 32)

    for block in (*words, (8 * len(words)) << 56):
        v[3] ^= block
        sipround()
        v[0] ^= block
    v[2] ^= 0xEE
    for _ in range(3):
        sipround()
    high = v[0] ^ v[1] ^ v[2] ^ v[3]
    v[1] ^= 0xDD
    for _ in range(3):
        sipround()
    return high, v[0] ^ v[1] ^ v[2] ^ v[3]


@settings(max_examples=50)
@given(st.tuples(*[st.integers(0, 2**64 - 1)] * 5))
def test_the_fingerprint_is_siphash(words: tuple[int, ...]) -> None:
    assert tuple(map(int, siphash(*map(np.uint64, words)))) == reference_siphash(words)


def key(frame: bytes, arrived_from: int, function: int = FLOW, kind: int = KIND) -> tuple[int, int]:
    """Return a frame's key as (low, high) word; its partition is checked to be the packet's."""
    packets = parsed(frame, arrived_from)
    assert packets[0]["status"] == 0
    make_key(function, kind, packets, 0)
    low, high = int(packets[0]["key_low"]), int(packets[0]["key_high"])
    assert low & 0xFFFF == int(packets[0]["partition"]) < PARTITIONS
    assert (low >> 16 & 0xFF, low >> 24 & 0xFF) == (kind, FINGERPRINT)
    return low, high


def datagram(source: str, destination: str, source_port: int, destination_port: int) -> bytes:
    return bytes(ethernet() / IPv6(src=source, dst=destination) / UDP(sport=source_port, dport=destination_port))


@settings(max_examples=100)
@given(addresses, addresses, ports, ports)
def test_both_directions_meet_where_the_switches_steer_them(client: str, server: str, client_port: int, server_port: int) -> None:
    out, back = datagram(client, server, client_port, server_port), datagram(server, client, server_port, client_port)
    assert key(out, INSIDE) == key(back, OUTSIDE)
    assert key(out, INSIDE)[0] & 0xFFFF == (client_port & 0x1FE) >> 1
    assert key(out, INSIDE, TUPLE) != key(back, OUTSIDE, TUPLE) or (client, client_port) == (server, server_port)
    assert key(out, INSIDE, TUPLE)[0] & 0xFFFF == key(back, OUTSIDE, TUPLE)[0] & 0xFFFF
    ping = bytes(ethernet() / IPv6(src=client, dst=server) / ICMPv6EchoRequest(id=client_port))
    assert key(ping, INSIDE)[0] & 0xFFFF == int(IPv6Address(client)) & 0xFF


@settings(max_examples=100)
@given(st.tuples(addresses, addresses, ports, ports), st.tuples(addresses, addresses, ports, ports), st.integers(0, 3))
def test_different_flows_have_different_keys(one: tuple[Any, ...], other: tuple[Any, ...], alike: int) -> None:
    other = (*one[:alike], *other[alike:])
    assert (key(datagram(*one), INSIDE) == key(datagram(*other), INSIDE)) == (one == other)


@pytest.mark.parametrize("bit", range(0, 256, 5))
def test_every_bit_of_both_addresses_counts(bit: int) -> None:
    frame = bytearray(udp6())
    frame[22 + bit // 8] ^= 1 << bit % 8
    for function in (FLOW, TUPLE):
        assert key(bytes(frame), INSIDE, function)[1] != key(udp6(), INSIDE, function)[1]
    of_source = bit < 128
    for function in (SOURCE, INITIATOR, ENDPOINT):
        assert (key(bytes(frame), INSIDE, function)[1] != key(udp6(), INSIDE, function)[1]) == of_source


def test_errors_echoes_and_extension_headers_have_the_key_of_their_flow() -> None:
    for about in (tcp6("A"), udp6(), echo6()):
        assert key(icmp6_error(about), OUTSIDE) == key(about, INSIDE)
        assert key(icmp6_error(about, ICMPv6DestUnreach(), "2001:db8::1"), OUTSIDE) == key(about, INSIDE)
    assert key(echo6(), INSIDE) == key(echo6(inside=False), OUTSIDE)
    options = bytes(outward6() / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / TCP(sport=40002, dport=80, flags="A"))
    assert key(options, INSIDE) == key(tcp6("A"), INSIDE)


def test_sources_initiators_and_endpoints() -> None:
    assert key(tcp6("S"), INSIDE, SOURCE) == key(udp6(), INSIDE, SOURCE) == key(echo6(), INSIDE, SOURCE)
    assert key(tcp6("S"), INSIDE, SOURCE) != key(tcp6("SA", inside=False), OUTSIDE, SOURCE)
    attempt = key(tcp6("S"), INSIDE, INITIATOR)
    assert attempt == key(tcp6("S"), INSIDE, SOURCE)
    for flags in ("SA", "RA", "R"):
        assert key(tcp6(flags, inside=False), OUTSIDE, INITIATOR) == attempt
    assert key(icmp6_error(tcp6("S"), ICMPv6DestUnreach(), "2001:db8::1"), OUTSIDE, INITIATOR) == attempt
    low, high = attempt
    assert low & 0xFFFF == hashed_partition(np.uint64(high), np.uint64(low))
    assert key(udp6(server_port=53), INSIDE, ENDPOINT) == key(udp6(server_port=54), INSIDE, ENDPOINT)
    assert key(udp6(), INSIDE, ENDPOINT) != key(udp6(inside=False), OUTSIDE, ENDPOINT), "what a translator may have changed"


def test_no_key_is_one_of_ipv4_and_people_can_tell() -> None:
    low, high = key(tcp6("S"), INSIDE)
    packets = parsed(tcp("S"))
    make_key(FLOW, KIND, packets, 0)
    assert int(packets[0]["key_low"]) >> 24 & 0xFF != FINGERPRINT
    assert str(FlowKey.of_words(low, high)) == f"ipv6 {high:016x}{low >> 32:08x}"


# ---- network functions ----------------------------------------------------------------------------------------------------


def opened() -> Instance:
    firewall = Instance.of("firewall")
    assert firewall(tcp6("S")) == firewall.outside(tcp6("SA", inside=False)) == firewall(tcp6("A")) == FORWARD
    return firewall


def test_inside_opens_and_outside_answers() -> None:
    firewall = opened()
    assert firewall.outside(tcp6("PA", inside=False, payload=b"200 OK")) == FORWARD
    assert firewall.outside(tcp6("PA", inside=False, client_port=40004)) == DROP
    assert firewall.outside(tcp("PA", inside=False)) == DROP, "a connection of IPv4 is another"
    assert firewall(udp6()) == firewall.outside(udp6(inside=False)) == FORWARD
    assert firewall(echo6()) == firewall.outside(echo6(inside=False)) == FORWARD


def test_outside_opens_nothing() -> None:
    for frame in (tcp6("S", inside=False), tcp6("A", inside=False), udp6(inside=False), echo6(inside=False), echo6()):
        assert Instance.of("firewall").outside(frame) == DROP
    assert Instance.of("firewall")(echo6(inside=False)) == DROP, "an answer nobody asked for"


def test_errors_pass_with_their_connection_only() -> None:
    """RFC 4890, section 4.3.1: without "packet too big" connections stall."""
    firewall = opened()
    assert firewall.outside(icmp6_error(tcp6("A"))) == FORWARD
    assert firewall.outside(icmp6_error(tcp6("A"), ICMPv6DestUnreach(), "2001:db8::1")) == FORWARD
    assert firewall.outside(icmp6_error(tcp6("A", client_port=4))) == DROP


@pytest.mark.parametrize("name", declaration.names())
@pytest.mark.parametrize("kind", ["solicitation", "advertisement", "router", "redirect", "listener"])
def test_what_is_for_the_link_passes_every_function(name: str, kind: str) -> None:
    """As ARP does; RFC 4890, section 4.4.1."""
    frame = well_formed_ipv6()[f"ipv6 {kind}"]
    instance = Instance.of(name)
    assert instance(frame) == instance.outside(frame) == FORWARD
    assert instance.records == {}


@pytest.mark.parametrize("name", ["nat", "nat_symmetric", "load_balancer"])
def test_translators_of_ipv4_pass_it_untouched_and_remember_nothing(name: str) -> None:
    instance = Instance.of(name)
    for frame in (tcp6("S"), udp6(), echo6(), icmp6_error(tcp6("A")), well_formed_ipv6()["ipv6 extensions"]):
        for side in (instance, instance.outside):
            assert side(frame) == FORWARD
            assert instance.sent == frame
    assert instance.records == {}


@pytest.mark.parametrize(
    ("rule", "matches"),
    [("drop", True), ("drop tcp", True), ("drop tcp to any port 80", True), ("drop udp", False), ("drop icmpv6", False),
     ("drop from fd00::/16", True), ("drop from fd00::/8 to fd00::a80:0/112", True), ("drop from fd01::/16", False),
     (f"drop tcp from {CLIENT_6} port 40002 to {SERVER_6}", True), (f"drop from {SERVER_6}", False),
     ("drop from fd00::a00:106/127", True), ("drop from fd00::a00:108/127", False), ("drop from ::/0", True),
     ("drop from fd00:0:0:0:8000::/65", False), ("drop from fd00::/65", True),
     ("drop from 0.0.0.0/0", False), ("drop from 10.0.0.0/8", False), ("drop to 10.128.0.1", False)],
)  # fmt: skip
def test_rules_name_networks_of_either_version(rule: str, matches: bool) -> None:
    firewall = Instance.of("firewall", rules=[rule])
    assert firewall(tcp6("S")) == (DROP if matches else FORWARD)
    assert firewall.cause == (REFUSED_BY_RULE if matches else 0)


def test_rules_for_one_version_leave_the_other_alone() -> None:
    assert Instance.of("firewall", rules=["drop from ::/0"])(tcp("S")) == FORWARD
    assert Instance.of("firewall", rules=["drop from ::a00:107/128"])(tcp("S")) == FORWARD, "its low bits are the client's"
    assert Instance.of("firewall", rules=["accept in tcp to fd00::/16 port 40002"]).outside(tcp6("S", inside=False)) == FORWARD
    assert Instance.of("firewall", rules=["drop icmpv6"])(echo6()) == DROP


@pytest.mark.parametrize(
    ("rule", "message"),
    [("drop from fd00::1/64", "has host bits set"), ("drop from fd00::/129", "is no network"),
     ("drop from fd00::x", "is no network"), ("drop from 10.0.0.0/8 to fd00::/16", "one place is IPv4, the other IPv6")],
)  # fmt: skip
def test_a_rule_that_makes_no_sense_is_refused(rule: str, message: str) -> None:
    with pytest.raises(NearstateError, match=message):
        Instance.of("firewall", rules=[rule])


def test_counter_limiter_and_detector_take_each_address_for_itself() -> None:
    counter = Instance.of("traffic_counter")
    assert counter(udp6()) == counter.outside(udp6(inside=False)) == FORWARD
    assert (counter.record()["packets_out"], counter.record()["packets_in"]) == (1, 1)

    limiter = Instance.of("rate_limiter", packets_per_s=1, burst_packets=2)
    other = bytes(ethernet() / IPv6(src="fd00:0:0:1::a00:107", dst=SERVER_6) / UDP())
    assert [limiter(udp6()) for _ in range(3)] == [FORWARD, FORWARD, DROP]
    assert limiter.cause == RATE_EXCEEDED
    assert limiter(other) == FORWARD, "its low 64 bits are the same"

    detector = Instance.of("port_scan_detector")
    verdicts = []
    for host in range(1, 12):
        there = f"2001:db8::{host:x}:0:0:1"  # all with the same low 32 bits
        verdicts.append(detector(bytes(ethernet() / IPv6(src=CLIENT_6, dst=there) / TCP(sport=9, dport=80, flags="S"))))
        detector.outside(bytes(ethernet() / IPv6(src=there, dst=CLIENT_6) / TCP(sport=80, dport=9, flags="RA")))
    assert verdicts[0] == FORWARD
    assert verdicts[-1] == DROP, "a scanner"


def test_heavy_hitters_counts_ipv6_senders_apart_from_ipv4s() -> None:
    sketch = Instance.of("heavy_hitters", width=64)
    for _ in range(5):
        assert sketch(udp6()) == FORWARD
    assert sketch(tcp("S")) == FORWARD

    def read(high: int, low: int) -> np.ndarray:
        return np.array([sketch.counters.get((high, low, word), 0) for word in range(4)], np.uint64)

    counters = snapshot(read, 64)
    assert item_of("10.0.1.7") == IPv4Address("10.0.1.7")
    assert item_of(CLIENT_6) in IPv4Network("240.0.0.0/4")
    assert int(estimates(counters, np.array([int(item_of(CLIENT_6))], np.uint64))[0]) >= 5
    items = {item_of(str(IPv6Address(2**77 * number + bit))) for number, bit in itertools.product(range(20), range(20))}
    assert len(items) == 400
    assert top(counters, 1)[0][1] >= 5
