"""Is every packet translated as RFC 4787, 5382 and 5508 want it, back to what it was, and never two clients to one port?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Ether

from datastore.base.errors import NearstateError
from datastore.compiled import INTERPRETED
from datastore.store.partitions import FlowKey, flow_partition
from nfs._translation import CLASS_PORTS, TRIES, candidates, external_port
from nfs.dataplane import DROP, FORWARD, PORTS_EXHAUSTED, REFUSED_BY_RULE
from nfs.dataplane import ICMP as ICMP_NUMBER
from nfs.dataplane import TCP as TCP_NUMBER
from nfs.dataplane import UDP as UDP_NUMBER
from tests.packets import CLIENT, SERVER, Instance, checksums_hold, ethernet, icmp_error, well_formed
from topologies.emulation.network import TRANSLATED_NETWORK

pytestmark = [pytest.mark.python_mode, pytest.mark.bounds]
LONG = os.environ.get("NEARSTATE_LONG") == "1"
EXTERNAL = "192.0.2.1"
ROUTER = "10.200.0.1"
UDP_S, ICMP_S, ESTABLISHED_S, TRANSITORY_S = 300, 60, 7440, 240
LAYERS = {"tcp": TCP, "udp": UDP, "icmp": ICMP}
KINDS = sorted(LAYERS)
End = tuple[str, int]


def nat(name: str = "nat", **given: Any) -> Instance:
    return Instance.of(name, **{"external_addresses": [EXTERNAL], **given})


def packet(kind: str, source: End, target: End, flags: str = "S", sequence: int = 0, payload: bytes = b"abc") -> bytes:
    """Return a frame. Of ICMP: a query with the source's port for identifier; where that is 0, a reply with the target's."""
    ip = ethernet() / IP(src=source[0], dst=target[0])
    if kind == "tcp":
        return bytes(ip / TCP(sport=source[1], dport=target[1], flags=flags, seq=sequence) / payload)
    if kind == "udp":
        return bytes(ip / UDP(sport=source[1], dport=target[1]) / payload)
    return bytes(ip / ICMP(type=8 if source[1] else 0, id=source[1] or target[1]) / payload)


def server_of(kind: str, number: int = 1, port: int = 80) -> End:
    return f"10.128.0.{number}", 0 if kind == "icmp" else port


def source_of(frame: bytes) -> End:
    found = Ether(frame)
    return found[IP].src, found[ICMP].id if ICMP in found else found[IP].payload.sport


def target_of(frame: bytes) -> End:
    found = Ether(frame)
    return found[IP].dst, found[ICMP].id if ICMP in found else found[IP].payload.dport


def out(instance: Instance, kind: str, client: End, server: End | None = None, **more: Any) -> End:
    """Send a client's packet and return the external endpoint it got; all else must be as it was."""
    frame = packet(kind, client, server or server_of(kind), **more)
    assert instance(frame) == FORWARD
    external = source_of(instance.sent)
    assert checksums_hold(instance.sent)
    assert instance.sent == packet(kind, external, server or server_of(kind), **more), "source and checksums, nothing else"
    return external


def back(instance: Instance, kind: str, external: End, server: End | None = None, **more: Any) -> End | None:
    """Answer to an external endpoint and return whom it reached; None: nobody."""
    frame = packet(kind, server or server_of(kind), external, **{"flags": "SA", **more})
    if instance.outside(frame) == DROP:
        return None
    client = target_of(instance.sent)
    assert checksums_hold(instance.sent)
    assert instance.sent == packet(kind, server or server_of(kind), client, **{"flags": "SA", **more})
    return client


clients = st.tuples(st.sampled_from([f"10.0.1.{n}" for n in range(1, 9)]), st.integers(1, 65535))


@settings(max_examples=200 if LONG else 12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KINDS), clients), min_size=1, max_size=25), st.integers(1, 3))
def test_translation_is_a_bijection(flows: list[tuple[str, End]], addresses: int) -> None:
    """No two live endpoints share an external one; there and back is the identity; class and protocol are kept."""
    instance = nat(external_addresses=[f"192.0.2.{n}" for n in range(1, addresses + 1)])
    given_to: dict[tuple[str, End], End] = {}
    for kind, client in flows:
        external = out(instance, kind, client)
        assert given_to.setdefault((kind, external), client) == client
        assert external[0].startswith("192.0.2.")
        if kind != "icmp":
            assert (external[1] ^ client[1]) & 0x1FF == 0, "RFC 4787, REQ-4; and answers fall into the same partition"
            assert external[1] > 0
            assert client[1] < 1024 or external[1] >= 1024
    for (kind, external), client in given_to.items():
        assert back(instance, kind, external) == client
        assert out(instance, kind, client) == external


@pytest.mark.parametrize("protocol", [TCP_NUMBER, UDP_NUMBER])
def test_all_candidates_of_all_ports_are_in_their_partition(protocol: int) -> None:
    for port in range(1, 65536, 97 if INTERPRETED else 1):
        for n in (0, 1, 2, 77, 126):
            found = int(external_port(0x0A000107, port, protocol, n))
            assert 0 < found < 65536
            assert port < 1024 or found >= 1024
            assert found & 1 == port & 1
            assert flow_partition(0, found, True) == flow_partition(0, port, True)


@pytest.mark.parametrize("port", [0, 1, 511, 512, 513, 1023, 1024, 40002, 65535])
@pytest.mark.parametrize("client", [1, 0x0A000107, 2**32 - 1])
def test_the_candidates_are_all_ports_of_the_class(port: int, client: int) -> None:
    count = int(candidates(port, UDP_NUMBER))
    found = {int(external_port(client, port, UDP_NUMBER, n)) for n in range(count)}
    low = {port & 511, port & 511 | 512} - {0} if port < 1024 else set()
    assert found == {1024 + (port & 511) + 512 * n for n in range(CLASS_PORTS)} | low
    if port:
        assert int(external_port(client, port, UDP_NUMBER, 0)) == port


def test_rfc4787_req1_the_mapping_does_not_depend_on_the_destination() -> None:
    instance = nat()
    for kind in KINDS:
        found = {out(instance, kind, (CLIENT, 4000), server_of(kind, number, port)) for number in (1, 2) for port in (80, 81)}
        assert len(found) == 1, "RFC 4787, REQ-1; RFC 5382, REQ-1; RFC 5508, REQ-1a"


def test_rfc4787_req2_a_client_stays_at_one_external_address() -> None:
    instance = nat(external_addresses="192.0.2.0/30")
    for client in range(20):
        found = {out(instance, kind, (f"10.0.1.{client}", port))[0] for kind in KINDS for port in (5000, 5002, 7001, 1023)}
        assert found == {f"192.0.2.{client % 4}"}, "with its low bits, so that ICMP and fragments come back to its instance"


def test_rfc4787_req3_no_port_overloading_and_ranges_apart() -> None:
    instance = nat()
    found = [out(instance, "udp", (f"10.0.1.{n}", 123)) for n in range(5)]
    assert len(set(found)) == 5
    assert [port < 1024 for _, port in found] == [True, True, False, False, False], "123 and 635 are all there are"
    assert all(out(instance, "udp", (f"10.0.1.{n}", 1024))[1] >= 1024 for n in range(20))


@pytest.mark.parametrize("port", [5004, 5005])
def test_rfc4787_req4_parity_is_kept(port: int) -> None:
    instance = nat()
    assert {out(instance, "udp", (f"10.0.1.{n}", port))[1] % 2 for n in range(30)} == {port % 2}


def test_rfc4787_req5_a_udp_mapping_lasts_five_minutes() -> None:
    instance = nat(inbound_refresh=False)
    external = out(instance, "udp", (CLIENT, 5000))
    assert instance.idle_timeout_s == UDP_S
    instance.now_s += UDP_S
    assert back(instance, "udp", external) == (CLIENT, 5000)
    instance.now_s += UDP_S / 2 + 1
    assert back(instance, "udp", external) is None


@pytest.mark.parametrize("refresh", [True, False])
def test_rfc4787_req6_refreshed_from_inside_and_by_choice_from_outside(refresh: bool) -> None:
    instance = nat(inbound_refresh=refresh)
    external = out(instance, "udp", (CLIENT, 5000))
    for _ in range(5):
        instance.now_s += UDP_S - 1
        assert out(instance, "udp", (CLIENT, 5000)) == external
    for _ in range(3):
        instance.now_s += UDP_S
        reached = back(instance, "udp", external)
    assert reached == ((CLIENT, 5000) if refresh else None)


def test_what_comes_from_outside_never_shortens() -> None:
    instance = nat()
    external = out(instance, "tcp", (CLIENT, 5000))
    out(instance, "tcp", (CLIENT, 5000), flags="A")
    for flags in ("A", "FA", "R", "S", "RA"):
        before = max(instance.expires_s.values())
        assert back(instance, "tcp", external, flags=flags) == (CLIENT, 5000)
        assert max(instance.expires_s.values()) >= before
        instance.now_s += 100


def test_rfc4787_req8_filtering_is_endpoint_independent() -> None:
    instance = nat()
    for kind in KINDS:
        external = out(instance, kind, (CLIENT, 5000))
        assert back(instance, kind, external, server_of(kind, 99, 4444)) == (CLIENT, 5000)


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_rfc4787_req9_hairpinning_with_the_external_source(kind: str) -> None:
    """RFC 5382, REQ-8 too. Both clients are inside; each sees the other's external endpoint only."""
    instance = nat(external_addresses="192.0.2.0/30")
    one, other = ("10.0.1.7", 5000), ("10.0.1.9", 6001)
    at_one, at_other = out(instance, kind, one), out(instance, kind, other)
    for source, target, seen, reached in ((one, at_other, at_one, other), (other, at_one, at_other, one)):
        assert instance(packet(kind, source, target)) == FORWARD
        assert instance.sent == packet(kind, seen, reached)
        assert checksums_hold(instance.sent)
    assert instance(packet(kind, one, (at_other[0], 9))) == DROP, "nobody has that port"


def test_rfc4787_req11_the_same_client_gets_the_same_port_again() -> None:
    ends = [(f"10.0.1.{n}", 5000) for n in range(40)]
    first, second = nat(), nat()
    found = [out(first, "udp", end) for end in ends]
    assert [out(second, "udp", end) for end in ends] == found
    first.now_s += UDP_S + 1  # the inside records are gone, the claims are not
    assert [out(first, "udp", end) for end in reversed(ends)] == found[::-1]


@pytest.mark.parametrize("kind", KINDS)
def test_rfc4787_req12_icmp_errors_end_nothing_and_refresh_nothing(kind: str) -> None:
    """RFC 5382, REQ-10 and RFC 5508, REQ-6 too."""
    instance = nat()
    external = out(instance, kind, (CLIENT, 5000))
    sent = instance.sent
    records = {key: record.tobytes() for key, record in instance.records.items()}
    instance.now_s += 10
    before = dict(instance.expires_s)
    for code in range(16):
        assert instance.outside(icmp_error(sent, kind=3, code=code, router=ROUTER)) == FORWARD
    assert instance.expires_s == before
    assert back(instance, kind, external) == (CLIENT, 5000)
    delivered = instance.sent
    after = dict(instance.expires_s)
    assert instance(icmp_error(delivered, inside=True)) == FORWARD
    assert instance.expires_s == after
    assert {key: record.tobytes() for key, record in instance.records.items()} == records


@pytest.mark.parametrize("name", ["nat", "nat_symmetric"])
def test_a_redirect_crosses_no_translator(name: str) -> None:
    """RFC 1122, section 3.2.2.2: it names a router of the receiver's own network."""
    instance = nat(name)
    out(instance, "udp", (CLIENT, 5000))
    sent = instance.sent
    assert back(instance, "udp", source_of(sent)) == (CLIENT, 5000)
    delivered = instance.sent
    for kind, verdict in ((5, DROP), (3, FORWARD)):
        assert instance.outside(icmp_error(sent, kind=kind, code=1, router=ROUTER)) == verdict
        assert instance(icmp_error(delivered, inside=True, kind=kind, code=1)) == verdict


def test_rfc5382_req2_simultaneous_open_and_half_close() -> None:
    instance = nat()
    client = (CLIENT, 5000)
    external = out(instance, "tcp", client, flags="S", sequence=7)
    assert back(instance, "tcp", external, flags="S") == client
    assert out(instance, "tcp", client, flags="SA", sequence=7) == external
    assert instance.idle_timeout_s == TRANSITORY_S
    assert back(instance, "tcp", external, flags="SA") == client
    assert out(instance, "tcp", client, flags="A", sequence=8) == external
    assert instance.idle_timeout_s == ESTABLISHED_S
    assert back(instance, "tcp", external, flags="FA") == client
    assert out(instance, "tcp", client, flags="PA", sequence=8) == external, "the other half is open"
    assert instance.idle_timeout_s == ESTABLISHED_S


@pytest.mark.parametrize("kind", KINDS)
def test_rfc5382_req4_from_outside_to_a_port_that_nobody_has(kind: str) -> None:
    instance = nat()
    assert back(instance, kind, (EXTERNAL, 5000)) is None
    assert instance.records == {}
    assert back(instance, kind, (CLIENT, 5000)) is None, "nor to an address behind it"


def opened(instance: Instance, server: End = (SERVER, 80), sequence: int = 100) -> None:
    out(instance, "tcp", (CLIENT, 5000), server, flags="S", sequence=sequence, payload=b"")
    assert instance.idle_timeout_s in (TRANSITORY_S, ESTABLISHED_S)
    out(instance, "tcp", (CLIENT, 5000), server, flags="A", sequence=sequence + 1, payload=b"")
    assert instance.idle_timeout_s == ESTABLISHED_S


@pytest.mark.parametrize("end", ["FA", "R", "RA"])
def test_rfc5382_req5_time_outs_and_rfc7857_reset(end: str) -> None:
    """A RST may be refused: what its sender sends behind it takes it back (RFC 6146, section 3.5.2.2)."""
    instance = nat()
    client = (CLIENT, 5000)
    opened(instance)
    instance.now_s += ESTABLISHED_S - 1
    out(instance, "tcp", client, flags="PA", sequence=101)
    assert instance.idle_timeout_s == ESTABLISHED_S
    out(instance, "tcp", client, flags=end, sequence=104, payload=b"")
    assert instance.idle_timeout_s == TRANSITORY_S
    assert max(instance.expires_s.values()) == instance.now_s + TRANSITORY_S * 3 // 2, "its port comes back soon"
    last = 105 if "F" in end else 104
    for sequence in (last, 104, last):  # the last ACK; data sent again
        out(instance, "tcp", client, flags="A", sequence=sequence)
        assert instance.idle_timeout_s == (TRANSITORY_S if "F" in end else ESTABLISHED_S)
    out(instance, "tcp", client, flags=end, sequence=104, payload=b"")
    opened(instance, sequence=5_000_000)


def test_a_segment_of_another_connection_keeps_the_mapping_for_long() -> None:
    instance = nat()
    client = (CLIENT, 5000)
    opened(instance)
    out(instance, "tcp", client, flags="FA", sequence=200)
    out(instance, "tcp", client, (SERVER, 81), flags="A", sequence=2**31)
    assert instance.idle_timeout_s == ESTABLISHED_S


def test_one_of_several_connections_that_closes_leaves_the_others_their_time_out() -> None:
    instance = nat()
    opened(instance)
    opened(instance, (SERVER, 81), sequence=9_000_000)
    for flags in ("FA", "A", "R"):
        out(instance, "tcp", (CLIENT, 5000), flags=flags, sequence=300)
        assert instance.idle_timeout_s == ESTABLISHED_S


def test_numbers_may_wrap() -> None:
    instance = nat()
    opened(instance, sequence=2**32 - 3)
    out(instance, "tcp", (CLIENT, 5000), flags="FA", sequence=2**32 - 2, payload=b"12345")
    for sequence in (4, 2**32 - 2, 4):
        out(instance, "tcp", (CLIENT, 5000), flags="A", sequence=sequence, payload=b"")
        assert instance.idle_timeout_s == TRANSITORY_S


@pytest.mark.parametrize("flags", ["", "A", "PA", "SA", "FA", "R", "RA", "SF", "SR", "FPU"])
def test_only_a_syn_opens(flags: str) -> None:
    instance = nat()
    assert instance(packet("tcp", (CLIENT, 5000), (SERVER, 80), flags=flags)) == DROP
    assert instance.records == {}
    picking = nat(pick_up=True)
    assert picking(packet("tcp", (CLIENT, 5000), (SERVER, 80), flags=flags)) == (FORWARD if flags in ("A", "PA") else DROP)


@pytest.mark.parametrize(("query", "reply"), [(8, 0), (13, 14), (15, 16), (17, 18)])
def test_rfc5508_req1_queries_of_all_kinds(query: int, reply: int) -> None:
    instance = nat()
    for client in ("10.0.1.1", "10.0.1.2"):
        frame = bytes(ethernet() / IP(src=client, dst=SERVER) / ICMP(type=query, id=9))
        assert instance(frame) == FORWARD
        assert checksums_hold(instance.sent)
        external = source_of(instance.sent)
        answer = bytes(ethernet() / IP(src=SERVER, dst=external[0]) / ICMP(type=reply, id=external[1]))
        assert instance.outside(answer) == FORWARD
        assert instance.sent == bytes(ethernet() / IP(src=SERVER, dst=client) / ICMP(type=reply, id=9))


def test_rfc5508_req2_a_query_lasts_a_minute() -> None:
    instance = nat(inbound_refresh=False)
    external = out(instance, "icmp", (CLIENT, 77))
    assert instance.idle_timeout_s == ICMP_S
    instance.now_s += ICMP_S
    assert back(instance, "icmp", external) == (CLIENT, 77)
    instance.now_s += ICMP_S / 2 + 1
    assert back(instance, "icmp", external) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taken", [False, True])
def test_rfc5508_req4_errors_from_outside(kind: str, taken: bool) -> None:
    """Quotation and outer header, byte by byte, also where the port was not kept. RFC 5382, REQ-9 too."""
    instance = nat()
    frame = packet(kind, (CLIENT, 5000), server_of(kind))
    untranslated = packet(kind, (EXTERNAL, 5000), server_of(kind))
    assert instance.outside(icmp_error(untranslated, router=ROUTER)) == DROP, "about nothing we know"
    if taken:
        out(instance, kind, ("10.0.1.8", 5000))
    assert instance(frame) == FORWARD
    translated = instance.sent
    assert (translated == untranslated) is not taken
    for error, code in ((3, 4), (3, 3), (11, 0), (12, 0)):
        assert instance.outside(icmp_error(translated, kind=error, code=code, router=ROUTER)) == FORWARD
        assert instance.sent == icmp_error(frame, kind=error, code=code, router=ROUTER)


@pytest.mark.parametrize("kind", KINDS)
def test_rfc5508_req5_errors_from_inside(kind: str) -> None:
    instance = nat()
    out(instance, kind, ("10.0.1.8", 5000))
    external = out(instance, kind, (CLIENT, 5000))
    assert external[1] != 5000
    answer = packet(kind, server_of(kind), external, flags="A")
    assert instance.outside(answer) == FORWARD
    delivered = instance.sent
    for router in (CLIENT, "10.0.0.254"):
        assert instance(icmp_error(delivered, inside=True, kind=3, code=3, router=router)) == FORWARD
        assert instance.sent == icmp_error(answer, inside=True, kind=3, code=3, router=EXTERNAL)
    unknown = packet(kind, server_of(kind), (CLIENT, 999), flags="A")
    assert instance(icmp_error(unknown, inside=True)) == DROP


def test_rfc5508_req7_a_hairpinned_error_reaches_who_sent() -> None:
    instance = nat(external_addresses="192.0.2.0/30")
    one, other = ("10.0.1.7", 5000), ("10.0.1.9", 6001)
    at_one, at_other = out(instance, "udp", one), out(instance, "udp", other)
    asked = packet("udp", one, at_other)
    assert instance(asked) == FORWARD
    error = icmp_error(instance.sent, inside=True, kind=3, code=3, router=other[0])
    assert instance(error) == FORWARD
    assert instance.sent == icmp_error(asked, inside=True, kind=3, code=3, router=at_other[0])
    assert at_one != one


@pytest.mark.parametrize("kind", [0, 14, 9, 10, 30, 42])
def test_rfc5508_req11_other_icmp_is_dropped(kind: int) -> None:
    instance = nat()
    frame = bytes(ethernet() / IP(src=CLIENT, dst=SERVER) / ICMP(type=kind) / bytes(4))
    assert instance(frame) == DROP
    assert instance.records == {}


def test_a_query_from_outside_reaches_nobody() -> None:
    """Also a hairpinned one: of a NAPT, an echo request to the external address can mean nobody inside."""
    instance = nat()
    out(instance, "icmp", (CLIENT, 77))
    assert instance.outside(packet("icmp", (SERVER, 77), (EXTERNAL, 0))) == DROP
    assert instance(packet("icmp", (CLIENT, 77), (EXTERNAL, 0))) == DROP


def test_protocols_without_ports_are_refused() -> None:
    instance, frames = nat(), well_formed()
    for name in ("sctp", "gre", "no payload", "error quoting gre"):
        for side in (instance, instance.outside):
            assert side(frames[name]) == DROP
            assert instance.cause == REFUSED_BY_RULE
    assert instance(frames["arp"]) == FORWARD
    assert instance.sent == frames["arp"]


@pytest.mark.parametrize("kind", ["vlan", "two vlans", "ip options", "tcp padded", "udp padded"])
def test_only_source_and_checksums_change_whatever_the_frame_is_like(kind: str) -> None:
    instance, frame = nat(pick_up=True), well_formed()[kind]
    assert instance(frame) == FORWARD
    assert checksums_hold(instance.sent)
    sent, expected = Ether(instance.sent), Ether(frame)
    for one in (sent, expected):
        del one[IP].chksum, one[IP].payload.chksum
    expected[IP].src = EXTERNAL
    assert bytes(sent) == bytes(expected)


def test_one_more_client_than_ports_and_recovery() -> None:
    """RFC 4787, REQ-3: rather none than one that somebody has. All ports of the class are given before."""
    instance = nat()
    ends = [(f"10.0.{n // 200}.{n % 200}", 5000) for n in range(CLASS_PORTS)]
    found = {out(instance, "udp", end): end for end in ends}
    assert len(found) == CLASS_PORTS
    late = packet("udp", ("10.0.9.9", 5000), server_of("udp"))
    for _ in range(3):
        assert instance(late) == DROP
        assert instance.cause == PORTS_EXHAUSTED
    assert out(instance, "udp", ("10.0.9.9", 5001)), "another class has ports"
    assert out(instance, "tcp", ("10.0.9.9", 5000)), "so has another protocol"
    for external, end in list(found.items())[::25]:
        assert back(instance, "udp", external) == end
    instance.now_s += UDP_S * 1.5 + 1
    assert instance(late) == FORWARD
    assert source_of(instance.sent) in found


def test_a_full_address_sends_its_clients_to_the_next() -> None:
    instance = nat(external_addresses="192.0.2.0/31")
    ends = [(f"10.0.{n // 100}.{2 * (n % 100)}", 5000) for n in range(CLASS_PORTS + 1)]
    found = [out(instance, "udp", end) for end in ends[:-1]]
    assert {address for address, _ in found} == {"192.0.2.0"}
    last = packet("udp", ends[-1], server_of("udp"))
    assert instance(last) == DROP, f"{TRIES} claims for one packet"
    assert instance(last) == FORWARD
    assert source_of(instance.sent) == ("192.0.2.1", 5000)


def outside_records(instance: Instance) -> dict[tuple[int, int], float]:
    return {key: instance.expires_s[key] for key in instance.records if key[0] & 0xFFFFFFFF}


@pytest.mark.parametrize(("kind", "timeout_s"), [("udp", UDP_S), ("icmp", ICMP_S), ("tcp", ESTABLISHED_S)])
def test_a_port_outlives_its_mapping_whenever_packets_come(kind: str, timeout_s: int) -> None:
    instance = nat()
    opened(instance) if kind == "tcp" else out(instance, kind, (CLIENT, 5000))
    for gap_s in (1, timeout_s // 5, timeout_s // 4 + 1, timeout_s // 2, timeout_s - 1, 3, timeout_s // 5, timeout_s // 5):
        instance.now_s += gap_s
        out(instance, kind, (CLIENT, 5000), flags="A", sequence=101)
        (claimed,) = outside_records(instance).values()
        assert claimed > instance.now_s + timeout_s


def test_a_port_that_somebody_else_has_is_given_up() -> None:
    """As after the loss of a store: the record inside still says that the port is ours."""
    instance = nat()
    first = out(instance, "udp", (CLIENT, 5000))
    (key,) = outside_records(instance)
    instance.now_s += 100
    del instance.records[key], instance.expires_s[key]
    assert out(instance, "udp", ("10.0.1.8", 5000)) == first
    second = out(instance, "udp", (CLIENT, 5000))
    assert second != first
    assert back(instance, "udp", first) == ("10.0.1.8", 5000)
    assert back(instance, "udp", second) == (CLIENT, 5000)


@dataclass
class Cluster:
    """Instances on one set of records."""

    instances: list[Instance]

    def do(self, who: int, client: int, flags: str, gap_s: int, dies: bool) -> None:
        """Let a packet of a client pass instance `who`, which may die after its claim is committed, before its record is."""
        instance = self.instances[who]
        for one in self.instances:
            one.now_s += gap_s
        before = {key: (record.copy(), instance.expires_s.get(key)) for key, record in instance.records.items()}
        end = (f"10.0.1.{client}", 5000)
        kind = "tcp" if flags else "udp"
        if instance(packet(kind, end, server_of(kind), flags=flags, sequence=client << 26)) == DROP:
            return
        external = source_of(instance.sent)
        if dies:
            for key in [key for key in instance.records if not key[0] & 0xFFFFFFFF]:
                del instance.records[key]
                instance.expires_s.pop(key, None)
                if key in before:
                    instance.records[key], expires = before[key]
                    instance.expires_s |= {key: expires} if expires is not None else {}
            return
        for one in self.instances:
            assert back(one, kind, external) == end, "a port that was used is its user's, seen from every instance"


actions = st.tuples(st.integers(0, 1), st.integers(1, 4), st.sampled_from(["", "S", "A", "A", "FA", "R"]),
                    st.sampled_from([0, 0, 1, 59, 61, 100, 239, 241, 299, 361, 1900, 7000, 11161]), st.booleans())  # fmt: skip


@settings(max_examples=1000 if LONG else 40, deadline=None)
@given(st.lists(actions, min_size=5, max_size=40), st.booleans())
def test_two_instances_never_give_one_port_twice(trace: list[tuple[int, int, str, int, bool]], refresh: bool) -> None:
    """Whatever the times between packets are, and wherever an instance dies."""
    one = nat(inbound_refresh=refresh)
    other = nat(inbound_refresh=refresh)
    other.records, other.expires_s = one.records, one.expires_s
    cluster = Cluster([one, other])
    for action in trace:
        cluster.do(*action)


def test_a_port_whose_instance_died_comes_back() -> None:
    """Claimed, and nothing more: free again when the claim expires, without anybody's doing."""
    instance = nat()
    Cluster([instance]).do(0, 1, "", 0, True)
    assert len(instance.records) == 1
    assert out(instance, "udp", ("10.0.1.2", 5000))[1] != 5000
    instance.now_s += UDP_S * 1.5 + 1
    assert out(instance, "udp", ("10.0.1.3", 5000)) == (EXTERNAL, 5000)


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_both_records_are_in_one_partition(kind: str) -> None:
    instance = nat()
    for client in range(5):
        out(instance, kind, (f"10.0.1.{client}", 5002))
    assert len(instance.records) == 10
    assert {FlowKey.of_words(low, high).partition for high, low in instance.records} == {(5002 & 0x1FE) >> 1}


def test_symmetric_each_connection_has_a_mapping_and_only_its_server_answers() -> None:
    instance = nat("nat_symmetric")
    for kind in KINDS:
        one, other = ("10.0.1.7", 5000), ("10.0.1.8", 5000)
        first, second = server_of(kind, 1), server_of(kind, 2)
        external = out(instance, kind, one, first)
        assert out(instance, kind, other, second)[0] == EXTERNAL
        assert out(instance, kind, other, first) != external
        if kind != "icmp":
            assert out(instance, kind, other, second) == external, "one port towards different servers"
            assert back(instance, kind, external, second) == other
        assert back(instance, kind, external, first) == one
        assert back(instance, kind, external, server_of(kind, 3)) is None


@settings(max_examples=200 if LONG else 10, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KINDS), clients, st.integers(1, 3)), min_size=1, max_size=20))
def test_symmetric_translation_is_a_bijection(flows: list[tuple[str, End, int]]) -> None:
    instance = nat("nat_symmetric")
    given_to: dict[tuple[str, End, int], End] = {}
    for kind, client, server in flows:
        external = out(instance, kind, client, server_of(kind, server))
        assert given_to.setdefault((kind, external, server), client) == client
    for (kind, external, server), client in given_to.items():
        assert back(instance, kind, external, server_of(kind, server)) == client


def test_symmetric_errors_both_ways() -> None:
    instance = nat("nat_symmetric")
    frame = packet("udp", (CLIENT, 5000), (SERVER, 80))
    out(instance, "udp", ("10.0.1.8", 5000))
    assert instance(frame) == FORWARD
    translated = instance.sent
    assert instance.outside(icmp_error(translated, router=ROUTER)) == FORWARD
    assert instance.sent == icmp_error(frame, router=ROUTER)
    answer = packet("udp", (SERVER, 80), source_of(translated))
    assert instance.outside(answer) == FORWARD
    assert instance(icmp_error(instance.sent, inside=True)) == FORWARD
    assert instance.sent == icmp_error(answer, inside=True, router=EXTERNAL)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"external_addresses": []}, "external_addresses=.*: give an IPv4 network"),
        ({"external_addresses": ["192.0.2.1", "192.0.2.3"]}, "consecutive"),
        ({"external_addresses": ["192.0.2.1", "192.0.2.1"]}, "consecutive"),
        ({"external_addresses": "192.0.2.1/30"}, "give an IPv4 network"),
        ({"external_addresses": "10.0.0.0/8"}, "at most 65,536"),
        ({"external_addresses": 7}, "give an IPv4 network"),
        ({"udp_timeout_s": 1}, "udp_timeout_s=1: 4 to 86400 seconds"),
        ({"udp_timeout_s": "long"}, "udp_timeout_s='long': 4 to"),
        ({"tcp_established_s": 100}, "tcp_established_s=100 is shorter than tcp_transitory_s=240"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(NearstateError, match=message):
        nat(**wrong)


def test_addresses_may_be_given_in_three_ways() -> None:
    for given_addresses in ("192.0.2.4/31", ["192.0.2.5", "192.0.2.4"], [int(IPv4Address("192.0.2.4")), "192.0.2.5"]):
        instance = nat(external_addresses=given_addresses)
        assert list(instance.env["external_addresses"][0]) == [int(IPv4Address("192.0.2.4")), 2]


def test_the_default_addresses_are_where_the_emulated_hosts_route_them() -> None:
    first, count = Instance.of("nat").env["external_addresses"][0]
    for address in (first, first + count - 1):
        assert IPv4Address(int(address)) in IPv4Network(TRANSLATED_NETWORK)


def test_an_icmp_identifier_may_be_zero() -> None:
    assert int(external_port(1, 0, ICMP_NUMBER, 0)) == 0
