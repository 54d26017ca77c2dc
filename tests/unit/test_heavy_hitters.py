"""Is the sketch's error what the paper bounds, and are the heaviest senders found from its counters alone?"""

from __future__ import annotations

import math
from collections import Counter
from ipaddress import IPv4Address

import numpy as np
import pytest

from datastore.base.errors import NearstateError
from datastore.compiled import INTERPRETED
from nfs.dataplane import FORWARD
from nfs.heavy_hitters import ROWS, WORDS, estimates, main, of_records, record_key, snapshot, top, width_for
from tests.packets import CLIENT, SERVER, Instance, tcp, udp, well_formed

pytestmark = [pytest.mark.python_mode, pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")]
WIDTH = 256
PACKETS = 3_000 if INTERPRETED else 20_000
SENDERS = 2_000


def reader(*instances: Instance):
    """Return `read` over the counters that these instances share."""

    def read(high: int, low: int) -> np.ndarray:
        return np.array([sum(each.counters.get((high, low, word), 0) for each in instances) for word in range(WORDS)], np.uint64)

    return read


def zipf(seed: int, near: bool) -> np.ndarray:
    """Return the senders of PACKETS packets, Zipf with exponent 1; in one network, or all over the address space."""
    numbers = np.random.default_rng(seed)
    share = 1 / np.arange(1, SENDERS + 1)
    everywhere = numbers.integers(1 << 24, 0xE0000000, SENDERS, dtype=np.uint64)
    addresses = np.uint64(0x0A000000) + np.arange(SENDERS, dtype=np.uint64) if near else everywhere
    return numbers.choice(addresses, PACKETS, p=share / share.sum())


@pytest.fixture(scope="module", params=[True, False], ids=["one network", "everywhere"])
def counted(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Return the sketch of two instances that saw half of the packets each, and who sent them."""
    senders = zipf(7, request.param)
    halves = [Instance.of("heavy_hitters", width=WIDTH) for _ in range(2)]
    frame = bytearray(udp())
    for n, sender in enumerate(senders):
        frame[26:30] = int(sender).to_bytes(4, "big")
        assert halves[n % 2](bytes(frame)) == FORWARD
    return snapshot(reader(*halves), WIDTH), senders


def test_every_row_counts_every_packet_once(counted: tuple[np.ndarray, np.ndarray]) -> None:
    assert [int(row.sum()) for row in counted[0]] == [PACKETS] * ROWS


def test_the_error_is_within_the_papers_bound(counted: tuple[np.ndarray, np.ndarray]) -> None:
    """Theorem 1: never too low; too high by more than e / width of all with probability exp(-3) at most."""
    counters, senders = counted
    addresses, exact = np.unique(senders, return_counts=True)
    error = estimates(counters, addresses).astype(np.int64) - exact
    assert error.min() >= 0
    assert np.mean(error > math.e / WIDTH * PACKETS) <= math.exp(-3)
    absent = np.setdiff1d(np.arange(0x0A010000, 0x0A020000, dtype=np.uint64), addresses)
    assert np.mean(estimates(counters, absent) > math.e / WIDTH * PACKETS) <= math.exp(-3)


@pytest.mark.parametrize("near", [True, False])
def test_the_heaviest_are_found(near: bool) -> None:
    """At the default width, from the sketch alone; built by the same additions, a million of them."""
    senders = np.repeat(zipf(11, near), 1_000_000 // PACKETS)
    exact = Counter(senders.tolist())
    counters = sketch(exact, 8192)
    found = top(counters, 10)
    wanted = [address for address, _ in exact.most_common(10)]
    assert {int(address) for address, _ in found} >= set(wanted[:9])
    for address, estimate in found:
        assert exact[int(address)] <= estimate <= exact[int(address)] + math.e / 8192 * len(senders)


def sketch(exact: Counter[int], width: int) -> np.ndarray:
    """Return the sketch of these weights, by the function itself: one packet of each sender, multiplied."""
    records: dict[tuple[int, int], np.ndarray] = {}
    frame = bytearray(udp())
    for sender, weight in exact.items():
        instance = Instance.of("heavy_hitters", width=width)
        frame[26:30] = int(sender).to_bytes(4, "big")
        instance(bytes(frame))
        for (high, low, word), count in instance.counters.items():
            records.setdefault((high, low), np.zeros(WORDS, np.uint64))[word] += np.uint64(count * weight)
    return of_records(((high, low, words.tobytes()) for (high, low), words in records.items()), width)


def test_no_sender_above_the_last_one_found_is_missed(counted: tuple[np.ndarray, np.ndarray]) -> None:
    """Whatever the noise of a narrow sketch, the search gives the first k of all 2^32 estimates."""
    counters, senders = counted
    found = top(counters, 5)
    assert [estimate for _, estimate in found] == sorted((estimate for _, estimate in found), reverse=True)
    rest = np.setdiff1d(np.unique(senders), np.array([int(address) for address, _ in found], np.uint64))
    assert estimates(counters, rest).max() <= found[-1][1]


def test_the_difference_of_two_moments_is_a_sketch_of_the_time_between() -> None:
    instance = Instance.of("heavy_hitters", width=2000)
    for _ in range(9):
        instance(udp())
    before = snapshot(reader(instance), 2000)
    for _ in range(3):
        instance.outside(udp(inside=False))
    assert top(snapshot(reader(instance), 2000) - before, 1) == [(IPv4Address(SERVER), 3)]


def test_bytes_and_destinations_may_be_counted() -> None:
    instance = Instance.of("heavy_hitters", counts="bytes", of="destination")
    frames = [tcp("S"), udp(payload=bytes(1000))]
    assert [instance(frame) for frame in frames] == [FORWARD, FORWARD]
    assert top(snapshot(reader(instance), 8192), 3) == [(IPv4Address(SERVER), sum(map(len, frames)))]


def test_every_frame_passes_and_what_is_no_packet_is_not_counted() -> None:
    instance = Instance.of("heavy_hitters")
    assert all(instance(frame) == instance(frame[:30]) == FORWARD for frame in well_formed().values())
    assert top(snapshot(reader(instance), 8192), 1)[0][0] == IPv4Address(CLIENT)


def test_nothing_counted_has_no_heaviest() -> None:
    assert top(np.zeros((ROWS, 64), np.uint64), 3) == []


def test_keys_are_spread_over_the_partitions() -> None:
    lows = [int(record_key(row, block)[1]) for row in range(ROWS) for block in range(2048)]
    partitions = np.bincount([low & 0xFFFF for low in lows], minlength=256)
    assert len(partitions) == 256
    assert partitions.max() < 32 + 6 * 32**0.5


def test_records_of_others_are_left_out() -> None:
    high, low = map(int, record_key(2, 5))
    value = np.array([1, 2, 3, 4], np.uint64).tobytes()
    other = (high, low ^ 1 << 16, value), (9 << 32, low, value), (2 << 32 | 16, low, value)
    counters = of_records([(high, low, value), (high, low, value), *other], 64)
    assert counters[2, 20:24].tolist() == [2, 4, 6, 8]
    assert counters.sum() == 20


def test_the_command_prints_what_running_stores_hold(capsys: pytest.CaptureFixture[str]) -> None:
    main(["no such table"])
    assert capsys.readouterr().out.startswith("0 counted in 0 tables")


@pytest.mark.parametrize(("epsilon", "width"), [(0.01, 272), (0.001, 2720), (math.e / 8192, 8192)])
def test_width_for_an_error(epsilon: float, width: int) -> None:
    assert width_for(epsilon) == width


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 1002}, "width=1002: a multiple of 4"),
        ({"width": 32}, "64 to 262144"),
        ({"counts": "packet"}, "did you mean packets"),
        ({"of": "sender"}, "unknown heavy hitters' of 'sender'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(NearstateError, match=message):
        Instance.of("heavy_hitters", **given)
