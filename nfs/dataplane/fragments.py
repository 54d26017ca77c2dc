"""Which flow does a later fragment belong to? It carries no ports; its first fragment did (RFC 791, section 3.2).

A small table of this process: source, destination, protocol and identification of a datagram name its first fragment's ports
for FRAGMENT_NS. Of IPv6 the name is a fingerprint, and the protocol no part of it but found with the ports: what a later fragment
says of it does not count (RFC 8200, section 4.5). The switches steer all fragments of a datagram by address, so they meet in one
instance; their flow's record may be elsewhere.

A later fragment that comes before its first waits in a *room* (RFC 4787, REQ-14), in the frame it came in:

    later (offset 1480) -> no first yet: it waits            first -> remembered; goes on, and behind it, in the order of their
    later (offset 2960) -> no first yet: it waits                     arrival, all that wait for it

The room is bounded in number (1/128 of the frames, at most 128) and in time (HOLD_NS), so fragments without a first one cannot
fill the frame pool. When it is full, the fragment that has waited longest is dropped for the newest one, with cause
fragment_room_full. After HOLD_NS a fragment is dropped with cause fragment. A fragment that waits knows no partition. Let go, it
is as one that has just come: parked, asked for elsewhere or run here as its flow's partition is by then. The switch may send the
datagram's addresses to another host meanwhile; then the first fragment comes there, and this one is dropped after HOLD_NS.

Fragments that overlap the first one are MALFORMED: they could overwrite the header by which it was let through (RFC 3128,
RFC 5722).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from datastore.compiled import inline, jit
from datastore.compiled.memory import network16, network32
from datastore.compiled.siphash import siphash
from nfs.dataplane.headers import TCP, UDP
from nfs.dataplane.ipv6 import low_word
from nfs.dataplane.ledger import MALFORMED

SLOTS = 1024
FRAGMENT_NS = 15_000_000_000
"""RFC 791, section 3.2: the suggested lower bound of a reassembly timer is 15 seconds."""
WORDS = 4
HIGH, LOW, UNTIL_NS, FIRST_END = range(WORDS)
"""FIRST_END: how many bytes of the datagram the first fragment has."""
HOLD_NS = 100_000_000
"""How long a later fragment waits for its first one: far above what reordering takes, far below any reassembly timer."""
MOST_HELD, FRAMES_EACH = 128, 128
HEAD, TAIL = range(2)
EMPTY = -1
MORE_FRAGMENTS = 0x2000
PORTS, PROTOCOL = np.uint64(0x0000FFFFFFFF0000), np.uint64(0xFF00)
"""What a slot's low word tells of the first fragment, beside its name."""
IPV6 = np.uint64(2)


def make_fragments() -> np.ndarray:
    """Return an empty table: uint64[SLOTS, 4]. A slot is overwritten by the next datagram that falls into it."""
    return np.zeros((SLOTS, WORDS), np.uint64)


class Room(NamedTuple):
    """Fragments that wait for their first one, a ring in order of arrival.

    names: uint64[n, 2], their datagrams. frames: int64[n], frame numbers, EMPTY where one has gone. since_ns: int64[n], when they
    came. control: int64[2], HEAD and TAIL: how many entries have been left behind and made, counted without end.
    """

    names: np.ndarray
    frames: np.ndarray
    since_ns: np.ndarray
    control: np.ndarray


def make_room(frames: int) -> Room:
    """Return an empty room for an area of so many frames; one of less than FRAMES_EACH holds no fragment."""
    count = min(MOST_HELD, frames // FRAMES_EACH)
    names, numbers = np.zeros((count, 2), np.uint64), np.full(count, EMPTY, np.int64)
    return Room(names, numbers, np.zeros(count, np.int64), np.zeros(2, np.int64))


@inline
def any_held(room: Room) -> Any:
    """Tell whether the room may hold a fragment."""
    return room.control[HEAD] != room.control[TAIL]


@jit
def hold(room: Room, packets: np.ndarray, index: int, memory: np.ndarray, now_ns: int) -> int:
    """Let packet `index` wait for its first fragment; returns the frame number of the one that must go for it, or EMPTY.

    In a room without places that is the packet itself.
    """
    places, evicted = room.frames.shape[0], np.int64(EMPTY)
    if places == 0:
        return np.int64(index)
    if room.control[TAIL] - room.control[HEAD] == places:
        evicted = take_oldest(room)
    place = room.control[TAIL] % places
    room.names[place, 0], room.names[place, 1] = datagram(packets, index, memory)
    room.frames[place], room.since_ns[place] = index, now_ns
    room.control[TAIL] += 1
    return evicted


@inline
def take_oldest(room: Room) -> Any:
    """Take the oldest entry out of a room that has one; returns its frame number, EMPTY when it had gone before."""
    place = room.control[HEAD] % room.frames.shape[0]
    index = room.frames[place]
    room.frames[place] = EMPTY
    room.control[HEAD] += 1
    return index


@inline
def oldest_ns(room: Room) -> Any:
    """Return since when the oldest entry of a room that has one waits; 0 when it has gone."""
    place = room.control[HEAD] % room.frames.shape[0]
    return room.since_ns[place] if room.frames[place] != EMPTY else np.int64(0)


@jit
def take_held(room: Room, packets: np.ndarray, index: int, memory: np.ndarray, out: np.ndarray, count: int) -> int:
    """Append to `out[:count]` the frame numbers of all that wait for first fragment `index`; returns how many there are then."""
    high, low = datagram(packets, index, memory)
    places = room.frames.shape[0]
    for n in range(room.control[HEAD], room.control[TAIL]):
        place = n % places
        if room.frames[place] == EMPTY or room.names[place, 0] != high or room.names[place, 1] != low or count == out.shape[0]:
            continue
        out[count] = room.frames[place]
        room.frames[place] = EMPTY
        count += 1
    while any_held(room) and room.frames[room.control[HEAD] % places] == EMPTY:
        room.control[HEAD] += 1
    return count


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
def remember_first(fragments: np.ndarray, packets: np.ndarray, index: int, memory: np.ndarray, now_ns: int) -> bool:
    """Remember the ports of a parsed packet if it is a first fragment; tells whether it is."""
    packet = packets[index]
    if packet.fragment_offset != 0 or not is_fragment(packet, memory) or packet.icmp_error:
        return False
    remember(fragments, packets, index, memory, now_ns)
    return True


@jit
def remember(fragments: np.ndarray, packets: np.ndarray, index: int, memory: np.ndarray, now_ns: int) -> None:
    """Remember the ports of a first fragment."""
    packet = packets[index]
    high, low = datagram(packets, index, memory)
    slot = fragments[_slot(high, low)]
    ports = np.uint64(packet.source_port) << np.uint64(32) | np.uint64(packet.destination_port) << np.uint64(16)
    protocol = np.uint64(packet.protocol) << np.uint64(8)
    slot[HIGH], slot[LOW], slot[UNTIL_NS] = high, low | ports | protocol, np.uint64(now_ns + FRAGMENT_NS)
    slot[FIRST_END] = np.uint64(first_end(packet))


@inline
def first_end(packet: Any) -> Any:
    """Return how many bytes of its datagram a first fragment has (RFC 791, section 3.2; RFC 8200, section 4.5)."""
    begin = np.int64(packet.fragment_header) + 8 if packet.ip_version == 6 else np.int64(packet.transport_offset)
    return np.int64(packet.network_offset) + np.int64(packet.ip_bytes) - begin


@jit
def find_flow(fragments: np.ndarray, packets: np.ndarray, index: int, memory: np.ndarray, now_ns: int) -> bool:
    """Give a later fragment the ports of its datagram's first; False when that was not seen. One that overlaps it: MALFORMED."""
    packet = packets[index]
    if packet.fragment_offset == 0:  # an error about a later fragment
        return False
    high, low = datagram(packets, index, memory)
    slot = fragments[_slot(high, low)]
    told = PORTS | PROTOCOL if packet.ip_version == 6 else PORTS
    if slot[HIGH] != high or slot[LOW] & ~told != low or slot[UNTIL_NS] < np.uint64(now_ns):
        return False
    if np.uint64(packet.fragment_offset) < slot[FIRST_END]:
        packet.status = MALFORMED
        return False
    packet.source_port = slot[LOW] >> np.uint64(32) & np.uint64(0xFFFF)
    packet.destination_port = slot[LOW] >> np.uint64(16) & np.uint64(0xFFFF)
    packet.protocol = slot[LOW] >> np.uint64(8) & np.uint64(0xFF)
    packet.has_ports = 1 if packet.protocol == TCP or packet.protocol == UDP else 0
    packet.status = 0
    return True
