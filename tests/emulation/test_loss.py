"""Does a cut link pass nothing until it is mended, and is a lost host gone with all it had, while the load goes on?"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from datastore.base.errors import NearstateError
from experiments.harness import spec
from experiments.harness.bench import Bench
from experiments.harness.procedures import failover
from experiments.harness.runner import network_parameters
from experiments.harness.spec import Experiment
from tests.rack import emulation_of
from topologies.emulation.journal import Journal
from topologies.emulation.network import Network
from topologies.emulation.processes import Launcher

LOSS = Experiment(
    question="What does the loss of nf1 cost?",
    procedure="failover",
    sweeps=({"nf": ("nat",), "placement": ("local",)},),
    settings={"offered_kpps": 5.0, "seconds": 1.5, "lost_at_s": 0.4},
    traffic={"flows": 100},
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    trial = next(spec.trials("loss", LOSS))
    with emulation_of("loss", tmp_path_factory) as (journal, launcher):
        network = Network("rack", network_parameters(trial, LOSS), journal.run_id, launcher, journal)
        bench = Bench(trial, LOSS, network, launcher)
        with network:
            yield bench
            bench.stop()


def answers(network: Network, host: str, address: str) -> bool:
    command = ["nsenter", "-t", str(network.hosts[host].pid), "-n", "ping", "-c", "1", "-W", "1", address]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_cut_link_passes_nothing_and_a_mended_one_everything(bench: Bench) -> None:
    network = bench.network
    address = bench.storage_address("nf2")
    assert answers(network, "nf1", address)
    network.cut("nf2", "storage")
    assert not answers(network, "nf1", address)
    network.mend("nf2", "storage")
    assert answers(network, "nf1", address)
    with pytest.raises(NearstateError, match="unknown interface of nf2 'stroage'"):
        network.cut("nf2", "stroage")
    with pytest.raises(NearstateError, match="unknown host 'nf9'"):
        network.mend("nf9")


def test_a_lost_host_is_gone_and_the_other_carries_on(bench: Bench) -> None:
    (point,) = failover.measure(bench)
    found, ledger = point["metrics"], point["ledger"]
    assert bench.functions["nf1"].wait(5) == -9
    assert list(bench.function_statistics()) == ["nf2"]
    assert not answers(bench.network, "control", bench.storage_address("nf1"))
    assert set(bench.network.steering()) == {"nf2"}
    assert found["recovered_ratio"] == 1
    assert found["flows"] == 50
    assert found["detection_ms"] >= 63, "a lease lasts 80 ms and 8 of margin, from a heartbeat up to 25 ms ago"
    assert found["outage_ms"] == pytest.approx(found["detection_ms"] + found["recovery_ms"])
    assert found["outage_ms"] >= found["silence_ms"] - 10
    assert 0 < ledger["lost"] == found["packets_lost"] < 0.6 * ledger["sent"]
    with pytest.raises(NearstateError, match="host 'nf1' cannot be lost: client, control, nf2, server are there"):
        bench.lose_host("nf1")


def test_the_detector_that_stands_in_takes_as_long_as_a_lease() -> None:
    ages = [failover.detection_ns(seed) for seed in range(200)]
    assert 63e6 <= min(ages) < 65e6
    assert 86e6 < max(ages) <= 88e6
    assert failover.detection_ns(3) == ages[3]


def test_a_host_that_is_none_of_two_cannot_fail_over(tmp_path: Path) -> None:
    trial = next(spec.trials("loss", LOSS))
    with Journal("test-loss-none") as journal, Launcher(journal, tmp_path) as launcher:
        network = Network("back_to_back", {}, "test-loss-none", launcher, journal)
        with pytest.raises(NearstateError, match="failover of 'nf1' among no NF hosts"):
            failover.ends(Bench(trial, LOSS, network, launcher))
