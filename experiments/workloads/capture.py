"""What is in a capture file, and how does it become traffic of the emulated network?

One packet and its answer, recorded elsewhere; the party at 192.0.2.7 becomes a client, inside:

    192.0.2.7:51000 -> 198.51.100.4:443     10.0.1.0:51000 -> 10.128.0.1:443    leaves at the client
    198.51.100.4:443 -> 192.0.2.7:51000     10.128.0.1:443 -> 10.0.1.0:51000    leaves at the server

Kept: time stamps (those that go back a little are made good), order, sizes, ports, payloads and all header fields else. New:
addresses (each gets one of its own), MAC addresses, no VLAN tags; checksums are computed, also where the file has wrong ones, as
files recorded where the network card completes them do. What a snap length cut off is filled up with zeros.
"""

from __future__ import annotations

import functools
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from datastore.base import ROOT
from datastore.base.errors import NearstateError
from experiments.workloads import savefile
from experiments.workloads.parties import (
    FRAGMENT_OFFSET,
    ICMP_ANSWERS,
    ICMP_ERRORS,
    ICMP_QUESTIONS,
    MORE_FRAGMENTS,
    busiest,
    ends,
    is_error,
    map_addresses,
    openers,
    parties,
    spread_ports,
)
from experiments.workloads.traffic import Replay
from nfs.dataplane.headers import ICMP, INSIDE, OUTSIDE, TCP, UDP
from topologies.emulation.recordings import is_ours

MOST_FRAMES = 1_000_000
MOST_IP_BYTES = 1500
ETHERNET = 1
LINK_BYTES = {0: 4, 12: 0, 14: 0, 101: 0, 108: 4, 113: 16, 228: 0, 276: 20}
"""Link types besides Ethernet (tcpdump.org/linktypes.html) and the bytes in front of the IP header: loopback, raw IP, Linux
cooked 1 and 2."""
VLAN_TYPES = (0x8100, 0x88A8, 0x9100)
MOST_BACK_S = 1.0
"""How much earlier than a packet before it a packet may be: several receive queues and merged files do that. A clock that was set
back by more leaves no gaps that could be replayed."""


class Recorded(NamedTuple):
    """An IPv4 packet of a file: its number there (from 1), time in ns, and its bytes from the IP header on, whole."""

    number: int
    time_ns: int
    packet: bytes


class Timing(NamedTuple):
    """When the packets of a replay leave, by the file's time stamps.

    seconds: from the first to the last. gap_s: the longest time without a packet, after packet number `gap_after` and before
    `gap_before` of the file. back: how many are earlier than one before them; most_back_s: by how much at most, that one being
    packet number `back_at`. untimed: number of the first packet without a time stamp, 0 when all have one.
    """

    seconds: float
    gap_s: float
    gap_after: int
    gap_before: int
    back: int
    most_back_s: float
    back_at: int
    untimed: int


class Prepared(NamedTuple):
    """Frames ready to send, in the file's order.

    memory: uint8, all frames one behind the other. The others have an element a frame. at, length: where it lies. side:
    INSIDE or OUTSIDE, whose it is. time_ns: since the first, never falling. flow: its flow's number. aim: number of the flow
    whose translation it goes by: of an ICMP error the quoted packet's, of a later fragment its first one's; -1: none is known.
    after: index of the frame that it answers, the last one from the other party of its flow or, of an ICMP error or a later
    fragment, of that one's; -1 without one. number: its number in the file.
    skipped: what of the file is not replayed, by reason.
    """

    memory: np.ndarray
    at: np.ndarray
    length: np.ndarray
    side: np.ndarray
    time_ns: np.ndarray
    flow: np.ndarray
    aim: np.ndarray
    after: np.ndarray
    number: np.ndarray
    skipped: Mapping[str, int]
    timing: Timing


class Contents(NamedTuple):
    """What a file holds. packets: its IPv4 packets. skipped: how many frames have none, by reason. untimed: see `Timing`."""

    packets: list[Recorded]
    skipped: Counter[str]
    untimed: int


def read(name: str) -> Contents:
    """Return the IPv4 packets of a capture file.

    Raises NearstateError as `savefile.frames` does, and for a file of more than MOST_FRAMES or without anything to replay.
    """
    contents = Contents([], Counter(), 0)
    for frame in savefile.frames(name):
        if frame.number > MOST_FRAMES:
            raise NearstateError(
                f"capture {name!r} has more than {MOST_FRAMES:,} frames: cut it, `tcpdump -r FILE -c {MOST_FRAMES} -w NEW`"
            )
        packet, reason = _packet(name, frame.link, frame.content)
        if reason:
            contents.skipped[reason] += 1
            continue
        contents.packets.append(Recorded(frame.number, frame.time_ns, packet))
        if not frame.timed and not contents.untimed:
            contents = contents._replace(untimed=frame.number)
    if not contents.packets:
        skipped = dict(contents.skipped) or "it is empty"
        raise NearstateError(f"capture {name!r} has no IPv4 packet that can be replayed: {skipped}")
    return contents


def _packet(name: str, link: int, frame: bytes) -> tuple[bytes, str]:
    """Return the IPv4 packet in a frame and "", or nothing and why there is none."""
    if link != ETHERNET and link not in LINK_BYTES:
        raise NearstateError(f"capture {name!r} has link type {link} {savefile.link_name(link)}: Ethernet (1) or one of "
                             f"{sorted(LINK_BYTES)} is possible")  # fmt: skip
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
    if len(packet) < min(total, header + _transport_bytes(packet, header)):
        return b"", "cut_in_headers"
    return packet + bytes(total - len(packet)), ""


def _transport_bytes(packet: bytes, header: int) -> int:
    """Return how many bytes of headers are behind a packet's IP header, which may be cut off; a quoted packet's count."""
    if int.from_bytes(packet[6:8], "big") & FRAGMENT_OFFSET:
        return 0
    if packet[9] == TCP:
        return max(20, (packet[header + 12] >> 4) * 4) if len(packet) > header + 12 else 20
    if packet[9] == ICMP and packet[header : header + 1] and packet[header] in ICMP_ERRORS:
        return 8 + 20 + 8
    return 8 if packet[9] in (ICMP, UDP) else 0


def at_speed(traffic: Mapping[str, Any], speed: float | None) -> Replay:
    """Return the replay that an experiment's traffic says, at the speed of a trial; None: at the traffic's own.

    Raises NearstateError for a wrong value.
    """
    return Replay.of(**{**traffic, **({} if speed is None else {"speed": speed})})


class Look(NamedTuple):
    """What is told of a replay before it starts. frames: how many are sent. has_tcp: some of them are TCP segments."""

    frames: int
    has_tcp: bool
    skipped: Mapping[str, int]
    timing: Timing


@functools.cache
def _looked_at(replay: Replay) -> Look:
    prepared = prepare(replay, "02:00:00:00:00:01", "02:00:00:00:00:02")
    has_tcp = bool((prepared.memory[prepared.at + 23] == TCP).any())
    return Look(len(prepared.at), has_tcp, prepared.skipped, prepared.timing)


def check(replay: Replay) -> Look:
    """Return what a replay is going to be; a file is read once, however often it is asked about and at whatever speeds.

    Raises NearstateError when it cannot be replayed.
    """
    look = _looked_at(replace(replay, speed=0.0, longest_s=1.0))
    check_timing(replay, look.timing)
    return look


def check_timing(replay: Replay, timing: Timing) -> None:
    """Raise NearstateError unless the time stamps make sense at the replay's speed; at speed 0 there are no times."""
    name, longest_s = replay.pcap, replay.longest_s
    if replay.speed and timing.untimed:
        raise NearstateError(f"capture {name!r}: packet {timing.untimed} is in a Simple Packet Block, which has no time stamp: "
                             "replay the file with speed=0")  # fmt: skip
    if replay.speed and timing.seconds > longest_s * replay.speed:
        raise NearstateError(
            f"capture {name!r} lasts {timing.seconds / replay.speed:,.1f} s at speed {replay.speed:g}, longer than "
            f"longest_s={longest_s:g}: packet {timing.gap_before} comes {timing.gap_s:,.1f} s after packet {timing.gap_after}; "
            "cut the file, or give a greater longest_s or speed"
        )
    if replay.speed and timing.most_back_s > MOST_BACK_S:
        raise NearstateError(
            f"capture {name!r}: packet {timing.back_at} is {timing.most_back_s:,.1f} s earlier than one before it, at most "
            f"{MOST_BACK_S:g} s is made good: order the file, `reordercap FILE NEW`, or replay it with speed=0"
        )


def describe(replay: Replay, look: Look) -> str:
    """Return a replay in a line: packets, time, what is left out or made good."""
    seconds = f"{look.timing.seconds / replay.speed:,.3f} s at speed {replay.speed:g}" if replay.speed else "as fast as possible"
    back = [f"{look.timing.back:,} time stamps earlier than one before"] if look.timing.back and replay.speed else []
    skipped = (
        [f"not replayed: {', '.join(f'{reason} {count:,}' for reason, count in look.skipped.items())}"] if look.skipped else []
    )
    return "; ".join([f"replay of {replay.pcap}: {look.frames:,} packets, {seconds}", *back, *skipped])


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


def _flow(packet: bytes, side: int) -> tuple[Any, ...]:
    """Return what both directions of a mapped packet's flow have in common: protocol, inside end, outside end.

    An ICMP query's identifier stands for both ports.
    """
    transport = (packet[0] & 15) * 4
    ports = (b"", b"")
    if not int.from_bytes(packet[6:8], "big") & FRAGMENT_OFFSET and len(packet) >= transport + 8:
        if packet[9] in (TCP, UDP):
            ports = (packet[transport : transport + 2], packet[transport + 2 : transport + 4])
        elif packet[9] == ICMP and packet[transport] in ICMP_QUESTIONS + ICMP_ANSWERS:
            ports = (packet[transport + 4 : transport + 6],) * 2
    flow_ends = ((packet[12:16], ports[0]), (packet[16:20], ports[1]))
    return (packet[9], *(flow_ends if side == INSIDE else flow_ends[::-1]))


class _Flows:
    """Numbers the flows of mapped packets as they come."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[Any, ...], int] = {}
        self.datagrams: dict[bytes, int] = {}
        self.last: dict[tuple[int, int], int] = {}

    def add(self, packet: bytes, side: int, index: int) -> tuple[int, int, int]:
        """Take in the packet that is frame number `index`; return flow, aim and after of `Prepared`."""
        flow = self.numbers.setdefault(_flow(packet, side), len(self.numbers))
        aim = self._aim(packet, side, flow)
        after = self.last.get((aim if aim >= 0 else flow, 1 - side), -1)
        self.last[flow, side] = index
        return flow, aim, after

    def _aim(self, packet: bytes, side: int, flow: int) -> int:
        fragment, datagram = int.from_bytes(packet[6:8], "big"), packet[4:6] + packet[9:10] + packet[12:20]
        if fragment & FRAGMENT_OFFSET:
            return self.datagrams.get(datagram, flow)
        if fragment & MORE_FRAGMENTS:
            self.datagrams[datagram] = flow
        quoted = packet[(packet[0] & 15) * 4 + 8 :]
        if is_error(packet):
            return self.numbers.get(_flow(quoted, 1 - side), -1) if len(quoted) >= 20 and quoted[0] >> 4 == 4 else -1
        return flow


def timing_of(time_ns: np.ndarray, numbers: np.ndarray, untimed: int) -> Timing:
    """Return the timing of packets with these time stamps and numbers in the file."""
    latest = np.maximum.accumulate(time_ns)
    gaps, back = np.diff(latest, append=latest[-1]), latest - time_ns
    gap, furthest = int(gaps.argmax()), int(back.argmax())
    return Timing(float(latest[-1] - latest[0]) / 1e9, float(gaps[gap]) / 1e9, int(numbers[gap]),
                  int(numbers[min(gap + 1, len(numbers) - 1)]), int(np.count_nonzero(back)), float(back[furthest]) / 1e9,
                  int(numbers[furthest]), untimed)  # fmt: skip


def prepare(replay: Replay, client_mac: str, server_mac: str, virtual: int | None = None) -> Prepared:
    """Return the frames of a replay.

    virtual: a load balancer's address; it stands for the outside address that inside sends most packets to. Raises
    NearstateError as `read` and `check_timing` do, and when no packet crosses between the parties.
    """
    recorded, skipped, untimed = read(replay.pcap)
    ours = is_ours(ROOT / replay.pcap)
    sides = parties(openers(packet for _, _, packet in recorded), replay.inside, ours)
    served = None if virtual is None else busiest((next(ends(packet)) for _, _, packet in recorded), sides)
    addresses = map_addresses(sides, {} if served is None or virtual is None else {served: virtual})
    rewrite = Rewriter(sides, addresses, spread_ports() if replay.ports == "spread" else None)
    macs = [bytes.fromhex(mac.replace(":", "")) for mac in (client_mac, server_mac)]
    headers = (macs[1] + macs[0] + b"\x08\x00", macs[0] + macs[1] + b"\x08\x00")
    memory, lengths = bytearray(), list[int]()
    columns: list[tuple[int, ...]] = []
    flows = _Flows()
    for number, time_ns, packet in recorded:
        source, destination = next(ends(packet))
        side = sides[source]
        if side == sides[destination]:
            skipped["between_one_party"] += 1
        elif side == OUTSIDE and replay.sides == "client":
            skipped["server_side"] += 1
        else:
            mapped = rewrite(packet)
            columns.append((side, time_ns, number, *flows.add(mapped, side, len(lengths))))
            lengths.append(len(headers[side]) + len(mapped))
            memory += headers[side] + mapped
    if not lengths:
        raise NearstateError(
            f"capture {replay.pcap!r}: no packet crosses from inside to outside ({dict(skipped)}); say which networks are "
            'inside, as traffic inside=("192.0.2.0/24",)'
        )
    length = np.array(lengths, np.int64)
    side_of, time_of, numbers, flow_of, aim, after = np.array(columns, np.int64).T.copy()
    timing = timing_of(time_of, numbers, untimed)
    check_timing(replay, timing)
    return Prepared(np.frombuffer(memory, np.uint8), np.cumsum(length) - length, length, side_of,
                    np.maximum.accumulate(time_of) - time_of[0], flow_of, aim, after, numbers, dict(skipped), timing)  # fmt: skip
