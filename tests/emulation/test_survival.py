"""Real TCP: long downloads through a NAT, half of them by the host that is lost in their middle. Which go on, and end right?"""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from datastore.base.partitioning import PARTITIONS
from experiments.harness.bench import Bench
from experiments.harness.spec import Experiment, Trial
from tests.rack import emulation_of, working_rack
from topologies.emulation.journal import Journal
from topologies.emulation.processes import Launcher

DOWNLOADS, FILE_BYTES, RATE_BYTES = 50, 2_500_000, 500_000
"""The server keeps each download to a rate, a second: curl's own limit lets one through now and then."""
LOST_AFTER_S = 1.2
SETTINGS = {"functions": {"nat": {"external_addresses": "10.64.0.0/31"}}}


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, Launcher]]:
    with emulation_of("survival", tmp_path_factory) as made:
        yield made


def _on(pid: int, *command: str) -> list[str]:
    return ["nsenter", "-t", str(pid), "-n", *command]


def downloads_survive(bench: Bench, folder: Path) -> tuple[int, int]:
    """Download, lose nf1 in the middle, and return how many downloads there were on it, and how many of all ended right."""
    server, client = bench.network.hosts["server"], bench.network.hosts["client"]
    address = str(server.interfaces["net"].ipv4).partition("/")[0]
    config = {"address": address, "files": {"long": FILE_BYTES}, "seed": 1, "services": ["nginx"], "rate_bytes": RATE_BYTES}
    serving = bench.launcher.spawn("servers", server, "experiments.workloads.real_servers:main", config)
    bench.extra.append(serving)
    ready = serving.receive(20) or {}
    sha256 = ready["sha256"]["long"]
    steered = bench.network.steering()
    ports = [20_000 + 2 * number for number in range(DOWNLOADS)]
    on_lost = sum(steered[(port & 0x1FE) >> 1] == "nf1" for port in ports)
    curls = [subprocess.Popen(_on(client.pid, "curl", "-s", "--max-time", "20", "--local-port", str(port),
                                  "-o", str(folder / str(port)), f"http://{address}/long")) for port in ports]  # fmt: skip
    time.sleep(LOST_AFTER_S)
    early = [curl.poll() for curl in curls]
    assert early == [None] * DOWNLOADS, "nothing is in its middle, or curl failed"
    bench.lose_host("nf1")
    if bench.peer:
        bench.peer.take_over("nf1", "nf2")
        bench.network.follow(["nf2"] * PARTITIONS)
    ended = [curl.wait(30) == 0 for curl in curls]
    right = sum(done and hashlib.sha256((folder / str(port)).read_bytes()).hexdigest() == sha256
                for done, port in zip(ended, ports))  # fmt: skip
    return on_lost, right


@pytest.mark.parametrize(
    ("placement", "replicas", "survive"), [("integrated", 2, True), ("conntrackd", 1, True), ("nftables", 1, False)]
)
def test_downloads_through_the_loss_of_their_host(emulation, tmp_path, placement, replicas, survive):
    trial = Trial("test", "rack", "nat", placement, replicas, {}, SETTINGS, 0, 1)
    experiment = Experiment("?", "throughput", ({},), network={"nf_hosts": 2})
    with working_rack(emulation, trial, experiment) as (bench, _):
        if placement == "nftables":  # as conntrackd has it: what is not known is not taken up in its middle, by luck of the ports
            for host in bench.nf_hosts:
                subprocess.run(_on(host.pid, "sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_loose=0"), check=True, timeout=10)
        on_lost, right = downloads_survive(bench, tmp_path)
        assert 0.3 * DOWNLOADS < on_lost < 0.7 * DOWNLOADS
        if survive:
            assert right == DOWNLOADS
        else:
            assert right == DOWNLOADS - on_lost
        if bench.coordinator:
            assert set(bench.network.steering()) == {"nf2"}
