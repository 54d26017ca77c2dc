"""The rack in tests: raw packets in at client and server, and what has become of them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from experiments.harness.bench import Bench
from experiments.harness.runner import network_parameters
from experiments.harness.spec import Experiment, Trial
from nfs.dataplane.ledger import imbalance
from tests.conftest import ETH_P_ALL
from topologies.emulation import system
from topologies.emulation.journal import Journal
from topologies.emulation.network import Network
from topologies.emulation.processes import Launcher

ARRIVAL_S = 10.0
"""Longest wait for a packet: a switch that others of this machine use too may pause for half a second."""


@contextmanager
def emulation_of(name: str, factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, Launcher]]:
    """Yield what an emulated network is made with: a journal named by the test, and a launcher. Skips without root."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it builds the emulated rack")
    logs = factory.mktemp("logs")
    with Journal(f"test-{name}-{os.getpid()}") as journal, Launcher(journal, logs, ("experiments.harness.preload",)) as launcher:
        yield journal, launcher


@contextmanager
def working_rack(
    emulation: tuple[Journal, Launcher],
    trial: Trial,
    experiment: Experiment,
    prepare: Callable[[Bench], None] = lambda bench: None,
) -> Iterator[tuple[Bench, dict[str, dict[str, Any]]]]:
    """Yield a rack whose functions and stores run; at the end every packet must have its place in their ledgers.

    With it comes a dict that holds the instances' statistics, by host, once the rack is gone. prepare: called once the network
    is there and no process of ours runs in it.
    """
    journal, launcher = emulation
    network = Network("rack", network_parameters(trial, experiment), journal.run_id, launcher, journal)
    bench = Bench(trial, experiment, network, launcher)
    statistics: dict[str, dict[str, Any]] = {}
    try:
        network.start()
        prepare(bench)
        bench.start_state()
        bench.start_functions()
        yield bench, statistics
        statistics.update(bench.function_statistics())
    finally:
        bench.stop()
        network.stop()
    for counts in statistics.values():
        assert imbalance(counts["ledger"]) == 0
        assert counts["missing_frames"] == 0


def open_sockets(bench: Bench) -> tuple[list[socket.socket], list[str]]:
    """Return raw sockets and MAC addresses of client and server."""
    sockets, macs = [], []
    for name in ("client", "server"):
        host = bench.network.hosts[name]
        with system.network_namespace(host.pid):
            system.run(["ip", "address", "flush", "dev", "net"], dict(os.environ))  # the kernel must not answer for us
            sockets.append(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
        sockets[-1].bind(("net", ETH_P_ALL))
        macs.append(host.interfaces["net"].mac)
    return sockets, macs


def ledgers_when(bench: Bench, reached: Callable[[dict[str, dict[str, int]]], bool]) -> dict[str, dict[str, int]]:
    """Return the instances' ledgers, by host, once no packet waits and they are as asked for."""
    deadline = time.monotonic() + ARRIVAL_S
    while True:
        ledgers = {name: statistics["ledger"] for name, statistics in bench.function_statistics().items()}
        if reached(ledgers) and not any(ledger["waiting"] for ledger in ledgers.values()):
            return ledgers
        assert time.monotonic() < deadline, str(ledgers)
        time.sleep(0.01)


def forwarded(bench: Bench, sent: int) -> int:
    """Return how many packets all instances forwarded, once they received `sent` and none waits."""
    ledgers = ledgers_when(bench, lambda ledgers: sum(ledger["received"] for ledger in ledgers.values()) == sent)
    return sum(ledger["forwarded"] for ledger in ledgers.values())


def settled(bench: Bench, quiet_s: float = 0.2) -> dict[str, dict[str, int]]:
    """Return the instances' ledgers once nothing has been received for a while."""
    seen: dict[str, dict[str, int]] = {}

    def quiet(ledgers: dict[str, dict[str, int]]) -> bool:
        nonlocal seen
        before, seen = seen, ledgers
        time.sleep(0 if before == ledgers else quiet_s)
        return before == ledgers

    return ledgers_when(bench, quiet)
