"""Does the time line count by the millisecond what arrived, and tell an outage and a broken flow from chance?"""

from __future__ import annotations

import numpy as np
import pytest

from analysis.results import time_line
from datastore.base.errors import NearstateError
from experiments.workloads import sink as sinks
from experiments.workloads import timeline
from experiments.workloads.generator import STEP, make_source, write_frame
from experiments.workloads.traffic import Traffic

ORIGIN_NS, MS = 10**15, 10**6


def line_of(arrivals: list[tuple[float, int, int, int]], watch: range = range(256), seconds: float = 0.1) -> timeline.TimeLine:
    """Return the time line of (milliseconds after the origin, flow, source, latency in ns)."""
    line = timeline.make_time_line({"bin_us": 1000, "seconds": seconds, "watch": watch}, ORIGIN_NS)
    for ms, slot, source, latency_ns in arrivals:
        timeline.note(line, slot, source, latency_ns, ORIGIN_NS + int(ms * MS))
    return line


def told(*arguments: object, **named: object) -> timeline.Told:
    return timeline.Told.of(timeline.report(line_of(*arguments, **named)))  # type: ignore[arg-type]


@pytest.mark.python_mode
@pytest.mark.bounds
def test_every_arrival_is_in_its_bin_and_what_is_late_in_the_last() -> None:
    line = told([(0.0, 1, 7, 5000), (0.9, 2, 7, 9000), (1.0, 1, 7, 1000), (99.9, 300, 7, 1000), (5000, 1, 7, 3000)])
    assert line.received[:2].tolist() == [2, 1]
    assert (line.received[99], line.received[100], line.received.sum()) == (1, 1, 5)
    assert line.highest_ns[:2].tolist() == [9000, 1000]
    assert sorted(line.slots) == [1, 2, 300]


@pytest.mark.python_mode
def test_only_watched_partitions_have_latencies_and_silence() -> None:
    line = told([(0, 256 + 5, 7, 1000), (10, 6, 7, 10**8), (20, 5, 7, 2000)], watch=range(5, 6))
    assert line.watched.tolist() == [int(n in (0, 20)) for n in range(101)]
    assert line.received.sum() == 3
    assert line.highest_ns.max() == 2000
    assert line.silence == (ORIGIN_NS, ORIGIN_NS + 20 * MS)


@pytest.mark.python_mode
@pytest.mark.parametrize("latency_ns", [1, 1023, 1024, 1025, 88_000, 1_000_000, 123_456_789])
def test_a_quantile_is_at_most_an_eighth_too_high(latency_ns: int) -> None:
    """A quantile is its bucket's upper end; below 1 us is one bucket."""
    line = told([(0, 1, 7, latency_ns)] * 99 + [(0, 1, 7, 900_000_000)])
    assert latency_ns <= line.p50_ns[0] <= max(latency_ns, 1024) * 1.126
    assert line.p99_ns[0] == line.p50_ns[0]
    assert not line.p50_ns[1:].any(), "empty bins have none"


@pytest.mark.python_mode
def test_quantiles_are_numpys_within_their_precision() -> None:
    latencies = np.random.default_rng(3).lognormal(12, 1.5, 3000).clip(2000, 9e8).astype(np.int64)
    line = told([(0.5, 1, 7, int(latency)) for latency in latencies])
    for estimate, fraction in ((line.p50_ns, 0.5), (line.p99_ns, 0.99)):
        right = np.quantile(latencies, fraction, method="inverted_cdf")
        assert right <= estimate[0] <= right * 1.126


def regular(until_ms: int, silent: range, flows: int = 4) -> list[tuple[float, int, int, int]]:
    return [(ms, ms % flows, 7, 1000) for ms in range(until_ms) if ms not in silent]


@pytest.mark.python_mode
@pytest.mark.parametrize(
    ("silent", "found"),
    [
        ([range(130, 170)], (129, 170)),  # of the loss's making, to the nanosecond
        ([range(20, 60), range(130, 140)], (130, 140)),  # the longest was before the loss: what follows is known to a bin
        ([range(130, 140), range(450, 480)], (130, 140)),  # a process waited for a core, long after
        ([range(130, 140), range(450, 510)], (449, 510)),  # as long as that nothing may be silent
        ([range(20, 60)], (120, 120)),  # nothing was silent after the loss
    ],
)
def test_an_outage_is_of_the_loss_or_too_long_to_be_anything_else(silent: list[range], found: tuple[int, int]) -> None:
    gone = [ms for span in silent for ms in span]
    line = told([(ms, ms % 4, 7, 1000) for ms in range(600) if ms not in gone], seconds=0.6)
    begin, end, ended = line.outage_after(ORIGIN_NS + 120 * MS, ORIGIN_NS + 600 * MS)
    assert ended
    assert ((begin - ORIGIN_NS) // MS, (end - ORIGIN_NS) // MS) == found


@pytest.mark.python_mode
def test_an_outage_ends_with_the_first_packet_or_not_at_all() -> None:
    line = told(regular(100, range(30, 60)))
    assert line.outage(ORIGIN_NS + 100 * MS) == (ORIGIN_NS + 29 * MS, ORIGIN_NS + 60 * MS, True)
    assert line.flows[:, timeline.PACKETS].tolist() == [18, 18, 17, 17]
    assert line.broken(ORIGIN_NS + 30 * MS, ORIGIN_NS + 100 * MS) == (4, 0)
    line = told(regular(100, range(30, 100)))
    assert line.outage(ORIGIN_NS + 100 * MS) == (ORIGIN_NS + 29 * MS, ORIGIN_NS + 100 * MS, False)
    assert line.broken(ORIGIN_NS + 30 * MS, ORIGIN_NS + 100 * MS) == (4, 4)


@pytest.mark.python_mode
def test_the_load_is_restored_when_its_rate_is_not_with_the_first_packet() -> None:
    line = told([*regular(100, range(30, 60)), (50.0, 1, 7, 1000)])
    assert line.restored_ns(ORIGIN_NS + 30 * MS, ORIGIN_NS + 100 * MS) == ORIGIN_NS + 59 * MS, "9 of its 10 bins are full"
    line = told(regular(100, range(30, 95)))
    assert line.restored_ns(ORIGIN_NS + 30 * MS, ORIGIN_NS + 100 * MS) is None


@pytest.mark.python_mode
def test_a_flow_is_broken_if_it_comes_from_elsewhere_or_not_again() -> None:
    arrivals = [arrival for arrival in regular(100, range(30, 60)) if arrival[0] < 30 or arrival[1] != 2]
    arrivals = [(ms, slot, 8 if slot == 3 and ms > 30 else source, ns) for ms, slot, source, ns in arrivals]
    arrivals.append((99.5, 77, 7, 1000))  # a flow that began later is none of those that could break
    assert told(arrivals).broken(ORIGIN_NS + 30 * MS, ORIGIN_NS + 100 * MS) == (4, 2)


@pytest.mark.python_mode
def test_what_is_kept_counts_from_the_loss() -> None:
    line = told(regular(100, range(30, 60)))
    kept = time_line(line.encode(ORIGIN_NS + 30 * MS, -10, 40))
    assert kept["ms"].tolist() == list(range(-10, 40))
    assert kept["received"].tolist() == [1] * 10 + [0] * 30 + [1] * 10
    assert (kept["highest_us"] == kept["watched"]).all()
    with pytest.raises(NearstateError, match="time line of 4 characters cannot be read"):
        time_line("abcd")


@pytest.mark.python_mode
@pytest.mark.parametrize(
    ("wanted", "said"),
    [({"bin_us": 1, "seconds": 1}, "at most 20000 bins"), ({"bin_us": 0, "seconds": 1}, "at most 20000 bins"),
     ({"bin_us": 1000, "seconds": 1, "watch": [256]}, "partition 256 is not one of 0 to 255")],
)  # fmt: skip
def test_a_wrong_wish_is_refused(wanted: dict[str, object], said: str) -> None:
    with pytest.raises(NearstateError, match=said):
        timeline.make_time_line(wanted, 0)


@pytest.mark.bounds
def test_the_sink_tells_the_line_the_source_it_sees() -> None:
    """Address and port as a NAT would have left them: 10.64.0.7:40002 and another port of the same address."""
    source = make_source(Traffic(flows=4), "02:00:00:00:00:01", "02:00:00:00:00:04", "10.128.0.1")
    source.control[STEP] = 7
    memory = np.zeros(64, np.uint8)
    for wanted, changes in (({"bin_us": 1000, "seconds": 1}, 1), (None, 0)):
        counter = sinks.make_sink(100, 7, wanted)
        for sequence, port in enumerate((40002, 40002, 40004)):
            write_frame(source, memory, 0, 60, 3, sequence, 5_000_000)
            memory[26:30], memory[34:36] = (10, 64, 0, 7), divmod(port, 256)
            sinks.take(counter, memory, 0, 60, int(counter.line.control[timeline.ORIGIN_NS]) + sequence)
        assert counter.control[sinks.RECEIVED] == 3
        assert counter.line.flows[:, timeline.CHANGES].sum() == changes
        assert counter.line.flows[:, timeline.SOURCE].max() == (0x0A400007 << 16 | 40004) * changes
        assert counter.line.bins[0, timeline.RECEIVED] == 3 * (wanted is not None)
