"""Packets for tests, built and taken apart by scapy: an implementation of the headers that is not ours."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import Any

import numpy as np

logging.getLogger("scapy").setLevel(logging.ERROR)

from scapy.layers.inet import (  # noqa: E402
    ICMP,
    IP,
    TCP,
    UDP,
    ICMPerror,
    IPerror,
    IPOption_Router_Alert,
    IPOption_Timestamp,
    TCPerror,
    UDPerror,
    fragment,
)
from scapy.layers.inet6 import (  # noqa: E402
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6NIQueryName,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPerror6,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    RouterAlert,
    fragment6,
)
from scapy.layers.ipsec import AH  # noqa: E402
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether  # noqa: E402
from scapy.packet import Packet  # noqa: E402

from datastore.base.errors import NearstateError  # noqa: E402
from nfs.dataplane import declaration, headers  # noqa: E402
from nfs.dataplane.headers import INSIDE, OUTSIDE  # noqa: E402
from nfs.dataplane.keys import make_key  # noqa: E402
from nfs.dataplane.rewrite import write_back  # noqa: E402
from nfs.dataplane.settings import remember  # noqa: E402

CLIENT, SERVER = "10.0.1.7", "10.128.0.1"
CLIENT_6, SERVER_6 = "fd00::a00:107", "fd00::a80:1"
CLIENT_PORT, SERVER_PORT = 40002, 80
ICMP_ERRORS = (3, 4, 5, 11, 12)


def ethernet() -> Any:
    return Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")


def outward(**ip: Any) -> Any:
    """Return Ethernet and IP headers of a packet from the client to the server."""
    return ethernet() / IP(src=CLIENT, dst=SERVER, **ip)


def inward(**ip: Any) -> Any:
    """Return Ethernet and IP headers of a packet from the server to the client."""
    return ethernet() / IP(src=SERVER, dst=CLIENT, **ip)


def tcp(flags: str, inside: bool = True, payload: bytes = b"", client_port: int = CLIENT_PORT) -> bytes:
    """Return a TCP segment of the connection CLIENT -> SERVER, from either side."""
    ports = (client_port, SERVER_PORT) if inside else (SERVER_PORT, client_port)
    return bytes((outward() if inside else inward()) / TCP(sport=ports[0], dport=ports[1], flags=flags) / payload)


def udp(inside: bool = True, payload: bytes = b"question", client_port: int = CLIENT_PORT, server_port: int = 53) -> bytes:
    ports = (client_port, server_port) if inside else (server_port, client_port)
    return bytes((outward() if inside else inward()) / UDP(sport=ports[0], dport=ports[1]) / payload)


def echo(inside: bool = True, identifier: int = 77) -> bytes:
    kind = "echo-request" if inside else "echo-reply"
    return bytes((outward() if inside else inward()) / ICMP(type=kind, id=identifier, seq=3) / b"ping")


def icmp_error(about: bytes, inside: bool = False, kind: int = 3, code: int = 4, router: str | None = None) -> bytes:
    """Return an ICMP error, from the other side than `about` went, that quotes 28 bytes of the packet `about`."""
    quoted = Ether(about)[IP]
    source = router or (CLIENT if inside else SERVER)
    header = ethernet() / IP(src=source, dst=quoted.src)
    return bytes(header / ICMP(type=kind, code=code) / bytes(quoted)[: quoted.ihl * 4 + 8])


def outward6(**ip: Any) -> Any:
    """Return Ethernet and IPv6 headers of a packet from the client to the server."""
    return ethernet() / IPv6(src=CLIENT_6, dst=SERVER_6, **ip)


def inward6(**ip: Any) -> Any:
    """Return Ethernet and IPv6 headers of a packet from the server to the client."""
    return ethernet() / IPv6(src=SERVER_6, dst=CLIENT_6, **ip)


def tcp6(flags: str, inside: bool = True, payload: bytes = b"", client_port: int = CLIENT_PORT) -> bytes:
    """`tcp` by IPv6."""
    ports = (client_port, SERVER_PORT) if inside else (SERVER_PORT, client_port)
    return bytes((outward6() if inside else inward6()) / TCP(sport=ports[0], dport=ports[1], flags=flags) / payload)


def udp6(inside: bool = True, payload: bytes = b"question", client_port: int = CLIENT_PORT, server_port: int = 53) -> bytes:
    ports = (client_port, server_port) if inside else (server_port, client_port)
    return bytes((outward6() if inside else inward6()) / UDP(sport=ports[0], dport=ports[1]) / payload)


def echo6(inside: bool = True, identifier: int = 77) -> bytes:
    return bytes(outward6() / ICMPv6EchoRequest(id=identifier) if inside else inward6() / ICMPv6EchoReply(id=identifier))


def icmp6_error(about: bytes, error: Any = None, router: str | None = None) -> bytes:
    """Return an ICMPv6 error (default: packet too big), from the other side than `about` went, that quotes it whole."""
    quoted = Ether(about)[IPv6]
    return bytes(ethernet() / IPv6(src=router or quoted.dst, dst=quoted.src) / (error or ICMPv6PacketTooBig()) / quoted)


def fragments6(upper: Any, extension: Any = None, size: int = 1280) -> list[bytes]:
    """Return the fragments of a packet from the client to the server with this transport header and payload."""
    header = IPv6ExtHdrFragment(id=0x12345678)
    whole = IPv6(src=CLIENT_6, dst=SERVER_6) / header / (extension / upper if extension is not None else upper)
    return [bytes(ethernet() / part) for part in fragment6(whole, size)]


def well_formed_ipv6() -> dict[str, bytes]:
    """Return one frame of every kind of IPv6 that the parser knows, by name."""
    hop, routing, options = (
        IPv6ExtHdrHopByHop(options=[RouterAlert()]),
        IPv6ExtHdrRouting(addresses=["2001:db8::9"]),
        IPv6ExtHdrDestOpt,
    )
    syn = TCP(sport=CLIENT_PORT, dport=443, flags="S", seq=2**32 - 1, options=[("MSS", 1440), ("WScale", 9)])
    parts = fragments6(UDP(sport=CLIENT_PORT, dport=4789) / bytes(3000))
    hidden = fragments6(UDP(sport=CLIENT_PORT, dport=4789) / bytes(3000), options())
    quoted = IPv6(src=CLIENT_6, dst=SERVER_6) / options() / UDP(sport=CLIENT_PORT, dport=53) / b"question"
    kinds: dict[str, bytes | Packet] = {
        "tcp": outward6(hlim=3, tc=8, fl=77) / syn, "udp": outward6() / UDP(sport=53, dport=5353) / b"answer",
        "udp padded": udp6(payload=b"") + bytes(6), "echo": echo6(), "echo reply": echo6(inside=False),
        "other addresses": ethernet() / IPv6(src="2001:db8:1:2:3:4:5:6", dst="ff0e:8:7:6:5:4:3:2") / UDP(sport=1, dport=2),
        "vlans": ethernet() / Dot1AD(vlan=5) / Dot1Q(vlan=6) / IPv6(src=CLIENT_6, dst=SERVER_6) / TCP(sport=5, dport=6),
        "extensions": outward6() / hop / options() / routing / options() / TCP(sport=8, dport=9, flags="S") / b"x",
        "authenticated": outward6() / AH(nh=17, payloadlen=4, spi=5, icv=bytes(12)) / UDP(sport=8, dport=9) / b"xy",
        "atomic fragment": outward6() / IPv6ExtHdrFragment(id=9) / TCP(sport=8, dport=9, flags="S"),
        "first fragment": parts[0], "later fragment": parts[1], "last fragment": parts[-1],
        "first fragment with options": hidden[0], "last fragment with options": hidden[-1],
        "esp": outward6(nh=50) / bytes(24), "mobility": outward6(nh=135) / bytes(16), "no next header": outward6(nh=59),
        "icmp of the other version": outward6(nh=1) / ICMP(), "node information": outward6() / ICMPv6NIQueryName(data="x"),
        "too big": icmp6_error(tcp6("A")), "unreachable": icmp6_error(udp6(), ICMPv6DestUnreach(code=4)),
        "time exceeded": icmp6_error(echo6(), ICMPv6TimeExceeded(), "2001:db8::1"),
        "parameter problem": inward6() / ICMPv6ParamProblem() / quoted,
        "error quoting a first fragment": icmp6_error(parts[0][: 14 + 40 + 8 + 64]),
        "error quoting a later fragment": icmp6_error(parts[1][: 14 + 40 + 8 + 64]),
        "error quoting esp": icmp6_error(bytes(outward6(nh=50) / bytes(24))),
        "solicitation": ethernet() / IPv6() / ICMPv6ND_NS(tgt="fe80::1"), "advertisement": outward6() / ICMPv6ND_NA(tgt=CLIENT_6),
        "router": outward6() / ICMPv6ND_RA(), "redirect": outward6() / ICMPv6ND_Redirect(),
        "listener": outward6(hlim=1) / hop / ICMPv6MLReport2(),
        "solicitation from afar": ethernet() / IPv6(hlim=64) / ICMPv6ND_NS(tgt="fe80::1"),
    }  # fmt: skip
    return {f"ipv6 {name}": bytes(kind) for name, kind in kinds.items()}


def well_formed() -> dict[str, bytes]:
    """Return one frame of every kind the parser knows, by name."""
    options = [IPOption_Router_Alert(), IPOption_Timestamp()]
    syn = outward(ttl=3, tos=8) / TCP(sport=CLIENT_PORT, dport=443, flags="S", seq=2**32 - 1, window=65535,
                                      options=[("MSS", 1460), ("SAckOK", b""), ("WScale", 7)])  # fmt: skip
    big = outward(id=9) / UDP(sport=CLIENT_PORT, dport=4789) / (bytes(range(256)) * 8)
    fragments = [bytes(ethernet() / part) for part in fragment(big[IP], fragsize=1480)]
    tcp_fragments = fragment((outward(id=10) / TCP(sport=CLIENT_PORT, dport=80, flags="PA") / bytes(3000))[IP], fragsize=1480)
    kinds: dict[str, bytes | Packet] = {
        "tcp syn": syn,
        "tcp data": outward() / TCP(sport=1, dport=65535, flags="PA", seq=17, ack=99, window=1) / b"payload",
        "tcp fin": tcp("FA", inside=False), "tcp rst": tcp("R"), "tcp all flags": tcp("FSRPAU"),
        "tcp padded": tcp("A") + bytes(6),
        "udp": outward() / UDP(sport=53, dport=5353) / b"answer", "udp empty": udp(payload=b""), "udp padded": udp() + bytes(10),
        "udp full": udp(payload=bytes(1472)),
        "echo": echo(), "echo reply": echo(inside=False),
        "icmp timestamp": outward() / ICMP(type=13, id=5),
        "error quoting tcp": icmp_error(tcp("A")), "error quoting udp": icmp_error(udp(), kind=11, code=0),
        "error quoting echo": icmp_error(echo(), kind=3, code=1, router="10.77.0.1"),
        "error quoting options": icmp_error(bytes(outward(options=options) / UDP(sport=7, dport=9) / bytes(20)), kind=12),
        "error quoting gre": icmp_error(bytes(outward(proto=47) / bytes(40))),
        "error from inside": icmp_error(udp(inside=False), inside=True),
        "vlan": ethernet() / Dot1Q(vlan=100) / IP(src=CLIENT, dst=SERVER) / TCP(sport=5, dport=6, flags="A"),
        "two vlans": ethernet() / Dot1AD(vlan=5) / Dot1Q(vlan=6) / IP(src=CLIENT, dst=SERVER) / UDP(sport=5, dport=6) / b"12",
        "ip options": outward(options=options) / TCP(sport=8, dport=9, flags="S") / b"x",
        "udp first fragment": fragments[0], "udp later fragment": fragments[1],
        "tcp first fragment": ethernet() / tcp_fragments[0], "tcp last fragment": ethernet() / tcp_fragments[-1],
        "sctp": outward(proto=132) / bytes(16), "gre": outward(proto=47) / bytes(24), "no payload": outward(proto=59),
        "arp": ethernet() / ARP(pdst=SERVER), "lldp": Ether(type=0x88CC) / bytes(46),
    }  # fmt: skip
    return {name: bytes(kind) for name, kind in kinds.items()} | well_formed_ipv6()


def parsed(frame: bytes, arrived_from: int = INSIDE, before: bytes = b"") -> np.ndarray:
    """Return PACKET[1] of a frame that ends where its memory ends, so that bounds checks see any read beyond it."""
    memory = np.frombuffer(before + frame, np.uint8).copy()
    packets = headers.make_packets(1)
    headers.parse(memory, len(before), len(frame), arrived_from, packets, 0)
    return packets


def _transport(packet: Packet, fields: dict[str, int], names: tuple[Any, Any, Any]) -> None:
    tcp_layer, udp_layer, icmp_layer = names
    for layer in (tcp_layer, udp_layer):
        if layer in packet:
            fields |= {"source_port": packet[layer].sport, "destination_port": packet[layer].dport, "has_ports": 1}
    if icmp_layer and icmp_layer in packet:
        identifier = packet[icmp_layer].fields.get("id", 0) or 0
        fields |= {"source_port": identifier, "destination_port": identifier}


def expected(frame: bytes, arrived_from: int = INSIDE) -> dict[str, int]:
    """Return what scapy says of a frame of `well_formed`, in the parser's field names."""
    packet = Ether(frame)
    fields = dict.fromkeys(headers.PACKET.names, 0) | {"length": len(frame), "arrived_from": arrived_from}
    if IPv6 in packet:
        return fields | _expected_ipv6(packet[IPv6], len(frame) - len(packet[IPv6].original))
    if IP not in packet:
        return fields | {"status": headers.NOT_IP}
    ip = packet[IP]
    network = len(frame) - len(ip.original)
    fields |= {"ip_version": 4, "network_offset": network, "transport_offset": network + ip.ihl * 4, "time_to_live": ip.ttl,
               "protocol": ip.proto, "source_address": _address(ip.src), "destination_address": _address(ip.dst),
               "ip_bytes": ip.len}  # fmt: skip
    if ip.frag:
        return fields | {"status": headers.FRAGMENT, "fragment_offset": ip.frag * 8}
    size = ip.len - ip.ihl * 4
    fields["payload_bytes"] = size
    if TCP in packet:
        segment = packet[TCP]
        fields |= {"tcp_flags": int(segment.flags) & 0x3F, "tcp_sequence": segment.seq, "tcp_acknowledgment": segment.ack,
                   "tcp_window": segment.window,
                   "tcp_window_scale": _window_scale(segment), "payload_bytes": size - segment.dataofs * 4}  # fmt: skip
    elif UDP in packet:
        fields["payload_bytes"] = min(packet[UDP].len, size) - 8
    elif ICMP in packet:
        fields |= {"icmp_type": packet[ICMP].type, "icmp_code": packet[ICMP].code, "payload_bytes": size - 8}
    if ICMP in packet and packet[ICMP].type in ICMP_ERRORS:
        quoted = packet[IPerror]
        fields |= {"icmp_error": 1, "protocol": quoted.proto, "source_address": _address(quoted.dst),
                   "destination_address": _address(quoted.src)}  # fmt: skip
        _transport(quoted, fields, (TCPerror, UDPerror, ICMPerror))
        fields["source_port"], fields["destination_port"] = fields["destination_port"], fields["source_port"]
    else:
        _transport(packet, fields, (TCP, UDP, ICMP))
    return fields


EXTENSIONS = (IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt, IPv6ExtHdrRouting, IPv6ExtHdrFragment, AH)
ERRORS_6 = (1, 2, 3, 4)
LINK_CONTROL_6 = (*range(133, 138), 143)


def _behind_extensions(ip: Any) -> tuple[Any, int, Any]:
    """Return what follows the extension headers, its protocol, and the fragment header of a fragment or None."""
    layer, protocol, found = ip.payload, ip.nh, None
    while isinstance(layer, EXTENSIONS):
        protocol = layer.nh
        if isinstance(layer, IPv6ExtHdrFragment) and (layer.offset or layer.m):
            found = layer
            if layer.offset:
                return layer.payload, protocol, found
        authenticated, layer = isinstance(layer, AH), layer.payload
        if authenticated and protocol == 17:  # scapy looks no further
            layer = UDP(layer.original)
    return layer, protocol, found


def _addresses6(source: str, destination: str) -> dict[str, int]:
    fields = {}
    for end, address in (("source", int(IPv6Address(source))), ("destination", int(IPv6Address(destination)))):
        fields[f"{end}_high"], fields[f"{end}_middle"] = address >> 64, address >> 32 & 0xFFFFFFFF
        fields[f"{end}_address"] = address & 0xFFFFFFFF
    return fields


def _expected_ipv6(ip: Any, network: int) -> dict[str, int]:
    layer, protocol, header = _behind_extensions(ip)
    end = network + 40 + ip.plen
    fields = {"ip_version": 6, "ip_bytes": 40 + ip.plen, "network_offset": network, "time_to_live": ip.hlim, "protocol": protocol,
              "transport_offset": end - len(layer.original), **_addresses6(ip.src, ip.dst)}  # fmt: skip
    size = len(layer.original)
    if header is not None:
        fields |= {"fragment_offset": header.offset * 8, "fragment_header": end - len(header.original)}
        if header.offset:
            return fields | {"status": headers.FRAGMENT}
    if TCP in layer:
        segment = layer[TCP]
        fields |= {"tcp_flags": int(segment.flags) & 0x3F, "tcp_sequence": segment.seq, "tcp_acknowledgment": segment.ack,
                   "tcp_window": segment.window, "tcp_window_scale": _window_scale(segment)}  # fmt: skip
        size -= segment.dataofs * 4
    elif UDP in layer:
        size = min(layer[UDP].len, size) - 8
    elif protocol == 58:
        size -= 8
        fields |= {"icmp_type": layer.type, "icmp_code": layer.original[1]}
        fields |= _expected_icmpv6(layer, ip)
    fields["payload_bytes"] = size
    if protocol != 58:
        _transport(layer, fields, (TCP, UDP, None))
    return fields


def _expected_icmpv6(layer: Any, ip: Any) -> dict[str, int]:
    """Return what differs from a packet without ports."""
    if layer.type in ERRORS_6:
        quoted = layer[IPerror6]
        inner, protocol, header = _behind_extensions(quoted)
        if header is not None and header.offset:
            return {"status": headers.FRAGMENT}
        fields = {"icmp_error": 1, "protocol": protocol, **_addresses6(quoted.dst, quoted.src)}
        _transport(inner, fields, (TCPerror, UDPerror, None))
        ports = fields.get("source_port", 0), fields.get("destination_port", 0)
        if isinstance(inner, (ICMPv6EchoRequest, ICMPv6EchoReply)):
            ports = inner.id, inner.id
        return fields | {"source_port": ports[1], "destination_port": ports[0]}
    if layer.type in LINK_CONTROL_6 and ip.hlim == (1 if layer.type == 143 else 255):
        return {"status": headers.NOT_IP}
    identifier = layer.id if layer.type in (128, 129) else 0
    return {"source_port": identifier, "destination_port": identifier}


def _window_scale(segment: Any) -> int:
    shifts = [value for name, value in segment.options if name == "WScale"]
    return 1 + min(shifts[0], 14) if shifts and segment.flags & 2 else 0


def _address(dotted: str) -> int:
    return int.from_bytes(bytes(map(int, dotted.split("."))), "big")


def checksums_hold(frame: bytes) -> bool:
    """Tell whether every checksum of a frame, also of a packet it quotes, is what scapy computes; cut quotations aside."""
    packet = Ether(frame)
    again = Ether(frame)
    for layer in (IP, TCP, UDP, ICMP):
        if layer in again and not (layer is UDP and packet[UDP].chksum == 0):
            del again[layer].chksum
    return bytes(again) == frame


@dataclass
class Instance:
    """A network function with records of its own, fed with frames: the engine's contract without its loop.

    A record is forgotten `idle_timeout_s` after the last packet that set it; `now_s` is the clock. sent: the frame as it left,
    after the last packet that was not dropped. cause: why the last one was dropped, 0 for the function's verdict.
    """

    function: declaration.NetworkFunction
    env: np.ndarray
    now_s: float = 1000.0
    records: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    expires_s: dict[tuple[int, int], float] = field(default_factory=dict)
    counters: dict[tuple[int, int, int], int] = field(default_factory=dict)
    idle_timeout_s: int = 0
    cause: int = 0
    sent: bytes = b""

    @classmethod
    def of(cls, name: str, **settings: Any) -> Instance:
        function = declaration.load(name)
        return cls(function, function.make_env(settings))

    def __call__(self, frame: bytes, arrived_from: int = INSIDE) -> int:
        """Return the verdict on a frame; one that is turned comes back from the other side once."""
        self.sent, self.cause = frame, 0
        verdict = self._pass(arrived_from)
        if verdict == declaration.TURN:
            verdict = self._pass(1 - arrived_from)
            verdict = declaration.DROP if verdict == declaration.TURN else verdict
        return verdict

    def _pass(self, arrived_from: int) -> int:
        packets = parsed(self.sent, arrived_from)
        status = int(packets[0]["status"])
        if status:
            self.cause = status
            return self.function.passes_mask >> status & 1
        make_key(self.function.key, self.function.kind, packets, 0)
        key = (int(packets[0]["key_high"]), int(packets[0]["key_low"]))
        for attempt in range(1 << 20):
            packet = packets.copy()
            state = np.frombuffer(bytearray(self._read(key).tobytes()), self.function.state)  # its padding, too
            for name in ("idle_timeout_s", "cause", "claim_timeout_s", "add_count"):
                self.env[name] = 0
            self.env["now_ns"], self.env["attempt"] = int(self.now_s * 1e9), attempt
            verdict = self.function.process(packet, 0, state, self.env)
            if self._claim():
                break
        self._commit(key, state, verdict)
        if verdict != declaration.DROP and self.function.rewrites:
            memory = np.frombuffer(self.sent, np.uint8).copy()
            write_back(memory, packet, 0)
            self.sent = memory.tobytes()
        return verdict

    def _read(self, key: tuple[int, int]) -> np.ndarray:
        if self.expires_s.get(key, self.now_s) < self.now_s:
            del self.records[key], self.expires_s[key]
        return self.records.get(key, np.zeros(1, self.function.state))

    def _claim(self) -> bool:
        """Commit what the function claimed; False when another has it."""
        env = self.env[0]
        if env["claim_timeout_s"] == 0:
            return True
        key = (int(env["claim_high"]), int(env["claim_low"]))
        there = self._read(key).tobytes()
        wanted = env["claim_words"].tobytes()[: self.function.state.itemsize]
        if key in self.records and there[:8] != wanted[:8]:
            return False
        self.records[key] = np.frombuffer(wanted, self.function.state).copy()
        self.expires_s[key] = self.now_s + int(env["claim_timeout_s"])
        return True

    def _commit(self, key: tuple[int, int], state: np.ndarray, verdict: int) -> None:
        env = self.env[0]
        self.idle_timeout_s = int(env["idle_timeout_s"])
        self.cause = int(env["cause"]) if verdict == declaration.DROP else 0
        if not self.function.stateless and (key in self.records or state.tobytes().strip(b"\0")):
            self.records[key] = state
            if self.idle_timeout_s:
                self.expires_s[key] = self.now_s + self.idle_timeout_s
        for n in range(int(env["add_count"])):
            place = (int(env["add_high"][n]), int(env["add_low"][n]), int(env["add_word"][n]))
            self.counters[place] = (self.counters.get(place, 0) + int(env["add_delta"][n])) % 2**64

    def change_settings(self, **settings: Any) -> None:
        """Give the function other settings; those not given are the defaults."""
        env = self.function.make_env(settings)
        remember(env, self.env)
        self.env = env

    def housekeep(self) -> None:
        """Call the function's housekeeping with the counters as they are."""
        assert self.function.housekeep

        def read(key_high: int, key_low: int) -> np.ndarray:
            return np.array([self.counters.get((key_high, key_low, word), 0) for word in range(8)], np.uint64)

        self.function.housekeep(self.env, read, self.now_s)

    def outside(self, frame: bytes) -> int:
        """Return the verdict on a frame that arrives from outside."""
        return self(frame, OUTSIDE)

    def record(self) -> Any:
        """Return the only record there is."""
        if len(self.records) != 1:
            raise NearstateError(f"{len(self.records)} records where the test expects one")
        return next(iter(self.records.values()))[0]
