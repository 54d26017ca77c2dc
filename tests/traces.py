"""Seeded packet traces: many conversations at once, some well-behaved, some not, for two implementations to be compared on.

A conversation is a Python generator that yields what it sends next, (side, frame); `make_trace` keeps a score of them going
and lets a random one take the next step, so that flows interleave, overlap and come back. Adding a kind of conversation is
adding a function to CONVERSATIONS. Frames are put together with `struct` (about 10 us each; scapy takes 60 times as long), and
`tests/unit/test_traces.py` has scapy look at them.

Every frame that is an IP packet without VLAN tag has a number of its own as IP identification (the fragments of one datagram
share theirs), so a frame that leaves can be told from all others of its trace.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from nfs.dataplane.headers import ACK, FIN, ICMP, INSIDE, OUTSIDE, PSH, RST, SYN, TCP, UDP

ETHERNET = bytes.fromhex("020000000002020000000001")
"""Destination and source; whoever sends a frame puts its own in their place."""
IPV4 = b"\x08\x00"
IDENTIFICATION = slice(18, 20)
GRE, ESP, SCTP, EXPERIMENT = 47, 50, 132, 253
ECHO_REPLY, UNREACHABLE, QUENCH, REDIRECT, ECHO, EXCEEDED, PARAMETER = 0, 3, 4, 5, 8, 11, 12
ICMP_ERRORS = (UNREACHABLE, QUENCH, REDIRECT, EXCEEDED, PARAMETER)
URG = 0x20
CONCURRENT = 24
MORE_FRAGMENTS = 0x2000

Sent = tuple[int, bytes]
Conversation = Iterator[Sent]


@dataclass(frozen=True)
class Trace:
    """Frames in the order of their arrival: `sides` says by which side each enters, `kinds` which conversation sent it."""

    seed: int
    frames: list[bytes]
    sides: list[int]
    kinds: list[str]


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1])) + (data[-1] << 8 if len(data) & 1 else 0)
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def ip(source: int, destination: int, protocol: int, payload: bytes, options: bytes = b"", fragment: int = 0, ttl: int = 64,
       tos: int = 0) -> bytes:  # fmt: skip
    """Return a frame with an IPv4 packet; options: a multiple of 4 bytes, fragment: the flags and offset field."""
    words = 5 + len(options) // 4
    header = struct.pack("!BBHHHBBHII", 0x40 | words, tos, words * 4 + len(payload), 0, fragment, ttl, protocol, 0,
                         source, destination) + options  # fmt: skip
    return ETHERNET + IPV4 + header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload


def numbered(frame: bytes, number: int) -> bytes:
    """Return an IP packet with this identification; a header checksum that was right stays right (RFC 1624)."""
    before = int.from_bytes(frame[IDENTIFICATION], "big")
    total = (~int.from_bytes(frame[24:26], "big") & 0xFFFF) + (~before & 0xFFFF) + number
    total = (total & 0xFFFF) + (total >> 16)
    total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return frame[:18] + struct.pack("!H", number) + frame[20:24] + struct.pack("!H", total) + frame[26:]


def covered(source: int, destination: int, protocol: int, segment: bytes, at: int) -> bytes:
    """Return a TCP or UDP segment with its checksum at byte `at` (RFC 9293, section 3.1; RFC 768)."""
    pseudo = struct.pack("!IIBBH", source, destination, 0, protocol, len(segment))
    return segment[:at] + struct.pack("!H", checksum(pseudo + segment) or 0xFFFF) + segment[at + 2 :]


@dataclass
class Flow:
    """Two ends that talk. `next`: by side, the sequence number of the next byte; TCP only."""

    client: int
    server: int
    client_port: int
    server_port: int
    next: list[int] = field(default_factory=lambda: [0, 0])

    def ends(self, side: int) -> tuple[int, int, int, int]:
        """Return (source, destination, source port, destination port) of what `side` sends."""
        if side == INSIDE:
            return self.client, self.server, self.client_port, self.server_port
        return self.server, self.client, self.server_port, self.client_port

    def segment(self, side: int, flags: int, payload: bytes = b"", sequence: int | None = None, acknowledges: int | None = None,
                window: int = 64240, options: bytes = b"", ip_options: bytes = b"", ttl: int = 64) -> Sent:  # fmt: skip
        """Return a TCP segment, by default with the numbers that are due; it does not move them on."""
        source, destination, source_port, destination_port = self.ends(side)
        sequence = self.next[side] if sequence is None else sequence
        acknowledges = (self.next[1 - side] if flags & ACK else 0) if acknowledges is None else acknowledges
        header = struct.pack("!HHIIBBHHH", source_port, destination_port, sequence & 0xFFFFFFFF, acknowledges & 0xFFFFFFFF,
                             (5 + len(options) // 4) << 4, flags, window, 0, 0)  # fmt: skip
        segment = covered(source, destination, TCP, header + options + payload, 16)
        return side, ip(source, destination, TCP, segment, ip_options, ttl=ttl)

    def advance(self, side: int, flags: int, payload: bytes = b"", **others: int | bytes) -> Sent:
        """Return the segment that is due, and move the sequence number behind it."""
        sent = self.segment(side, flags, payload, **others)  # type: ignore[arg-type]
        self.next[side] = (self.next[side] + len(payload) + bool(flags & SYN) + bool(flags & FIN)) & 0xFFFFFFFF
        return sent

    def datagram(self, side: int, payload: bytes, ip_options: bytes = b"", checksummed: bool = True) -> Sent:
        source, destination, source_port, destination_port = self.ends(side)
        whole = struct.pack("!HHHH", source_port, destination_port, 8 + len(payload), 0) + payload
        whole = covered(source, destination, UDP, whole, 6) if checksummed else whole
        return side, ip(source, destination, UDP, whole, ip_options)

    def query(self, side: int, kind: int, number: int, code: int = 0, payload: bytes = b"ping") -> Sent:
        """Return an ICMP query or its answer; the client's port is the identifier."""
        source, destination, _, _ = self.ends(side)
        return side, ip(source, destination, ICMP, icmp(kind, code, struct.pack("!HH", self.client_port, number) + payload))


def icmp(kind: int, code: int, rest: bytes) -> bytes:
    """Return an ICMP message; rest: the four bytes behind its checksum, and everything that follows."""
    message = struct.pack("!BBH", kind, code, 0) + rest
    return message[:2] + struct.pack("!H", checksum(message)) + message[4:]


def error_about(sent: Sent, kind: int, code: int, router: int | None = None, quoted_bytes: int = 28) -> Sent:
    """Return an ICMP error from the other side that quotes the start of an IP packet (RFC 792)."""
    side, frame = sent
    source, destination = struct.unpack_from("!II", frame, 26)
    return 1 - side, ip(router or destination, source, ICMP, icmp(kind, code, bytes(4) + frame[14 : 14 + quoted_bytes]))


class Seeded(random.Random):
    """The trace's dice and the small world it happens in: few addresses and ports, so that tuples overlap and come back."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        net = (seed % 60_000 + 1) << 8
        self.clients = [(10 << 24) + net % (1 << 23) + host for host in (1, 2, 3)]
        self.servers = [(10 << 24) + (1 << 23) + net % (1 << 23) + host for host in (1, 2, 3)]
        self.router_inside, self.router_outside = self.clients[0] + 200, self.servers[0] + 200
        self.seen: list[Sent] = []

    def flow(self, ports: int = 40) -> Flow:
        client_port = 32768 + 2 * self.randrange(ports)
        server_port = self.choice((22, 53, 80, 443, client_port))
        numbers = [self.choice((self.getrandbits(32), 0, 0xFFFFFFFE)) for _ in range(2)]
        return Flow(self.choice(self.clients), self.choice(self.servers), client_port, server_port, numbers)

    def payload(self, most: int = 64) -> bytes:
        return self.randbytes(self.randint(1, most))

    def router(self, side: int) -> int:
        return self.router_inside if side == INSIDE else self.router_outside

    def chance(self, probability: float) -> bool:
        return self.random() < probability


def maybe_again(dice: Seeded, sent: Sent) -> Conversation:
    """What is sent may be sent again: a retransmission has the same numbers."""
    yield sent
    while dice.chance(0.1):
        yield sent


def handshake(dice: Seeded, flow: Flow) -> Conversation:
    options = b"\x02\x04\x05\xb4\x01\x03\x03\x07" if dice.chance(0.5) else b""
    yield from maybe_again(dice, flow.advance(INSIDE, SYN, options=options))
    yield from maybe_again(dice, flow.advance(OUTSIDE, SYN | ACK, options=options))
    yield from maybe_again(dice, flow.advance(INSIDE, ACK))


def talk(dice: Seeded, flow: Flow, most: int = 6) -> Conversation:
    for _ in range(dice.randint(0, most)):
        side = dice.choice((INSIDE, OUTSIDE))
        yield from maybe_again(dice, flow.advance(side, ACK | dice.choice((0, PSH)), dice.payload()))
        if dice.chance(0.5):
            yield flow.segment(1 - side, ACK)


def close(dice: Seeded, flow: Flow) -> Conversation:
    """Both ends close, one after the other or at the same time (RFC 9293, section 3.6)."""
    first = dice.choice((INSIDE, OUTSIDE))
    if dice.chance(0.2):
        yield flow.advance(first, FIN | ACK)
        yield flow.advance(1 - first, FIN | ACK, acknowledges=flow.next[first] - 1)
        yield flow.segment(first, ACK)
        yield flow.segment(1 - first, ACK)
        return
    yield from maybe_again(dice, flow.advance(first, FIN | ACK))
    if dice.chance(0.7):
        yield flow.segment(1 - first, ACK)
        for _ in range(dice.randint(0, 2)):
            yield flow.advance(1 - first, ACK | PSH, dice.payload())
    yield from maybe_again(dice, flow.advance(1 - first, FIN | ACK))
    yield from maybe_again(dice, flow.segment(first, ACK))


def connection(dice: Seeded) -> Conversation:
    """From handshake to close or reset, and perhaps the same tuple once more."""
    flow = dice.flow()
    for _ in range(dice.choice((1, 1, 2, 3))):
        yield from handshake(dice, flow)
        yield from talk(dice, flow)
        if dice.chance(0.75):
            yield from close(dice, flow)
        else:
            side = dice.choice((INSIDE, OUTSIDE))
            yield flow.segment(side, RST | ACK)
            if dice.chance(0.3):
                yield flow.segment(1 - side, dice.choice((ACK, RST, FIN | ACK, PSH | ACK)))
        if dice.chance(0.3):
            yield flow.segment(dice.choice((INSIDE, OUTSIDE)), dice.choice((ACK, FIN | ACK, SYN, SYN | ACK, RST)))
        flow.next = [number + dice.randrange(1, 1 << 20) for number in flow.next]


def refused(dice: Seeded) -> Conversation:
    flow = dice.flow()
    yield flow.advance(INSIDE, SYN)
    yield flow.segment(OUTSIDE, RST | ACK, sequence=0)
    if dice.chance(0.5):
        yield flow.segment(OUTSIDE, SYN | ACK)
    if dice.chance(0.5):
        yield from handshake(dice, flow)


def simultaneous_open(dice: Seeded) -> Conversation:
    """Both open at once (RFC 9293, section 3.5)."""
    flow = dice.flow()
    yield from maybe_again(dice, flow.advance(INSIDE, SYN))
    yield from maybe_again(dice, flow.advance(OUTSIDE, SYN))
    for side in dice.sample((INSIDE, OUTSIDE), 2):
        yield flow.segment(side, SYN | ACK, sequence=flow.next[side] - 1)
    for side in dice.sample((INSIDE, OUTSIDE), 2):
        yield flow.segment(side, ACK)
    yield from talk(dice, flow)
    yield from close(dice, flow)


def half_open(dice: Seeded) -> Conversation:
    """The client forgot and opens again; the server answers with what it knows (RFC 9293, section 3.5.1)."""
    flow = dice.flow()
    yield from handshake(dice, flow)
    known = list(flow.next)
    flow.next[INSIDE] += dice.randrange(100_000, 1 << 30)
    yield flow.segment(INSIDE, SYN)
    yield flow.segment(OUTSIDE, ACK, sequence=known[OUTSIDE], acknowledges=known[INSIDE])
    yield flow.segment(INSIDE, RST, sequence=known[INSIDE])
    yield from handshake(dice, flow)
    yield from talk(dice, flow)


def lost_state(dice: Seeded) -> Conversation:
    """The server has a connection that nobody on the path has seen: its answer to the SYN is an acknowledgement."""
    flow = dice.flow()
    yield flow.segment(INSIDE, SYN)
    yield flow.segment(OUTSIDE, ACK, acknowledges=flow.next[INSIDE] - 5000)
    yield flow.segment(INSIDE, RST, sequence=flow.next[INSIDE] - 5000)
    yield from handshake(dice, flow)


def any_flags(dice: Seeded) -> Conversation:
    """Segments in any order, from either side, with any flags and plausible numbers."""
    flow = dice.flow()
    if dice.chance(0.7):
        yield from handshake(dice, flow)
    for _ in range(dice.randint(1, 12)):
        side = dice.choice((INSIDE, OUTSIDE))
        usual = dice.choice((SYN, SYN | ACK, ACK, PSH | ACK, FIN | ACK, RST, RST | ACK))
        flags = usual if dice.chance(0.6) else dice.getrandbits(8)
        yield flow.advance(side, flags, dice.payload() if dice.chance(0.3) else b"")


def any_numbers(dice: Seeded) -> Conversation:
    """An established connection, and segments far outside its windows among the good ones."""
    flow = dice.flow()
    yield from handshake(dice, flow)
    for _ in range(dice.randint(1, 6)):
        side = dice.choice((INSIDE, OUTSIDE))
        flags = dice.choice((ACK, PSH | ACK, FIN | ACK)) if dice.chance(0.8) else RST
        sequence, acknowledges, window = dice.getrandbits(32), dice.getrandbits(32), dice.getrandbits(16)
        yield flow.segment(side, flags, dice.payload(), sequence=sequence, acknowledges=acknowledges, window=window)
        yield flow.segment(1 - side, ACK)


def unasked(dice: Seeded) -> Conversation:
    """One packet out of nowhere."""
    flow, side = dice.flow(400), dice.choice((INSIDE, OUTSIDE))
    yield dice.choice((flow.segment(side, dice.getrandbits(6)), flow.segment(OUTSIDE, SYN),
                       flow.datagram(OUTSIDE, dice.payload()), flow.query(side, dice.randrange(20), 1)))  # fmt: skip


def question(dice: Seeded) -> Conversation:
    """UDP both ways, begun by either side."""
    flow = dice.flow()
    if dice.chance(0.3):
        yield flow.datagram(OUTSIDE, dice.payload())
    for _ in range(dice.randint(1, 5)):
        yield flow.datagram(INSIDE, dice.payload(), checksummed=dice.chance(0.9))
        for _ in range(dice.randint(0, 2)):
            yield flow.datagram(OUTSIDE, dice.payload(600))


def ping(dice: Seeded) -> Conversation:
    """ICMP queries and answers, right and wrong ones (RFC 792)."""
    flow = dice.flow()
    asks, answers = dice.choice(((ECHO, ECHO_REPLY), (ECHO, ECHO_REPLY), (ECHO, ECHO_REPLY), (13, 14), (15, 16), (17, 18)))
    opener = INSIDE if dice.chance(0.8) else OUTSIDE
    for number in range(dice.randint(1, 4)):
        yield flow.query(opener, asks, number)
        if dice.chance(0.8):
            yield flow.query(1 - opener, answers, number)
        if dice.chance(0.15):
            yield flow.query(dice.choice((INSIDE, OUTSIDE)), dice.choice((0, 8, 13, 14, 9, 10, 30, 40)), number)


def error(dice: Seeded) -> Conversation:
    """An ICMP error about something that was sent, about something that was not, or with a quotation that is cut."""
    if dice.seen and dice.chance(0.7):
        about = dice.choice(dice.seen[-200:])
    else:
        flow, side = dice.flow(400), dice.choice((INSIDE, OUTSIDE))
        about = dice.choice((flow.segment(side, ACK), flow.datagram(side, dice.payload()), flow.query(side, ECHO, 1),
                             error_about(flow.datagram(side, b"?"), UNREACHABLE, 1)))  # fmt: skip
    size = dice.choice((28, 28, 28, 48, 128)) if dice.chance(0.85) else dice.randrange(60)
    kind = dice.choice((UNREACHABLE, UNREACHABLE, EXCEEDED, QUENCH, REDIRECT, PARAMETER))
    router = dice.router(1 - about[0]) if dice.chance(0.5) else None
    side, frame = error_about(about, kind, dice.randrange(6) if kind == UNREACHABLE else 0, router, size)
    if dice.chance(0.1):  # sent to somebody who has not sent the quoted packet
        other = dice.choice(dice.clients if side == OUTSIDE else dice.servers)
        frame = ip(int.from_bytes(frame[26:30], "big"), other, ICMP, frame[34:])
    yield side, frame


def fragments(dice: Seeded) -> Conversation:
    """One datagram in pieces: in order, in another order, with one missing, or overlapping."""
    flow, side = Flow(dice.choice(dice.clients), dice.choice(dice.servers), 20000 + dice.randrange(4000), 4789), dice.choice(
        (INSIDE, INSIDE, OUTSIDE)
    )  # fmt: skip
    if dice.chance(0.3):
        yield flow.datagram(INSIDE, dice.payload())
    _, whole = flow.datagram(side, dice.randbytes(dice.randint(200, 1400)))
    source, destination, _, _ = flow.ends(side)
    body, cut = whole[34:], 8 * dice.randint(2, 12)
    pieces = [(at, body[at : at + cut]) for at in range(0, len(body), cut)][:4]
    how = dice.choice(("order", "order", "other order", "missing", "overlapping"))
    if how == "other order":
        dice.shuffle(pieces)
    elif how == "missing" and len(pieces) > 1:
        pieces.pop(dice.randrange(len(pieces)))
    last = max(at for at, _ in pieces)
    for at, piece in pieces:
        piece = piece + bytes(8) if how == "overlapping" and at != last else piece
        yield side, ip(source, destination, UDP, piece, fragment=at // 8 | (MORE_FRAGMENTS if at != last else 0))
    yield flow.datagram(1 - side, dice.payload())


def hairpin(dice: Seeded) -> Conversation:
    """Two clients that both have talked to a server talk to each other; one of them answers with an error."""
    one, other = (Flow(client, dice.choice(dice.servers), 32768 + 2 * dice.randrange(40), 53)
                  for client in dice.sample(dice.clients, 2))  # fmt: skip
    yield one.datagram(INSIDE, dice.payload())
    yield other.datagram(INSIDE, dice.payload())
    there = Flow(one.client, other.client, one.client_port, other.client_port)
    back = Flow(other.client, one.client, other.client_port, one.client_port)
    for _ in range(dice.randint(1, 3)):
        yield there.datagram(INSIDE, dice.payload())
        if dice.chance(0.7):
            yield back.datagram(INSIDE, dice.payload())
        if dice.chance(0.3):
            yield INSIDE, error_about(there.datagram(INSIDE, dice.payload()), UNREACHABLE, 3)[1]


def options(dice: Seeded) -> Conversation:
    """IP options: padding, router alert, security, record route, time stamp, source routes, and nonsense."""
    kinds = (b"\x01\x01\x01\x00", b"\x94\x04\x00\x00", b"\x82\x0b" + bytes(9) + b"\x00", b"\x07\x07\x04" + bytes(4) + b"\x00",
             b"\x44\x08\x05\x00" + bytes(4), b"\x83\x07\x04" + bytes(4) + b"\x00", dice.randbytes(8))  # fmt: skip
    flow, chosen = dice.flow(), dice.choice(kinds)
    yield flow.datagram(INSIDE, dice.payload(), chosen)
    yield flow.datagram(OUTSIDE, dice.payload(), chosen)


def other_protocols(dice: Seeded) -> Conversation:
    """Packets of transports without ports that we know."""
    flow, protocol = dice.flow(), dice.choice((GRE, ESP, SCTP, EXPERIMENT))
    body = struct.pack("!HH", 0, 0x0800) + dice.payload() if protocol == GRE else dice.randbytes(dice.randint(4, 40))
    for side in dice.choice(((INSIDE, OUTSIDE), (OUTSIDE, INSIDE, OUTSIDE))):
        source, destination, _, _ = flow.ends(side)
        yield side, ip(source, destination, protocol, body)


def not_ip(dice: Seeded) -> Conversation:
    """VLAN tags, ARP-like frames, IPv6 and frames of random bytes."""
    side, inner = dice.flow(400).segment(dice.choice((INSIDE, OUTSIDE)), dice.choice((SYN, ACK)))
    yield side, dice.choice((
        ETHERNET + b"\x81\x00\x00\x07" + inner[12:], ETHERNET + b"\x88\xb5" + dice.payload(),
        ETHERNET + b"\x86\xdd" + dice.randbytes(60), ETHERNET + IPV4 + dice.payload(), dice.randbytes(dice.randint(14, 90)),
    ))  # fmt: skip


def mutated(dice: Seeded) -> Conversation:
    """A good packet with flipped bits, a wrong length, a wrong checksum, no time to live, or its end cut off."""
    side = dice.choice((INSIDE, OUTSIDE))
    side, good = dice.choice(dice.seen) if dice.seen and dice.chance(0.5) else dice.flow().segment(side, dice.choice((SYN, ACK)))
    if len(good) < 42 or good[12:14] != IPV4:
        return
    side = 1 - side if dice.chance(0.1) else side
    frame = bytearray(good)
    how = dice.randrange(5)
    if how == 0:
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(14, min(len(frame), 90))
            frame[at] ^= 1 << dice.randrange(8)
    elif how == 1:  # a length of IP, UDP or TCP
        at = min(dice.choice((14, 16, 17, 38, 39, 46)), len(frame) - 1)
        frame[at] = dice.getrandbits(8)
    elif how == 2:
        frame[dice.choice((24, 25))] ^= 1 << dice.randrange(8)
    elif how == 3:
        frame[22] = dice.randrange(2)
    else:
        del frame[dice.randrange(14, len(frame)) :]
    if how != 2 and len(frame) >= 34 and dice.chance(0.9):  # else nothing but the header checksum is seen to be wrong
        size = max(20, (frame[14] & 15) * 4)
        frame[24:26] = bytes(2)
        frame[24:26] = struct.pack("!H", checksum(bytes(frame[14 : 14 + size])))
    yield side, bytes(frame)


CONVERSATIONS: dict[Callable[[Seeded], Conversation], int] = {
    connection: 12, any_flags: 14, any_numbers: 5, simultaneous_open: 4, half_open: 4, lost_state: 3, refused: 4, unasked: 40,
    question: 14, ping: 14, error: 70, fragments: 5, options: 6, other_protocols: 6, not_ip: 10, mutated: 50,
}  # fmt: skip
"""Kinds of conversations, and how often each is begun."""
TRANSLATED = CONVERSATIONS | {hairpin: 8}
"""For what translates addresses: clients know each other by external ones."""


def make_trace(seed: int, packets: int, kinds: Mapping[Callable[[Seeded], Conversation], int] | None = None) -> Trace:
    """Return the trace of `packets` frames that belongs to `seed`; at most 65,535. kinds: CONVERSATIONS or some of them."""
    assert 0 < packets < 1 << 16
    chosen = kinds or CONVERSATIONS
    dice, trace = Seeded(seed), Trace(seed, [], [], [])
    going: list[tuple[str, Conversation, dict[bytes, int]]] = []
    while len(trace.frames) < packets:
        while len(going) < CONCURRENT:
            begun = dice.choices(list(chosen), list(chosen.values()))[0]
            going.append((begun.__name__, begun(dice), {}))
        at = dice.randrange(len(going))
        name, conversation, datagrams = going[at]
        sent = next(conversation, None)
        if sent is None:
            going[at] = going[-1]
            going.pop()
            continue
        side, frame = sent
        number = len(trace.frames) + 1
        if len(frame) >= 34 and frame[12:14] == IPV4:
            if name == "fragments" and frame[20:22] != b"\0\0":
                number = datagrams.setdefault(frame[26:34], number)
            frame = numbered(frame, number)
            if name != "mutated":
                dice.seen.append((side, frame))
        trace.frames.append(frame)
        trace.sides.append(side)
        trace.kinds.append(name)
    return trace
