"""Under which key a packet's record is kept: 16 bytes that name the flow, the record type and the partition.

    high = client address << 32 | server address
    low  = client port << 48 | server port << 32 | protocol << 24 | record type << 16 | partition

The client is the inside party, so both directions of a connection give the same key, without comparing addresses; and
the partition is computed from the same header bits the switches steer by (`datastore/store/partitions.py`).
"""

from __future__ import annotations

import numpy as np

from datastore.native import inline, jit
from datastore.store.partitions import flow_partition, hashed_partition
from nfs.dataplane.headers import INSIDE

NONE, FLOW, TUPLE, SOURCE = range(4)
"""Key functions: no state at all; both directions of a connection alike; as seen on the wire; the sender's address."""
KEY_NAMES = {"NONE": NONE, "FLOW": FLOW, "TUPLE": TUPLE, "SOURCE": SOURCE}


@inline
def _words(first: int, second: int, first_port: int, second_port: int, protocol: int, kind: int) -> tuple[int, int]:
    """Return the key's high and low word, the low one still without its partition."""
    high = np.uint64(first) << np.uint64(32) | np.uint64(second)
    ports = np.uint64(first_port) << np.uint64(48) | np.uint64(second_port) << np.uint64(32)
    return high, ports | np.uint64(protocol) << np.uint64(24) | np.uint64(kind) << np.uint64(16)


@jit
def make_key(key: int, kind: int, packets: np.ndarray, index: int) -> None:
    """Set `key_high`, `key_low` and `partition` of `packets[index]` by key function `key` for record type `kind`."""
    packet = packets[index]
    inside = packet.arrived_from == INSIDE
    client, server = packet.source_address, packet.destination_address
    client_port, server_port = packet.source_port, packet.destination_port
    if not inside:
        client, server = server, client
        client_port, server_port = server_port, client_port
    if key == SOURCE:
        high, low = _words(packet.source_address, 0, 0, 0, 0, kind)
        partition = hashed_partition(high, low)
    else:
        partition = flow_partition(client, client_port, packet.has_ports)
        if key == TUPLE:
            high, low = _words(packet.source_address, packet.destination_address, packet.source_port,
                               packet.destination_port, packet.protocol, kind)  # fmt: skip
        else:
            high, low = _words(client, server, client_port, server_port, packet.protocol, kind)
    packet.key_high = high
    packet.key_low = low | np.uint64(partition)
    packet.partition = partition
