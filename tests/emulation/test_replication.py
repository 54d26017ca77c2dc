"""Replicated stores under network functions in the rack: what packets did is on every replica before they leave, and stays."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from datastore.base.errors import NearstateError
from datastore.base.partitioning import PARTITIONS
from experiments.harness.bench import Bench
from experiments.harness.spec import Experiment, Trial
from tests.rack import emulation_of, working_rack
from topologies.emulation.journal import Journal
from topologies.emulation.processes import Launcher

FLOWS, RATE_KPPS = 500, 5.0
EVEN = list(range(0, PARTITIONS, 2))


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, Launcher]]:
    with emulation_of("replication", tmp_path_factory) as made:
        yield made


def rack(emulation: tuple[Journal, Launcher], nf: str, placement: str, replicas: int) -> Any:
    trial = Trial("test", "rack", nf, placement, replicas, {}, {"coordinated": True}, 0, 1)
    experiment = Experiment("?", "throughput", ({},), traffic={"flows": FLOWS}, network={"nf_hosts": 2})
    return working_rack(emulation, trial, experiment)


def counted(bench: Bench, host: str) -> dict[tuple[int, int], int]:
    """Return the packets that the records of a host's table count, by key."""
    return {(record.low, record.high): int(np.frombuffer(record.value, np.uint64)[0]) for record in bench.records(host)}


@pytest.mark.parametrize("placement", ["integrated", "centralized"])
def test_what_left_is_on_both_replicas(emulation, placement):
    with rack(emulation, "traffic_counter", placement, 2) as (bench, _):
        bench.start_workload()
        point = bench.step(RATE_KPPS, 1.0)
        assert point["ledger"]["received"] == point["ledger"]["sent"] == 5000
        tables = [counted(bench, host) for host in bench.stores]
        assert tables[0] == tables[1]
        assert sum(tables[0].values()) == 5000


@pytest.mark.parametrize("placement", ["integrated", "centralized"])
def test_a_lost_host_takes_nothing_that_left(emulation, placement):
    with rack(emulation, "traffic_counter", placement, 2) as (bench, _):
        bench.start_workload()
        bench.offer(RATE_KPPS, 3.0)
        first, survivor = list(bench.stores)
        lost = bench.nf_hosts[0].name if placement == "integrated" else first
        bench.lose_host(lost)
        point = bench.finish()
        assert point["ledger"]["received"] > 0.9 * point["ledger"]["sent"]
        groups = bench.status()["map"]["groups"]
        assert all(group["members"] == [survivor] for group in groups)
        if placement == "integrated":
            assert set(bench.network.steering()) == {survivor}
        received_and_lost = point["ledger"]["sent"]
        assert point["ledger"]["received"] <= sum(counted(bench, survivor).values()) <= received_and_lost


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_move_under_load_loses_and_overtakes_nothing(emulation, replicas):
    with rack(emulation, "nat", "integrated", replicas) as (bench, statistics):
        bench.start_workload()
        bench.warm_up()
        bench.offer(RATE_KPPS, 3.0)
        bench.move(EVEN, "nf2")
        assert bench.network.steering().count("nf2") == PARTITIONS
        bench.move(EVEN, "nf1")
        point = bench.finish()
        assert point["metrics"]["lost"] == point["metrics"]["flow_reordered"] == point["metrics"]["duplicated"] == 0
        assert bench.network.steering().count("nf1") == len(EVEN)
        bench.wait_full()
    assert sum(counts["ledger"]["uncommitted"] for counts in statistics.values()) == 0


@pytest.mark.parametrize("nf", ["nat", "traffic_counter"])
def test_a_lost_store_process_stalls_and_lets_overtake_nobody(emulation, nf):
    """Its NF process lives, has the packets, and asks the new primary for what it parked."""
    with rack(emulation, nf, "integrated", 2) as (bench, statistics):
        bench.start_workload()
        bench.warm_up()
        bench.offer(RATE_KPPS, 3.0)
        bench.lose("store", "nf1")
        point = bench.finish()
        assert point["metrics"]["flow_reordered"] == point["metrics"]["duplicated"] == 0
        assert point["ledger"]["received"] > 0.9 * point["ledger"]["sent"]
        assert {tuple(group["members"]) for group in bench.status()["map"]["groups"]} == {("nf2",)}
        while set(bench.network.steering()) != {"nf2"}:
            time.sleep(0.01)
    assert sum(counts["ledger"]["state_unreachable"] for counts in statistics.values()) == 0  # nobody's patience ran out


@pytest.mark.parametrize("side", ["inside", "outside"])
def test_a_function_whose_link_is_down_hands_its_host_over(emulation, side):
    with rack(emulation, "traffic_counter", "integrated", 2) as (bench, _):
        bench.start_workload()
        bench.offer(RATE_KPPS, 3.0)
        bench.network.cut("nf1", side)
        point = bench.finish()
        assert point["ledger"]["received"] > 0.8 * point["ledger"]["sent"]
        status = bench.status()
        assert set(bench.network.steering()) == {"nf2"}
        assert {group["members"][0] for group in status["map"]["groups"]} == {"nf2"}
        assert status["hosts"]["nf1"]["lease_ms"] > 0
        assert not status["instances"]["nf1"]["link"]
        with pytest.raises(NearstateError, match="packets cannot reach nf1"):
            bench.move(EVEN, "nf1")
        bench.network.mend("nf1", side)
        while not bench.status()["instances"]["nf1"]["link"]:
            time.sleep(0.01)
        bench.move(EVEN, "nf1")  # it can be given its share again
        assert bench.network.steering().count("nf1") == len(EVEN)
        again = bench.step(RATE_KPPS, 1.0)
        assert again["ledger"]["received"] == again["ledger"]["sent"]


def test_a_dead_function_hands_its_host_over(emulation):
    with rack(emulation, "traffic_counter", "integrated", 2) as (bench, _):
        bench.start_workload()
        bench.offer(RATE_KPPS, 3.0)
        bench.functions.pop("nf1").kill()
        point = bench.finish()
        assert point["ledger"]["received"] > 0.9 * point["ledger"]["sent"]
        assert set(bench.network.steering()) == {"nf2"}
        assert {group["members"][0] for group in bench.status()["map"]["groups"]} == {"nf2"}
        assert bench.status()["hosts"]["nf1"]["lease_ms"] > 0  # the store lives, as backup
