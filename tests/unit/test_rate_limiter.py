"""Does the token bucket let through exactly what burst and rate allow, in any window, whatever the clock does?"""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datastore.base.errors import NearstateError
from nfs.dataplane import DROP, FORWARD, RATE_EXCEEDED
from tests.packets import Instance, echo, tcp, udp, well_formed

pytestmark = [pytest.mark.python_mode, pytest.mark.bounds,
              pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")]  # fmt: skip
SECOND_NS = 10**9
gaps_ns = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 4 * SECOND_NS), st.integers(0, 10**6)), min_size=1, max_size=40)


def limiter(**given: int | str) -> Instance:
    return Instance.of("rate_limiter", **given)


def at(instance: Instance, now_ns: int, frame: bytes) -> int:
    """Return the verdict on a frame from inside at a time in nanoseconds; below 2^53 they are exact in `now_s`."""
    instance.now_s = now_ns / SECOND_NS
    assert int(instance.now_s * 1e9) in (now_ns - 1, now_ns), "what the clock shows, rounded down"
    return instance(frame)


def times(gaps: list[int]) -> list[int]:
    """Return the times, in nanoseconds as the instance sees them, of packets with these gaps."""
    now, found = 1000 * SECOND_NS, []
    for gap in gaps:
        now += gap
        found.append(int(now / SECOND_NS * 1e9))
    return found


@settings(max_examples=80)
@given(gaps_ns, st.integers(1, 2000), st.integers(1, 8))
@example([0, 0, 0, SECOND_NS, 0, 0], 2, 2)
def test_passes_exactly_what_no_window_forbids(gaps: list[int], rate: int, burst: int) -> None:
    """RFC 2697, section 3. In every window that ends now, at most burst + rate * its length: else, and only then, DROP."""
    bucket = limiter(packets_per_s=rate, burst_packets=burst)
    passed: list[int] = []
    for now in times(gaps):
        windows = [
            (len(passed) - n + 1) * SECOND_NS <= burst * SECOND_NS + rate * (now - first) for n, first in enumerate(passed)
        ]
        within = all(windows)
        assert at(bucket, now, udp()) == (FORWARD if within else DROP)
        assert bucket.cause == (0 if within else RATE_EXCEEDED)
        passed += [now] * within


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2 * SECOND_NS), st.integers(0, 1400)), min_size=1, max_size=30),
       st.integers(1, 5000), st.integers(1504, 5000))  # fmt: skip
def test_bytes_of_ip_are_counted_likewise(sent: list[tuple[int, int]], rate: int, burst: int) -> None:
    bucket = limiter(packets_per_s=0, bytes_per_s=rate, burst_bytes=burst)
    passed: list[tuple[int, int]] = []
    for now, (_, payload) in zip(times([gap for gap, _ in sent]), sent, strict=True):
        size = 20 + 8 + payload
        windows = [sum(s for _, s in passed[n:]) * SECOND_NS <= (burst - size) * SECOND_NS + rate * (now - passed[n][0])
                   for n in range(len(passed))]  # fmt: skip
        within = size <= burst and all(windows)
        assert at(bucket, now, udp(payload=bytes(payload))) == (FORWARD if within else DROP)
        passed += [(now, size)] * within


@settings(max_examples=80)
@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=30))
def test_clock_jumps_are_harmless(clock: list[int]) -> None:
    """Whatever the clock shows, the debt is within 0 and the burst, and a second later one more may pass."""
    bucket = limiter(packets_per_s=1, burst_packets=2, bytes_per_s=2**32, burst_bytes=4_000_000_000)
    for now in [abs(n) for n in clock]:
        bucket.now_s = now / 1e9
        assert bucket(udp()) in (FORWARD, DROP)
        for record in bucket.records.values():
            assert 0 <= record[0]["packets_owed"] <= 2 * SECOND_NS
            assert 0 <= record[0]["bytes_owed"] <= 4 * 10**18
        assert 0 < bucket.idle_timeout_s <= 5
        bucket.now_s += 2.001 + bucket.now_s / 2**40
        assert bucket(udp()) == FORWARD


def test_a_clock_a_little_behind_pays_nothing_back_twice() -> None:
    bucket = limiter(packets_per_s=10, burst_packets=1)
    assert at(bucket, 1000 * SECOND_NS, udp()) == FORWARD
    for _ in range(20):  # two instances, one of them 90 ms behind
        assert at(bucket, 1000 * SECOND_NS - 90_000_000, udp()) == DROP
        assert at(bucket, 1000 * SECOND_NS, udp()) == DROP
    assert at(bucket, 1000 * SECOND_NS + 100_000_001, udp()) == FORWARD


def test_every_sender_has_a_bucket_whatever_it_sends() -> None:
    bucket = limiter(packets_per_s=1, burst_packets=2)
    assert [bucket(frame) for frame in (udp(), tcp("S"), echo())] == [FORWARD, FORWARD, DROP]
    answers = [bucket.outside(frame) for frame in (udp(inside=False), tcp("SA", inside=False), echo(inside=False))]
    assert answers == [FORWARD, FORWARD, DROP]
    assert len(bucket.records) == 2


@pytest.mark.parametrize(("limits", "free"), [("inside", "outside"), ("outside", "inside")])
def test_one_side_may_be_left_alone(limits: str, free: str) -> None:
    bucket = limiter(packets_per_s=1, burst_packets=1, limits=limits)
    verdicts = {"inside": [bucket(udp()) for _ in range(3)], "outside": [bucket.outside(udp(inside=False)) for _ in range(3)]}
    assert verdicts == {limits: [FORWARD, DROP, DROP], free: [FORWARD] * 3}


def test_dropped_packets_owe_nothing() -> None:
    bucket = limiter(packets_per_s=1, burst_packets=1)
    assert at(bucket, 1000 * SECOND_NS, udp()) == FORWARD
    for n in range(1, 10):
        assert at(bucket, 1000 * SECOND_NS + n * SECOND_NS // 10, udp()) == DROP
    assert at(bucket, 1001 * SECOND_NS, udp()) == FORWARD


def test_both_limits_hold_together() -> None:
    bucket = limiter(packets_per_s=1, burst_packets=3, bytes_per_s=1, burst_bytes=2000)
    assert bucket(udp(payload=bytes(1400))) == FORWARD
    assert bucket(udp(payload=bytes(1400))) == DROP, "1,428 + 1,428 bytes"
    assert [bucket(udp(payload=b"")) for _ in range(3)] == [FORWARD, FORWARD, DROP], "the third packet that passed was the last"
    assert bucket.cause == RATE_EXCEEDED


def test_the_record_is_forgotten_when_the_bucket_is_full_again() -> None:
    bucket = limiter(packets_per_s=2, burst_packets=100)
    for _ in range(100):
        assert bucket(udp()) == FORWARD
    assert bucket.idle_timeout_s == 50 + 2
    assert bucket(udp()) == DROP


def test_no_limit_at_all_and_frames_without_a_sender() -> None:
    bucket = limiter(packets_per_s=0)
    assert all(bucket(udp()) == FORWARD for _ in range(100))
    bucket = limiter(packets_per_s=1, burst_packets=1)
    frames = well_formed()
    assert [bucket(frames[name]) for name in ("arp", "udp later fragment")] == [FORWARD, FORWARD]
    assert bucket.records == {}


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"burst_packets": 0}, "packets_per_s=1000000, burst_packets=0: a burst is 1 to"),
        ({"packets_per_s": -1}, "packets_per_s=-1"),
        ({"bytes_per_s": 1000, "burst_bytes": 1000}, "burst_bytes=1000: a burst is 1504 to"),
        ({"packets_per_s": 1, "burst_packets": 10**6}, "comes back within a day"),
        ({"limits": "insid"}, "unknown side that the rate limiter limits 'insid': did you mean inside"),
        ({"rate": 5}, "unknown setting"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given_settings: dict[str, int | str], message: str) -> None:
    with pytest.raises(NearstateError, match=message):
        limiter(**given_settings)
