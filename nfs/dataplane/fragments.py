"""Which flow does a later fragment belong to? It carries no ports; its first fragment did (RFC 791, section 3.2).

A small table of this process: source, destination, protocol and identification of a datagram name its first fragment's ports
for FRAGMENT_S. A later fragment that came before its first, or whose first was never seen, stays one without a flow. The
switches steer all fragments of a datagram by address, so they meet in one instance; their flow's record may be elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.native import inline, jit
from datastore.native.memory import network16
from nfs.dataplane.headers import ICMP

SLOTS = 1024
FRAGMENT_NS = 15_000_000_000
"""RFC 791, section 3.2: the suggested lower bound of a reassembly timer is 15 seconds."""
WORDS = 3
HIGH, LOW, UNTIL_NS = range(WORDS)
MORE_FRAGMENTS = 0x2000


def make_fragments() -> np.ndarray:
    """Return an empty table: uint64[SLOTS, 3]. A slot is overwritten by the next datagram that falls into it."""
    return np.zeros((SLOTS, WORDS), np.uint64)


@inline
def _slot(high: int, low: int) -> Any:
    return np.int64((high ^ low * np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xD6E8FEB86659FD93) >> np.uint64(54))


@inline
def datagram(packets: np.ndarray, index: int, memory: np.ndarray) -> Any:
    """Return the two words that name a fragment's datagram: addresses; identification, protocol and side."""
    packet = packets[index]
    identification = network16(memory, packet.frame + packet.network_offset + 4)
    high = np.uint64(packet.source_address) << np.uint64(32) | np.uint64(packet.destination_address)
    low = np.uint64(identification) << np.uint64(48) | np.uint64(packet.protocol) << np.uint64(8) | np.uint64(packet.arrived_from)
    return high, low


@jit
def remember_first(fragments: np.ndarray, packets: np.ndarray, index: int, memory: np.ndarray, now_ns: int) -> None:
    """Remember the ports of a parsed packet if it is a first fragment."""
    packet = packets[index]
    if not network16(memory, packet.frame + packet.network_offset + 6) & MORE_FRAGMENTS or packet.icmp_error:
        return
    high, low = datagram(packets, index, memory)
    slot = fragments[_slot(high, low)]
    ports = np.uint64(packet.source_port) << np.uint64(32) | np.uint64(packet.destination_port) << np.uint64(16)
    slot[HIGH], slot[LOW], slot[UNTIL_NS] = high, low | ports, np.uint64(now_ns + FRAGMENT_NS)


@jit
def find_flow(fragments: np.ndarray, packets: np.ndarray, index: int, memory: np.ndarray, now_ns: int) -> bool:
    """Give a later fragment the ports of its datagram's first; False when that was not seen."""
    packet = packets[index]
    high, low = datagram(packets, index, memory)
    slot = fragments[_slot(high, low)]
    ports = np.uint64(0x0000FFFFFFFF0000)
    if slot[HIGH] != high or slot[LOW] & ~ports != low or slot[UNTIL_NS] < np.uint64(now_ns):
        return False
    packet.source_port = slot[LOW] >> np.uint64(32) & np.uint64(0xFFFF)
    packet.destination_port = slot[LOW] >> np.uint64(16) & np.uint64(0xFFFF)
    packet.has_ports = 0 if packet.protocol == ICMP else 1
    packet.status = 0
    return True
