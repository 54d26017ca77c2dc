"""Does the emulated network delay and lose what its specification says, before a trial is believed?

Probes are UDP frames sent and received on packet sockets at both ends of a path, by one process with one clock. They go where
packets go: client to the NF's inside by the steering rules, storage to storage by address. The addresses in them belong to
nobody, so no stack answers. They go in short trains, one frame every 20 us, because a single frame measures mostly how long an
idle virtual CPU takes to wake (probes one at a time gave minima from 56 to 200 us on the same path, trains differ by a tenth of
that); the round trip is the smallest one-way latency there plus the smallest one back.

The arithmetic. A path's round trip is twice the sum of its links' delays, plus what the emulator itself costs: two passes of
the switch and the wake-ups. That base is no propagation, so

    excess = round trip - base - 2 * sum of delays,        |excess| <= max(5 % of the specification, 50 us)

Base: where links have a delay, the round trip between the same switch ports before the delay is put in; without delays, the
cheapest of the network's own paths, so that what is tested is that no path is slower than its like. It is recorded, and a base
above BASE_LIMIT_US makes the trial invalid: the machine is too busy to emulate anything.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from topologies.emulation import system

if TYPE_CHECKING:
    from topologies.emulation.network import Network

BUDGET_S, BASE_BUDGET_S = 0.35, 0.25
SPACING_NS = 20_000
LONG_TRAIN, SHORT_TRAIN = 12, 4
"""Frames of a train. Where frames are held on their way, trains are short: they would compete with each other for processors."""
TURNS, LEAST_TURNS = 24, 2
MOST_STORAGE_PATHS = 12
BASE_LIMIT_US = 1000.0
MOST_TRIM_US = 100.0
"""A wire that sleeps wakes 5 us late on a quiet machine, 90 us where its processors are lent out."""
NOBODY_INSIDE, NOBODY_OUTSIDE = "10.127.255.254", "10.255.255.254"
ETH_P_IP = 0x0800
MAGIC = b"nearstate probe "
TAG_BYTES = 6


@dataclass(frozen=True)
class End:
    """One end of a path: the process that owns the namespace, the interface there, and its MAC address."""

    host: str
    pid: int
    interface: str
    mac: str

    def __str__(self) -> str:
        return f"{self.host}.{self.interface}"


@dataclass(frozen=True)
class Path:
    """Where probes go. spec_us: twice the sum of the links' delays. client_port: names the partition, so the instance."""

    a: End
    b: End
    spec_us: float
    client_port: int = 0
    crossings: int = 0
    """Delayed cables crossed on a round trip."""


@dataclass
class Measurement:
    """What one path did: round trips in microseconds, frames sent and lost."""

    path: str
    spec_us: float
    rtt_us: float = float("nan")
    rtt_p50_us: float = float("nan")
    excess_us: float = float("nan")
    sent: int = 0
    lost: int = 0


@dataclass
class Calibration:
    """The verdict on a network: valid, and if not, why. All times are microseconds."""

    base_us: float
    trim_us: float = 0.0
    paths: list[Measurement] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def valid(self) -> bool:
        return not self.reasons

    @property
    def rtt_us(self) -> float:
        """Return the largest of the paths' round trips."""
        return max((path.rtt_us for path in self.paths), default=0.0)

    @property
    def loss(self) -> float:
        """Return the share of probes lost on all paths."""
        return sum(path.lost for path in self.paths) / max(1, sum(path.sent for path in self.paths))

    def to_json(self) -> dict[str, Any]:
        """Return the calibration as JSON data, `valid` and `reasons` first."""
        paths = [{key: round(v, 1) if isinstance(v, float) else v for key, v in asdict(path).items()} for path in self.paths]
        return {
            "valid": self.valid, "reasons": self.reasons, "base_us": round(self.base_us, 1),
            "trim_us": round(self.trim_us, 1), "rtt_us": round(self.rtt_us, 1), "loss": self.loss,
            "paths": paths, "seconds": round(self.seconds, 3),
        }  # fmt: skip


def calibrate(network: Network) -> Calibration:
    """Measure every kind of path of a running network whose packet loops have not attached yet; takes at most 0.7 s."""
    started = time.monotonic()
    paths = network_paths(network)
    measurements = measure(paths, BUDGET_S)
    base_us = network.base_us
    if base_us is None:
        base_us = min((measurement.rtt_us for measurement in measurements), default=0.0)
    result = Calibration(base_us, network.trim_us, measurements)
    for measurement in measurements:
        measurement.excess_us = measurement.rtt_us - base_us - measurement.spec_us
        result.reasons += judge(measurement, base_us)
    if base_us > BASE_LIMIT_US:
        result.reasons.append(f"a round trip costs {base_us:.0f} us before any delay: this machine is too busy to emulate")
    result.seconds = time.monotonic() - started
    return result


def base_us(network: Network) -> float:
    """Return what a round trip costs without the delays: call it while the middles of the cables are not joined yet.

    Through a switch: from middle to middle, on the same ports and rules. Without one: from a host to its cable's middle.
    """
    cables = network.cables()
    middles = {cables[number][:2]: names for number, names, _ in network.middles()}

    def middle(end: End, beside: End, side: int) -> End:
        """Return the interface in the middle of the cable of `beside`, in the place of `end`; a cable without delay has none."""
        names = middles.get((beside.host, beside.interface))
        return replace(end, pid=network.middle_pid(), interface=names[side]) if names else end

    paths = []
    for path in network_paths(network):
        a, b = path.a, path.b
        if network.switch is None:
            if (a.host, a.interface) not in middles:
                a, b = b, a
            b = middle(b, a, 0)
        else:
            a, b = middle(a, a, 1), middle(b, b, 1)
        paths.append(replace(path, a=a, b=b, spec_us=0.0))
    return min((measurement.rtt_us for measurement in measure(paths, BASE_BUDGET_S)), default=0.0)


def trim_us(network: Network, base_us: float) -> float:
    """Return what crossing a delay line costs beyond its hold, in microseconds: on the cheapest path, 0 to MOST_TRIM_US.

    The cheapest and bounded, so that a busy moment now does not make the delay too short for the whole trial.
    """
    paths = [path for path in network_paths(network) if path.crossings]
    costs = [
        (measurement.rtt_us - base_us - measurement.spec_us) / path.crossings
        for path, measurement in zip(paths, measure(paths, BASE_BUDGET_S), strict=True)
        if measurement.rtt_us == measurement.rtt_us
    ]
    return min(max(0.0, min(costs)), MOST_TRIM_US) if costs else 0.0


def judge(measurement: Measurement, base_us: float) -> list[str]:
    """Return the reasons, if any, for which a path is not what was asked for."""
    reasons = []
    if measurement.lost:
        reasons.append(f"{measurement.path}: {measurement.lost} of {measurement.sent} probes lost")
    tolerance_us = max(0.05 * measurement.spec_us, 50.0)
    faster = measurement.spec_us == 0 and measurement.excess_us < 0  # than the base, measured in a busy moment: nothing is added
    if not faster and not abs(measurement.excess_us) <= tolerance_us:  # also without any round trip: not a number
        reasons.append(
            f"{measurement.path}: round trip {measurement.rtt_us:.0f} us, of it {base_us:.0f} us the emulator's, "
            f"for {measurement.spec_us:.0f} us specified: off by more than {tolerance_us:.0f} us"
        )
    return reasons


def network_paths(network: Network) -> list[Path]:
    """Return the paths to probe: client and server to every NF host, and storage interfaces in pairs (at most 12)."""
    delays: dict[tuple[str, str], float] = {}
    for host, interface, other, other_interface, delay_us in network.cables():
        delays[host, interface] = delay_us
        if network.switch is None:
            delays[other, other_interface] = 0.0  # one cable, counted once
    paths = []
    steering = network.steering()
    for nf in (host for host in network.hosts.values() if host.role == "nf"):
        if nf.name in steering:
            port = steering.index(nf.name) << 1
            paths.append(_path(network, ("client", "net"), (nf.name, "inside"), delays, port))
            paths.append(_path(network, ("server", "net"), (nf.name, "outside"), delays, port))
    for a, b in _storage_pairs(network):
        paths.append(_path(network, (a, "storage"), (b, "storage"), delays))
    return paths


def _path(
    network: Network, a: tuple[str, str], b: tuple[str, str], delays: dict[tuple[str, str], float], client_port: int = 0
) -> Path:
    crossings = 2 * sum(delays[end] > 0 for end in (a, b))
    return Path(_end(network, *a), _end(network, *b), 2 * (delays[a] + delays[b]), client_port, crossings)


def _end(network: Network, host: str, interface: str) -> End:
    emulated = network.hosts[host]
    return End(host, emulated.pid, interface, emulated.interfaces[interface].mac)


def _storage_pairs(network: Network) -> list[tuple[str, str]]:
    stored = [host for host in network.hosts.values() if "storage" in host.interfaces]
    nfs = [host.name for host in stored if host.role == "nf"]
    others = [host.name for host in stored if host.role != "nf"]
    return ([(nf, other) for nf in nfs for other in others] + list(itertools.pairwise(nfs)))[:MOST_STORAGE_PATHS]


def measure(paths: Sequence[Path], budget_s: float) -> list[Measurement]:
    """Probe all paths in turns, a train each way a turn, until the budget or TURNS are used up (but LEAST_TURNS in any case).

    In turns, so that a moment's disturbance of the machine does not fall on one path alone.
    """
    deadline = time.monotonic() + budget_s
    results = [Measurement(f"{path.a} - {path.b}", path.spec_us) for path in paths]
    latencies_us: list[tuple[list[float], list[float]]] = [([], []) for _ in paths]
    with contextlib.ExitStack() as stack:
        sockets = [[stack.enter_context(_packet_socket(end)) for end in (path.a, path.b)] for path in paths]
        frames = [[_frame(path, forward) for forward in (True, False)] for path in paths]
        trains = itertools.count()
        for turn in range(TURNS):
            if turn >= LEAST_TURNS and time.monotonic() > deadline:
                break
            for at, (path, result) in enumerate(zip(paths, results, strict=True)):
                for way in (0, 1):
                    wait_s = 0.05 + 2e-6 * path.spec_us
                    frame_count = SHORT_TRAIN if path.spec_us else LONG_TRAIN
                    ends = sockets[at][way], sockets[at][1 - way]
                    arrived = _train(*ends, frames[at][way], next(trains), frame_count, wait_s)
                    latencies_us[at][way].extend(arrived)
                    result.sent += frame_count
                    result.lost += frame_count - len(arrived)
    for result, ways in zip(results, latencies_us, strict=True):
        if all(ways):
            result.rtt_us = sum(min(way) for way in ways)
            result.rtt_p50_us = sum(median(way) for way in ways)
    return results


def _train(sender: socket.socket, receiver: socket.socket, frame: bytes, number: int, count: int, wait_s: float) -> list[float]:
    """Send one train of `count` frames and return the latencies, in microseconds, of the frames that arrived.

    number: of no other train, since every socket on an interface also gets what is meant for the others there.
    Spins, since sleeping adds a wake-up, but yields, since switch and delay line may need this very core.
    """
    sent_ns: dict[bytes, int] = {}
    latencies_us: list[float] = []
    next_ns = time.perf_counter_ns()
    deadline = next_ns + int(wait_s * 1e9)
    while len(latencies_us) < count and (now := time.perf_counter_ns()) < deadline:
        if len(sent_ns) < count and now >= next_ns:
            tag = struct.pack(">IH", number, len(sent_ns))
            next_ns = sent_ns[tag] = time.perf_counter_ns()
            next_ns += SPACING_NS
            with contextlib.suppress(OSError):  # no buffer, link down: a frame that is lost
                sender.send(frame + tag)
            deadline = next_ns + int(wait_s * 1e9)
        try:
            received = receiver.recv(2048)
        except OSError:  # nothing there yet, or the link is down
            os.sched_yield()
            continue
        arrived_ns = time.perf_counter_ns()
        tag = received[-TAG_BYTES:]
        if received[-TAG_BYTES - len(MAGIC) : -TAG_BYTES] == MAGIC and tag in sent_ns:
            latencies_us.append((arrived_ns - sent_ns[tag]) / 1e3)
    return latencies_us


def _packet_socket(end: End) -> socket.socket:
    with system.network_namespace(end.pid):
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IP))
    packets.bind((end.interface, ETH_P_IP))
    packets.setblocking(False)
    return packets


def _frame(path: Path, forward: bool) -> bytes:
    """Return a probe without its tag: Ethernet, IPv4, UDP (RFC 768: checksum 0, not computed), MAGIC."""
    source, target = (path.a, path.b) if forward else (path.b, path.a)
    inside_sends = (path.a.host == "client") == forward
    addresses = (NOBODY_INSIDE, NOBODY_OUTSIDE) if inside_sends else (NOBODY_OUTSIDE, NOBODY_INSIDE)
    ports = (path.client_port, 7) if inside_sends else (7, path.client_port)
    size = len(MAGIC) + TAG_BYTES
    header = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 28 + size, 0, 0, 64, 17, 0, *(socket.inet_aton(address) for address in addresses)
    )
    checksum = sum(struct.unpack(">10H", header))
    checksum = ~((checksum & 0xFFFF) + (checksum >> 16)) & 0xFFFF
    header = header[:10] + struct.pack(">H", checksum) + header[12:]
    ethernet = bytes.fromhex((target.mac + source.mac).replace(":", "")) + struct.pack(">H", ETH_P_IP)
    return ethernet + header + struct.pack(">HHHH", *ports, 8 + size, 0) + MAGIC
