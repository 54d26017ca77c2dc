"""Whose are the addresses of a capture file, and which ones do they get in the emulated network?

192.0.2.7:51000 SYN -> 198.51.100.4:443     192.0.2.7 opens, so it is inside: 10.0.1.0; the other is outside: 10.128.0.1
"""

from __future__ import annotations

import ipaddress
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from experiments.workloads.traffic import CLIENT_NETWORK
from nfs.dataplane.headers import ACK, ICMP, INSIDE, OUTSIDE, SYN, TCP, UDP

NETWORKS = (ipaddress.IPv4Network("10.0.0.0/10"), ipaddress.IPv4Network("10.128.0.0/9"))
"""The emulated network's addresses by party: INSIDE, OUTSIDE. Those of 10.64.0.0/10 are a NAT's or a load balancer's: on the
outside of a NAT they are clients, on the inside of a balancer servers."""
FIRST_FREE = (CLIENT_NETWORK, int(ipaddress.IPv4Address("10.128.0.1")))
ICMP_ERRORS = (3, 4, 5, 11, 12)
ICMP_QUESTIONS, ICMP_ANSWERS = (8, 13, 15, 17), (0, 14, 16, 18)
SYSTEM_PORTS = 1024
"""Ports below are servers' (RFC 6335, section 6)."""
MORE_FRAGMENTS, FRAGMENT_OFFSET = 0x2000, 0x1FFF
SAID, BY_PORT, BY_ORDER, BY_ERROR = range(4)
"""What tells who opened, the surest first: a SYN or its answer, an ICMP query or its answer; a system port; the first packet; an
ICMP error, which goes to a party that sent something."""

Ends = tuple[int, int]
"""Two addresses as numbers."""


def ends(packet: bytes) -> Iterator[Ends]:
    """Yield (source, destination) of an IPv4 packet and, of an ICMP error, the quoted packet's as the error sees them."""
    yield int.from_bytes(packet[12:16], "big"), int.from_bytes(packet[16:20], "big")
    quoted = (packet[0] & 15) * 4 + 8
    if is_error(packet) and len(packet) >= quoted + 20:
        yield (int.from_bytes(packet[quoted + 16 : quoted + 20], "big"), int.from_bytes(packet[quoted + 12 : quoted + 16], "big"))


def is_error(packet: bytes) -> bool:
    """Tell whether a packet is an ICMP error, the first part of one at least."""
    header = (packet[0] & 15) * 4
    first = not int.from_bytes(packet[6:8], "big") & FRAGMENT_OFFSET
    return packet[9] == ICMP and first and len(packet) >= header + 8 and packet[header] in ICMP_ERRORS


def opener(packet: bytes) -> tuple[int, bool]:
    """Return how sure it is who opened the connection of a packet (SAID ...), and whether its source did."""
    header, protocol = (packet[0] & 15) * 4, packet[9]
    if int.from_bytes(packet[6:8], "big") & FRAGMENT_OFFSET or len(packet) < header + 8:
        return BY_ORDER, True
    if is_error(packet):
        return BY_ERROR, False
    if protocol == ICMP and packet[header] in ICMP_QUESTIONS + ICMP_ANSWERS:
        return SAID, packet[header] in ICMP_QUESTIONS
    if protocol == TCP and len(packet) >= header + 14 and packet[header + 13] & SYN:
        return SAID, not packet[header + 13] & ACK
    if protocol in (TCP, UDP):
        source, destination = (int.from_bytes(packet[at : at + 2], "big") < SYSTEM_PORTS for at in (header, header + 2))
        if source != destination:
            return BY_PORT, destination
    return BY_ORDER, True


def openers(packets: Iterable[bytes]) -> list[Ends]:
    """Return (opener, other) of each pair of addresses that speak, the surest pairs first, those alike in the packets' order."""
    pairs: dict[tuple[int, int, int], None] = {}
    for packet in packets:
        sureness, is_source = opener(packet)
        for source, destination in ends(packet):
            pairs[(sureness, source, destination) if is_source else (sureness, destination, source)] = None
    return [(first, second) for _, first, second in sorted(pairs, key=lambda pair: pair[0])]


def parties(pairs: Iterable[Ends], inside: Sequence[str] = (), ours: bool = False) -> dict[int, int]:
    """Return INSIDE or OUTSIDE for each address, from (opener, other) of each connection, the surest first.

    inside: networks (CIDR) that are inside; all else is outside. Without them, whoever opens is inside, and its partner on the
    other side. ours: a recording of this testbed, in which addresses of NETWORKS keep their sides.
    """
    pairs = list(pairs)
    addresses = dict.fromkeys(itertools.chain.from_iterable(pairs))
    networks = [ipaddress.IPv4Network(text) for text in inside]
    if networks:
        return {address: INSIDE if any(within(n, address) for n in networks) else OUTSIDE for address in addresses}
    found = {a: side for a in addresses for side in (INSIDE, OUTSIDE) if within(NETWORKS[side], a)} if ours else {}
    for first, second in pairs:
        if first not in found:
            found[first] = 1 - found[second] if second in found else INSIDE
        found.setdefault(second, 1 - found[first])
    return found


def within(network: ipaddress.IPv4Network, address: int) -> bool:
    """Tell whether an address, as a number, is in a network."""
    return address & int(network.netmask) == int(network.network_address)


def map_addresses(sides: Mapping[int, int], fixed: Mapping[int, int] | None = None) -> dict[int, int]:
    """Return each address' own address in the emulated network, in its party's half; those that are there already stay.

    fixed: addresses that get the one given here.
    """
    mapped = dict(fixed or {})
    taken = set(mapped.values())
    mapped |= {address: address for address, side in sides.items()
               if address not in taken | mapped.keys() and within(NETWORKS[side], address)}  # fmt: skip
    taken |= set(mapped.values())
    free = [(address for address in itertools.count(first) if address not in taken) for first in FIRST_FREE]
    for address, side in sides.items():
        if address not in mapped:
            mapped[address] = next(free[side])
    return mapped


def busiest(pairs: Iterable[Ends], sides: Mapping[int, int]) -> int | None:
    """Return the outside address that inside sends most packets to, from (source, destination) of each; None: there is none."""
    counts = Counter(destination for source, destination in pairs if sides[source] == INSIDE and sides[destination] == OUTSIDE)
    return counts.most_common(1)[0][0] if counts else None


def spread_ports() -> Callable[[int, int], int]:
    """Return a function of (address, port) that numbers an address' ports anew as Linux hands them out: even ones first.

    Steering takes 256 partitions from bits 1 to 8 of the inside port; a file's own ports may all lie in a few.
    """
    counters: dict[int, Iterator[int]] = {}
    chosen: dict[tuple[int, int], int] = {}

    def port_of(address: int, port: int) -> int:
        if (address, port) not in chosen:
            order = itertools.chain(range(1024, 65536, 2), range(1025, 65536, 2), range(1024))
            chosen[address, port] = next(counters.setdefault(address, order))
        return chosen[address, port]

    return port_of
