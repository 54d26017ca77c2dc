"""Which partition does a packet or a key belong to, and which hosts keep that partition?

A partition is the unit of placement, steering and movement (DESIGN, section 6). A flow's partition comes from the header
bits the switches steer by, alike in both directions, so that a packet and its state meet on one host:

    TCP, UDP      bits 1 to 8 of the client's port; bit 0 is left out, since Linux hands out even ports first
    all others    the low byte of the client's address (ICMP, other protocols, fragments without ports)

The client is the inside party. Keys that are no flows are spread by a hash that is the same on every host.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

import numpy as np

from datastore.base.errors import NearstateError, unknown
from datastore.base.partitioning import PARTITIONS, PORT_MASK
from datastore.compiled import inline, jit
from datastore.compiled.siphash import siphash

PARTITION_BITS = np.uint64(0xFFFF)
"""The part of a key's low word that names its partition."""

FINGERPRINT = 41
"""As the protocol of a key (it is IPv6's own number, RFC 2473): the rest is a fingerprint."""

_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)


@jit
def flow_partition(client_address: int, client_port: int, has_ports: bool) -> Any:
    """Return the partition, 0 to 255, of a flow; addresses and ports in host byte order."""
    if has_ports:
        return (np.int64(client_port) & np.int64(PORT_MASK)) >> np.int64(1)
    return np.int64(client_address) & np.int64(0xFF)


@jit
def hashed_partition(key_high: int, key_low: int) -> Any:
    """Return the partition of a key that is no flow; the partition bits of `key_low` do not count.

    The finaliser of MurmurHash3 (A. Appleby, public domain) over both words: the same on all hosts, unlike a table's hash.
    """
    mixed = np.uint64(key_high) * _MIX_1 ^ (np.uint64(key_low) & ~PARTITION_BITS)
    mixed = (mixed ^ mixed >> np.uint64(33)) * _MIX_1
    mixed = (mixed ^ mixed >> np.uint64(33)) * _MIX_2
    return np.int64((mixed ^ mixed >> np.uint64(33)) & np.uint64(PARTITIONS - 1))


@inline
def key_high(client_address: int, server_address: int) -> Any:
    """Return the high word of a flow's key as uint64."""
    return np.uint64(client_address) << np.uint64(32) | np.uint64(server_address)


@inline
def key_low(client_port: int, server_port: int, protocol: int, kind: int, partition: int) -> Any:
    """Return the low word of a flow's key as uint64; `kind` is the number of the record type (8 bits)."""
    ports = np.uint64(client_port) << np.uint64(48) | np.uint64(server_port) << np.uint64(32)
    return ports | np.uint64(protocol) << np.uint64(24) | np.uint64(kind) << np.uint64(16) | np.uint64(partition)


@inline
def fingerprint_key(client_high: int, client_low: int, server_high: int, server_low: int, ports: int, kind: int) -> Any:
    """Return (high, low) of the key of what does not fit one, without its partition; all but `kind` are uint64.

    96 bits of a fingerprint; the others are as in `key_low`. ports: all else that the key depends on.
    """
    high, low = siphash(client_high, client_low, server_high, server_low, ports)
    return high, low & np.uint64(0xFFFFFFFF00000000) | np.uint64(FINGERPRINT << 24) | np.uint64(kind) << np.uint64(16)


@dataclass(frozen=True)
class FlowKey:
    """A 16-byte key taken apart, for people to read; of IPv6 it has nothing but a fingerprint in place of addresses and ports."""

    client: IPv4Address
    client_port: int
    server: IPv4Address
    server_port: int
    protocol: int
    kind: int
    partition: int

    @classmethod
    def of_words(cls, low: int, high: int) -> FlowKey:
        """Take apart the two words of a key."""
        low, high = int(low), int(high)
        return cls(
            IPv4Address(high >> 32), low >> 48, IPv4Address(high & 0xFFFFFFFF), low >> 32 & 0xFFFF,
            low >> 24 & 0xFF, low >> 16 & 0xFF, low & 0xFFFF,
        )  # fmt: skip

    def __str__(self) -> str:
        if self.protocol == FINGERPRINT:
            words = int(self.client), int(self.server), self.client_port << 16 | self.server_port
            return "ipv6 " + "".join(f"{word:08x}" for word in words)
        protocol = {1: "icmp", 6: "tcp", 17: "udp"}.get(self.protocol, f"protocol {self.protocol}")
        return f"{protocol} {self.client}:{self.client_port} -> {self.server}:{self.server_port}"


@dataclass(frozen=True)
class PartitionMap:
    """Who keeps what: for each partition its hosts, primary first, valid for one epoch."""

    epoch: int
    replicas: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if not 0 < self.epoch < 2**32:
            raise NearstateError(f"partition map with epoch {self.epoch}: epochs are 1 to 2^32 - 1")
        if len(self.replicas) != PARTITIONS:
            raise NearstateError(f"partition map of {len(self.replicas)} partitions: it must name {PARTITIONS}")
        for partition, hosts in enumerate(self.replicas):
            if not hosts or len(set(hosts)) != len(hosts):
                raise NearstateError(
                    f"partition {partition} is kept by {list(hosts)}: name one or more hosts, each once, primary first"
                )

    def to_json(self) -> dict[str, Any]:
        """Return the map as a JSON object."""
        return {"epoch": self.epoch, "replicas": [list(hosts) for hosts in self.replicas]}

    @classmethod
    def from_json(cls, document: dict[str, Any] | str) -> PartitionMap:
        """Read what `to_json` returned, as an object or as its text; raises NearstateError when it is no map."""
        try:
            fields = json.loads(document) if isinstance(document, str) else document
            return cls(int(fields["epoch"]), tuple(tuple(map(str, hosts)) for hosts in fields["replicas"]))
        except (ValueError, KeyError, TypeError) as error:
            raise NearstateError(
                f'not a partition map: {error!r}; it looks like {{"epoch": 1, "replicas": [["nf1"], ...]}}'
            ) from error

    def primaries(self, hosts: Sequence[str]) -> np.ndarray:
        """Return, as int32[PARTITIONS], the index in `hosts` of each partition's primary."""
        index = {name: position for position, name in enumerate(hosts)}
        for replicas in self.replicas:
            if replicas[0] not in index:
                raise unknown("store host", replicas[0], hosts)
        return np.array([index[replicas[0]] for replicas in self.replicas], np.int32)

    def kept_by(self, host: str) -> list[int]:
        """Return the partitions whose primary is `host`."""
        return [partition for partition, hosts in enumerate(self.replicas) if hosts[0] == host]
