"""Do real clients and sockets of IPv6 work through the rack with a firewall: inside may open, outside may not?"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.harness.bench import Bench
from experiments.harness.spec import Experiment, Trial
from tests.rack import emulation_of, settled, working_rack
from topologies.emulation import system

EXPERIMENT = Experiment(question="Does IPv6 work?", procedure="real_clients", sweeps=())
PORT = 8080
MEGABYTE = bytes(range(256)) * 4096


@dataclass
class Running:
    """A rack with two instances of a chain, its state integrated."""

    bench: Bench
    client: str
    server: str

    def socket_of(self, host: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """Return a socket of a host."""
        with system.network_namespace(self.bench.network.hosts[host].pid):
            opened = socket.socket(socket.AF_INET6, kind)
        opened.settimeout(5)
        return opened

    def listening(self, host: str) -> socket.socket:
        listener = self.socket_of(host)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("::", PORT))
        listener.listen()
        return listener

    def ping(self, host: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        with system.network_namespace(self.bench.network.hosts[host].pid):
            return subprocess.run(["ping", "-6", "-i", "0.05", *arguments], capture_output=True, text=True, check=False)

    def counts(self) -> dict[str, int]:
        """Return the ledgers of all instances together, once nothing arrives any more."""
        ledgers = settled(self.bench).values()
        return {cause: sum(ledger[cause] for ledger in ledgers) for cause in next(iter(ledgers))}


LONG = pytest.mark.skipif(not os.environ.get("NEARSTATE_LONG"), reason="long mode only: NEARSTATE_LONG=1")


@pytest.fixture(scope="module", params=["firewall+nat", pytest.param("firewall", marks=LONG)])
def rack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if not system.has_ipv6():
        pytest.skip("this kernel has no IPv6")
    trial = Trial("mine", "rack", request.param, "integrated", 1, {}, {}, 0, 1)
    with emulation_of("ipv6", tmp_path_factory) as emulation, working_rack(emulation, trial, EXPERIMENT) as (bench, _):
        hosts = bench.network.hosts
        client, server = (str(hosts[name].interfaces["net"].ipv6) for name in ("client", "server"))
        yield Running(bench, client, server)


def test_nothing_is_said_until_somebody_speaks(rack: Running) -> None:
    """Neither address detection nor solicitations nor group reports: what an experiment counts is its own."""
    time.sleep(1.5)
    assert rack.counts()["received"] == 0
    assert rack.bench.network.show()["refused_packets"] == 0


def test_pings_are_answered_whole_and_in_fragments(rack: Running) -> None:
    for size in (56, 1452, 4000):
        answer = rack.ping("client", "-c", "5", "-W", "5", "-s", str(size), rack.server)
        assert "5 received" in answer.stdout, (size, answer.stdout, rack.counts())


def test_inside_opens_and_megabytes_flow_both_ways(rack: Running) -> None:
    """Many connections, so that both instances have their share."""
    with rack.listening("server") as listener:
        for _ in range(8):
            with rack.socket_of("client") as ours:
                ours.connect((rack.server, PORT))
                theirs, peer = listener.accept()
                with theirs:
                    assert peer[0] == rack.client, "nobody translates it"
                    for sender, receiver in ((ours, theirs), (theirs, ours)):
                        sender.settimeout(10)
                        received = 0
                        for start in range(0, len(MEGABYTE), 1 << 15):
                            piece = MEGABYTE[start : start + (1 << 15)]
                            sender.sendall(piece)
                            got = b""
                            while len(got) < len(piece):
                                got += receiver.recv(1 << 16)
                            assert got == piece
                            received += len(got)
                        assert received == len(MEGABYTE)
    shares = [ledger["forwarded"] for ledger in settled(rack.bench).values()]
    assert min(shares) > 100, "each instance has its share"


def test_a_refusal_comes_back(rack: Running) -> None:
    with rack.socket_of("client") as ours, pytest.raises(ConnectionRefusedError):
        ours.connect((rack.server, PORT + 1))


def test_an_unreachable_port_is_told_by_an_error(rack: Running) -> None:
    """The switch steers the ICMPv6 error by the address, the datagram by its port: the instance asks for the flow's state."""
    with rack.socket_of("client", socket.SOCK_DGRAM) as ours:
        ours.connect((rack.server, PORT + 2))
        ours.send(b"anybody there?")
        with pytest.raises(ConnectionRefusedError):
            ours.recv(100)


def test_outside_opens_nothing(rack: Running) -> None:
    before = rack.counts()
    with rack.listening("client"), rack.socket_of("server") as theirs:
        theirs.settimeout(0.5)
        with pytest.raises(TimeoutError):
            theirs.connect((rack.client, PORT))
    assert "0 received" in rack.ping("server", "-c", "3", "-W", "1", rack.client).stdout
    with rack.socket_of("server", socket.SOCK_DGRAM) as theirs:
        theirs.sendto(b"unasked", (rack.client, PORT))
    now = rack.counts()
    assert now["received"] - before["received"] >= 5
    assert now["dropped_by_verdict"] - before["dropped_by_verdict"] == now["received"] - before["received"]


def test_a_web_server_is_asked(rack: Running, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(MEGABYTE)
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; user root; pid {tmp_path}/pid; error_log {tmp_path}/error; worker_processes 1;\nevents {{}}\n"
        f"http {{ access_log off; server {{ listen [::]:{PORT}; root {tmp_path}; }} }}\n"
    )
    tmp_path.chmod(0o755)
    hosts = rack.bench.network.hosts
    with system.network_namespace(hosts["server"].pid):
        server = subprocess.Popen(["nginx", "-e", f"{tmp_path}/error", "-c", f"{tmp_path}/nginx.conf"],
                                  preexec_fn=system.dying_with_us())  # fmt: skip
    try:
        with system.network_namespace(hosts["client"].pid):
            command = ["curl", "-6", "-sS", "--retry", "20", "--retry-connrefused", "--retry-delay", "1", "--max-time", "20"]
            answer = subprocess.run([*command, f"http://[{rack.server}]:{PORT}/file"], capture_output=True, check=False)
        assert answer.stdout == MEGABYTE, answer.stderr
    finally:
        server.terminate()
        server.wait(5)
