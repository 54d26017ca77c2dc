"""Over a real cable: does every frame arrive once and intact by AF_XDP and AF_PACKET alike, and is the rest counted?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from datastore.base.errors import NearstateError
from nfs.dataplane.frames import FRAME_BYTES, Frames, free_frames, give_frame, make_frames, take_frame
from nfs.dataplane.opening import open_port, open_ports
from nfs.dataplane.port import BURST, TX_REFUSED, OpenPort, reclaim, refill, rx_burst, tx_flush, tx_push, unsent
from tests.conftest import Bench, Host, make_bench
from topologies.emulation import system

KINDS = ("afxdp", "afpacket")
COMBINATIONS = [(sender, receiver) for sender in KINDS for receiver in KINDS]
HEADER = bytes.fromhex("02000000000202000000000188b5")  # EtherType 0x88B5: local experiments (IEEE 802)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from make_bench("test-ports", tmp_path_factory.mktemp("logs"), ("nfs.dataplane.port",))


@dataclass
class End:
    """One end of a cable with a port on it."""

    host: Host
    frames: Frames
    opened: OpenPort

    def send(self, contents: list[bytes]) -> list[bytes]:
        """Queue frames and give them to the kernel; return those that found no room."""
        port, left = self.opened.port, []
        reclaim(port, self.frames)
        for content in contents:
            at = int(take_frame(self.frames))
            if at < 0 or not _push(self, at, content):
                left.append(content)
        tx_flush(port, self.frames)
        return left

    def receive(self, quiet_s: float = 0.2) -> list[bytes]:
        """Return what arrives until nothing has for `quiet_s`."""
        addresses, lengths = np.zeros(BURST, np.int64), np.zeros(BURST, np.int64)
        found, quiet_since = [], time.monotonic()
        while time.monotonic() < quiet_since + quiet_s:
            refill(self.opened.port, self.frames)
            for i in range(rx_burst(self.opened.port, self.frames, addresses, lengths, BURST)):
                at, length = int(addresses[i]), int(lengths[i])
                found.append(self.frames.memory[at : at + length].tobytes())
                give_frame(self.frames, at)
                quiet_since = time.monotonic()
        return found

    def dropped(self) -> int:
        """Return all frames the kernel dropped here. The device counts those too that its XDP program could not hand on."""
        by_port, by_device = sum(self.opened.statistics().values()), self._dropped_by_device()
        if self.opened.kind == "afxdp":
            assert by_port <= by_device
            return by_device
        return by_port + by_device

    def _dropped_by_device(self) -> int:
        with system.network_namespace(self.host.pid):
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        fields = next(line.split() for line in lines if line.strip().startswith("net:"))
        return int(fields[4]) + int(fields[12])


def _push(end: End, at: int, content: bytes) -> bool:
    end.frames.memory[at : at + len(content)] = np.frombuffer(content, np.uint8)
    if tx_push(end.opened.port, end.frames, at, len(content)):
        return True
    give_frame(end.frames, at)
    return False


def cable(bench: Bench, kinds: tuple[str, str], receiver_frames: int = 4096) -> tuple[End, End]:
    """Return the two ends of a new cable, a sending and a receiving one."""
    hosts = (bench.host("one"), bench.host("other"))
    bench.cable((hosts[0], "net"), (hosts[1], "net"))
    ends = []
    for host, kind, count in zip(hosts, kinds, (4096, receiver_frames), strict=True):
        frames = make_frames(count)
        with system.network_namespace(host.pid):
            ends.append(End(host, frames, open_port("net", frames, kind)))
        assert ends[-1].opened.kind == kind
        refill(ends[-1].opened.port, frames)
    return ends[0], ends[1]


def content(number: int, length: int) -> bytes:
    body = np.random.default_rng(number).bytes(length - len(HEADER) - 4)
    return HEADER + number.to_bytes(4, "big") + body


def missing(end: End) -> int:
    """Return how many frames are neither free, nor waiting for the kernel to fill them, nor on their way out."""
    port, filled = end.opened.port, 0
    if end.opened.kind == "afxdp":
        filled = int(np.uint32(port.fill_producer[0] - port.rx_consumer[0]))
    return end.frames.stack.size - int(free_frames(end.frames)) - filled - int(unsent(port))


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="-".join)
def test_every_size_arrives_once_and_intact(bench: Bench, kinds: tuple[str, str]) -> None:
    sender, receiver = cable(bench, kinds)
    sent = [content(length, length) for length in range(60, 1515)]
    found = []
    for start in range(0, len(sent), BURST):
        assert sender.send(sent[start : start + BURST]) == []
        found += receiver.receive(0.005)
    found += receiver.receive()
    assert found == sent, "in order, each once, bit by bit"
    reclaim(sender.opened.port, sender.frames)
    assert (missing(sender), missing(receiver)) == (0, 0)
    assert sum(receiver.opened.statistics().values()) == 0


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="-".join)
def test_vlan_tags_arrive_as_they_were_sent(bench: Bench, kinds: tuple[str, str]) -> None:
    sender, receiver = cable(bench, kinds)
    tags = ["8100a007", "88a80005", "88a8000581000006", "8100000181000002"]
    sent = [content(n, 60)[:12] + bytes.fromhex(tag) + content(n, 100 + n)[12:] for n, tag in enumerate(tags * 8)]
    assert sender.send(sent) == []
    assert receiver.receive() == sent
    assert (missing(sender), missing(receiver)) == (0, 0)


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="-".join)
def test_saturated_what_does_not_arrive_is_counted(bench: Bench, kinds: tuple[str, str]) -> None:
    """Nobody receives while 20,000 frames leave: received + dropped by cause is what was sent, to the frame."""
    sender, receiver = cable(bench, kinds, receiver_frames=512)
    total, accepted = 20_000, 0
    pending = [content(number % 256, 60 + number % 1400) for number in range(BURST)]
    deadline = time.monotonic() + 10
    while accepted < total and time.monotonic() < deadline:
        accepted += len(pending) - len(sender.send(pending))
    while unsent(sender.opened.port) and time.monotonic() < deadline:
        reclaim(sender.opened.port, sender.frames)
    assert unsent(sender.opened.port) == 0, "everything queued has left"
    found = receiver.receive()
    assert set(found) <= set(pending)
    refused = int(sender.opened.port.control[TX_REFUSED])
    first, again = receiver.opened.statistics(), receiver.opened.statistics()
    assert first == again, "reading the counters does not reset them"
    assert 0 < len(found) < accepted
    assert sum(first.values()) > 0
    assert len(found) + sender.dropped() + receiver.dropped() + refused == accepted
    assert (missing(sender), missing(receiver)) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_go_on_from_port_to_port_without_a_copy(bench: Bench, kind: str) -> None:
    """As in an NF: what came in by one port leaves by the other, in the same frame."""
    left, middle, right = (bench.host(name) for name in ("left", "middle", "right"))
    bench.cable((left, "net"), (middle, "inside"))
    bench.cable((right, "net"), (middle, "outside"))
    frames = make_frames(2048)
    with system.network_namespace(middle.pid):
        inside, outside = open_ports(["inside", "outside"], frames, kind)
    for opened in (inside, outside):
        refill(opened.port, frames)
    with left.packet_socket("net") as source, right.packet_socket("net") as target:
        target.settimeout(2)
        addresses, lengths = np.zeros(BURST, np.int64), np.zeros(BURST, np.int64)
        for number in range(300):
            source.send(content(number, 60 + number))
            deadline, count = time.monotonic() + 2, 0
            while not count and time.monotonic() < deadline:
                count = rx_burst(inside.port, frames, addresses, lengths, BURST)
            for i in range(count):
                assert tx_push(outside.port, frames, int(addresses[i]), int(lengths[i]))
            tx_flush(outside.port, frames)
            assert target.recv(2048) == content(number, 60 + number)
            for opened in (inside, outside):
                reclaim(opened.port, frames)
                refill(opened.port, frames)


def test_frames_larger_than_a_frame_never_reach_beyond_it(bench: Bench) -> None:
    """An MTU of 3,000: AF_PACKET cuts at the frame's end, AF_XDP refuses; the neighbouring frame is untouched."""
    for kind in KINDS:
        hosts = (bench.host("one"), bench.host("other"))
        bench.cable((hosts[0], "net"), (hosts[1], "net"), mtu=3000)
        frames = make_frames(1024)
        with system.network_namespace(hosts[1].pid):
            end = End(hosts[1], frames, open_port("net", frames, kind))
        refill(end.opened.port, frames)
        with hosts[0].packet_socket("net") as source:
            for length in (1514, 1700, 2048, 2049, 3000):
                source.send(content(length, length))
            source.send(content(1, 60))
            found = end.receive()
        assert found[0] == content(1514, 1514)
        assert found[-1] == content(1, 60)
        assert all(len(frame) <= FRAME_BYTES for frame in found)
        assert len(found) + end.dropped() == 6
        assert missing(end) == 0


def test_what_cannot_be_opened_is_one_clear_line(bench: Bench) -> None:
    host = bench.host("one")
    frames = make_frames(64)
    with system.network_namespace(host.pid):
        for kind in KINDS:
            with pytest.raises(NearstateError, match="on interface 'nothing' failed: No such device") as raised:
                open_port("nothing", frames, kind)
            assert "\n" not in str(raised.value)


def test_an_interface_that_another_port_keeps_is_refused_and_what_was_opened_is_given_back(bench: Bench) -> None:
    """Of two interfaces the second is taken: the first one must not stay with an AF_XDP socket that nobody reads."""
    host, peers = bench.host("one"), [bench.host(name) for name in ("left", "right")]
    for interface, peer in zip(("inside", "outside"), peers, strict=True):
        bench.cable((peer, "net"), (host, interface))
    taken, frames = make_frames(1024), make_frames(1024)
    with system.network_namespace(host.pid):
        keeper = open_port("outside", taken, "afxdp")
        with pytest.raises(NearstateError, match="on interface 'outside' failed: Device or resource busy"):
            open_ports(["inside", "outside"], frames, "afxdp")
        fallback = open_ports(["inside", "outside"], frames, "auto")
        assert [opened.kind for opened in fallback] == ["afpacket", "afpacket"]
        assert keeper.kind == "afxdp"
    end = End(host, frames, fallback[0])
    with peers[0].packet_socket("net") as source:
        found: list[bytes] = []
        for _ in range(20):  # the link may need a moment after its XDP program is gone
            source.send(content(1, 60))
            found += end.receive(0.1)
            if found:
                break
    assert set(found) == {content(1, 60)}
