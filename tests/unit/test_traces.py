"""Are traces what they say: repeatable, well-formed where they should be, varied; and would the oracle see a wrong verdict?"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from datastore.compiled import INTERPRETED
from nfs.dataplane.headers import TCP
from tests import packets
from tests.oracle import FIREWALL, KNOWN_DIFFERENCES, compare, identity
from tests.oracle_nat import NAT
from tests.replay import Replay
from tests.traces import CONVERSATIONS, IPV4, Trace, make_trace

GARBAGE = ("mutated", "not_ip")


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace(7, 6000)


def test_a_seed_gives_its_trace_again_and_another_seed_another(trace: Trace) -> None:
    assert make_trace(7, 6000) == trace
    other = make_trace(8, 100)
    assert not set(other.frames) & set(trace.frames)


def test_scapy_finds_the_same_checksums_and_lengths(trace: Trace) -> None:
    """Of every kind but garbage, of options that scapy can write again, and of whole datagrams: pieces have no checksum."""
    chosen = [frame for frame, kind in zip(trace.frames, trace.kinds, strict=True) if kind not in (*GARBAGE, "options")]
    checked = 0
    for frame in chosen[::5]:
        packet = packets.Ether(frame)
        ip = packet[packets.IP]
        assert ip.len == len(frame) - 14
        if ip.frag == 0 and not ip.flags.MF and packets.ICMP not in packet:
            assert packets.checksums_hold(frame), frame.hex()
            checked += 1
    assert checked > 500


def test_every_kind_of_conversation_and_every_order_of_flags_is_there(trace: Trace) -> None:
    kinds = Counter(trace.kinds)
    assert set(kinds) == {begun.__name__ for begun in CONVERSATIONS}
    flags = {(side, frame[47] & 0x3F) for frame, side in zip(trace.frames, trace.sides, strict=True)
             if len(frame) >= 54 and frame[12:15] == IPV4 + b"\x45" and frame[23] == TCP}  # fmt: skip
    assert len(flags) > 100, "of 64 sets of flags from two sides"
    assert 0.25 < sum(trace.sides) / len(trace.sides) < 0.6


def test_a_frame_that_leaves_can_be_told_from_all_others(trace: Trace) -> None:
    seen = Counter(identity(frame) for frame, kind in zip(trace.frames, trace.kinds, strict=True) if kind != "fragments")
    assert [count for frame, count in seen.items() if count > 1 and len(frame) == 4] == []


@pytest.mark.skipif(INTERPRETED, reason="the engine runs compiled")
def test_the_oracle_sees_a_wrong_verdict_and_a_wrong_byte(trace: Trace) -> None:
    """Against itself nothing differs; one verdict or byte changed in what "the kernel" did is one difference, unexplained."""
    replay = Replay.of("firewall")
    ours = replay(trace.frames, trace.sides)
    plain = [n for n, kind in enumerate(trace.kinds) if kind == "question" and ours[n] is not None]
    clean, strict = compare(FIREWALL, trace, ours, ours, replay.seen)
    assert all(difference.known for difference in clean), "only what the kernel would not have sent: wrong header checksums"
    assert strict > len(ours) // 2
    side, frame = ours[plain[5]] or (0, b"")
    for wrong in (None, (1 - side, frame), (side, frame[:40] + bytes([frame[40] ^ 1]) + frame[41:])):
        theirs = [wrong if n == plain[5] else left for n, left in enumerate(ours)]
        found = [difference for difference in compare(FIREWALL, trace, ours, theirs, replay.seen)[0] if difference.known is None]
        assert [difference.number for difference in found] == [plain[5]]


def test_the_document_has_every_known_difference() -> None:
    text = Path("docs/network_functions.md").read_text()
    of_the_nat = [known for known in NAT.known if known.name not in {other.name for other in KNOWN_DIFFERENCES}]
    for table in (KNOWN_DIFFERENCES, of_the_nat):
        assert "\n".join(f"| {known.name} | {known.rfc} | {known.why} |" for known in table) in text
