"""The Linux kernel as oracle: what does nftables do with a trace, packet by packet, and is every difference from us known?

A network function joins by a `Subject`: its name, the rules that have nftables do the same job, and what of a frame that left
must agree. What is meant to differ is a line in KNOWN_DIFFERENCES; its predicates see the packet and what came before it.

    client "net" ---- "inside" nf "outside" ---- "net" server         the kernel of `nf` forwards and filters

Raw sockets send each frame at one end and see what comes out at the other. All of it runs on one CPU, where the kernel has a
single queue for veth: order is kept, and once a marker sent behind a batch has come out, so has all that ever will.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datastore.base.errors import NearstateError
from nfs.dataplane import declaration
from nfs.dataplane.headers import ACK, FIN, ICMP, INSIDE, OUTSIDE, PACKET, RST, SYN, TCP
from nfs.dataplane.ledger import MALFORMED, TRUNCATED
from nfs.firewall import CLOSING, ESTABLISHED, OPEN, RESET, SYN_RECEIVED, SYN_SENT, TIME_WAIT
from tests.conftest import Bench, Host
from tests.traces import (
    CONVERSATIONS,
    ECHO,
    ECHO_REPLY,
    EXPERIMENT,
    GRE,
    ICMP_ERRORS,
    IPV4,
    SCTP,
    URG,
    Conversation,
    Seeded,
    Trace,
    checksum,
    ip,
)
from tests.translated import Box, Left, Translated, plainly
from topologies.emulation import system

Ends = tuple[int, ...]
MARKER_S = 5.0
MARKER = ip(0x0A7F0001, 0x0AFF0001, EXPERIMENT, b"nearstate marker")
GATEWAYS = {"inside": "10.127.255.254/9", "outside": "10.255.255.254/9"}
NEIGHBOURS = {"inside": "10.127.255.253", "outside": "10.255.255.253"}
SILENCE = "table ip silence {\n  chain own {\n    type filter hook output priority 0; policy drop;\n  }\n}\n"
"""No ICMP errors of the kernel's own: only what forwards is compared."""
FIREWALL_RULES = """
table ip nearstate {
  chain through {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname "inside" ct state new accept
  }
}
"""
SYSCTLS = {
    "netfilter/nf_conntrack_tcp_loose": "0",  # only a SYN opens a connection
    "netfilter/nf_conntrack_tcp_be_liberal": "1",  # sequence numbers and windows are the ends' business
    "netfilter/nf_conntrack_checksum": "0",  # and so are the transport's checksums: we never read a payload
}


@dataclass(frozen=True)
class Subject:
    """A job that a network function of ours, or a chain of them, and the kernel both do.

    nf: names, joined by "+". rules: what `nft -f` gets. sysctls: what the kernel must be told to do the same job, below
    /proc/sys/net. same: whether two frames that left, ours and the kernel's, say the same, given the one that entered.
    known: what may differ. external: the address that both translate clients to; "": they translate nothing. independent: ours
    gives a client's port one external port for all who talk to it; the kernel does not. strict: the share of packets that must
    be compared without any excuse.
    """

    nf: str
    rules: str
    sysctls: Mapping[str, str]
    same: Callable[[bytes, bytes, bytes], bool]
    known: tuple[Known, ...]
    kinds: Mapping[Callable[[Seeded], Conversation], int] = field(default_factory=CONVERSATIONS.copy)
    external: str = ""
    independent: bool = False
    strict: float = 0.6

    @property
    def functions(self) -> list[str]:
        return self.nf.split("+")

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Return what our functions are told."""
        return {name: {"external_addresses": [self.external]} for name in self.functions if name.startswith("nat")}

    def passages(self, trace: Trace, ours: Box, theirs: Box) -> tuple[list[Left], list[Left]]:
        """Return for each frame of a trace whether and how it left us and the kernel, translations undone."""
        if not self.external:
            return plainly(ours, trace), plainly(theirs, trace)
        external = socket.inet_aton(self.external)
        return Translated(ours, external, self.independent, True)(trace), Translated(theirs, external, False, False)(trace)


def datagram(frame: bytes) -> bytes:
    """Return the IP packet in a frame without link header and padding, as it is before a router has touched it.

    Time to live and header checksum are zero: forwarding changes the first (RFC 1812, section 5.3.1), and we are no router.
    """
    size = int.from_bytes(frame[16:18], "big")
    packet = bytearray(frame[14 : 14 + size])
    packet[8] = packet[10] = packet[11] = 0
    return bytes(packet)


def header_holds(frame: bytes) -> bool:
    """Tell whether the IP header checksum is right."""
    return checksum(frame[14 : 14 + (frame[14] & 15) * 4]) == 0


def same_datagram(given: bytes, ours: bytes, theirs: bytes) -> bool:
    """Nothing is rewritten: both sent what they were given, and what had a good header checksum has one still."""
    if given[12:14] != IPV4:
        return ours == theirs
    return datagram(ours) == datagram(theirs) and (header_holds(ours) or not header_holds(given)) and header_holds(theirs)


@dataclass
class Kernel:
    """The kernel of a namespace, doing a subject's job between two raw sockets."""

    sockets: tuple[socket.socket, socket.socket]
    macs: tuple[bytes, bytes]
    cpu: int = field(default_factory=lambda: min(os.sched_getaffinity(0)))

    @classmethod
    def start(cls, bench: Bench, subject: Subject) -> Kernel:
        client, nf, server = (bench.host(f"{name}-{subject.nf}") for name in ("client", "nf", "server"))
        bench.cable((client, "net"), (nf, "inside"))
        bench.cable((server, "net"), (nf, "outside"))
        for end, interface in ((client, "inside"), (server, "outside")):
            nf.ip(f"address add {GATEWAYS[interface]} dev {interface}")
            nf.ip(f"neighbour replace {NEIGHBOURS[interface]} lladdr {mac_of(end, 'net')} dev {interface} nud permanent")
            network = "10.0.0.0/9" if interface == "inside" else "10.128.0.0/9"
            nf.ip(f"route replace {network} via {NEIGHBOURS[interface]} dev {interface}")
        sysctls = {"ipv4/ip_forward": "1", "ipv4/conf/all/rp_filter": "0", "ipv4/conf/all/send_redirects": "0"}
        with system.network_namespace(nf.pid):
            system.run(["nft", "-f", "-"], dict(os.environ), SILENCE + subject.rules)
            for name, value in (sysctls | dict(subject.sysctls)).items():
                Path("/proc/sys/net", name).write_text(value)
        macs = tuple(bytes.fromhex(mac_of(nf, interface).replace(":", "")) for interface in ("inside", "outside"))
        return cls((client.packet_socket("net"), server.packet_socket("net")), (macs[0], macs[1]))

    def box(self, trace: Trace) -> Box:
        """Return what takes frames of a trace. It raises NearstateError when something else leaves, or a marker is lost."""
        places: dict[bytes, list[int]] = {}
        for at, frame in enumerate(trace.frames):
            places.setdefault(identity(frame), []).append(at)

        def take(_: Sequence[int], frames: Sequence[bytes], sides: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
            with one_cpu(self.cpu):
                left = list(self._batch(frames, sides))
            for side, frame in left:
                at_most = places.get(identity(frame))
                if not at_most:
                    raise NearstateError(f"the kernel sent what is not in trace {trace.seed}: {frame.hex()}")
                yield at_most.pop(0), side, frame

        return take

    def _batch(self, given: Sequence[bytes], sides: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Send some frames; yield (side, frame) for all that came out, pieces of earlier ones that are whole now too."""
        for frame, side in zip(given, sides, strict=True):
            self.sockets[side].send(self.macs[side] + frame[6:])
        self.sockets[INSIDE].send(self.macs[INSIDE] + MARKER[6:])
        for side in (OUTSIDE, INSIDE):
            for frame in self._arrived(side):
                yield side, frame

    def _arrived(self, side: int) -> Iterator[bytes]:
        """Yield what came in on a side; on OUTSIDE up to the marker."""
        raw, marker = self.sockets[side], datagram(MARKER)
        raw.settimeout(MARKER_S if side == OUTSIDE else 0)
        while True:
            try:
                frame, (_, _, kind, *_rest) = raw.recvfrom(2048)
            except BlockingIOError:
                return
            if kind == socket.PACKET_OUTGOING:
                continue
            if side == OUTSIDE and datagram(frame) == marker:
                return
            yield frame


def mac_of(host: Host, interface: str) -> str:
    with system.network_namespace(host.pid), socket.socket() as any_socket:
        request = struct.pack("16s240x", interface.encode())
        return fcntl.ioctl(any_socket, 0x8927, request)[18:24].hex(":")  # SIOCGIFHWADDR


@contextmanager
def one_cpu(cpu: int) -> Iterator[None]:
    """Within the block this thread runs on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def identity(frame: bytes) -> bytes:
    """Return what tells an IP packet from the others of its trace: identification and fragment offset."""
    is_ip = len(frame) >= 34 and frame[12:14] == IPV4
    return frame[18:20] + bytes([frame[20] & 0x1F, frame[21]]) if is_ip else frame


@dataclass
class Seen:
    """One packet of a trace with what both did. `flow`: what came before it in its flow, oldest first.

    fields: what our parser says (`headers.PACKET`). state: field `state` of our record before this packet, 0: there is none.
    """

    number: int
    side: int
    frame: bytes
    fields: Mapping[str, int]
    state: int
    ours: Left
    theirs: Left
    flow: list[Seen]

    @property
    def flags(self) -> int:
        """The flags of a TCP segment, all set for what is none."""
        return self.fields["tcp_flags"] if self.fields["protocol"] == TCP and not self.fields["icmp_error"] else 0

    @property
    def control(self) -> int:
        return self.flags & (SYN | ACK | FIN | RST)

    @property
    def is_ip(self) -> bool:
        return len(self.frame) >= 34 and self.frame[12:14] == IPV4

    @property
    def forwarded(self) -> bool:
        """Both let it through."""
        return self.ours is not None and self.theirs is not None

    def acknowledged(self) -> int | None:
        """Return the highest acknowledgment that the other side has sent in this flow, as a window tracker keeps it."""
        highest = None
        for earlier in self.flow:
            if earlier.side != self.side and earlier.flags & ACK and earlier.theirs is not None:
                number = earlier.fields["tcp_acknowledgment"]
                if highest is None or 0 < (number - highest) & 0xFFFFFFFF < 1 << 31:
                    highest = number
        return highest


@dataclass(frozen=True)
class Known:
    """A difference between us and the kernel that is meant.

    rfc: the paragraph it stands on. why: ours is right, or deliberately simpler. explains: recognises the packet. parts: the same
    for a packet after which the two may remember different things of its flow although they did the same with it. What differs
    later in a flow whose memories have parted, until a handshake that both saw, is put down to where they did.
    """

    name: str
    rfc: str
    why: str
    explains: Callable[[Seen], bool]
    parts: Callable[[Seen], bool] = lambda seen: False


INSIDE_NET, OUTSIDE_NET = 0x0A000000 >> 23, 0x0A800000 >> 23


def _misrouted(seen: Seen) -> bool:
    source, destination = (int.from_bytes(seen.frame[at : at + 4], "big") for at in (26, 30))
    nets = (INSIDE_NET, OUTSIDE_NET) if seen.side == INSIDE else (OUTSIDE_NET, INSIDE_NET)
    return seen.is_ip and (source >> 23, destination >> 23) != nets


def _options(seen: Seen) -> bool:
    return seen.is_ip and seen.frame[14] & 15 > 5


def _fragment(seen: Seen) -> bool:
    return seen.is_ip and bool(int.from_bytes(seen.frame[20:22], "big") & 0x3FFF)


def _reset_by_number(seen: Seen) -> bool:
    due = seen.acknowledged() if seen.flags & RST and seen.state in TRACKED else None
    return due is not None and seen.fields["tcp_sequence"] != due


def _urgent(seen: Seen) -> bool:
    return bool(seen.flags & URG) and (bool(seen.flags & RST) or seen.control == SYN | ACK)


def _after_reset(seen: Seen) -> bool:
    """A RST has passed, and no answer to a SYN since."""
    for earlier in reversed(seen.flow):
        if earlier.flags and earlier.control == SYN | ACK and earlier.forwarded:
            return False
        if earlier.control & RST and earlier.ours is not None and earlier.flags:
            return True
    return False


def _follows_a_reset(seen: Seen) -> bool:
    return bool(seen.flags or seen.fields["icmp_error"]) and _after_reset(seen)


def _opened_after_reset(seen: Seen) -> bool:
    return seen.control == SYN and _after_reset(seen)


def _other_kind(seen: Seen) -> bool:
    """An answer to a query that has not been asked so, although another one with the same identifier has."""
    if seen.fields["protocol"] != ICMP or seen.fields["icmp_error"] or seen.state != OPEN or seen.side == INSIDE:
        return False
    asked = {(earlier.fields["icmp_type"], earlier.fields["icmp_code"]) for earlier in seen.flow if earlier.side == INSIDE}
    kind = seen.fields["icmp_type"]
    return (ECHO if kind == ECHO_REPLY else kind - 1, seen.fields["icmp_code"]) not in asked


def _other_transport(seen: Seen) -> bool:
    return seen.is_ip and (seen.frame[23] == SCTP or (seen.frame[23] == GRE and bool(seen.frame[35] & 7)))


def _early(seen: Seen) -> bool:
    return seen.state == SYN_SENT and seen.side == OUTSIDE and seen.control == ACK


def _crossing(seen: Seen) -> bool:
    """The last that both sides opened with were two SYNs, or the last is one."""
    opened = [step for step in (*seen.flow, seen) if step.control & SYN and not step.control & ~(SYN | ACK) and step.ours]
    crossed = {step.side for step in opened[-4:] if step.control == SYN} == {INSIDE, OUTSIDE}
    return seen.state == SYN_RECEIVED and (crossed or (seen.side == OUTSIDE and seen.control == SYN))


def _opened_again(seen: Seen) -> bool:
    return seen.state in (ESTABLISHED, CLOSING, TIME_WAIT) and seen.control in (SYN, SYN | ACK)


def _forgotten(seen: Seen) -> bool:
    queried = seen.state == OPEN and seen.fields["protocol"] == ICMP
    return bool(seen.fields["icmp_error"]) and (seen.state == RESET or queried)


def _unreadable(seen: Seen) -> bool:
    status, quoted = seen.fields["status"], seen.fields["transport_offset"] + 8
    if seen.fields["protocol"] != ICMP or seen.fields["icmp_type"] not in ICMP_ERRORS:
        return False
    return status == TRUNCATED or (status == MALFORMED and seen.frame[quoted : quoted + 1].hex()[:1] != "4")


HANDSHAKE = [(INSIDE, SYN, True), (OUTSIDE, SYN | ACK, True), (INSIDE, ACK, True)]
TRACKED = (SYN_SENT, SYN_RECEIVED, ESTABLISHED, CLOSING, TIME_WAIT, RESET)
KNOWN_DIFFERENCES = (
    Known("not IPv4", "IEEE 802.1Q; RFC 1812, section 3.1", "we pass link protocols and look behind VLAN tags, as a "
          "bridge does; a router's interface takes IPv4 without a tag", lambda seen: not seen.is_ip),
    Known("time to live", "RFC 1812, section 5.3.1", "we are no hop: a packet's time does not run out with us",
          lambda seen: seen.is_ip and seen.frame[22] <= 1),
    Known("header checksum", "RFC 1812, section 5.2.2", "only a router must verify it; the next hop drops such a packet, whether "
          "we do or not", lambda seen: seen.is_ip and not header_holds(seen.frame)),
    Known("routing", "RFC 1812, section 5.3.7", "we have no routes: whatever arrives on one side leaves on the other",
          _misrouted, _misrouted),
    Known("IP options", "RFC 1812, section 5.2.4", "a router fills in record route and time stamp, refuses source routes and "
          "options it cannot read; we leave options to the hosts", _options),
    Known("fragments", "RFC 791, section 3.2; RFC 4787, section 11", "the kernel reassembles before it decides; a first fragment "
          "has all we need and goes on at once, later ones carry no ports", _fragment, _fragment),
    Known("reset by number", "RFC 5961, section 3.2", "the kernel ends a connection only by a RST with exactly the number due; "
          "without window tracking we keep no numbers, and any segment takes a RST back", _reset_by_number, _reset_by_number),
    Known("after a reset", "RFC 6146, section 3.5.2.2", "after a RST we treat a connection as one that may live; the kernel "
          "closes it by the exact one, and forgets its FINs and SYNs; an attempt that was refused is over for us, while the "
          "kernel lets all segments through for 10 s; ICMP errors follow the connection", _follows_a_reset,
          _opened_after_reset),
    Known("urgent", "RFC 9293, section 3.8.5", "URG has no part in opening and closing; the kernel refuses it beside RST or "
          "SYN ACK", _urgent),
    Known("data before the handshake", "RFC 9293, section 3.5.1", "the answer that leads to a RST is a bare acknowledgment; the "
          "kernel lets data pass as well", _early),
    Known("crossing SYN", "RFC 9293, section 3.5", "an outside SYN in answer to ours is a simultaneous open, before or "
          "after SYN ACK; the kernel keeps a state of its own for it and is stricter there", _crossing),
    Known("opened again", "RFC 9293, sections 3.5.1 and 3.6.1; RFC 1337, section 2", "a SYN on a live connection changes nothing "
          "before its RST; the kernel starts anew when it is acknowledged, and forgets TIME-WAIT at an outside SYN too",
          _opened_again, _opened_again),
    Known("ICMP kinds", "RFC 792, echo and time stamp", "one record serves all queries with an identifier; the kernel keeps one "
          "for each type and code", _other_kind),
    Known("error about the forgotten", "RFC 5508, section 4.2", "we remember a refused connection for 10 s, and queries of any "
          "kind by identifier: an error about them still passes", _forgotten),
    Known("unreadable quotation", "RFC 792; RFC 1812, section 4.3.2.3", "an error quotes an IPv4 header and at least 8 bytes "
          "behind it; the kernel is content with the ports, and with any version", _unreadable),
    Known("other transports", "RFC 9260, section 4; RFC 2890", "a protocol between two addresses is one flow for us; "
          "the kernel follows SCTP associations and GRE keys", _other_transport),
)  # fmt: skip
"""The firewall's, without window tracking; the first that explains a packet counts."""


FIREWALL = Subject("firewall", FIREWALL_RULES, SYSCTLS, same_datagram, KNOWN_DIFFERENCES)


@dataclass(frozen=True)
class Difference:
    """Packet `number` of a trace, on which we and the kernel differ. known: name in KNOWN_DIFFERENCES, None: nothing explains it.

    later: it follows from an earlier packet of its flow that did.
    """

    number: int
    known: str | None
    later: bool
    seen: Seen


def compare(
    subject: Subject, trace: Trace, ours: Sequence[Left], theirs: Sequence[Left], notes: np.ndarray
) -> tuple[list[Difference], int]:
    """Return the packets of a trace on which the two differ, and on how many no difference would have been excused.

    notes: `Replay.seen` of the same trace.
    """
    flows: dict[Ends, list[Seen]] = {}
    apart: dict[Ends, str] = {}
    found, strict = [], 0
    names = PACKET.names or ()
    layout = declaration.load(subject.functions[0]).state
    states = np.ascontiguousarray(notes["record"]).view(np.uint8)[:, : layout.itemsize].copy().view(layout)["state"].ravel()
    for number, (frame, side) in enumerate(zip(trace.frames, trace.sides, strict=True)):
        fields = dict(zip(names, notes["packet"][number].tolist(), strict=True))
        key = ends(fields)
        seen = Seen(number, side, frame, fields, int(states[number]), ours[number], theirs[number], flows.setdefault(key, []))
        known = next((known for known in subject.known if known.explains(seen)), None)
        strict += known is None and key not in apart
        if not agree(subject, seen):
            name = known.name if known else apart.get(key)
            found.append(Difference(number, name, known is None, seen))
        if key:
            parted = next((known.name for known in subject.known if known.parts(seen)), None)
            if known and not agree(subject, seen):
                parted = parted or known.name
            if parted:
                apart[key] = parted
            elif completes_handshake(seen):
                apart.pop(key, None)
            seen.flow.append(seen)
    return found, strict


def ends(fields: Mapping[str, int]) -> Ends:
    """Return what names the flow of a packet, whichever side and direction it came from; empty for what has no flow."""
    if fields["status"]:
        return ()
    one, other = ((fields[f"{end}_address"], fields[f"{end}_port"]) for end in ("source", "destination"))
    return (fields["protocol"], *min(one, other), *max(one, other))


def agree(subject: Subject, seen: Seen) -> bool:
    """Tell whether both dropped the packet, or both sent the same."""
    if seen.ours is None or seen.theirs is None:
        return seen.ours is seen.theirs
    return seen.ours[0] == seen.theirs[0] and subject.same(seen.frame, seen.ours[1], seen.theirs[1])


def unaltered(subject: Subject, frame: bytes, left: Left) -> bool:
    """Tell whether a packet that left us, its translation undone, is as it entered; garbage may leave as anything."""
    is_packet = len(frame) >= 34 and frame[12:14] == IPV4 and header_holds(frame)
    return left is None or not is_packet or subject.same(frame, left[1], frame)


def completes_handshake(seen: Seen) -> bool:
    """Tell whether this is the third segment of a handshake that both let through, with the right numbers, repeated or not."""
    steps = [seen]
    for earlier in reversed(seen.flow):
        if earlier.control and (earlier.side, earlier.control) != (steps[0].side, steps[0].control):
            steps.insert(0, earlier)
        if len(steps) == 3:
            break
    if [(step.side, step.control, step.forwarded) for step in steps] != HANDSHAKE:
        return False
    sequence, acknowledged = ([step.fields[name] for step in steps] for name in ("tcp_sequence", "tcp_acknowledgment"))
    return acknowledged[1] == (sequence[0] + 1) & 0xFFFFFFFF == sequence[2] and acknowledged[2] == (sequence[1] + 1) & 0xFFFFFFFF
