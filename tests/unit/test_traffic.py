"""Is the traffic what its description says, the same for the same seed, and refused when it makes no sense?"""

from __future__ import annotations

import numpy as np
import pytest

from datastore.base.errors import NearstateError
from datastore.base.partitioning import PARTITIONS
from datastore.store.partitions import flow_partition
from experiments.workloads.traffic import IMIX, Traffic, flow_tuple, make_tables, packets_in


def test_flows_have_tuples_of_their_own() -> None:
    flows = [*range(70_000), *range(1_000_000, 1_070_000), *range(9_990_000, 10_000_000)]
    assert len({flow_tuple(flow) for flow in flows}) == len(flows)


def test_every_partition_gets_the_same_share_of_flows() -> None:
    counts = np.zeros(PARTITIONS, np.int64)
    for flow in range(30_720):
        _, port, _ = flow_tuple(flow)
        counts[flow_partition(0, port, True)] += 1
    assert set(counts) == {30_720 // PARTITIONS}
    small = [flow_partition(0, flow_tuple(flow)[1], True) for flow in range(1000)]
    assert max(np.bincount(small)) - min(np.bincount(small)) <= 1


def test_client_addresses_spread_over_the_client_network() -> None:
    addresses = [flow_tuple(flow)[0] for flow in range(4096)]
    assert {address.rpartition(".")[0] for address in addresses} == {"10.0.1"}
    assert len(set(addresses)) == 256


def test_uniform_flows_come_equally_often() -> None:
    slots = make_tables(Traffic(flows=1000)).slots
    counts = np.bincount(slots, minlength=1000)
    assert counts.max() - counts.min() <= 1
    many = make_tables(Traffic(flows=1_000_000)).slots
    assert len(np.unique(many)) > 60_000
    assert many.max() < 1_000_000


def test_zipf_flows_follow_their_law() -> None:
    slots = make_tables(Traffic(flows=1000, flow_choice="zipf", zipf_exponent=1.2)).slots
    counts = np.bincount(slots, minlength=1000)
    weights = np.arange(1, 1001) ** -1.2
    for rank in (0, 1, 4, 19):
        assert counts[rank] / len(slots) == pytest.approx(weights[rank] / weights.sum(), rel=0.12)


def test_sizes_are_fixed_or_the_simple_imix() -> None:
    assert set(make_tables(Traffic(frame_bytes=128)).lengths) == {124}
    lengths = make_tables(Traffic(frame_bytes=0)).lengths
    for size, share in IMIX:
        assert np.mean(lengths == size - 4) == pytest.approx(share / 12, rel=0.05)
    assert set(lengths) == {size - 4 for size, _ in IMIX}


def test_arrivals_have_the_mean_they_should() -> None:
    constant, poisson = make_tables(Traffic()).gaps, make_tables(Traffic(arrivals="poisson")).gaps
    assert set(constant) == {1.0}
    assert poisson.mean() == pytest.approx(1.0, abs=1e-9)
    assert poisson.std() == pytest.approx(1.0, abs=0.02), "an exponential's deviation is its mean"
    assert np.mean(poisson > 1) == pytest.approx(np.exp(-1), abs=0.01)


def test_the_share_of_new_flows() -> None:
    assert make_tables(Traffic(new_flow_share=0.1)).new.mean() == pytest.approx(0.1, abs=0.01)
    assert not make_tables(Traffic()).new.any()


def test_a_seed_reproduces_and_another_does_not() -> None:
    traffic = {"flows": 500, "frame_bytes": 0, "arrivals": "poisson", "flow_choice": "zipf", "new_flow_share": 0.2}
    one, same, other = (make_tables(Traffic.of(**traffic, seed=seed)) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flow": 5}, "unknown traffic parameter 'flow': did you mean flows"),
        ({"arrivals": "possion"}, "unknown arrival process 'possion': did you mean poisson"),
        ({"flow_choice": "ziph"}, "did you mean zipf"),
        ({"frame_bytes": 63}, "frame_bytes=63: 64 to 1518"),
        ({"frame_bytes": 1519}, "64 to 1518, or 0 for IMIX"),
        ({"flows": 0}, "flows=0: 1 to"),
        ({"client_ports": 300}, "client_ports=300: 256 to 30,720 in multiples of 256"),
        ({"new_flow_share": 1.5}, "new_flow_share=1.5: 0 to 1"),
        ({"zipf_exponent": 0.0}, "zipf_exponent=0.0"),
        ({"flows": "many"}, "flows='many'"),
        ({"flows": 1.5}, "flows=1.5"),
        ({"frame_bytes": None}, "frame_bytes=None"),
        ({"new_flow_share": float("nan")}, "new_flow_share=nan"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name_and_value(values: dict[str, object], message: str) -> None:
    with pytest.raises(NearstateError, match=message):
        Traffic.of(**values)


def test_packets_of_a_step() -> None:
    assert packets_in(20, 0.5) == 10_000
    assert packets_in(0.0001, 0.1) == 1
