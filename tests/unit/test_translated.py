"""Does the oracle's own account of a translator hold: endpoints, checksums, hairpins; and would it see a wrong one?"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence

import pytest

from datastore.base.errors import NearstateError
from datastore.compiled import INTERPRETED
from nfs.dataplane.headers import ICMP, INSIDE, OUTSIDE
from tests import packets
from tests.oracle import unaltered
from tests.oracle_nat import NAT, NAT_SYMMETRIC
from tests.replay import Replay
from tests.traces import TRANSLATED, UNREACHABLE, Flow, Trace, error_about, make_trace
from tests.translated import Translated, end_at, place_of, with_end

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the engine runs compiled")
GARBAGE = ("mutated", "not_ip", "options", "fragments", "error")
EXTERNAL = socket.inet_aton(NAT.external)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace(3, 3000, TRANSLATED)


def translated(trace: Trace, change: Callable[[int, bytes], bytes] = lambda side, frame: frame) -> tuple[Translated, list[bytes]]:
    """Return what our NAT made of a trace, and every frame that left it; change: what somebody does to these."""
    replay, left = Replay.of("nat", settings=NAT.settings), []
    inner = replay.box(trace)

    def box(numbers: Sequence[int], frames: Sequence[bytes], sides: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
        for number, side, frame in inner(numbers, frames, sides):
            left.append(frame)
            yield number, side, change(side, frame)

    return Translated(box, EXTERNAL, True, True), left


def test_every_client_keeps_a_port_of_its_class_and_every_checksum_holds(trace: Trace) -> None:
    passage, _ = translated(trace)
    left = passage(trace)
    assert all(unaltered(NAT, frame, after) for frame, after in zip(trace.frames, left, strict=True))
    assert len(passage.newest) > 60
    assert len({(protocol, end) for (protocol, _), end in passage.newest.items()}) == len(passage.newest), "a bijection"
    for (protocol, client), end in passage.newest.items():
        same_class = (int.from_bytes(client.port, "big") ^ int.from_bytes(end.port, "big")) & 0x1FF == 0
        assert protocol == ICMP or (same_class and end.address == EXTERNAL)
    moved = [client for (_, client), end in passage.newest.items() if client.port != end.port]
    assert moved, "no two clients ever had the same port"


def test_scapy_finds_every_checksum_of_what_left_right(trace: Trace) -> None:
    kept = [n for n, kind in enumerate(trace.kinds) if kind not in GARBAGE]
    good = Trace(trace.seed, [trace.frames[n] for n in kept], [trace.sides[n] for n in kept], [trace.kinds[n] for n in kept])
    passage, left = translated(good)
    passage(good)
    assert len(left) > 500
    assert [frame.hex() for frame in left if not packets.checksums_hold(frame)] == []


def test_hairpins_and_errors_about_them_arrive(trace: Trace) -> None:
    """RFC 4787, REQ-9; RFC 5508, REQ-7."""
    passage, _ = translated(trace)
    left = passage(trace)
    hairpins = [n for n in sorted(passage.reachable) if trace.kinds[n] == "hairpin"]
    assert len(hairpins) > 20
    assert any(trace.frames[n][23] == ICMP for n in hairpins)
    assert {(left[n] or (None,))[0] for n in hairpins} == {INSIDE}


@pytest.mark.parametrize("at", [26, 34, 40, 50])
def test_a_byte_that_changes_on_the_way_is_seen(trace: Trace, at: int) -> None:
    """Of the address or port that was given: a second one for the client. Of a checksum or the payload: altered."""
    flow = Flow(0x0A000001, 0x0A800001, 40000, 53)
    sent = [flow.datagram(INSIDE, bytes(20)), flow.datagram(INSIDE, bytes(20))]
    few = Trace(1, [frame for _, frame in sent], [side for side, _ in sent], ["question"] * 2)
    count = iter(range(2))

    def change(side: int, frame: bytes) -> bytes:
        return frame[:at] + bytes([frame[at] ^ next(count)]) + frame[at + 1 :]

    passage, _ = translated(few, change)
    if at in (26, 34):
        with pytest.raises(NearstateError, match="and now"):
            passage(few)
        return
    left = passage(few)
    assert [unaltered(NAT, frame, after) for frame, after in zip(few.frames, left, strict=True)] == [True, False]


@pytest.mark.parametrize("name", ["datagram", "segment", "query", "error"])
@pytest.mark.parametrize("source", [True, False])
def test_another_endpoint_there_and_back_is_what_it_was(name: str, source: bool) -> None:
    flow = Flow(0x0A000001, 0x0A800001, 40000, 53)
    sent = {"datagram": flow.datagram(INSIDE, b"abc"), "segment": flow.segment(INSIDE, 2), "query": flow.query(INSIDE, 8, 1),
            "error": error_about(flow.segment(OUTSIDE, 16), UNREACHABLE, 1, None, 48)}  # fmt: skip
    frame = sent[name][1]
    place = place_of(frame, source)
    assert place is not None
    own, outer = end_at(frame, place), frame[26:30] if source else frame[30:34]
    other = own._replace(address=EXTERNAL, port=b"\x12\x34")
    changed = with_end(frame, place, other, EXTERNAL)
    assert changed != frame
    assert packets.checksums_hold(changed)
    assert with_end(changed, place, own, outer) == frame


def test_the_two_subjects_differ_in_what_they_excuse() -> None:
    names = [{known.name for known in subject.known} for subject in (NAT, NAT_SYMMETRIC)]
    assert names[0] - names[1] == {"not in the flow"}
