"""Do packets of real clients meet the functions of a chain spread over hosts, and is each accounted for at each stage?"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.harness.bench import ASYMMETRIC, SYMMETRIC, Bench
from experiments.harness.procedures.real_clients import LARGE, SMALL, RealClients
from experiments.harness.runner import run_trial
from experiments.harness.spec import Experiment, Trial
from experiments.workloads.real_servers import DOMAIN
from tests.rack import emulation_of, settled, working_rack
from topologies.emulation.journal import Journal
from topologies.emulation.network import SERVER_ADDRESS
from topologies.emulation.processes import Launcher

LONG = pytest.mark.skipif(not os.environ.get("NEARSTATE_LONG"), reason="long mode only: NEARSTATE_LONG=1")
SYSTEMS = [
    ("firewall|nat", 2, "integrated", SYMMETRIC),
    ("firewall|nat", 4, "centralized", ASYMMETRIC),  # two instances a stage, answers by the other ones
    pytest.param(("firewall|nat", 4, "integrated", SYMMETRIC), marks=LONG),
    pytest.param(("firewall|nat", 2, "local", SYMMETRIC), marks=LONG),
    pytest.param(("firewall+traffic_counter|heavy_hitters|nat", 3, "integrated", SYMMETRIC), marks=LONG),
]


@dataclass
class Running:
    """A rack with a chain over its NF hosts, and real clients in it."""

    bench: Bench
    real: RealClients

    def counts(self) -> list[dict[str, int]]:
        """Return the ledger of each stage, its instances' together, once nothing waits."""
        ledgers = settled(self.bench)
        return [
            {cause: sum(ledgers[host][cause] for host in stage) for cause in ledgers[stage[0]]} for stage in self.bench.stages
        ]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, Launcher]]:
    with emulation_of("chains", tmp_path_factory) as made:
        yield made


def test_what_the_generator_sends_is_counted_once_at_each_stage(emulation: tuple[Journal, Launcher], tmp_path: Path) -> None:
    journal, launcher = emulation
    experiment = Experiment("Is every packet accounted for?", "packet_latency", (),
                            settings={"offered_kpps": 5.0, "seconds": 0.5, "lateness_limit_us": 0.0})  # fmt: skip
    trial = Trial("mine", "rack", "firewall|nat", "integrated", 1, {}, {}, 0, 1)
    line = run_trial(trial, experiment, journal, launcher, tmp_path)
    [point] = line["points"] or pytest.fail(str(line["invalid_reasons"]))
    ledger = point["ledger"]
    assert ledger["unaccounted"] == 0, line
    assert ledger["received"] > 0.9 * ledger["sent"] > 2000, line
    assert 2 * ledger["received"] <= ledger["nf"]["received"] <= 2 * ledger["sent"], "once by the firewall, once by the NAT"


@pytest.fixture(scope="module", params=SYSTEMS, ids=lambda system: "-".join(map(str, system)))
def running(emulation: tuple[Journal, Launcher], request: pytest.FixtureRequest) -> Iterator[Running]:
    """Yield each system once; at the end every frame of every stage must have its place."""
    nf, nf_hosts, placement, paths = request.param
    experiment = Experiment("Do chains over hosts work?", "real_clients", (), network={"nf_hosts": nf_hosts})
    trial = Trial("mine", "rack", nf, placement, 1, {}, {"paths": paths}, 0, 1)
    with working_rack(emulation, trial, experiment) as (bench, statistics):
        yield Running(bench, RealClients(bench))
    for counts in statistics.values():
        assert counts["ledger"]["forwarded"] > 10, "each instance has its share"


def test_every_packet_of_a_download_meets_every_stage(running: Running) -> None:
    before = running.counts()
    answer = running.real.do("download", file=LARGE, count=2)
    assert answer.get("sha256") == [running.real.sha256[LARGE]] * 2, answer
    passed = [{cause: now - then[cause] for cause, now in counts.items()}
              for counts, then in zip(running.counts(), before, strict=True)]  # fmt: skip
    assert all(stage["received"] > 2000 for stage in passed)
    for one, other in itertools.pairwise(passed):
        lost_here, lost_there = (stage["received"] - stage["forwarded"] for stage in (one, other))
        assert -lost_there <= one["received"] - other["received"] <= lost_here, "what one stage forwards, the next one receives"


def test_all_kinds_of_clients_are_served(running: Running) -> None:
    """Also pings and errors: a NAT's external address names another partition than the client's own."""
    answer = running.real.do("ping", count=20, payload_bytes=1472)
    assert (answer.get("received"), answer.get("duplicates")) == (20, 0), answer
    assert running.real.do("trace", method="icmp") == {"hops": [SERVER_ADDRESS]}
    assert running.real.do("lookup", name=DOMAIN) == {"addresses": [SERVER_ADDRESS]}
    assert running.real.do("copy", size=1_000_003) == {"same": True}
    answer = running.real.do("request", file=SMALL, connections=100, seconds=1, keep=False)
    assert (answer["failed"], answer["requests"] > 100) == (0, True), answer


def test_the_server_cannot_open_connections_to_the_client(running: Running) -> None:
    outside = RealClients(running.bench, client="server", server="client")
    before = running.counts()
    assert "timed out" in outside.do("download", file=SMALL, timeout_s=0.7)["failed"]
    now = running.counts()
    for process in (outside.clients, outside.servers):
        process.kill()
    assert now[-1]["forwarded"] == before[-1]["forwarded"], "the outermost stage lets none of it through"
    assert now[0]["received"] == before[0]["received"], "so the innermost one sees none of it"
