"""Under which key a packet's record is kept: 16 bytes that name the flow, the record type and the partition.

    high = client address << 32 | server address
    low  = client port << 48 | server port << 32 | protocol << 24 | record type << 16 | partition

The client is the inside party, so both directions of a connection give the same key, without comparing addresses; and
the partition is computed from the same header bits the switches steer by (`datastore/store/partitions.py`).

IPv6's addresses do not fit: of these there are 96 bits of a fingerprint in place of addresses and ports, and the protocol 41.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.store.partitions import fingerprint_key, flow_partition, hashed_partition, key_high, key_low
from nfs.dataplane.headers import ACK, INSIDE, RST, SYN
from nfs.dataplane.ipv6 import low_word

NONE, FLOW, TUPLE, SOURCE, ENDPOINT, INITIATOR = range(6)
"""Key functions: no state at all; both directions of a connection alike; as seen on the wire; the sender's address; the inside
party's address and port as this side sees them (inside its own, outside what a NAT made of them); the address of whoever
opens, as far as one packet tells: the receiver of a SYN ACK, a RST or an ICMP error, else the sender."""


@inline
def endpoint_key(address: int, port: int, protocol: int, side: int, kind: int, partition: int) -> Any:
    """Return (high, low) of the key of an endpoint as seen from `side`, INSIDE or OUTSIDE."""
    return key_high(address, side), key_low(port, 0, protocol, kind, partition)


@inline
def answers_initiator(packet: Any) -> bool:
    """Tell whether a packet can be the answer to an attempt to open a connection, so that its receiver is the initiator."""
    return packet.icmp_error != 0 or packet.tcp_flags & RST != 0 or packet.tcp_flags & (SYN | ACK) == SYN | ACK


@inline
def make_key(key: int, kind: int, packets: np.ndarray, index: int) -> None:
    """Set `key_high`, `key_low` and `partition` of `packets[index]` by key function `key` for record type `kind`."""
    packet = packets[index]
    if packet.ip_version == 6:
        make_key_of_ipv6(key, kind, packets, index)
        return
    inside = packet.arrived_from == INSIDE
    client, server = packet.source_address, packet.destination_address
    client_port, server_port = packet.source_port, packet.destination_port
    if not inside:
        client, server = server, client
        client_port, server_port = server_port, client_port
    partition = flow_partition(client, client_port, packet.has_ports)
    if key in (SOURCE, INITIATOR):
        answer = key == INITIATOR and answers_initiator(packet)
        high = key_high(packet.destination_address if answer else packet.source_address, 0)
        low = key_low(0, 0, 0, kind, 0)
        partition = hashed_partition(high, low)
    elif key == TUPLE:
        high = key_high(packet.source_address, packet.destination_address)
        low = key_low(packet.source_port, packet.destination_port, packet.protocol, kind, 0)
    elif key == ENDPOINT:
        high, low = endpoint_key(client, client_port, packet.protocol, packet.arrived_from, kind, 0)
    else:
        high, low = key_high(client, server), key_low(client_port, server_port, packet.protocol, kind, 0)
    packet.key_high = high
    packet.key_low = low | np.uint64(partition)
    packet.partition = partition


@jit
def make_key_of_ipv6(key: int, kind: int, packets: np.ndarray, index: int) -> None:
    """`make_key` for a packet of IPv6."""
    packet = packets[index]
    first_high, first_low = packet.source_high, low_word(packet.source_middle, packet.source_address)
    second_high, second_low = packet.destination_high, low_word(packet.destination_middle, packet.destination_address)
    first_port, second_port = np.uint64(packet.source_port), np.uint64(packet.destination_port)
    from_client = packet.arrived_from == INSIDE
    turned = answers_initiator(packet) if key == INITIATOR else not from_client and key != SOURCE and key != TUPLE
    if turned:
        first_high, first_low, second_high, second_low = second_high, second_low, first_high, first_low
        first_port, second_port = second_port, first_port
    ports = first_port << np.uint64(48) | second_port << np.uint64(32) | np.uint64(packet.protocol) << np.uint64(24)
    if key in (SOURCE, INITIATOR):
        second_high = second_low = ports = np.uint64(0)
    elif key == ENDPOINT:
        second_high, second_low = np.uint64(0), np.uint64(packet.arrived_from)
        ports &= ~(np.uint64(0xFFFF) << np.uint64(32))
    high, low = fingerprint_key(first_high, first_low, second_high, second_low, ports, kind)
    if key in (SOURCE, INITIATOR):
        partition = hashed_partition(high, low)
    else:
        address, port = (packet.source_address, packet.source_port) if from_client else (
            packet.destination_address, packet.destination_port)  # fmt: skip
        partition = flow_partition(address, port, packet.has_ports)
    packet.key_high = high
    packet.key_low = low | np.uint64(partition)
    packet.partition = partition
