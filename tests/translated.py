"""A trace through a translator of addresses, whichever ports it gives: what it did can be compared with another's, byte by byte.

A trace speaks of clients by their own addresses and ports, as if nothing were translated. It is sent in rounds:

    from inside   client:port -> server           sent as it is; what leaves says which external port the client has
    from outside  server -> client:port           sent to the external port, so its round begins when that is known
    hairpin       client:port -> other client     sent to the other client's external port

What left is returned as if it had not been translated: `external` is the client's again, which every translator must be able to
undo without a trace, checksums too. Addresses are written here by RFC 1624 once more, after another pattern than
`nfs/dataplane/rewrite.py`: a checksum knows the checksum it is under.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from datastore.base.errors import NearstateError
from nfs.dataplane.headers import ICMP, INSIDE, OUTSIDE, TCP, UDP
from tests.traces import ICMP_ERRORS, IPV4, Trace

Left = tuple[int, bytes] | None
"""(Side by which a frame left, its bytes then); None: it did not."""
Box = Callable[[Sequence[int], Sequence[bytes], Sequence[int]], Iterable[tuple[int, int, bytes]]]
"""Gets numbers, bytes and sides of some frames of a trace; says (number, side, bytes) of all that left since."""
NOBODYS_PORT = 9
INSIDE_NET = 0x0A000000 >> 23
MOST = 64


class Check(NamedTuple):
    """A checksum at byte `at`; udp: zero says that there is none. under: the one that covers it in its turn."""

    at: int
    udp: bool = False
    under: Check | None = None


class Place(NamedTuple):
    """Where an endpoint is written: bytes of address and port, and what covers them. outer: the address around a quotation."""

    protocol: int
    address: int
    port: int | None
    over_address: tuple[Check, ...]
    over_port: tuple[Check, ...]
    outer: int | None


class End(NamedTuple):
    address: bytes
    port: bytes


class Flow(NamedTuple):
    protocol: int
    client: End
    other: End


def place_of(frame: bytes, source: bool) -> Place | None:
    """Return where the source, or destination, of an IPv4 packet's flow is written; None for what has none.

    Of an ICMP error: the quoted packet went the other way, so the flow's source is the quoted destination.
    """
    if len(frame) < 34 or frame[12:14] != IPV4 or frame[14] >> 4 != 4 or frame[14] & 15 < 5:
        return None
    header, transport, protocol = Check(24), 14 + (frame[14] & 15) * 4, frame[23]
    address = 26 if source else 30
    if int.from_bytes(frame[20:22], "big") & 0x1FFF:
        return Place(protocol, address, None, (header,), (), None)
    if len(frame) < transport + 8:
        return None
    if protocol != ICMP:
        over = transport_checks(frame, protocol, transport, None)
        return Place(protocol, address, transport + (0 if source else 2), (header, *over), over, None)
    check = Check(transport + 2)
    if frame[transport] not in ICMP_ERRORS:
        return Place(protocol, address, transport + 4, (header,), (check,), None)
    quoted = transport + 8
    ports = quoted + (frame[quoted] & 15) * 4 if len(frame) > quoted else len(frame)
    if len(frame) < ports + 8 or ports < quoted + 20:
        return None
    protocol = frame[quoted + 9]
    over = transport_checks(frame, protocol, ports, check)
    covers_address = () if protocol == ICMP else over
    port = ports + 4 if protocol == ICMP else ports + (2 if source else 0)
    return Place(protocol, quoted + (16 if source else 12), port, (check, Check(quoted + 10, False, check), *covers_address),
                 (check, *over), address)  # fmt: skip


def transport_checks(frame: bytes, protocol: int, at: int, under: Check | None) -> tuple[Check, ...]:
    """Return the checksum of a TCP, UDP or ICMP header at byte `at`, where the frame has it."""
    place = {TCP: at + 16, UDP: at + 6, ICMP: at + 2}.get(protocol, len(frame))
    return (Check(place, protocol == UDP, under),) if place + 2 <= len(frame) else ()


def put(frame: bytearray, at: int, value: bytes, checks: Iterable[Check]) -> None:
    """Write `value` at byte `at` and correct the checksums over it."""
    for n in range(0, len(value), 2):
        before, after = bytes(frame[at + n : at + n + 2]), value[n : n + 2]
        frame[at + n : at + n + 2] = after
        for check in checks:
            correct(frame, check, before, after)


def correct(frame: bytearray, check: Check, before: bytes, after: bytes) -> None:
    """RFC 1624, equation 3, on one checksum and those it is under."""
    old = bytes(frame[check.at : check.at + 2])
    if check.udp and old == b"\0\0":
        return
    total = sum(0xFFFF - int.from_bytes(word, "big") for word in (old, before)) + int.from_bytes(after, "big")
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    new = (0xFFFF - total).to_bytes(2, "big")
    new = b"\xff\xff" if check.udp and new == b"\0\0" else new
    frame[check.at : check.at + 2] = new
    if check.under:
        correct(frame, check.under, old, new)


def end_at(frame: bytes, place: Place) -> End:
    port = b"" if place.port is None else frame[place.port : place.port + 2]
    return End(frame[place.address : place.address + 4], port)


def with_end(frame: bytes, place: Place, end: End, outer: bytes) -> bytes:
    """Return a frame with another endpoint at a place. outer: the address around a quotation."""
    changed = bytearray(frame)
    put(changed, place.address, end.address, place.over_address)
    if place.port is not None:
        put(changed, place.port, end.port, place.over_port)
    if place.outer is not None:
        put(changed, place.outer, outer, (Check(24),))
    return bytes(changed)


def flow_of(frame: bytes, side: int) -> Flow | None:
    """Return the flow of a frame as the trace has it; None where there are no ports."""
    client, other = place_of(frame, side == INSIDE), place_of(frame, side != INSIDE)
    if client is None or other is None or client.port is None:
        return None
    return Flow(client.protocol, end_at(frame, client), End(end_at(frame, other).address, b"") if client.protocol == ICMP
                else end_at(frame, other))  # fmt: skip


def is_hairpin(frame: bytes, side: int) -> bool:
    """Tell whether an IPv4 packet from inside is for somebody inside."""
    return (
        side == INSIDE and len(frame) >= 34 and frame[12:14] == IPV4 and int.from_bytes(frame[30:34], "big") >> 23 == INSIDE_NET
    )


def plainly(box: Box, trace: Trace) -> list[Left]:
    """Return for each frame of a trace whether and how it left a box that translates nothing."""
    left: list[Left] = [None] * len(trace.frames)
    for begin in range(0, len(left), MOST):
        end = min(begin + MOST, len(left))
        for number, side, frame in box(range(begin, end), trace.frames[begin:end], trace.sides[begin:end]):
            left[number] = side, frame
    return left


@dataclass
class Translated:
    """A translator and what it has given so far: `given` to flows, `newest` to each client's port by whichever flow.

    independent: a port is its client's whoever sends to it (RFC 4787, section 4.1), so who is not in the flow may use it too.
    lasting: nothing expires within a trace, so a port that was given stays its client's.
    """

    box: Box
    external: bytes
    independent: bool
    lasting: bool
    given: dict[Flow, End] = field(default_factory=dict)
    newest: dict[tuple[int, End], End] = field(default_factory=dict)
    owners: dict[tuple[int, End, End | None], End] = field(default_factory=dict)
    reachable: set[int] = field(default_factory=set)

    def __call__(self, trace: Trace) -> list[Left]:
        """Return for each frame of a trace whether and how it left, untranslated. `reachable`: those to a port that somebody has.

        Raises NearstateError when a port that must last is given to a second client, or a client gets a second one.
        """
        left: list[Left] = [None] * len(trace.frames)
        begin = 0
        opening: set[tuple[int, End]] = set()  # who has sent in this round
        for number, (frame, side) in enumerate(zip(trace.frames, trace.sides, strict=True)):
            to_client = side == OUTSIDE or is_hairpin(frame, side)
            target = place_of(frame, False) if to_client else None
            if number - begin == MOST or (target and (target.protocol, end_at(frame, target)) in opening):
                self._round(trace, begin, number, left)
                begin = number
                opening.clear()
            sender = place_of(frame, True) if side == INSIDE else None
            if sender:
                opening.add((sender.protocol, end_at(frame, sender)))
        self._round(trace, begin, len(trace.frames), left)
        return left

    def _round(self, trace: Trace, begin: int, end: int, left: list[Left]) -> None:
        numbers, sides = range(begin, end), trace.sides[begin:end]
        if not numbers:
            return
        sent = [self._outward(trace.frames[n], n, trace.sides[n]) for n in numbers]
        for number, side, frame in self.box(numbers, sent, sides):
            left[number] = side, self._untranslated(trace.frames[number], trace.sides[number], side, frame)

    def _outward(self, frame: bytes, number: int, side: int) -> bytes:
        """Return a frame of the trace as it is sent: to the external endpoint of the client it is for."""
        if side == INSIDE and not is_hairpin(frame, side):
            return frame
        place = place_of(frame, False)
        if place is None:
            return frame
        end = self._external_end(frame, side, place)
        if end is not None:
            self.reachable.add(number)
        elif number % 2 or place.protocol == ICMP:  # an identifier may be taken by a query that never left
            return frame  # to an address behind the translator
        else:
            end = self._nobodys(place.protocol)
        return with_end(frame, place, end, end.address if frame[30:34] == end_at(frame, place).address else frame[30:34])

    def _external_end(self, frame: bytes, side: int, place: Place) -> End | None:
        if place.port is None:  # a later fragment
            return End(self.external, b"")
        client = end_at(frame, place)
        flow = flow_of(frame, side) if side == OUTSIDE else None
        own = self.given.get(flow) if flow else None
        return self.newest.get((place.protocol, client)) if own is None and self.independent else own

    def _untranslated(self, frame: bytes, from_side: int, side: int, left: bytes) -> bytes:
        """Return what left with the client's own endpoint in place of the external one, which is noted."""
        place = place_of(frame, True) if from_side == INSIDE else None
        if place is None or len(left) < len(frame[: place.address + 4]):
            return left
        external, own = end_at(left, place), end_at(frame, place)
        flow = flow_of(frame, from_side)
        if flow is not None and place.outer is None:
            self._note(flow, external)
        return with_end(left, place, own, frame[26:30])

    def _nobodys(self, protocol: int) -> End:
        """Return an external endpoint that no client has."""
        taken = {end for kind, end, _ in self.owners if kind == protocol}
        ends = (End(self.external, port.to_bytes(2, "big")) for port in range(NOBODYS_PORT, 1 << 16))
        return next(end for end in ends if end not in taken)

    def _note(self, flow: Flow, external: End) -> None:
        key = flow.protocol, external, None if self.independent else flow.other
        if self.lasting and self.owners.setdefault(key, flow.client) != flow.client:
            raise NearstateError(f"{external} is of {self.owners[key]} and of {flow.client}")
        if self.lasting and self.given.setdefault(flow, external) != external:
            raise NearstateError(f"{flow} had {self.given[flow]}, and now {external}")
        self.owners[key] = flow.client
        self.given[flow] = self.newest[flow.protocol, flow.client] = external
