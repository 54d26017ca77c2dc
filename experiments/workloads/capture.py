"""What is in a capture file, and how does it become traffic of the emulated network?

One packet and its answer, recorded elsewhere; the party at 192.0.2.7 becomes a client, inside:

    192.0.2.7:51000 -> 198.51.100.4:443     10.0.1.0:51000 -> 10.128.0.1:443    leaves at the client
    198.51.100.4:443 -> 192.0.2.7:51000     10.128.0.1:443 -> 10.0.1.0:51000    leaves at the server

Kept: time stamps, order, sizes, ports, payloads and all header fields else. New: addresses (each gets one of its own), MAC
addresses, no VLAN tags; checksums are computed, also where the file has wrong ones, as files recorded where the network card
completes them do. What a snap length cut off is filled up with zeros.
"""

from __future__ import annotations

import errno
import functools
import gzip
import io
import ipaddress
import itertools
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from datastore.native import ROOT
from datastore.native.errors import NearstateError
from experiments.workloads.traffic import CLIENT_NETWORK, Replay
from nfs.dataplane.headers import ICMP, INSIDE, OUTSIDE, TCP, UDP

MOST_FRAMES = 1_000_000
MOST_IP_BYTES = 1500
ETHERNET = 1
LINK_BYTES = {0: 4, 12: 0, 14: 0, 101: 0, 108: 4, 113: 16, 228: 0, 276: 20}
"""Link types besides Ethernet (tcpdump.org/linktypes.html) and the bytes in front of the IP header: loopback, raw IP, Linux
cooked 1 and 2."""
VLAN_TYPES = (0x8100, 0x88A8, 0x9100)
ICMP_ERRORS = (3, 4, 5, 11, 12)
MORE_FRAGMENTS, FRAGMENT_OFFSET = 0x2000, 0x1FFF
OUR_NETWORK = ipaddress.IPv4Network("10.0.0.0/8")
NETWORKS = (ipaddress.IPv4Network("10.0.0.0/9"), ipaddress.IPv4Network("10.128.0.0/9"))
"""The emulated network's addresses by party: INSIDE, OUTSIDE."""
FIRST_FREE = (CLIENT_NETWORK, int(ipaddress.IPv4Address("10.128.0.1")))
PCAP_MAGICS = {b"\xa1\xb2\xc3\xd4": ">", b"\xd4\xc3\xb2\xa1": "<", b"\xa1\xb2\x3c\x4d": ">", b"\x4d\x3c\xb2\xa1": "<"}
PCAPNG_MAGIC, PCAPNG_ORDERS = b"\x0a\x0d\x0d\x0a", {b"\x1a\x2b\x3c\x4d": ">", b"\x4d\x3c\x2b\x1a": "<"}


class Recorded(NamedTuple):
    """An IPv4 packet of a file: its number there (from 1), time in ns, and its bytes from the IP header on, whole."""

    number: int
    time_ns: int
    packet: bytes


class Prepared(NamedTuple):
    """Frames ready to send, in the file's order.

    memory: uint8, all frames one behind the other. The others have an element a frame. at, length: where it lies. side:
    INSIDE or OUTSIDE, whose it is. time_ns: since the first, never falling. flow: its flow's number. after: index of the last
    frame of the same flow from the other party, -1 without one. number: its number in the file. skipped: what of the file is
    not replayed, by reason.
    """

    memory: np.ndarray
    at: np.ndarray
    length: np.ndarray
    side: np.ndarray
    time_ns: np.ndarray
    flow: np.ndarray
    after: np.ndarray
    number: np.ndarray
    skipped: Mapping[str, int]


def read(name: str) -> tuple[list[Recorded], Counter[str]]:
    """Return the IPv4 packets of a capture file, and how many frames have none, by reason.

    Raises NearstateError for a file that cannot be read, is no capture, is cut off, or is larger than MOST_FRAMES.
    """
    path = ROOT / name
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is no file")
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise NearstateError(f"capture {name!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    _check_complete(name, content)
    found, skipped = [], Counter[str]()
    for number, (time_ns, link, frame) in enumerate(_frames(name, content), 1):
        packet, reason = _packet(name, link, frame)
        if reason:
            skipped[reason] += 1
        else:
            found.append(Recorded(number, time_ns, packet))
        if number > MOST_FRAMES:
            raise NearstateError(
                f"capture {name!r} has more than {MOST_FRAMES:,} frames: cut it, `tcpdump -r FILE -c {MOST_FRAMES}`"
            )
    if not found:
        raise NearstateError(f"capture {name!r} has no IPv4 packet that can be replayed: {dict(skipped) or 'it is empty'}")
    return found, skipped


def _check_complete(name: str, content: bytes) -> None:
    """Raise NearstateError unless the file is a whole capture: scapy takes a file that is cut off for one that ends there."""
    order = PCAP_MAGICS.get(content[:4])
    if order:
        at, record, what = 24, 16, "record"
    elif content[:4] == PCAPNG_MAGIC and (order := PCAPNG_ORDERS.get(content[8:12])):
        at, record, what = 0, 12, "block"
    else:
        raise NearstateError(f"capture {name!r} is neither pcap nor pcapng: it begins with {content[:4].hex() or 'nothing'}")
    number = 0
    while at != len(content):
        number += 1
        if at + record <= len(content):
            if content[at : at + 4] == PCAPNG_MAGIC and what == "block":
                order = PCAPNG_ORDERS.get(content[at + 8 : at + 12], order)
            length = struct.unpack_from(f"{order}I", content, at + (8 if what == "record" else 4))[0]
            at += record + length if what == "record" else max(record, length)
            if at <= len(content):
                continue
        raise NearstateError(
            f"capture {name!r} is cut off: {what} {number} reaches beyond its {len(content):,} bytes; record it anew, or save "
            "the whole part with `tcpdump -r FILE -w NEW`"
        )


def _frames(name: str, content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield time in ns, link type and bytes of every frame."""
    from scapy.error import Scapy_Exception  # here: 28 MB that no other process of an emulated host needs
    from scapy.utils import RawPcapReader

    file: Any = io.BytesIO(content)
    about: Any
    try:
        with RawPcapReader(file) as reader:
            for frame, about in reader:
                if hasattr(about, "tshigh"):
                    ticks = ((about.tshigh or 0) << 32) + (about.tslow or 0)
                    yield ticks * 1_000_000_000 // (about.tsresol or 1_000_000), about.linktype, frame
                else:
                    yield about.sec * 1_000_000_000 + about.usec * (1 if reader.nano else 1000), reader.linktype, frame
    except (Scapy_Exception, struct.error, ValueError) as error:
        raise NearstateError(f"capture {name!r} cannot be read: {error}") from error


def _packet(name: str, link: int, frame: bytes) -> tuple[bytes, str]:
    """Return the IPv4 packet in a frame and "", or nothing and why there is none."""
    if link != ETHERNET and link not in LINK_BYTES:
        raise NearstateError(f"capture {name!r} has link type {link}: Ethernet (1) or one of {sorted(LINK_BYTES)} is possible")
    at = LINK_BYTES.get(link, 14)
    if link == ETHERNET:
        while len(frame) >= at + 2 and int.from_bytes(frame[at - 2 : at], "big") in VLAN_TYPES:
            at += 4
        if frame[at - 2 : at] != b"\x08\x00":
            return b"", "not_ipv4"
    if len(frame) <= at or frame[at] >> 4 != 4:
        return b"", "not_ipv4"
    header, total = (frame[at] & 15) * 4, int.from_bytes(frame[at + 2 : at + 4], "big")
    if header < 20 or total < header or len(frame) < at + header:
        return b"", "malformed"
    if total > MOST_IP_BYTES:
        return b"", "oversized"
    packet = frame[at : at + total]
    if frame[at + 9] in (ICMP, TCP, UDP) and len(packet) < min(total, header + 8):
        return b"", "cut_in_headers"
    return packet + bytes(total - len(packet)), ""


@functools.cache
def check(replay: Replay) -> None:
    """Raise NearstateError when the file cannot be replayed; a file is read once however often it is asked about."""
    prepare(replay, "02:00:00:00:00:01", "02:00:00:00:00:02")


# Who is who


def parties(pairs: Iterable[tuple[int, int]], inside: Sequence[str] = ()) -> dict[int, int]:
    """Return INSIDE or OUTSIDE for each address, from the (source, destination) of each packet in order.

    With networks given, they are inside. Without: a recording of this testbed keeps its sides (10.0.0.0/9 is inside); in any
    other whoever is first seen sending to somebody new is inside, and whom it sends to is on the other side.
    """
    pairs = list(pairs)
    addresses = dict.fromkeys(itertools.chain.from_iterable(pairs))
    networks = [ipaddress.IPv4Network(text) for text in inside]
    if not networks and all(_within(OUR_NETWORK, address) for address in addresses):
        networks = [NETWORKS[INSIDE]]
    if networks:
        return {address: INSIDE if any(_within(n, address) for n in networks) else OUTSIDE for address in addresses}
    found: dict[int, int] = {}
    for source, destination in pairs:
        if source not in found:
            found[source] = 1 - found[destination] if destination in found else INSIDE
        found.setdefault(destination, 1 - found[source])
    return found


def _within(network: ipaddress.IPv4Network, address: int) -> bool:
    return address & int(network.netmask) == int(network.network_address)


def map_addresses(sides: Mapping[int, int]) -> dict[int, int]:
    """Return each address' own address in the emulated network, in its party's half; those that are there already stay."""
    mapped = {address: address for address, side in sides.items() if _within(NETWORKS[side], address)}
    taken = set(mapped)
    free = [(address for address in itertools.count(first) if address not in taken) for first in FIRST_FREE]
    for address, side in sides.items():
        if address not in mapped:
            mapped[address] = next(free[side])
    return mapped


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


# Headers


def checksum(data: bytes) -> int:
    """Return the internet checksum (RFC 1071); the sum of 16-bit words in one's complement is the number modulo 65,535."""
    return -int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF


def updated(check: int, before: bytes, after: bytes) -> int:
    """Return a checksum after bytes it covers, at an even offset, have changed (RFC 1624)."""
    return (check - 0xFFFF + int.from_bytes(before, "big") - int.from_bytes(after, "big")) % 0xFFFF


class Rewriter:
    """Puts packets into the emulated network. ports: see `spread_ports`; None keeps them."""

    def __init__(
        self, sides: Mapping[int, int], addresses: Mapping[int, int], ports: Callable[[int, int], int] | None = None
    ) -> None:
        self.sides, self.addresses, self.ports = sides, addresses, ports

    def __call__(self, packet: bytes) -> bytes:
        """Return a whole IPv4 packet with mapped addresses and ports and right checksums."""
        data = bytearray(packet)
        before, after = self._map(data, 0)
        header = (data[0] & 15) * 4
        fragment = int.from_bytes(data[6:8], "big")
        put16(data, 10, 0)
        put16(data, 10, checksum(bytes(data[:header])))
        if fragment & FRAGMENT_OFFSET:
            return bytes(data)
        if data[9] == ICMP and data[header] in ICMP_ERRORS and len(data) >= header + 8 + 20:
            self._map_quoted(data, header + 8)
        if fragment & MORE_FRAGMENTS:
            _update_transport(data, 0, before, after)
        else:
            _compute_transport(data, header)
        return bytes(data)

    def _map(self, data: bytearray, at: int) -> tuple[bytes, bytes]:
        """Map addresses and ports of the IP header at byte `at`; returns the bytes a transport checksum covers, old and new."""
        ends = [int.from_bytes(data[at + offset : at + offset + 4], "big") for offset in (12, 16)]
        transport = at + (data[at] & 15) * 4
        has_ports = data[at + 9] in (TCP, UDP) and len(data) >= transport + 4
        has_ports = has_ports and not int.from_bytes(data[at + 6 : at + 8], "big") & FRAGMENT_OFFSET
        before = bytes(data[at + 12 : at + 20] + (data[transport : transport + 4] if has_ports else b""))
        for number, address in enumerate(ends):
            mapped = self.addresses[address]
            data[at + 12 + 4 * number : at + 16 + 4 * number] = mapped.to_bytes(4, "big")
            if has_ports and self.ports and self.sides[address] == INSIDE:
                port_at = transport + 2 * number
                put16(data, port_at, self.ports(mapped, int.from_bytes(data[port_at : port_at + 2], "big")))
        after = bytes(data[at + 12 : at + 20] + (data[transport : transport + 4] if has_ports else b""))
        return before, after

    def _map_quoted(self, data: bytearray, at: int) -> None:
        """Map the packet an ICMP error quotes, as far as it is there, its checksums by what has changed."""
        if data[at] >> 4 != 4 or (data[at] & 15) < 5:
            return
        before, after = self._map(data, at)
        put16(data, at + 10, updated(int.from_bytes(data[at + 10 : at + 12], "big"), before[:8], after[:8]))
        _update_transport(data, at, before, after)


def put16(data: bytearray, at: int, value: int) -> None:
    """Write a 16-bit field in network byte order."""
    data[at : at + 2] = value.to_bytes(2, "big")


def _checksum_at(protocol: int, transport: int) -> int | None:
    offset = {TCP: 16, UDP: 6}.get(protocol)
    return None if offset is None else transport + offset


def _update_transport(data: bytearray, at: int, before: bytes, after: bytes) -> None:
    """Update the transport checksum of the packet at byte `at`, of which not all is here."""
    check_at = _checksum_at(data[at + 9], at + (data[at] & 15) * 4)
    if check_at is None or check_at + 2 > len(data) or len(before) < 12:
        return
    check = int.from_bytes(data[check_at : check_at + 2], "big")
    if data[at + 9] == UDP and check == 0:
        return
    value = updated(check, before, after)
    put16(data, check_at, 0xFFFF if data[at + 9] == UDP and value == 0 else value)


def _compute_transport(data: bytearray, transport: int) -> None:
    """Compute the transport checksum of a whole packet; UDP's zero says there is none (RFC 768) and stays."""
    protocol, size = data[9], len(data) - transport
    if protocol == ICMP and size >= 8:
        put16(data, transport + 2, 0)
        put16(data, transport + 2, checksum(bytes(data[transport:])))
    elif (protocol == TCP and size >= 20) or (protocol == UDP and size >= 8 and any(data[transport + 6 : transport + 8])):
        covered = min(size, int.from_bytes(data[transport + 4 : transport + 6], "big")) if protocol == UDP else size
        check_at = _checksum_at(protocol, transport)
        assert check_at is not None
        put16(data, check_at, 0)
        pseudo = bytes(data[12:20]) + struct.pack(">BBH", 0, protocol, covered)
        value = checksum(pseudo + bytes(data[transport : transport + covered]))
        put16(data, check_at, 0xFFFF if protocol == UDP and value == 0 else value)


def _ends(packet: bytes) -> Iterator[tuple[int, int]]:
    """Yield (source, destination) of a packet and, of an ICMP error, the quoted packet's as the error sees them."""
    yield int.from_bytes(packet[12:16], "big"), int.from_bytes(packet[16:20], "big")
    quoted = (packet[0] & 15) * 4 + 8
    is_whole = not int.from_bytes(packet[6:8], "big") & FRAGMENT_OFFSET
    if packet[9] == ICMP and is_whole and len(packet) >= quoted + 20 and packet[quoted - 8] in ICMP_ERRORS:
        yield (int.from_bytes(packet[quoted + 16 : quoted + 20], "big"), int.from_bytes(packet[quoted + 12 : quoted + 16], "big"))


def _flow(packet: bytes, side: int) -> tuple[Any, ...]:
    """Return what both directions of a mapped packet's flow have in common: protocol, inside end, outside end."""
    transport = (packet[0] & 15) * 4
    has_ports = packet[9] in (TCP, UDP) and not int.from_bytes(packet[6:8], "big") & FRAGMENT_OFFSET
    ports = (packet[transport : transport + 2], packet[transport + 2 : transport + 4]) if has_ports else (b"", b"")
    ends = ((packet[12:16], ports[0]), (packet[16:20], ports[1]))
    return (packet[9], *(ends if side == INSIDE else ends[::-1]))


def prepare(replay: Replay, client_mac: str, server_mac: str) -> Prepared:
    """Return the frames of a replay. Raises NearstateError as `read` does, and when no packet crosses between the parties."""
    recorded, skipped = read(replay.pcap)
    pairs = itertools.chain.from_iterable(_ends(packet) for _, _, packet in recorded)
    sides = parties(pairs, replay.inside)
    rewrite = Rewriter(sides, map_addresses(sides), spread_ports() if replay.ports == "spread" else None)
    macs = [bytes.fromhex(mac.replace(":", "")) for mac in (client_mac, server_mac)]
    headers = (macs[1] + macs[0] + b"\x08\x00", macs[0] + macs[1] + b"\x08\x00")
    frames: list[bytes] = []
    columns: list[tuple[int, ...]] = []
    flows: dict[tuple[Any, ...], int] = {}
    last: dict[tuple[int, int], int] = {}
    for number, time_ns, packet in recorded:
        source, destination = next(_ends(packet))
        side = sides[source]
        if side == sides[destination]:
            skipped["between_one_party"] += 1
        elif side == OUTSIDE and replay.sides == "client":
            skipped["server_side"] += 1
        else:
            mapped = rewrite(packet)
            flow = flows.setdefault(_flow(mapped, side), len(flows))
            columns.append((side, time_ns, flow, last.get((flow, 1 - side), -1), number))
            last[flow, side] = len(frames)
            frames.append(headers[side] + mapped)
    if not frames:
        raise NearstateError(
            f"capture {replay.pcap!r}: no packet crosses from inside to outside ({dict(skipped)}); say which networks are "
            'inside, as traffic inside=("192.0.2.0/24",)'
        )
    lengths = np.array([len(frame) for frame in frames], np.int64)
    side_of, time_of, flow_of, after, numbers = np.array(columns, np.int64).T.copy()
    return Prepared(np.frombuffer(b"".join(frames), np.uint8), np.cumsum(lengths) - lengths, lengths, side_of,
                    np.maximum.accumulate(time_of) - time_of[0], flow_of, after, numbers, dict(skipped))  # fmt: skip
