"""Do real clients notice that the pool of backends behind their address changes, or that one of them falls silent?

client -> 10.64.1.1 -> nf1, nf2 (load_balancer) -> server, server2, server3, an nginx each
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from experiments.harness.bench import Bench
from experiments.harness.procedures.real_clients import LARGE, SMALL, RealClients
from experiments.harness.spec import Experiment, Trial
from tests.rack import emulation_of, working_rack
from topologies.emulation import system
from topologies.emulation.journal import Journal
from topologies.emulation.network import CLIENT_ADDRESS
from topologies.emulation.processes import Launcher

VIRTUAL, SERVERS = "10.64.1.1", ("server", "server2", "server3")
EXPERIMENT = Experiment("Does nobody notice?", "real_clients", (), network={"server_hosts": len(SERVERS)})
FAILURE_S, TRIAL_S, PATIENCE_S, BUSY_S = 0.4, 3.0, 15.0, 4
IS_LONG = bool(os.environ.get("NEARSTATE_LONG"))
LONG = pytest.mark.skipif(not IS_LONG, reason="long mode only: NEARSTATE_LONG=1")
IN_CI = [("integrated", "rewrite"), ("centralized", "direct")]
IN_LONG_MODE = [("integrated", "direct"), ("centralized", "rewrite"), ("local", "rewrite"), ("integrated:hashed", "rewrite")]
SYSTEMS = [*IN_CI, *(pytest.param(system, marks=LONG) for system in IN_LONG_MODE)]
"""(placement, mode)."""


@dataclass
class Running:
    """A rack with a balancer on two NF hosts, web servers behind it, and real clients."""

    bench: Bench
    mode: str
    real: Any = None

    def settings(self, *weights: int) -> dict[str, Any]:
        """Return the balancer's settings with these weights of the servers; those without one are not in the pool."""
        interfaces = [self.bench.network.hosts[name].interfaces["net"] for name in SERVERS]
        pool = [{"address": str(interface.ipv4).partition("/")[0], "mac": interface.mac, "weight": weight}
                for interface, weight in zip(interfaces, weights, strict=False)]  # fmt: skip
        return {"load_balancer": {"virtual_address": VIRTUAL, "ports": 80, "mode": self.mode, "backends": pool,
                                  "failure_s": FAILURE_S, "trial_s": TRIAL_S}}  # fmt: skip

    def change(self, *weights: int) -> None:
        self.bench.change_settings(self.settings(*weights))

    def accepted(self) -> list[int]:
        """Return how many connections each server has accepted."""
        return [self.real.accepted(name) for name in SERVERS]

    def established(self) -> list[int]:
        return [self.real.connections(name) for name in SERVERS]

    def await_established(self, count: int) -> list[int]:
        deadline = time.monotonic() + PATIENCE_S
        while sum(now := self.established()) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        return now

    def silence(self, server: str, silent: bool = True) -> None:
        """Have a server send nothing to the client any more, as if it were dead; or again."""
        with system.network_namespace(self.bench.network.hosts[server].pid):
            route = ["ip", "route", "add" if silent else "delete", "blackhole", f"{CLIENT_ADDRESS}/32"]
            system.run(route, dict(os.environ))


def shorten(running: Running) -> None:
    """Skip what the other system of the ordinary run shows as well."""
    if running.mode == "direct" and not IS_LONG:
        pytest.skip("direct return: long mode only: NEARSTATE_LONG=1")


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, Launcher]]:
    with emulation_of("balancer", tmp_path_factory) as made:
        yield made


@pytest.fixture(scope="module", params=SYSTEMS, ids="-".join)
def running(emulation: tuple[Journal, Launcher], request: pytest.FixtureRequest) -> Iterator[Running]:
    """Yield each system once; at the end every packet must have its place."""
    placement, mode = request.param
    trial = Trial("mine", "rack", "load_balancer", placement, 1, {}, {}, 0, 1)

    def choose_pool(bench: Bench) -> None:
        bench.overrides = {"functions": Running(bench, mode).settings(1, 1, 1)}

    with working_rack(emulation, trial, EXPERIMENT, choose_pool) as (bench, statistics):
        if mode == "direct":  # the backends have the virtual address themselves
            for name in SERVERS:
                with system.network_namespace(bench.network.hosts[name].pid):
                    system.run(["ip", "address", "add", f"{VIRTUAL}/32", "dev", "lo"], dict(os.environ))
        served_at = VIRTUAL if mode == "direct" else ""
        yield Running(bench, mode, RealClients(bench, address=VIRTUAL, backends=SERVERS[1:], served_at=served_at))
    for counts in statistics.values():
        assert counts["ledger"]["forwarded"] > 1000


def test_no_connection_breaks_when_the_pool_changes_and_a_drained_server_gets_no_new_ones(running: Running) -> None:
    real, others = running.real, running.real.more_clients()
    running.change(1, 1, 1)
    real.begin("request", file=SMALL, connections=60, seconds=BUSY_S)
    end_s = time.monotonic() + BUSY_S
    then = running.await_established(60)
    assert min(then) > 5, "the balancer spreads them"
    for weights, closed in (((1, 0, 1), (1,)), ((1, 0), (1, 2)), ((0, 1), (0, 2))):
        running.change(*weights)
        before = running.accepted()
        assert real.do("connect", clients=others, file=SMALL, count=40).get("connections") == 40
        new = [now - count for now, count in zip(running.accepted(), before, strict=True)]
        assert [server for server in range(3) if new[server] == 0] == list(closed), "drained or removed: nobody new"
        assert sum(new) == 40
        now = running.established()
        assert time.monotonic() > end_s or all(here >= count for here, count in zip(now, then, strict=True)), "who is there stays"
    answer = real.end()
    assert (answer["failed"], answer["requests"] > 1000) == (0, True), answer
    others.kill()


def test_downloads_arrive_undamaged_while_the_pool_changes_all_the_time(running: Running) -> None:
    shorten(running)
    real = running.real
    real.begin("download", file=LARGE, count=6)
    for turn in range(30):
        running.change(*((1, 0, 1), (0, 1), (1, 1, 1))[turn % 3])
        time.sleep(0.03)
    answer = real.end()
    assert answer.get("sha256") == [real.sha256[LARGE]] * 6, answer


def test_a_silent_server_is_left_out_and_comes_back_after_a_trial(running: Running) -> None:
    shorten(running)
    real = running.real
    running.change(1, 1, 1)
    running.silence("server3")
    try:
        before = running.accepted()
        answer = real.do("request", file=SMALL, connections=30, seconds=3, keep=False)
        assert (answer["failed"], answer["requests"] > 100) == (0, True), "a SYN sent again goes to another server"
        answer = real.do("connect", file=SMALL, count=60)
        assert answer.get("connections") == 60, answer
        assert answer["seconds"] < 10, "it is left out but for trials: else a third of them would wait a second each"
        new = [now - count for now, count in zip(running.accepted(), before, strict=True)]
        assert new[2] == 0
        assert min(new[:2]) > 50
    finally:
        running.silence("server3", silent=False)
    deadline = time.monotonic() + PATIENCE_S
    before = running.accepted()
    while running.accepted()[2] - before[2] < 10:
        assert time.monotonic() < deadline, "it answers again, and gets no connection"
        assert real.do("connect", file=SMALL, count=20).get("connections") == 20
