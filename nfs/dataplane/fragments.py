"""Which flow does a later fragment belong to? It carries no ports; its first fragment did (RFC 791, section 3.2).

A small table of this process: source, destination, protocol and identification of a datagram name its first fragment's ports
for FRAGMENT_NS. Of IPv6 the name is a fingerprint, and the protocol no part of it but found with the ports: what a later fragment
says of it does not count (RFC 8200, section 4.5). A later fragment that came before its first, or whose first was never seen,
stays one without a flow. The switches steer all fragments of a datagram by address, so they meet in one instance; their flow's
record may be elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.native import inline, jit
from datastore.native.memory import network16, network32
from datastore.native.siphash import siphash
from nfs.dataplane.headers import TCP, UDP
from nfs.dataplane.ipv6 import low_word

SLOTS = 1024
FRAGMENT_NS = 15_000_000_000
"""RFC 791, section 3.2: the suggested lower bound of a reassembly timer is 15 seconds."""
WORDS = 3
HIGH, LOW, UNTIL_NS = range(WORDS)
MORE_FRAGMENTS = 0x2000
PORTS, PROTOCOL = np.uint64(0x0000FFFFFFFF0000), np.uint64(0xFF00)
"""What a slot's low word tells of the first fragment, beside its name."""
IPV6 = np.uint64(2)


def make_fragments() -> np.ndarray:
    """Return an empty table: uint64[SLOTS, 3]. A slot is overwritten by the next datagram that falls into it."""
    return np.zeros((SLOTS, WORDS), np.uint64)


@inline
def _slot(high: int, low: int) -> Any:
    return np.int64((high ^ low * np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xD6E8FEB86659FD93) >> np.uint64(54))


@inline
def is_fragment(packet: Any, memory: np.ndarray) -> bool:
    """Tell whether a parsed packet with a transport header is a first fragment."""
    if packet.ip_version == 6:
        return packet.fragment_header != 0
    return network16(memory, packet.frame + packet.network_offset + 6) & MORE_FRAGMENTS != 0


@jit
def datagram(packets: np.ndarray, index: int, memory: np.ndarray) -> Any:
    """Return the two words that name a fragment's datagram: addresses; identification, protocol and side."""
    packet = packets[index]
    if packet.ip_version == 6:
        return datagram_of_ipv6(packets, index, memory)
    identification = network16(memory, packet.frame + packet.network_offset + 4)
    high = np.uint64(packet.source_address) << np.uint64(32) | np.uint64(packet.destination_address)
    low = np.uint64(identification) << np.uint64(48) | np.uint64(packet.protocol) << np.uint64(8) | np.uint64(packet.arrived_from)
    return high, low


@jit
def datagram_of_ipv6(packets: np.ndarray, index: int, memory: np.ndarray) -> Any:
    """Return the two words that name a fragment's datagram, 80 bits of a fingerprint and the side; no protocol."""
    packet = packets[index]
    identification = np.uint64(network32(memory, packet.frame + packet.fragment_header + 4))
    high, low = siphash(packet.source_high, low_word(packet.source_middle, packet.source_address), packet.destination_high,
                        low_word(packet.destination_middle, packet.destination_address), identification)  # fmt: skip
    return high, low & ~(PORTS | np.uint64(0xFFFF)) | IPV6 | np.uint64(packet.arrived_from)


@inline
def remember_first(fragments: np.ndarray, packets: np.ndarray, index: int, memory: np.ndarray, now_ns: int) -> None:
    """Remember the ports of a parsed packet if it is a first fragment."""
    packet = packets[index]
    if is_fragment(packet, memory) and not packet.icmp_error:
        remember(fragments, packets, index, memory, now_ns)


@jit
def remember(fragments: np.ndarray, packets: np.ndarray, index: int, memory: np.ndarray, now_ns: int) -> None:
    """Remember the ports of a first fragment."""
    packet = packets[index]
    high, low = datagram(packets, index, memory)
    slot = fragments[_slot(high, low)]
    ports = np.uint64(packet.source_port) << np.uint64(32) | np.uint64(packet.destination_port) << np.uint64(16)
    protocol = np.uint64(packet.protocol) << np.uint64(8)
    slot[HIGH], slot[LOW], slot[UNTIL_NS] = high, low | ports | protocol, np.uint64(now_ns + FRAGMENT_NS)


@jit
def find_flow(fragments: np.ndarray, packets: np.ndarray, index: int, memory: np.ndarray, now_ns: int) -> bool:
    """Give a later fragment the ports of its datagram's first; False when that was not seen."""
    packet = packets[index]
    if packet.fragment_offset == 0:  # an error about a later fragment
        return False
    high, low = datagram(packets, index, memory)
    slot = fragments[_slot(high, low)]
    told = PORTS | PROTOCOL if packet.ip_version == 6 else PORTS
    if slot[HIGH] != high or slot[LOW] & ~told != low or slot[UNTIL_NS] < np.uint64(now_ns):
        return False
    packet.source_port = slot[LOW] >> np.uint64(32) & np.uint64(0xFFFF)
    packet.destination_port = slot[LOW] >> np.uint64(16) & np.uint64(0xFFFF)
    packet.protocol = slot[LOW] >> np.uint64(8) & np.uint64(0xFF)
    packet.has_ports = 1 if packet.protocol == TCP or packet.protocol == UDP else 0
    packet.status = 0
    return True
