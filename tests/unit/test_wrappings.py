"""Is IP found behind whatever stands before it, and does only that pass unseen which has a name?

CERT VU#855201, CVE-2021-27853 and its kin: what a filter cannot read, the host behind it may.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, LLC, SNAP, STP, Dot1AD, Dot1Q, Dot3, Ether

from nfs.dataplane import DROP, FORWARD
from nfs.dataplane.ledger import NOT_IP, OVERSIZED, TRUNCATED, UNREADABLE
from nfs.dataplane.link import LINK_PROTOCOLS
from tests.packets import CLIENT, SERVER, Instance, checksums_hold, ethernet, parsed, udp

pytestmark = [pytest.mark.python_mode, pytest.mark.bounds]
ENDS: dict[str, Any] = {"src": "02:00:00:00:00:02", "dst": "02:00:00:00:00:01"}
SYN: Any = IP(src=SERVER, dst=CLIENT) / TCP(sport=4444, dport=22, flags="S")
SYN_6: Any = IPv6(src="2001:db8::1", dst="2001:db8::2") / TCP(sport=4444, dport=22, flags="S")


def typed(kind: int, body: bytes) -> bytes:
    return bytes(Ether(**ENDS, type=kind)) + body


def tags(*kinds: int, inner: bytes = b"\x08\x00" + bytes(SYN)) -> bytes:
    """Return a frame with VLAN tags of these types, all of VLAN 0."""
    return bytes(Ether(**ENDS))[:12] + b"".join(struct.pack("!HH", kind, 0) for kind in kinds) + inner


def snap(payload: Any, kind: int = 0x0800, oui: int = 0) -> Any:
    return LLC(dsap=0xAA, ssap=0xAA, ctrl=3) / SNAP(OUI=oui, code=kind) / payload


def pppoe(payload: bytes, protocol: bytes = b"\x00\x21") -> bytes:
    return typed(0x8864, b"\x11\x00\x00\x01" + struct.pack("!H", len(payload) + len(protocol)) + protocol + payload)


def labels(count: int, payload: bytes, kind: int = 0x8847) -> bytes:
    return typed(kind, b"".join(struct.pack("!I", 16 + n << 12 | (n == count - 1) << 8 | 64) for n in range(count)) + payload)


HIDDEN: dict[str, bytes] = {
    "plain": bytes(Ether(**ENDS) / SYN), "a priority tag": tags(0x8100),
    "two tags": bytes(Ether(**ENDS) / Dot1AD() / Dot1Q() / SYN),
    "three tags": tags(0x8100, 0x8100, 0x8100), "eight tags": tags(*[0x88A8] * 8), "0x9100": tags(0x9100), "0x9200": tags(0x9200),
    "0x9300, 0x88a8, 0x8100": tags(0x9300, 0x88A8, 0x8100), "LLC and SNAP": bytes(Dot3(**ENDS) / snap(SYN)),
    "802.1H": bytes(Dot3(**ENDS) / snap(SYN, oui=0xF8)),
    "a tag, LLC and SNAP": tags(0x8100, inner=struct.pack("!H", len(snap(SYN))) + bytes(snap(SYN))),
    "SNAP with a tag": bytes(Dot3(**ENDS) / snap(Dot1Q() / SYN, 0x8100)),
    "PPPoE": pppoe(bytes(SYN)), "PPPoE, protocol of one byte": pppoe(bytes(SYN), b"\x21"),
    "PPPoE with IPv6": pppoe(bytes(SYN_6), b"\x00\x57"),
    "a tag and PPPoE": tags(0x8100, inner=pppoe(bytes(SYN))[12:]),
    "MPLS": labels(1, bytes(SYN)), "three labels": labels(3, bytes(SYN)), "eight labels": labels(8, bytes(SYN), 0x8848),
    "MPLS with IPv6": labels(2, bytes(SYN_6)),
    "IPv6 behind three tags": tags(0x8100, 0x9100, 0x8100, inner=b"\x86\xdd" + bytes(SYN_6)),
    "MAC in MAC": typed(0x88E7, bytes(4) + bytes(Ether(**ENDS) / SYN)),
    "a tag, MAC in MAC, a tag": tags(0x88A8, inner=typed(0x88E7, bytes(4) + bytes(Ether(**ENDS) / Dot1Q() / SYN))[12:]),
}  # fmt: skip
UNKNOWN: dict[str, bytes] = {
    "nine tags": tags(*[0x8100] * 9), "nine labels": labels(9, bytes(SYN)), "MACsec": typed(0x88E5, bytes(8) + bytes(SYN)),
    "an experiment's EtherType": typed(0x88B5, bytes(SYN)),
    "an EtherType behind tags": tags(0x8100, inner=b"\x88\xb6" + bytes(SYN)),
    "neither length nor EtherType": typed(1501, bytes(SYN)), "the last of these": typed(0x5FF, bytes(SYN)),
    "IP's own LLC": bytes(Dot3(**ENDS) / LLC(dsap=6, ssap=6, ctrl=3) / SYN),
    "IPX": bytes(Dot3(**ENDS)) + b"\xff\xff\x00\x22" + bytes(40),
    "SNAP of a vendor": bytes(Dot3(**ENDS) / snap(SYN, oui=0x00000C)),
    "bridged in SNAP": bytes(Dot3(**ENDS) / snap(SYN, 7, 0x0080C2)),
    "a length in SNAP": bytes(Dot3(**ENDS) / snap(SYN, 1000)), "AppleTalk in PPPoE": pppoe(bytes(40), b"\x00\x29"),
    "a pseudowire": labels(1, bytes(4) + bytes(Ether(**ENDS) / SYN)), "HSR": typed(0x892F, bytes(4) + b"\x08\x00" + bytes(SYN)),
    "network service header": typed(0x894F, bytes(8) + bytes(SYN)),
    "a fabric's tag": typed(0x8926, bytes(4) + b"\x08\x00" + bytes(SYN)),
}  # fmt: skip
NAMED: dict[str, bytes] = {
    **{name: typed(kind, bytes(46)) for name, kind in LINK_PROTOCOLS.items()},
    "ARP as it is": bytes(ethernet() / ARP(pdst=SERVER)),
    "ARP behind tags": tags(0x88A8, 0x8100, inner=b"\x08\x06" + bytes(ARP())),
    "ARP in SNAP": bytes(Dot3(**ENDS) / snap(ARP(), 0x0806)), "spanning tree": bytes(Dot3(**ENDS) / LLC() / STP()),
    "PPP's link control": pppoe(bytes(20), b"\xc0\x21"),
}  # fmt: skip
FILTERS = ("firewall", "nat", "nat_symmetric", "load_balancer", "rate_limiter", "port_scan_detector")


@pytest.mark.parametrize("what", HIDDEN)
def test_ip_is_found_behind_what_stands_before_it(what: str) -> None:
    packet = parsed(HIDDEN[what])[0]
    assert packet["status"] == 0
    assert (packet["source_port"], packet["tcp_flags"]) == (4444, 2)
    assert packet["network_offset"] == len(HIDDEN[what]) - packet["ip_bytes"]
    firewall = Instance.of("firewall")
    assert firewall.outside(HIDDEN[what]) == DROP
    assert firewall.cause == 0, "by its verdict"
    limiter = Instance.of("rate_limiter", packets_per_s=1, burst_packets=1)
    assert [limiter.outside(HIDDEN[what]) for _ in range(3)] == [FORWARD, DROP, DROP]


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_cannot_be_looked_through_passes_no_filter(what: str) -> None:
    assert parsed(UNKNOWN[what])[0]["status"] == UNREADABLE
    for name in FILTERS:
        function = Instance.of(name)
        assert (function(UNKNOWN[what]), function.cause) == (DROP, UNREADABLE), name
        assert (function.outside(UNKNOWN[what]), function.cause) == (DROP, UNREADABLE), name
    for name in ("passthrough", "traffic_counter", "heavy_hitters"):
        assert Instance.of(name).outside(UNKNOWN[what]) == FORWARD, name


@pytest.mark.parametrize("what", NAMED)
def test_link_protocols_with_a_name_pass_every_function(what: str) -> None:
    assert parsed(NAMED[what])[0]["status"] == NOT_IP
    for name in (*FILTERS, "passthrough", "traffic_counter", "heavy_hitters"):
        function = Instance.of(name)
        assert function(NAMED[what]) == function.outside(NAMED[what]) == FORWARD, name
        assert function.records == {}


@pytest.mark.parametrize("what", HIDDEN)
def test_a_wrapping_that_is_cut_is_truncated_wherever_it_is(what: str) -> None:
    frame = HIDDEN[what]
    for length in range(14, len(frame)):
        assert parsed(frame[:length])[0]["status"] == TRUNCATED, length


def test_what_is_found_is_translated_where_it_is() -> None:
    """The wrapping stays as it was, and the checksums hold."""
    header: Any = IP(src=CLIENT, dst=SERVER)
    inside = bytes(header / UDP(sport=40002, dport=53) / b"question")
    for frame in (tags(0x8100, 0x8100, 0x8100, inner=b"\x08\x00" + inside), pppoe(inside), labels(3, inside)):
        nat = Instance.of("nat", external_addresses=["192.0.2.1"])
        assert nat(frame) == FORWARD
        at = len(frame) - len(inside)
        assert nat.sent[:at] == frame[:at]
        left = bytes(ethernet()) + nat.sent[at:]
        assert Ether(left[:12] + b"\x08\x00" + left[14:])[IP].src == "192.0.2.1"
        assert checksums_hold(left[:12] + b"\x08\x00" + left[14:])


def test_a_frame_longer_than_the_network_takes_is_oversized_first() -> None:
    assert parsed(tags(0x8100, inner=bytes(1600)))[0]["status"] == OVERSIZED


# ---- a frame may be longer than its packet ----------------------------------------------------------------------------

TRAILERS = [0, 1, 4, 6, 10, 16, 18]


def behind(frame: bytes, size: int) -> bytes:
    return frame + bytes(range(0xA1, 0xA1 + size))


def icmp_holds(frame: bytes) -> bool:
    """Tell whether the ICMP checksum holds by the IP packet's own length (RFC 792)."""
    data = frame[34 : 14 + int.from_bytes(frame[16:18], "big")]
    data += bytes(len(data) % 2)
    return sum(struct.unpack(f"!{len(data) // 2}H", data)) % 0xFFFF == 0


@pytest.mark.parametrize("name", ["nat", "nat_symmetric"])
@pytest.mark.parametrize("size", TRAILERS)
@pytest.mark.parametrize("quoted", [8, 12, 15, 16, 17, 18, 20, 100])
@pytest.mark.parametrize("kind", ["tcp", "udp", "echo"])
def test_an_icmp_error_is_translated_up_to_its_packets_end(name: str, size: int, quoted: int, kind: str) -> None:
    """RFC 5508, REQ-4: the quoted checksum is changed where it is quoted, and what follows the packet is none of it."""
    upper = {"tcp": TCP(sport=40002, dport=443, flags="S", seq=9) / bytes(90), "udp": UDP(sport=40002, dport=53) / bytes(90),
             "echo": ICMP(id=40002) / bytes(90)}[kind]  # fmt: skip
    nat = Instance.of(name, external_addresses=["192.0.2.1"])
    assert nat(bytes(ethernet() / IP(src="10.0.1.8", dst=SERVER) / upper)) == FORWARD  # another client has the port
    sent = bytes(ethernet() / IP(src=CLIENT, dst=SERVER) / upper)
    assert nat(sent) == FORWARD
    quotation = nat.sent[14 : 34 + quoted]
    error = ethernet() / IP(src="198.51.100.1", dst=IP(quotation).src) / ICMP(type=3, code=4) / quotation
    frame = behind(bytes(error), size)
    assert nat.outside(frame) == FORWARD
    assert icmp_holds(nat.sent)
    assert nat.sent[len(frame) - size :] == frame[len(frame) - size :], "the trailer is as it was"
    assert Ether(nat.sent)[IP].dst == CLIENT
    check = {"tcp": 18, "udp": 8, "echo": 4}[kind]
    if quoted >= check:
        assert nat.sent[42 : 42 + len(quotation)] == sent[14 : 34 + quoted], "the quotation is as it was sent"


def test_extensions_behind_a_quotation_are_none_of_it() -> None:
    """RFC 4884, section 3: byte 5 says where the quotation ends; here before a checksum that a longer one would have."""
    nat = Instance.of("nat", external_addresses=["192.0.2.1"])
    sent = bytes(ethernet() / IP(src=CLIENT, dst=SERVER) / TCP(sport=40002, dport=443, flags="S"))
    assert nat(sent) == FORWARD
    extension = bytes([0x20, 0, 0xDF, 0xFF]) + bytes(range(1, 13))
    error = ethernet() / IP(src="198.51.100.1", dst="192.0.2.1") / ICMP(type=3, code=4, length=7) / (nat.sent[14:42] + extension)
    assert nat.outside(bytes(error)) == FORWARD
    assert icmp_holds(nat.sent)
    assert nat.sent[-len(extension) :] == extension


@pytest.mark.parametrize("size", TRAILERS)
def test_bytes_are_those_of_the_packet(size: int) -> None:
    """RFC 791, total length; RFC 8200, payload length: neither padding nor a trailer was sent by anybody."""
    for frame in (udp(payload=b"1"), bytes(ethernet() / IPv6(src="2001:db8::1", dst="2001:db8::2") / UDP(sport=9, dport=7))):
        counter = Instance.of("traffic_counter")
        assert counter(behind(frame, size)) == FORWARD
        assert counter.record()["bytes_out"] == len(frame)
        limiter = Instance.of("rate_limiter", packets_per_s=0, bytes_per_s=1000, burst_bytes=2000)
        assert limiter(behind(frame, size)) == FORWARD
        assert limiter.record()["bytes_owed"] == (len(frame) - 14) * 10**9
        assert parsed(behind(frame, size))[0]["payload_bytes"] == parsed(frame)[0]["payload_bytes"]
        hitters = Instance.of("heavy_hitters", counts="bytes")
        assert hitters(behind(frame, size)) == FORWARD
        assert set(hitters.counters.values()) == {len(frame)}


@pytest.mark.parametrize("size", TRAILERS)
def test_a_segment_in_a_padded_frame_has_no_data(size: int) -> None:
    """Window tracking counts what the segment carries."""
    firewall = Instance.of("firewall", track_window=True)
    ends = ethernet() / IP(src=CLIENT, dst=SERVER), ethernet() / IP(src=SERVER, dst=CLIENT)
    assert firewall(behind(bytes(ends[0] / TCP(sport=9, dport=7, flags="S", seq=1)), size)) == FORWARD
    assert firewall.outside(behind(bytes(ends[1] / TCP(sport=7, dport=9, flags="SA", seq=5, ack=2)), size)) == FORWARD
    assert firewall(behind(bytes(ends[0] / TCP(sport=9, dport=7, flags="A", seq=2, ack=6)), size)) == FORWARD
    assert firewall.record()["opener_end"] == 2
