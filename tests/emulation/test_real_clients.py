"""Do real programs work through the rack: web, name, copy and stream servers, their clients, a thousand connections at once?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from datastore.base import ROOT
from experiments.harness.bench import Bench
from experiments.harness.procedures.real_clients import LARGE, SMALL, RealClients, protocol_counters
from experiments.harness.runner import network_parameters
from experiments.harness.spec import Experiment, Trial
from experiments.workloads.real_servers import DOMAIN
from tests.rack import emulation_of, working_rack
from topologies.emulation.journal import Journal, clean, processes_of
from topologies.emulation.network import SERVER_ADDRESS, Network
from topologies.emulation.processes import Launcher

EXPERIMENT = Experiment(question="Do real programs work?", procedure="real_clients", sweeps=())
MANY = 1000
RUN_ID = "test-real-clients-killed"
LONG = pytest.mark.skipif(not os.environ.get("NEARSTATE_LONG"), reason="long mode only: NEARSTATE_LONG=1")
IN_CI = [("firewall", "integrated"), ("firewall", "centralized"), ("nat", "integrated")]
IN_LONG_MODE = [("firewall", "local"), ("firewall", "integrated:hashed"), ("passthrough", "local")]
IN_LONG_MODE += [("traffic_counter", placement) for placement in ("local", "integrated", "integrated:hashed", "centralized")]
IN_LONG_MODE += [("nat", placement) for placement in ("local", "integrated:hashed", "centralized")]
IN_LONG_MODE += [("nat_symmetric", "integrated"), ("firewall+nat", "integrated"), ("firewall|nat", "integrated")]
SYSTEMS = [*IN_CI, *(pytest.param(system, marks=LONG) for system in IN_LONG_MODE)]
"""(network function, placement): a new one is added here by its name, a chain as "firewall+nat"."""
STATELESS = ("passthrough", "traffic_counter")
"""NFs that let outside open connections."""


@dataclass
class Running:
    """A rack with an NF and its state, and real clients in it."""

    bench: Bench
    real: RealClients
    nf: str
    placement: str


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, Launcher]]:
    with emulation_of("real-clients", tmp_path_factory) as made:
        yield made


@pytest.fixture(scope="module", params=SYSTEMS, ids="-".join)
def running(emulation: tuple[Journal, Launcher], request: pytest.FixtureRequest) -> Iterator[Running]:
    """Yield each system once; at the end, every packet its NFs received must have its place in their ledgers."""
    nf, placement = request.param
    trial = Trial("mine", "rack", nf, placement, 1, {}, {}, 0, 1)
    with working_rack(emulation, trial, EXPERIMENT) as (bench, statistics):
        yield Running(bench, RealClients(bench), nf, placement)
    assert sum(counts["ledger"]["forwarded"] for counts in statistics.values()) > 10, "it all went through the NFs"


def test_downloads_arrive_undamaged(running: Running) -> None:
    answer = running.real.do("download", file=LARGE, count=2)
    assert answer.get("sha256") == [running.real.sha256[LARGE]] * 2, answer
    assert answer["bytes"] == 2 * running.bench.settings["large_bytes"]


def test_a_copy_by_scp_there_and_back_is_the_original(running: Running) -> None:
    assert running.real.do("copy", size=2_000_003) == {"same": True}


@pytest.mark.parametrize("payload_bytes", [56, 1472])
def test_every_ping_is_answered(running: Running, payload_bytes: int) -> None:
    answer = running.real.do("ping", count=20, payload_bytes=payload_bytes)
    assert (answer.get("sent"), answer.get("received"), answer.get("duplicates")) == (20, 20, 0), answer


@pytest.mark.parametrize("method", ["default", "icmp", "tcp"])
def test_the_server_is_one_hop_away(running: Running, method: str) -> None:
    """The NFs are no routers: they leave the time to live alone and do not appear.

    By UDP the answer is an ICMP error, which the switch steers by the client's address and the flow it speaks of by the client's
    port: it may meet another instance, which then needs the flow's state. `local` does not have it there.
    """
    if (running.placement, method) == ("local", "default") and running.nf not in STATELESS:
        pytest.skip("local state: an ICMP error about a flow of another instance is dropped, as it should be")
    assert running.real.do("trace", method=method) == {"hops": [SERVER_ADDRESS]}


@pytest.mark.parametrize("tcp", [False, True])
def test_names_are_looked_up(running: Running, tcp: bool) -> None:
    assert running.real.do("lookup", name=DOMAIN, tcp=tcp) == {"addresses": [SERVER_ADDRESS]}
    assert running.real.do("lookup", name="nobody.nearstate.test", tcp=tcp) == {"addresses": []}


@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=LONG)])
def test_a_tcp_stream_flows(running: Running, reverse: bool) -> None:
    answer = running.real.do("stream", seconds=1, reverse=reverse)
    assert answer.get("goodput_mbps", 0) > 10, answer


def test_every_datagram_of_a_udp_stream_arrives_at_the_server(running: Running) -> None:
    """Those that iperf3 was too slow to take from its socket have arrived too."""

    def came_too_late() -> int:
        return protocol_counters(running.real.servers.pid, {"Udp": ("RcvbufErrors",)})["RcvbufErrors"]

    before = came_too_late()
    answer = running.real.do("stream", seconds=1, udp_mbps=10)
    assert answer.get("goodput_mbps", 0) > 5, answer
    late = came_too_late() - before
    assert answer["lost"] <= late, f"{answer}, of which {late} waited too long for their reader"


def test_a_thousand_connections_are_open_at_once_and_all_are_served(running: Running) -> None:
    running.real.begin("request", file=SMALL, connections=MANY, seconds=2)
    deadline = time.monotonic() + 10
    while (established := running.real.connections()) < MANY and time.monotonic() < deadline:
        time.sleep(0.05)
    answer = running.real.end()
    assert established == MANY
    assert answer["failed"] == 0, answer
    assert answer["requests"] >= MANY


def test_short_connections_one_after_the_other_and_side_by_side(running: Running) -> None:
    answer = running.real.do("connect", file=SMALL, count=100)
    assert answer.get("connections") == 100, answer
    answer = running.real.do("request", file=SMALL, connections=16, seconds=1, keep=False)
    assert answer["failed"] == 0, answer
    assert answer["requests"] > 50


def test_the_server_cannot_open_connections_to_the_client(running: Running) -> None:
    """The same servers on the client's host and the same clients on the server's: what inside may, outside may not."""
    outside = RealClients(running.bench, client="server", server="client")
    dropped = {name: counts["ledger"]["dropped_by_verdict"] for name, counts in running.bench.function_statistics().items()}
    answers = {
        "curl": outside.do("download", file=SMALL, timeout_s=0.7),
        "dig": outside.do("lookup", tries=1),
        "ping": outside.do("ping", count=2, deadline_s=1),
    }
    now = running.bench.function_statistics()
    for process in (outside.clients, outside.servers):
        process.kill()
    if running.nf in STATELESS:
        assert not any("failed" in answer for answer in answers.values()), answers
        return
    assert "timed out" in answers["curl"]["failed"]
    assert "no servers could be reached" in answers["dig"]["failed"]
    assert "100% packet loss" in answers["ping"]["failed"]
    assert sum(counts["ledger"]["dropped_by_verdict"] - dropped[name] for name, counts in now.items()) >= 4


def test_nothing_is_left_when_the_runner_is_killed(emulation: tuple[Journal, Launcher]) -> None:
    """Servers, what they forked, and clients at work end with the runner, without `clean`."""
    runner = subprocess.Popen([sys.executable, "-m", "tests.emulation.test_real_clients"], cwd=ROOT, stdout=subprocess.PIPE)
    assert runner.stdout is not None
    try:
        assert runner.stdout.readline() == b"at work\n"
        servers = {name for pid in descendants(runner.pid) if (name := program(pid))}
        assert {"nginx", "iperf3", "sshd", "dnsmasq", "wrk"} <= servers
        family = descendants(runner.pid)
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        deadline = time.monotonic() + 5
        while (left := [pid for pid in family if program(pid)]) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert {pid: program(pid) for pid in left} == {}
        assert list(processes_of(RUN_ID)) == []
    finally:
        runner.kill()
        runner.wait()
        clean(RUN_ID)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and those they did."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def program(pid: int) -> str:
    """Return the program a process runs; "" when it has ended."""
    try:
        return "" if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX" else _name(pid)
    except OSError:
        return ""


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/exe").readlink().name


def work_until_killed() -> None:
    """The runner that is killed: it has clients at work."""
    trial = Trial("mine", "rack", "passthrough", "local", 1, {}, {}, 0, 1)
    journal = Journal(RUN_ID)
    launcher = Launcher(journal, Path("/tmp") / RUN_ID, ("experiments.harness.preload",))
    network = Network("rack", network_parameters(trial, EXPERIMENT), journal.run_id, launcher, journal)
    bench = Bench(trial, EXPERIMENT, network, launcher)
    network.start()
    bench.start_functions()
    real = RealClients(bench)
    real.begin("request", file=SMALL, connections=16, seconds=60)
    while real.connections() < 16:
        time.sleep(0.01)
    print("at work", flush=True)
    real.end()


if __name__ == "__main__":
    work_until_killed()
