"""Are real TCP handshakes counted as what they are, over symmetric and asymmetric paths?"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from experiments.harness.bench import Bench
from experiments.harness.procedures import handshakes
from experiments.harness.runner import network_parameters
from experiments.harness.spec import Experiment, Trial
from topologies.emulation.journal import Journal
from topologies.emulation.network import Network
from topologies.emulation.processes import Launcher

SETTINGS = {"rate_per_s": 200.0, "seconds": 0.2, "timeout_s": 0.5}


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, Launcher]]:
    if os.geteuid() != 0:
        pytest.skip("needs root: it builds the emulated rack")
    logs, preload = tmp_path_factory.mktemp("logs"), ("experiments.harness.preload",)
    with Journal(f"test-handshakes-{os.getpid()}") as journal, Launcher(journal, logs, preload) as launcher:
        yield journal, launcher


@pytest.mark.parametrize(("placement", "asymmetric_share"), [("local", 0.0), ("integrated", 1.0)])
def test_shared_state_opens_connections_over_asymmetric_paths_and_local_state_opens_none(
    emulation: tuple[Journal, Launcher], placement: str, asymmetric_share: float
) -> None:
    journal, launcher = emulation
    experiment = Experiment("Do they open?", "handshakes", (), settings=SETTINGS)
    trial = Trial("mine", "rack", "firewall", placement, 1, {}, {}, 0, 1)
    network = Network("rack", network_parameters(trial, experiment), journal.run_id, launcher, journal)
    bench = Bench(trial, experiment, network, launcher)
    try:
        network.start()
        symmetric, asymmetric = handshakes.measure(bench)
    finally:
        bench.stop()
        network.stop()
    assert (symmetric["sweep"], asymmetric["sweep"]) == ({"paths": "symmetric"}, {"paths": "asymmetric"})
    assert symmetric["valid"], symmetric["invalid_reasons"]
    assert asymmetric["valid"], asymmetric["invalid_reasons"]
    assert symmetric["metrics"]["attempts"] == asymmetric["metrics"]["attempts"] == 40
    assert symmetric["metrics"]["success_ratio"] == 1.0
    assert symmetric["histograms"]["handshake_ns"]
    assert asymmetric["metrics"]["success_ratio"] == asymmetric_share
    assert symmetric["ledger"]["nf"]["forwarded"] >= 4 * 40, "SYN, SYN-ACK, ACK and RST of each"
    if placement == "local":
        assert asymmetric["ledger"]["nf"]["dropped_by_verdict"] >= 40, "every SYN-ACK, some of them sent again"
