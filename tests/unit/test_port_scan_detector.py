"""Are scanners found as soon as the paper's equations say, and benign sources as seldom taken for one?"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from ipaddress import IPv4Address

import numpy as np
import pytest

from datastore.base.errors import NearstateError
from datastore.compiled import INTERPRETED
from datastore.store.partitions import hashed_partition
from nfs.dataplane import BLOCKED_SOURCE, DROP, FORWARD
from nfs.dataplane.headers import INSIDE
from nfs.port_scan_detector import FLAGGED_HIGH, FLAGGED_LOW, FORGET_S, KIND, PLACES, REMEMBERED
from tests.packets import Instance, echo, icmp_error, tcp, udp

pytestmark = [pytest.mark.python_mode, pytest.mark.bounds,
              pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")]  # fmt: skip
SOURCES = 60 if INTERPRETED else 800
SCANNER = "198.51.100.9"
TEMPLATES = {flags: tcp(flags) for flags in ("S", "SA", "RA", "PA", "R")}


def segment(flags: str, source: str, destination: str, source_port: int, destination_port: int) -> bytes:
    """Return a segment with these ends; its checksums are the template's, which the detector does not read."""
    frame = bytearray(TEMPLATES[flags])
    frame[26:34] = IPv4Address(source).packed + IPv4Address(destination).packed
    frame[34:38] = source_port.to_bytes(2, "big") + destination_port.to_bytes(2, "big")
    return bytes(frame)


class Source:
    """Somebody who opens connections, on one side, and whose attempts are answered as told."""

    def __init__(self, detector: Instance, address: str = SCANNER, inside: bool = False) -> None:
        self.detector, self.address, self.inside, self.attempts = detector, address, inside, 0
        high, low = int(IPv4Address(address)) << 32, KIND << 16
        self.key = (high, low | int(hashed_partition(np.uint64(high), np.uint64(low))))

    def contact(self, answer: str | None, destination: str | None = None, port: int = 80) -> int:
        """Open a connection to the next host and port, let it be answered ("SA", "RA" or not); return the SYN's verdict."""
        self.attempts += 1
        there = destination or str(IPv4Address(0x0A000000 + self.attempts * 2_654_435 % 2**24))
        verdict = self.send("S", there, port)
        if answer and verdict == FORWARD:
            self.detector(segment(answer, there, self.address, port, 2000), INSIDE if not self.inside else 1 - INSIDE)
        return verdict

    def send(self, flags: str, destination: str = "10.0.0.1", port: int = 80) -> int:
        return self.detector(segment(flags, self.address, destination, 2000, port), INSIDE if self.inside else 1 - INSIDE)

    def until_judged(self, draw: Callable[[], bool], limit: int = 1000) -> str:
        """Contact hosts until the detector has decided; return "scanner", "benign" or "undecided"."""
        for _ in range(limit):
            before = sum(self.counts())
            self.contact("SA" if draw() else "RA")
            if self.record()["scanner"]:
                return "scanner"
            if sum(self.counts()) < before:
                return "benign"
        return "undecided"

    def record(self):
        return self.detector.records[self.key][0]

    def counts(self) -> tuple[int, int]:
        """Return how many successes and failures the walk has so far."""
        if self.key not in self.detector.records:
            return 0, 0
        return int(self.record()["successes"]), int(self.record()["failures"])


@pytest.fixture
def detector() -> Instance:
    return Instance.of("port_scan_detector")


def test_four_refusals_in_a_row_make_a_scanner(detector: Instance) -> None:
    """ln(0.99 / 0.01) = 4.595 lies between 3 and 4 steps of ln(0.8 / 0.2) = 1.386."""
    scanner = Source(detector)
    assert [scanner.contact("RA") for _ in range(4)] == [FORWARD] * 4
    assert scanner.contact("RA") == DROP
    assert detector.cause == BLOCKED_SOURCE
    for frame in (udp(inside=False), echo(inside=False)):
        assert Source(detector, "10.128.0.1").detector.outside(frame) == FORWARD, "others are not concerned"
    assert scanner.send("PA") == DROP, "nothing of it passes"


def test_a_blocked_source_is_free_again_after_a_while() -> None:
    detector = Instance.of("port_scan_detector", block_s=60)
    scanner = Source(detector)
    for _ in range(5):
        scanner.contact("RA")
    for _ in range(6):
        detector.now_s += 10
        assert scanner.send("PA") == DROP, "packets that are blocked do not prolong it"
    detector.now_s += 1
    assert scanner.contact("SA") == FORWARD


@pytest.mark.parametrize("inside", [True, False])
def test_no_answer_is_a_failure_when_its_time_is_over(detector: Instance, inside: bool) -> None:
    scanner = Source(detector, "10.0.9.9" if inside else SCANNER, inside)
    assert [scanner.contact(None) for _ in range(PLACES)] == [FORWARD] * PLACES
    detector.now_s += 2.9
    assert scanner.send("PA") == FORWARD
    assert scanner.counts() == (0, 0)
    detector.now_s += 0.3
    assert scanner.send("PA") == DROP
    assert detector.cause == BLOCKED_SOURCE


def test_an_icmp_error_about_the_attempt_is_a_failure(detector: Instance) -> None:
    assert detector(tcp("S")) == FORWARD
    source = Source(detector, "10.0.1.7", inside=True)
    assert detector.outside(icmp_error(udp(), router="10.99.0.1")) == FORWARD
    assert source.counts() == (0, 0), "an error about something else says nothing"
    assert detector.outside(icmp_error(tcp("S"), router="10.99.0.1", code=1)) == FORWARD
    assert source.counts() == (0, 1)


def test_only_first_contacts_count(detector: Instance) -> None:
    """Section III: the outcome of the first connection attempt to each local host."""
    source = Source(detector)
    for answer in ("SA", "RA", "RA", "SA", "RA"):
        source.contact(answer, "10.0.0.1")
    assert source.counts() == (1, 0)


def test_a_scan_of_one_hosts_ports_counts_unless_hosts_do() -> None:
    for contacts, failures in (("services", 3), ("hosts", 1)):
        source = Source(Instance.of("port_scan_detector", contacts=contacts))
        for port in (22, 23, 25):
            source.contact("RA", "10.0.0.1", port)
        assert source.counts() == (0, failures)


def test_a_reset_that_answers_no_attempt_says_nothing(detector: Instance) -> None:
    source = Source(detector)
    source.contact("SA", "10.0.0.1")
    for flags in ("R", "PA", "SA"):
        source.send(flags, "10.0.0.1")
        detector(segment("RA", "10.0.0.1", SCANNER, 80, 2000))
    assert source.counts() == (1, 0)


def test_attempts_beyond_the_places_are_not_counted_and_not_remembered(detector: Instance) -> None:
    source = Source(detector)
    for _ in range(PLACES + 3):
        source.contact(None)
    assert bin(source.record()["contacted"]).count("1") == PLACES


def test_what_was_contacted_is_forgotten_before_everything_seems_known(detector: Instance) -> None:
    source = Source(detector)
    for _ in range(200):
        source.contact("SA")
        assert bin(source.record()["contacted"]).count("1") == source.record()["contacts"] <= REMEMBERED
    assert [source.contact("RA") for _ in range(16)][-1] == DROP, "a good reputation does not last"


def test_a_silent_source_starts_anew(detector: Instance) -> None:
    source = Source(detector)
    for _ in range(3):
        source.contact("RA")
    detector.now_s += FORGET_S + 1
    source.contact("RA")
    assert source.counts() == (0, 1)


def test_a_clock_a_little_behind_makes_nothing_late(detector: Instance) -> None:
    source = Source(detector)
    source.contact(None)
    detector.now_s -= 0.5
    source.contact("SA")
    assert source.counts() == (1, 0)


@pytest.mark.parametrize("watch", ["inside", "outside"])
def test_one_side_may_be_watched(watch: str) -> None:
    detector = Instance.of("port_scan_detector", watch=watch)
    for inside in (True, False):
        source = Source(detector, "10.0.9.9" if inside else SCANNER, inside)
        verdicts = [source.contact("RA") for _ in range(6)]
        assert verdicts[-1] == (DROP if inside == (watch == "inside") else FORWARD)


def test_marked_scanners_are_counted_and_pass() -> None:
    detector = Instance.of("port_scan_detector", action="mark")
    source = Source(detector)
    assert [source.contact("RA") for _ in range(7)] == [FORWARD] * 7
    counted = [detector.counters.get((int(FLAGGED_HIGH), int(FLAGGED_LOW), word), 0) for word in range(2)]
    assert counted == [1, 7], "the refusal that decided, then 3 attempts and their answers"


def drift(theta: float, theta_0: float, theta_1: float) -> float:
    """Return the mean of the walk's step when attempts succeed with probability `theta`."""
    return theta * math.log(theta_1 / theta_0) + (1 - theta) * math.log((1 - theta_1) / (1 - theta_0))


@pytest.mark.parametrize(("theta_0", "theta_1", "alpha", "beta"), [(0.8, 0.2, 0.01, 0.99), (0.7, 0.3, 0.02, 0.95)])
def test_scanners_and_benign_sources_are_told_apart_as_the_paper_says(theta_0: float, theta_1: float, alpha: float,
                                                                      beta: float) -> None:  # fmt: skip
    """Detection >= beta, false positives <= alpha, each with three standard deviations; the mean number of attempts is between
    the paper's expectation (section III-B), which ignores that a walk overshoots, and that with one whole step on top."""
    detector = Instance.of("port_scan_detector", theta_0=theta_0, theta_1=theta_1, alpha=alpha, beta=beta)
    random_numbers = random.Random(4)

    def judged(theta: float, base: int) -> tuple[list[str], float]:
        sources = [Source(detector, str(IPv4Address(base + n))) for n in range(SOURCES)]
        found = [source.until_judged(lambda: random_numbers.random() < theta) for source in sources]
        return found, sum(source.attempts for source in sources) / SOURCES

    noise = 3 / SOURCES**0.5
    scanners, attempts = judged(theta_1, 0xC6336400)
    assert scanners.count("scanner") / SOURCES >= beta - noise * (beta * (1 - beta)) ** 0.5
    per_attempt = drift(theta_1, theta_0, theta_1)
    expected = (beta * math.log(beta / alpha) + (1 - beta) * math.log((1 - beta) / (1 - alpha))) / per_attempt
    step = math.log((1 - theta_1) / (1 - theta_0)) / per_attempt
    uncounted = 1.1  # contacts that look known
    assert expected * (1 - noise) <= attempts <= (expected + step) * (1 + noise) * uncounted
    benign, _ = judged(theta_0, 0xC0000200)
    assert benign.count("scanner") / SOURCES <= alpha + noise * (alpha * (1 - alpha)) ** 0.5
    assert set(scanners + benign) == {"scanner", "benign"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"theta_1": 0.9}, "theta_0=0.8, theta_1=0.9"),
        ({"theta_0": 1.0}, "theta_0=1.0"),
        ({"alpha": 0.0}, "alpha=0.0, beta=0.99"),
        ({"beta": 0.005}, "0 < alpha < beta < 1"),
        ({"answer_s": 0}, "answer_s=0"),
        ({"block_s": 10**6}, "block_s=1000000"),
        ({"action": "ban"}, "unknown port scan detector's action 'ban'"),
        ({"watch": "outsid"}, "did you mean outside"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(NearstateError, match=message):
        Instance.of("port_scan_detector", **given)
