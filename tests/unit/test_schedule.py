"""Is a step judged by the schedule that was drawn for it, and not by the rate that it was asked for?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.figures import highest_carried_kpps
from experiments.harness import accounting
from experiments.workloads.generator import CURSOR, generate, make_source
from experiments.workloads.traffic import CHOICES, Traffic, make_tables, packets_in, scheduled_s
from nfs.dataplane.frames import make_frames
from nfs.dataplane.port import closed_port

MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02")
NO_FUNCTIONS: dict[str, Any] = {"functions": {}}


def judged(sent: int, planned: int, elapsed_s: float, schedule_s: float, limit_us: float = 500.0) -> list[str]:
    """Return the gate's reasons for a step whose every packet left in time."""
    told = {"sent": sent, "planned": planned, "elapsed_s": elapsed_s, "scheduled_s": schedule_s, "lateness": {"p99_us": 20.0}}
    return accounting.doubts(planned / 1e3, limit_us, told, NO_FUNCTIONS)


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
@pytest.mark.parametrize("first", [0, 200, CHOICES - 300, 5 * CHOICES + 7])
def test_the_schedule_is_the_one_the_generator_walks(arrivals: str, first: int) -> None:
    """The generator itself says when it would send the next packet, behind the last gap."""
    source = make_source(Traffic(flows=1, arrivals=arrivals), *MACS, "10.128.0.1")
    source.control[CURSOR] = first
    walked_ns = generate(source, closed_port(ring_slots=1024), make_frames(1024), 0, 0.0, 600, 1e6 / 20.0, 1 << 62)
    assert scheduled_s(source.tables, first, 600, 20.0) == pytest.approx(walked_ns / 1e9, rel=1e-9)


def test_a_schedule_longer_than_the_table_begins_it_again() -> None:
    tables = make_tables(Traffic(arrivals="poisson"))
    assert scheduled_s(tables, 5, 3 * CHOICES, 1.0) == pytest.approx(3 * CHOICES / 1e3)


def test_a_step_that_kept_its_drawn_schedule_is_valid_whatever_the_sample() -> None:
    """1 kpps for 1 s: of 300 samples of 1,000 gaps some are 5 % longer than the mean says."""
    tables = make_tables(Traffic(arrivals="poisson"))
    drawn = [scheduled_s(tables, 1000 * step, packets_in(1.0, 1.0), 1.0) for step in range(300)]
    assert max(drawn) > 1.05
    assert min(drawn) < 0.95
    for schedule_s in drawn:
        assert judged(1000, 1000, schedule_s, schedule_s) == []
        assert judged(1000, 1000, schedule_s * 1.02, schedule_s) != [], "2 % behind its own schedule"


def test_a_step_behind_its_schedule_is_not_believed() -> None:
    assert judged(1000, 1000, 1.005, 1.0) == []
    (reason,) = judged(1000, 1000, 1.02, 1.0)
    assert reason == "generator sent 1.0 of 1 kpps: the machine or the path took no more"
    assert judged(980, 1000, 1.0, 1.0) != [], "not all of it left"
    assert judged(0, 1000, 1.5, 1.0) != []


def test_a_schedule_of_a_millisecond_may_end_as_late_as_a_packet_may_be() -> None:
    """Two packets a millisecond apart, the second one 100 us late: within the limit on lateness."""
    assert judged(2, 2, 0.0011, 0.001) == []
    assert judged(2, 2, 0.0011, 0.001, limit_us=0.0) == []
    assert judged(2, 2, 0.0016, 0.001) != []


def test_an_even_schedule_is_as_long_as_its_rate_says() -> None:
    tables = make_tables(Traffic())
    for offered_kpps, seconds in ((20.0, 0.4), (0.3, 1.0), (400.0, 2.0)):
        planned = packets_in(offered_kpps, seconds)
        assert scheduled_s(tables, 11, planned, offered_kpps) == pytest.approx(planned / offered_kpps / 1e3)
    assert np.all(tables.gaps == 1.0)


def test_a_load_of_random_arrivals_is_carried_when_what_was_sent_arrived() -> None:
    """A sample 4 % below the load that it is named by, of which all arrived; and a path that lost a fifth."""

    def rows(received_kpps: float, sent_kpps: float) -> pd.DataFrame:
        values = {"delivered_kpps": received_kpps, "sent_kpps": sent_kpps}
        return pd.DataFrame([{"placement": placement, "offered_kpps": 10, "metric": metric, "value": value, "valid": True}
                             for placement in ("local", "integrated") for metric, value in values.items()])  # fmt: skip

    assert highest_carried_kpps(rows(9.6, 9.61), ["local", "integrated"]) == 10
    assert highest_carried_kpps(rows(7.7, 9.61), ["local", "integrated"]) is None
    assert highest_carried_kpps(rows(9.89, 10.4), ["local", "integrated"]) is None, "below the load itself"
    assert highest_carried_kpps(rows(9.99, 10.4), ["local", "integrated"]) == 10
