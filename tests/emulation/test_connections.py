"""Do all connections open over a cable, does every one fail without a responder, and do the kernel and our firewall pass them?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from experiments.harness.bench import Bench
from experiments.harness.procedures import connection_rate
from experiments.harness.runner import network_parameters
from experiments.harness.spec import Experiment, Trial
from topologies.emulation.journal import Journal
from topologies.emulation.network import Network
from topologies.emulation.processes import Launcher

pytestmark = pytest.mark.alone
SETTINGS = {"capacity": 1 << 16, "warmup_kops": 2.0, "warmup_seconds": 0.1, "seconds": 0.1, "ladder_kops": (5,),
            "search_steps": 2, "search_high_kops": 20.0, "search_seconds": 0.1}  # fmt: skip


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, Launcher]]:
    if os.geteuid() != 0:
        pytest.skip("needs root: it makes network namespaces")
    logs, preload = tmp_path_factory.mktemp("logs"), ("experiments.harness.preload",)
    with Journal(f"test-connections-{os.getpid()}") as journal, Launcher(journal, logs, preload) as launcher:
        yield journal, launcher


@pytest.fixture
def bench(emulation: tuple[Journal, Launcher], request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The workload's bench with the network function, the placement and the kind of ports that the test names."""
    journal, launcher = emulation
    nf, placement, port_kind = request.param
    experiment = Experiment("Do they open?", "connection_rate", (), settings={**SETTINGS, "port_kind": port_kind})
    trial = Trial("mine", "back_to_back", nf, placement, 1, {}, {}, 0, 1)
    network = Network("back_to_back", network_parameters(trial, experiment), journal.run_id, launcher, journal)
    bench = Bench(trial, experiment, network, launcher)
    try:
        network.start()
        yield bench
    finally:
        bench.stop()
        network.stop()


def assert_all_opened(point: dict[str, Any]) -> None:
    ledger = point["ledger"]
    assert ledger["sent"] == ledger["syns"] == ledger["established"] == ledger["completed"] > 0
    assert (ledger["repeated"], ledger["foreign"], point["metrics"]["failed"]) == (0, 0, 0)


OPENED = [(nf, placement, "auto") for nf in ("firewall", "nat") for placement in ("integrated", "nftables")]


@pytest.mark.parametrize("bench", [*OPENED, ("firewall", "integrated", "afpacket")], indirect=True, ids="-".join)
def test_every_connection_opens_through_our_functions_and_the_kernel_s(bench: Bench) -> None:
    points = connection_rate.measure(bench)
    for point in points[:2]:
        assert_all_opened(point)
    assert [point["sweep"] for point in points] == [{"load": "saturated"}, {"offered_kops": 5.0}, {"search": "rfc9693"}]
    assert points[1]["ledger"]["sent"] == 500
    assert points[2]["metrics"]["lossless_kops"] > 0
    if not bench.is_peer:
        assert points[1]["ledger"]["nf"]["forwarded"] == 3 * 500, "SYN, SYN ACK and ACK of each"


@pytest.mark.parametrize("bench", [("firewall", "local", "auto")], indirect=True, ids="-".join)
def test_connections_without_an_answer_have_failed(bench: Bench) -> None:
    bench.start_state()
    bench.start_functions()
    ends = connection_rate.Ends(bench)
    assert_all_opened(ends.step(2.0, 0.1))
    bench.functions["nf1"].kill()
    bench.functions.clear()
    point = ends.step(2.0, 0.1)
    assert (point["ledger"]["sent"], point["ledger"]["completed"], point["ledger"]["syns"]) == (200, 0, 0)
    assert (point["metrics"]["failed"], point["metrics"]["failed_ratio"]) == (200, 1.0)
