"""Packets for tests, built and taken apart by scapy: an implementation of the headers that is not ours."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
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
from scapy.layers.inet6 import ICMPv6ND_NS, IPv6  # noqa: E402
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether  # noqa: E402
from scapy.packet import Packet  # noqa: E402

from datastore.native.errors import NearstateError  # noqa: E402
from nfs.dataplane import declaration, headers  # noqa: E402
from nfs.dataplane.headers import INSIDE, OUTSIDE  # noqa: E402
from nfs.dataplane.keys import make_key  # noqa: E402
from nfs.dataplane.rewrite import write_back  # noqa: E402
from nfs.dataplane.settings import remember  # noqa: E402

CLIENT, SERVER = "10.0.1.7", "10.128.0.1"
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
        "ipv6": ethernet() / IPv6(src="2001:db8::1", dst="2001:db8::2") / TCP(sport=1, dport=2),
        "ipv6 neighbour": ethernet() / IPv6() / ICMPv6ND_NS(tgt="fe80::1"),
        "arp": ethernet() / ARP(pdst=SERVER), "lldp": Ether(type=0x88CC) / bytes(46),
    }  # fmt: skip
    return {name: bytes(kind) for name, kind in kinds.items()}


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
    if icmp_layer in packet:
        identifier = packet[icmp_layer].fields.get("id", 0) or 0
        fields |= {"source_port": identifier, "destination_port": identifier}


def expected(frame: bytes, arrived_from: int = INSIDE) -> dict[str, int]:
    """Return what scapy says of a frame of `well_formed`, in the parser's field names."""
    packet = Ether(frame)
    fields = dict.fromkeys(headers.PACKET.names, 0) | {"length": len(frame), "arrived_from": arrived_from}
    if IP not in packet:
        return fields | {"status": headers.NOT_IP}
    ip = packet[IP]
    network = len(frame) - len(ip.original)
    fields |= {"network_offset": network, "transport_offset": network + ip.ihl * 4, "time_to_live": ip.ttl, "protocol": ip.proto,
               "source_address": _address(ip.src), "destination_address": _address(ip.dst)}  # fmt: skip
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
