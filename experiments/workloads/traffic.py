"""What traffic looks like: which flows, which sizes, when; checked completely, then frozen, then turned into tables.

The generator walks three tables made here from the seed, so the same seed sends the same packets at the same intended times.
"""

from __future__ import annotations

import ipaddress
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from datastore.base.errors import NearstateError, unknown

if TYPE_CHECKING:
    from typing_extensions import Self

CLIENT_NETWORK = int(ipaddress.IPv4Address("10.0.1.0"))
"""Emulated clients are 10.0.1.0 to 10.0.1.255, all behind the one client host."""
PORTS_PER_SERVER_PORT = 30_720
"""Flow n has client port 1024 + 2 (n mod 30,720): even, as Linux hands them out, so all 256 partitions are used alike."""
CHOICES = 1 << 17
IMIX = ((64, 7), (594, 4), (1518, 1))
"""Simple IMIX: frame bytes (with frame check sequence) and their share (RFC 6985, section 3 allows naming the mix so)."""
ARRIVALS = ("constant", "poisson")
FLOW_CHOICES = ("uniform", "zipf")
SIDES = ("both", "client")
PORTS = ("keep", "spread")


class Parameters:
    """What is declared by name and checked completely."""

    def _check(self, name: str, kind: type | tuple[type, ...], right: Callable[[Any], bool], valid: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind) or not right(value):
            raise NearstateError(f"traffic {name}={value!r}: {valid} is possible")

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Return the workload with these values. Raises NearstateError for a name that is no parameter."""
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for name in values:
            if name not in names:
                raise unknown("traffic parameter", name, names)
        return cls(**values)


@dataclass(frozen=True)
class Traffic(Parameters):
    """A workload.

    frame_bytes: 64 to 1518 with the frame check sequence, or 0 for IMIX. flows: concurrent flows. flow_choice: "uniform" or
    "zipf" (exponent `zipf_exponent`). new_flow_share: share of packets that start a new flow in place of an old one.
    client_ports: how many ports the clients use, 256 to 30,720 in multiples of 256 (each partition has equally many); with few,
    several clients use the same one, and a NAT has to give some of them another.
    """

    frame_bytes: int = 64
    flows: int = 1000
    flow_choice: str = "uniform"
    zipf_exponent: float = 1.1
    arrivals: str = "constant"
    new_flow_share: float = 0.0
    client_ports: int = PORTS_PER_SERVER_PORT
    seed: int = 1

    def __post_init__(self) -> None:
        if self.arrivals not in ARRIVALS:
            raise unknown("arrival process", self.arrivals, ARRIVALS)
        if self.flow_choice not in FLOW_CHOICES:
            raise unknown("flow choice", self.flow_choice, FLOW_CHOICES)
        self._check("frame_bytes", int, lambda size: size == 0 or 64 <= size <= 1518, "64 to 1518, or 0 for IMIX,")
        self._check("flows", int, lambda flows: 1 <= flows <= 10_000_000, "1 to 10,000,000")
        self._check("new_flow_share", (int, float), lambda share: 0.0 <= share <= 1.0, "0 to 1")
        self._check("zipf_exponent", (int, float), lambda exponent: 0.0 < exponent <= 4.0, "above 0, at most 4,")
        self._check("client_ports", int, lambda ports: 256 <= ports <= PORTS_PER_SERVER_PORT and ports % 256 == 0,
                    "256 to 30,720 in multiples of 256")  # fmt: skip
        self._check("seed", int, lambda seed: seed >= 0, "a whole number from 0")


@dataclass(frozen=True)
class Replay(Parameters):
    """A workload from a capture file.

    pcap: the file (pcap or pcapng, also gzipped), from the repository's root. speed: 1 keeps the file's timing, 2 halves all
    gaps, 0 is as fast as possible. sides: "both", or "client": only the inside party's packets. inside: networks (CIDR) of
    the inside party; without, see `parties.parties`. ports: "keep", or "spread": the inside party's ports over all partitions.
    patience_ms: how long a packet waits for the one it answers to arrive: at speed 0 each, else the first of a flow that is
    translated. longest_s: a replay that would take longer is refused, and one at speed 0 is ended.
    """

    pcap: str
    speed: float = 1.0
    sides: str = "both"
    inside: tuple[str, ...] = ()
    ports: str = "keep"
    patience_ms: float = 20.0
    longest_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.sides not in SIDES:
            raise unknown("sides of a replay", self.sides, SIDES)
        if self.ports not in PORTS:
            raise unknown("ports of a replay", self.ports, PORTS)
        self._check("pcap", str, lambda name: name != "", "the name of a capture file")
        self._check("speed", (int, float), lambda speed: speed == 0 or 0.001 <= speed <= 1000, "0.001 to 1000, or 0,")
        self._check("patience_ms", (int, float), lambda wait: 0 <= wait <= 10_000, "0 to 10,000")
        self._check("longest_s", (int, float), lambda longest: 0 < longest <= 1e6, "above 0, at most 1,000,000,")
        self._check("inside", (tuple, list), lambda found: all(map(_is_network, found)), "a tuple of networks like 192.0.2.0/24")
        object.__setattr__(self, "inside", tuple(self.inside))  # JSON makes a list of it


def _is_network(text: Any) -> bool:
    try:
        ipaddress.IPv4Network(text)
    except ValueError:
        return False
    return True


class Tables(NamedTuple):
    """What the generator walks, CHOICES elements each: flow slots int64, frame lengths int64 (without frame check
    sequence), gaps float64 in units of the mean gap, new uint8 (1: start a new flow)."""

    slots: np.ndarray
    lengths: np.ndarray
    gaps: np.ndarray
    new: np.ndarray


def make_tables(traffic: Traffic) -> Tables:
    """Return the tables of a workload, determined by its seed."""
    random = np.random.default_rng(traffic.seed)
    if traffic.flow_choice == "zipf":
        weights = np.arange(1, traffic.flows + 1, dtype=np.float64) ** -traffic.zipf_exponent
        slots = random.choice(traffic.flows, CHOICES, p=weights / weights.sum())
    elif traffic.flows <= CHOICES:  # every flow equally often, up to the remainder
        slots = random.permutation(np.resize(np.arange(traffic.flows), CHOICES))
    else:
        slots = random.integers(0, traffic.flows, CHOICES)
    if traffic.frame_bytes:
        lengths = np.full(CHOICES, traffic.frame_bytes - 4)
    else:
        sizes, shares = zip(*IMIX, strict=True)
        lengths = random.choice(np.array(sizes) - 4, CHOICES, p=np.array(shares) / sum(shares))
    gaps = random.exponential(1.0, CHOICES) if traffic.arrivals == "poisson" else np.ones(CHOICES)
    new = (random.random(CHOICES) < traffic.new_flow_share).astype(np.uint8)
    return Tables(slots.astype(np.int64), lengths.astype(np.int64), gaps / gaps.mean(), new)


def scheduled_s(tables: Tables, first: int, packets: int, offered_kpps: float) -> float:
    """Return how long `packets` packets take as drawn, in s, the gap behind the last one included; packet number `first` since
    the generator's start is the first of them.

    The draws of a step are a sample, so its mean gap is not 1 / `offered_kpps`: of 1,000 gaps of a Poisson process it is off by
    more than 3 % in one step of three.
    """
    rounds, rest = divmod(packets, CHOICES)
    gaps = rounds * tables.gaps.sum() + np.roll(tables.gaps, -(first % CHOICES))[:rest].sum()
    return float(gaps / offered_kpps / 1e3)


def template(source_mac: str, next_hop_mac: str, server: str) -> np.ndarray:
    """Return the first 42 bytes of every frame, uint8: Ethernet, IPv4 and UDP with the varying fields zero.

    The UDP checksum is 0, which RFC 768 reserves for "none": stamps are written without touching it.
    """
    ethernet = bytes.fromhex(next_hop_mac.replace(":", "") + source_mac.replace(":", "")) + b"\x08\x00"
    address = ipaddress.IPv4Address(server).packed
    ip = struct.pack(">BBHHHBBHI4s", 0x45, 0, 0, 0, 0x4000, 64, 17, 0, 0, address)
    return np.frombuffer(ethernet + ip + bytes(8), dtype=np.uint8).copy()


def flow_tuple(flow: int, client_ports: int = PORTS_PER_SERVER_PORT) -> tuple[str, int, int]:
    """Return client address, client port and server port of flow number `flow`; no two flows share all three."""
    address = CLIENT_NETWORK + (flow * 2_654_435_761 >> 24 & 0xFF)
    return (str(ipaddress.IPv4Address(address)), 1024 + 2 * (flow % client_ports),
            2000 + flow // client_ports % 60_000)  # fmt: skip


def packets_in(offered_kpps: float, seconds: float) -> int:
    """Return how many packets a step of that load and length has."""
    return max(1, math.ceil(offered_kpps * 1000 * seconds))
