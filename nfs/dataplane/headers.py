"""What a frame says of itself: the parser from bytes to the fields network functions see.

Reads Ethernet with what may stand before IP in it (`link.py`), IPv4 (RFC 791), IPv6 and its extension headers (RFC 8200,
`ipv6.py`), TCP (RFC 9293), UDP (RFC 768), ICMP (RFC 792) and ICMPv6 (RFC 4443); an ICMP error is followed to its flow. Nothing is
read beyond the frame's length, whatever its headers claim. Nothing behind a packet's own end is taken for its own: a frame may be
longer than its packet, by Ethernet's padding, a trailer, or a capture's check sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import INTERPRETED, inline, jit
from datastore.compiled.memory import network16, network32
from nfs.dataplane import ipv6
from nfs.dataplane.ledger import FRAGMENT, MALFORMED, NOT_IP, OVERSIZED, TRUNCATED
from nfs.dataplane.link import IPV4, IPV6, skip_link_headers

INSIDE, OUTSIDE = 0, 1
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
MAX_FRAME_BYTES = 1522
"""Ethernet header, one VLAN tag and 1,500 bytes, with 4 bytes to spare for a second tag."""

_FIELDS = (
    ("frame", "i8"),  # byte offset of the packet in the frames
    ("key_high", "u8"),
    ("key_low", "u8"),
    ("next_hop", "u8"),  # destination MAC address for the frame to leave with; 0: the one it has
    ("length", "u4"),  # bytes of the whole frame, without the frame check sequence
    ("source_address", "u4"),  # of IPv6 the low 32 bits
    ("destination_address", "u4"),
    ("tcp_sequence", "u4"),
    ("tcp_acknowledgment", "u4"),
    ("source_port", "u2"),  # TCP and UDP; for ICMP echo the identifier stands in both
    ("destination_port", "u2"),
    ("tcp_window", "u2"),
    ("partition", "u2"),
    ("network_offset", "u2"),  # bytes from the frame's start to the IP header
    ("transport_offset", "u2"),
    ("payload_bytes", "u2"),  # bytes behind the transport header
    ("fragment_offset", "u2"),  # in bytes; 0 for whole packets and first fragments
    ("arrived_from", "u1"),  # INSIDE or OUTSIDE
    ("protocol", "u1"),
    ("tcp_flags", "u1"),
    ("icmp_type", "u1"),
    ("icmp_code", "u1"),
    ("icmp_error", "u1"),  # 1: addresses and ports are those of the flow the error speaks of, seen from this side
    ("time_to_live", "u1"),
    ("status", "u1"),  # 0: parsed; else the ledger cause that says why not
    ("has_ports", "u1"),
    ("tcp_window_scale", "u1"),  # of a SYN: 1 + the shift count (RFC 7323, section 2.2); 0: it has no such option
    ("verdict", "u1"),  # the engine's: what the NF said, while the packet waits for its state to be committed
    ("ip_version", "u1"),  # 4 or 6; 0: neither
    # of IPv6, zero else; behind the others, so that a packet of IPv4 stays on the cache lines it had
    ("source_high", "u8"),  # bits 127 to 64 of the address
    ("destination_high", "u8"),
    ("source_middle", "u4"),  # bits 63 to 32
    ("destination_middle", "u4"),
    ("fragment_header", "u2"),  # bytes from the frame's start to the fragment header of a fragment; 0: it is none
    ("ip_bytes", "u2"),  # bytes of the IP packet with its header, by that header (RFC 791, RFC 8200)
)
PACKET = np.dtype([(name, kind) for name, kind in _FIELDS], align=True)
"""One packet's fields, in host byte order; what a network function gets as `packet`."""


def make_packets(count: int) -> np.ndarray:
    """Return PACKET[count], all zero; a record array where the parser runs as plain Python, which asks for attributes."""
    packets = np.zeros(count, PACKET)
    return packets.view(np.recarray) if INTERPRETED else packets


@inline
def _is_icmp_error(kind: int) -> bool:
    """RFC 792: destination unreachable, source quench, redirect, time exceeded, parameter problem."""
    return kind == 3 or kind == 4 or kind == 5 or kind == 11 or kind == 12


@inline
def _is_icmp_query(kind: int) -> bool:
    """RFC 792 and RFC 950: echo, time stamp, information and address mask, questions and answers."""
    return kind == 0 or kind == 8 or 13 <= kind <= 18


@jit
def parse(memory: np.ndarray, at: int, length: int, arrived_from: int, packets: np.ndarray, index: int) -> int:
    """Fill `packets[index]` from the `length` bytes at byte `at` of `memory` (uint8); return its status.

    Status 0: an IPv4 or IPv6 packet whose flow is known. Else the ledger's cause: NOT_IP (a link protocol with a name, also
    ICMPv6 that is for the link alone, see `ipv6.is_link_control`), UNREADABLE (neither that nor IP), FRAGMENT (a later one:
    addresses are set, ports are not), TRUNCATED, OVERSIZED or MALFORMED.
    """
    packet = packets[index]
    packet.frame = at
    packet.length = length
    packet.arrived_from = arrived_from
    packet.source_address = packet.destination_address = 0
    packet.source_port = packet.destination_port = 0
    packet.tcp_flags = packet.icmp_type = packet.icmp_code = packet.icmp_error = packet.has_ports = 0
    packet.protocol = packet.fragment_offset = packet.payload_bytes = packet.time_to_live = 0
    packet.network_offset = packet.transport_offset = packet.ip_bytes = packet.next_hop = 0
    packet.tcp_sequence = packet.tcp_acknowledgment = packet.tcp_window = packet.tcp_window_scale = 0
    if packet.ip_version == 6:  # of the packet that was here before
        packet.source_high = packet.destination_high = packet.source_middle = packet.destination_middle = 0
        packet.fragment_header = 0
    packet.ip_version = 0
    status = _parse_ethernet(memory, at, length, packets, index)
    packet.status = status
    return status


@inline
def _parse_ethernet(memory: np.ndarray, at: int, length: int, packets: np.ndarray, index: int) -> int:
    if length < 14:
        return TRUNCATED
    if length > MAX_FRAME_BYTES:
        return OVERSIZED
    offset = np.int64(14)
    kind = np.int64(network16(memory, at + 12))
    if kind != IPV4 and kind != IPV6:
        status, kind, offset = skip_link_headers(memory, at, length, kind)
        if status:
            return status
    if kind == IPV4:
        return _parse_ipv4(memory, at, length, offset, packets, index)
    return _parse_ipv6(memory, at, length, offset, packets, index)


@inline
def _parse_ipv4(memory: np.ndarray, at: int, length: int, offset: int, packets: np.ndarray, index: int) -> int:
    if length < offset + 20:
        return TRUNCATED
    ip = at + offset
    header_bytes = np.int64(memory[ip] & np.uint8(15)) * 4
    total_bytes = np.int64(network16(memory, ip + 2))
    if memory[ip] >> np.uint8(4) != 4 or header_bytes < 20 or total_bytes < header_bytes:
        return MALFORMED
    if length < offset + total_bytes:
        return TRUNCATED
    packet = packets[index]
    packet.ip_version = 4
    packet.network_offset = offset
    packet.transport_offset = offset + header_bytes
    packet.ip_bytes = total_bytes
    packet.time_to_live = memory[ip + 8]
    packet.protocol = memory[ip + 9]
    packet.source_address = network32(memory, ip + 12)
    packet.destination_address = network32(memory, ip + 16)
    fragment = np.int64(network16(memory, ip + 6))
    packet.fragment_offset = (fragment & 0x1FFF) * 8
    if fragment & 0x1FFF:
        return _later_fragment(packets, index)
    more_fragments = fragment & 0x2000 != 0
    return _parse_transport(memory, ip + header_bytes, total_bytes - header_bytes, more_fragments, packets, index)


@inline
def _later_fragment(packets: np.ndarray, index: int) -> int:
    """FRAGMENT; MALFORMED for one that begins within a TCP header, to overwrite flags that have passed (RFC 3128, RFC 1858)."""
    packet = packets[index]
    return MALFORMED if packet.protocol == TCP and packet.fragment_offset == 8 else FRAGMENT


@jit
def _parse_ipv6(memory: np.ndarray, at: int, length: int, offset: int, packets: np.ndarray, index: int) -> int:
    if length < offset + ipv6.HEADER_BYTES:
        return TRUNCATED
    ip = at + offset
    if memory[ip] >> np.uint8(4) != 6:
        return MALFORMED
    end = ip + ipv6.HEADER_BYTES + np.int64(network16(memory, ip + 4))
    if at + length < end:
        return TRUNCATED
    status, protocol, transport, fragment = ipv6.skip_extensions(memory, ip + ipv6.HEADER_BYTES, end, memory[ip + 6])
    packet = packets[index]
    packet.ip_version = 6
    packet.network_offset = offset
    packet.transport_offset = transport - at
    packet.time_to_live = memory[ip + 7]
    packet.ip_bytes = end - ip
    packet.protocol = protocol
    _put_addresses(memory, ip + 8, ip + 24, packets, index)
    more_fragments = False
    if fragment:
        packet.fragment_header = fragment - at
        word = np.int64(network16(memory, fragment + 2))
        packet.fragment_offset = word & ipv6.OFFSET_BYTES
        more_fragments = word & ipv6.MORE_FRAGMENTS != 0
    if status:
        return _later_fragment(packets, index) if status == FRAGMENT else status
    return _parse_transport(memory, transport, end - transport, more_fragments, packets, index)


@jit
def _put_addresses(memory: np.ndarray, source: int, destination: int, packets: np.ndarray, index: int) -> None:
    """Set the addresses of `packets[index]` to the IPv6 ones at bytes `source` and `destination`."""
    packet = packets[index]
    packet.source_high = ipv6.network64(memory, source)
    packet.source_middle = network32(memory, source + 8)
    packet.source_address = network32(memory, source + 12)
    packet.destination_high = ipv6.network64(memory, destination)
    packet.destination_middle = network32(memory, destination + 8)
    packet.destination_address = network32(memory, destination + 12)


@jit
def _window_scale(memory: np.ndarray, at: int, end: int) -> Any:
    """Return 1 + the shift count of a SYN's window scale option, at most 15 (RFC 7323, section 2.3); 0: there is none."""
    while at + 2 < end:
        kind, size = np.int64(memory[at]), np.int64(memory[at + 1])
        if kind == 1:  # no operation: the one option without a length that another may follow
            at += 1
            continue
        if kind == 0 or size < 2:
            break
        if kind == 3 and size == 3:
            return min(np.int64(memory[at + 2]), 14) + 1
        at += size
    return 0


@inline
def _parse_transport(memory: np.ndarray, at: int, size: int, more: bool, packets: np.ndarray, index: int) -> int:
    """Parse `size` bytes of transport header and payload at byte `at`; `more`: a first fragment, so lengths may not match."""
    packet = packets[index]
    if packet.protocol == TCP:
        if size < 20:
            return TRUNCATED
        header_bytes = np.int64(memory[at + 12] >> np.uint8(4)) * 4
        if header_bytes < 20:
            return MALFORMED
        if size < header_bytes:
            return TRUNCATED
        packet.tcp_sequence = network32(memory, at + 4)
        packet.tcp_acknowledgment = network32(memory, at + 8)
        packet.tcp_flags = memory[at + 13] & np.uint8(0x3F)
        packet.tcp_window = network16(memory, at + 14)
        if packet.tcp_flags & SYN and header_bytes > 20:
            packet.tcp_window_scale = _window_scale(memory, at + 20, at + header_bytes)
        packet.payload_bytes = size - header_bytes
    elif packet.protocol == UDP:
        if size < 8:
            return TRUNCATED
        datagram = np.int64(network16(memory, at + 4))
        if datagram < 8 or (datagram > size and not more):
            return MALFORMED
        packet.payload_bytes = min(datagram, size) - 8
    elif packet.protocol == ICMP and packet.ip_version == 4:
        return _parse_icmp(memory, at, size, packets, index)
    elif packet.protocol == ICMPV6 and packet.ip_version == 6:
        return _parse_icmpv6(memory, at, size, packets, index)
    else:
        packet.payload_bytes = size
        return 0
    packet.source_port = network16(memory, at)
    packet.destination_port = network16(memory, at + 2)
    packet.has_ports = 1
    return 0


@jit
def _parse_icmp(memory: np.ndarray, at: int, size: int, packets: np.ndarray, index: int) -> int:
    """Echo and its reply: the identifier is the client's port. An error: the flow of the packet it quotes (RFC 792)."""
    if size < 8:
        return TRUNCATED
    packet = packets[index]
    packet.icmp_type = memory[at]
    packet.icmp_code = memory[at + 1]
    packet.payload_bytes = size - 8
    if not _is_icmp_error(np.int64(memory[at])):
        packet.source_port = packet.destination_port = network16(memory, at + 4)
        return 0
    quoted = at + 8
    if size < 8 + 20 or memory[quoted] >> np.uint8(4) != 4:
        return MALFORMED
    header_bytes = np.int64(memory[quoted] & np.uint8(15)) * 4
    if header_bytes < 20:
        return MALFORMED
    if size < 8 + header_bytes + 8:
        return TRUNCATED
    if network16(memory, quoted + 6) & np.uint16(0x1FFF):  # of a later fragment: what stands there are no ports
        return FRAGMENT
    if network32(memory, quoted + 12) != packet.destination_address:  # RFC 792: an error goes to whom the quoted packet is from
        return MALFORMED
    if memory[quoted + 9] == ICMP and not _is_icmp_query(np.int64(memory[quoted + header_bytes])):
        return MALFORMED  # RFC 1122, section 3.2.2: no error is about an error
    # The quoted packet went the other way, so its source is this side's destination.
    packet.icmp_error = 1
    packet.protocol = memory[quoted + 9]
    packet.source_address = network32(memory, quoted + 16)
    packet.destination_address = network32(memory, quoted + 12)
    ports = quoted + header_bytes
    if packet.protocol == TCP or packet.protocol == UDP:
        packet.source_port = network16(memory, ports + 2)
        packet.destination_port = network16(memory, ports)
        packet.has_ports = 1
    elif packet.protocol == ICMP:
        packet.source_port = packet.destination_port = network16(memory, ports + 4)
    return 0


@jit
def _parse_icmpv6(memory: np.ndarray, at: int, size: int, packets: np.ndarray, index: int) -> int:
    """As `_parse_icmp`, by RFC 4443; what is for the link alone is NOT_IP, unless in fragments (RFC 6980)."""
    if size < 8:
        return TRUNCATED
    packet = packets[index]
    kind = np.int64(memory[at])
    packet.icmp_type = kind
    packet.icmp_code = memory[at + 1]
    packet.payload_bytes = size - 8
    if ipv6.is_link_control(kind, np.int64(packet.time_to_live)) and packet.fragment_header == 0:
        return NOT_IP
    if not ipv6.is_error(kind):
        if ipv6.is_echo(kind):
            packet.source_port = packet.destination_port = network16(memory, at + 4)
        return 0
    quoted, end = at + 8, at + size
    if size < 8 + ipv6.HEADER_BYTES or memory[quoted] >> np.uint8(4) != 6:
        return MALFORMED
    status, protocol, ports, _ = ipv6.skip_extensions(memory, quoted + ipv6.HEADER_BYTES, end, memory[quoted + 6])
    if status:
        return status
    if end < ports + 8:
        return TRUNCATED
    # RFC 4443: an error goes to whom the quoted packet is from (section 2.2) and is about no error (section 2.4, e.1)
    astray = ipv6.network64(memory, quoted + 8) != packet.destination_high
    astray = astray or network32(memory, quoted + 16) != packet.destination_middle
    if astray or network32(memory, quoted + 20) != packet.destination_address:
        return MALFORMED
    if protocol == ICMPV6 and memory[ports] < 128:
        return MALFORMED
    _put_addresses(memory, quoted + 24, quoted + 8, packets, index)  # it went the other way
    packet.icmp_error = 1
    packet.protocol = protocol
    if protocol in (TCP, UDP):
        packet.source_port = network16(memory, ports + 2)
        packet.destination_port = network16(memory, ports)
        packet.has_ports = 1
    elif protocol == ICMPV6 and ipv6.is_echo(np.int64(memory[ports])):
        packet.source_port = packet.destination_port = network16(memory, ports + 4)
    return 0
