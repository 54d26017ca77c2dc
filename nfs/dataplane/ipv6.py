"""Where does an IPv6 packet's transport header begin, and which ICMPv6 messages are about the link only?

Between the IPv6 header and the transport header stand extension headers, each with the number of what follows and its own length
(RFC 8200, section 4). Those that Open vSwitch walks are walked here, so that both find the same ports: hop-by-hop options,
routing, fragment, destination options, authentication (RFC 4302). All else (ESP, mobility, no next header) is a protocol without
ports. A fragment header with offset zero and nothing to follow is that of an atomic fragment: a whole packet (RFC 6946).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.compiled.memory import network16, network32
from datastore.compiled.siphash import siphash
from nfs.dataplane.ledger import FRAGMENT, MALFORMED, TRUNCATED

HEADER_BYTES = 40
HOP_BY_HOP, ROUTING, FRAGMENTATION, AUTHENTICATION, DESTINATION = 0, 43, 44, 51, 60
MOST_EXTENSIONS = 8
"""RFC 8200, section 4.1: each at most once, but destination options twice, are six before the transport header."""
OFFSET_BYTES, MORE_FRAGMENTS = 0xFFF8, 1
"""Of bytes 2 and 3 of a fragment header (RFC 8200, section 4.5)."""


@inline
def network64(memory: np.ndarray, at: int) -> Any:
    """Return the 64-bit integer in network byte order at byte `at` of a uint8 array."""
    return np.uint64(network32(memory, at)) << np.uint64(32) | np.uint64(network32(memory, at + 4))


@inline
def low_word(middle: int, low: int) -> Any:
    """Return the lower 64 bits of an address from what a packet has of them, as uint64."""
    return np.uint64(middle) << np.uint64(32) | np.uint64(low)


@inline
def source_word(packet: Any) -> Any:
    """Return 32 bits that name a packet's sender, as uint32: an IPv4 address itself, a hash of an IPv6 one (`named`)."""
    return named(packet.ip_version, packet.source_high, low_word(packet.source_middle, packet.source_address))


@inline
def destination_word(packet: Any) -> Any:
    """Return 32 bits that name whom a packet is to, as `source_word`."""
    return named(packet.ip_version, packet.destination_high, low_word(packet.destination_middle, packet.destination_address))


@jit
def named(version: int, high: int, low: int) -> Any:
    """Return 32 bits for an address; of IPv6 28 bits of a fingerprint, in 240.0.0.0/4, where no host is (RFC 1112, section 4)."""
    if version != 6:
        return np.uint32(low)
    mixed, _ = siphash(high, low, np.uint64(0), np.uint64(0), np.uint64(0))
    return np.uint32(mixed >> np.uint64(36) | np.uint64(0xF0000000))


@jit
def skip_extensions(memory: np.ndarray, at: int, end: int, protocol: int) -> Any:
    """Walk from byte `at`, where a header of kind `protocol` begins, to the transport header; read nothing from byte `end` on.

    Returns (status, protocol, at, fragment): what follows and where; the byte of the fragment header of a fragment, else 0.
    Status FRAGMENT: a later fragment, so what follows is payload. MALFORMED: more headers than there can be, the hop-by-hop
    options not first (RFC 8200, section 4.3), or a second fragment header.
    """
    protocol, at, fragment, seen = np.int64(protocol), np.int64(at), np.int64(0), False
    for n in range(MOST_EXTENSIONS + 1):
        if protocol not in (HOP_BY_HOP, ROUTING, FRAGMENTATION, AUTHENTICATION, DESTINATION):
            return np.int64(0), protocol, at, fragment
        if n == MOST_EXTENSIONS or (protocol == HOP_BY_HOP and n > 0) or (protocol == FRAGMENTATION and seen):
            break
        if at + 8 > end:
            return np.int64(TRUNCATED), protocol, at, fragment
        following, size = np.int64(memory[at]), (np.int64(memory[at + 1]) + 1) * 8
        if protocol == AUTHENTICATION:
            size = (np.int64(memory[at + 1]) + 2) * 4
        elif protocol == FRAGMENTATION:
            size, seen = np.int64(8), True
            word = np.int64(network16(memory, at + 2))
            if word & (OFFSET_BYTES | MORE_FRAGMENTS):
                fragment = at
            if word & OFFSET_BYTES:
                return np.int64(FRAGMENT), following, at + size, fragment
        if at + size > end:
            return np.int64(TRUNCATED), protocol, at, fragment
        protocol, at = following, at + size
    return np.int64(MALFORMED), protocol, at, fragment


@inline
def is_error(kind: int) -> bool:
    """RFC 4443, section 2.1: destination unreachable, packet too big, time exceeded, parameter problem."""
    return 1 <= kind <= 4


@inline
def is_echo(kind: int) -> bool:
    """RFC 4443, section 4: echo request and reply, which carry an identifier."""
    return kind == 128 or kind == 129


@inline
def is_link_control(kind: int, hop_limit: int) -> bool:
    """Tell whether an ICMPv6 message is for the link alone, as ARP is for IPv4: whoever bridges a link must not drop it.

    RFC 4890, sections 4.2 and 4.4.1: neighbour and router discovery, redirect (133 to 137, RFC 4861), inverse discovery (141,
    142, RFC 3122), secure discovery (148, 149, RFC 3971), with hop limit 255, which nothing from beyond the link has; multicast
    listeners (130 to 132, 143, RFC 3810) and multicast routers (151 to 153, RFC 4286), with hop limit 1.
    """
    if hop_limit == 255:
        return 133 <= kind <= 137 or 141 <= kind <= 142 or 148 <= kind <= 149
    return hop_limit == 1 and (130 <= kind <= 132 or kind == 143 or 151 <= kind <= 153)
