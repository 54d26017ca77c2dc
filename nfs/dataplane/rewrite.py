"""Writing a network function's changes of addresses and ports into the frame, with the checksums they are part of.

A function sets `packet.source_address`, `source_port`, `destination_address`, `destination_port` or `next_hop`; `write_back`
compares them with the frame and changes what differs. Checksums are updated, not computed (RFC 1624, equation 3), so a
checksum that was wrong stays wrong, and a payload is never read. Of an IPv6 frame only the next hop is changed.

An ICMP error has the addresses and ports of the flow it speaks of, seen from the side it came from: its source is the quoted
packet's destination. Changing them changes the quotation and the error's own header (RFC 5508, section 4.2):

    from outside, destination changed    quoted source and outer destination
    from inside, source changed          quoted destination and outer source
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.compiled.memory import network16, network32, put_network16
from nfs.dataplane.headers import ICMP, INSIDE, OUTSIDE, TCP, UDP

NO_CHECKSUM = -1


@inline
def updated(check: int, before: int, after: int) -> Any:
    """Return an Internet checksum after one 16-bit word it covers has changed (RFC 1624, equation 3)."""
    total = (~np.int64(check) & 0xFFFF) + (~np.int64(before) & 0xFFFF) + np.int64(after)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@inline
def put_covered(memory: np.ndarray, at: int, value: int, check_1: int, check_2: int, udp: bool) -> None:
    """Write a 16-bit word at byte `at` and update the checksums at bytes `check_1` and `check_2` (NO_CHECKSUM: none).

    udp: `check_2` is a UDP checksum: zero means that there is none, and a sum of zero is written as all ones (RFC 768).
    """
    before = np.int64(network16(memory, at))
    put_network16(memory, at, value)
    if check_1 != NO_CHECKSUM:
        put_network16(memory, check_1, updated(network16(memory, check_1), before, value))
    if check_2 != NO_CHECKSUM:
        check = np.int64(network16(memory, check_2))
        if not (udp and check == 0):
            check = np.int64(updated(check, before, value))
            put_network16(memory, check_2, 0xFFFF if udp and check == 0 else check)


@jit
def put_address(memory: np.ndarray, at: int, address: int, check_1: int, check_2: int, udp: bool) -> None:
    """Write an IPv4 address, as two words."""
    put_covered(memory, at, np.int64(address) >> 16, check_1, check_2, udp)
    put_covered(memory, at + 2, np.int64(address) & 0xFFFF, check_1, check_2, udp)


@inline
def transport_checksum(protocol: int, at: int) -> Any:
    """Return the byte of the checksum of a TCP or UDP header at byte `at`; NO_CHECKSUM for protocols with no pseudo-header."""
    return at + 16 if protocol == TCP else at + 6 if protocol == UDP else np.int64(NO_CHECKSUM)


@jit
def write_back(memory: np.ndarray, packets: np.ndarray, index: int) -> None:
    """Write into the frame what differs from `packets[index]`. Only for a packet that parsed (status 0)."""
    packet = packets[index]
    if packet.next_hop != 0:
        put_network16(memory, packet.frame, np.int64(packet.next_hop >> np.uint64(32)))
        put_network16(memory, packet.frame + 2, np.int64(packet.next_hop >> np.uint64(16) & np.uint64(0xFFFF)))
        put_network16(memory, packet.frame + 4, np.int64(packet.next_hop & np.uint64(0xFFFF)))
    if packet.ip_version == 6:
        return
    if packet.icmp_error:
        write_error(memory, packets, index)
        return
    ip = packet.frame + packet.network_offset
    at = packet.frame + packet.transport_offset
    udp = packet.protocol == UDP
    whole = packet.fragment_offset == 0
    check = transport_checksum(packet.protocol, at) if whole else np.int64(NO_CHECKSUM)
    if network32(memory, ip + 12) != packet.source_address:
        put_address(memory, ip + 12, packet.source_address, ip + 10, check, udp)
    if network32(memory, ip + 16) != packet.destination_address:
        put_address(memory, ip + 16, packet.destination_address, ip + 10, check, udp)
    if not whole:
        return
    if packet.has_ports:
        if network16(memory, at) != packet.source_port:
            put_covered(memory, at, packet.source_port, NO_CHECKSUM, check, udp)
        if network16(memory, at + 2) != packet.destination_port:
            put_covered(memory, at + 2, packet.destination_port, NO_CHECKSUM, check, udp)
    elif packet.protocol == ICMP:
        identifier = packet.destination_port if packet.arrived_from == OUTSIDE else packet.source_port
        if network16(memory, at + 4) != identifier:
            put_covered(memory, at + 4, identifier, at + 2, NO_CHECKSUM, False)


@jit
def turn_around(memory: np.ndarray, packets: np.ndarray, index: int) -> None:
    """Let the packet have come from the other side: the frame's Ethernet addresses change places."""
    packet = packets[index]
    for n in range(3):
        at = packet.frame + 2 * n
        mine, others = np.int64(network16(memory, at)), np.int64(network16(memory, at + 6))
        put_network16(memory, at, others)
        put_network16(memory, at + 6, mine)
    packet.arrived_from = INSIDE if packet.arrived_from == OUTSIDE else OUTSIDE


@jit
def write_error(memory: np.ndarray, packets: np.ndarray, index: int) -> None:
    """`write_back` for an ICMP error: its own header and the packet it quotes, both under the ICMP checksum."""
    packet = packets[index]
    ip = packet.frame + packet.network_offset
    icmp = packet.frame + packet.transport_offset
    quoted = icmp + 8
    ports = quoted + np.int64(memory[quoted] & np.uint8(15)) * 4
    if network32(memory, quoted + 16) != packet.source_address:
        quote_endpoint(memory, packets, index, quoted + 16, packet.source_address, ports + 2, packet.source_port)
        put_address(memory, ip + 12, packet.source_address, ip + 10, NO_CHECKSUM, False)
    if network32(memory, quoted + 12) != packet.destination_address:
        quote_endpoint(memory, packets, index, quoted + 12, packet.destination_address, ports, packet.destination_port)
        put_address(memory, ip + 16, packet.destination_address, ip + 10, NO_CHECKSUM, False)


@inline
def quotation_end(memory: np.ndarray, packets: np.ndarray, index: int) -> Any:
    """Return the byte behind the quotation of an ICMP error: its packet's, or where extensions begin (RFC 4884, section 3)."""
    packet = packets[index]
    end = packet.frame + np.int64(packet.network_offset) + np.int64(packet.ip_bytes)
    icmp = packet.frame + packet.transport_offset
    words = np.int64(memory[icmp + 5])
    if words > 0 and (memory[icmp] == 3 or memory[icmp] == 11 or memory[icmp] == 12):
        end = min(end, icmp + 8 + 4 * words)
    return end


@jit
def quote_endpoint(memory: np.ndarray, packets: np.ndarray, index: int, at: int, address: int, port_at: int, port: int) -> None:
    """Write address and port of one end of a quoted packet, its checksums as far as they are quoted, and the ICMP checksum."""
    packet = packets[index]
    icmp = packet.frame + packet.transport_offset
    quoted = icmp + 8
    end = quotation_end(memory, packets, index)
    ports = quoted + np.int64(memory[quoted] & np.uint8(15)) * 4
    check = transport_checksum(packet.protocol, ports)
    udp = packet.protocol == UDP
    if packet.protocol == ICMP:
        port_at, check = ports + 4, ports + 2
    if check + 2 > end:
        check = np.int64(NO_CHECKSUM)
    for half in range(2):
        value = np.int64(address) >> 16 if half == 0 else np.int64(address) & 0xFFFF
        pseudo = check if packet.protocol != ICMP else np.int64(NO_CHECKSUM)
        put_quoted(memory, at + 2 * half, value, quoted + 10, pseudo, icmp + 2, udp)
    if packet.has_ports or packet.protocol == ICMP:
        put_quoted(memory, port_at, port, NO_CHECKSUM, check, icmp + 2, udp)


@jit
def put_quoted(memory: np.ndarray, at: int, value: int, check_1: int, check_2: int, icmp_check: int, udp: bool) -> None:
    """`put_covered` inside a quotation: each word that changes, checksums too, changes the ICMP checksum."""
    total = np.int64(network16(memory, icmp_check))
    before = np.int64(network16(memory, at))
    sum_1 = np.int64(network16(memory, check_1)) if check_1 != NO_CHECKSUM else np.int64(0)
    sum_2 = np.int64(network16(memory, check_2)) if check_2 != NO_CHECKSUM else np.int64(0)
    put_covered(memory, at, value, check_1, check_2, udp)
    total = updated(total, before, value)
    if check_1 != NO_CHECKSUM:
        total = updated(total, sum_1, network16(memory, check_1))
    if check_2 != NO_CHECKSUM:
        total = updated(total, sum_2, network16(memory, check_2))
    put_network16(memory, icmp_check, total)
