"""The rack in tests: raw packets in at client and server, and what has become of them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

from experiments.harness.bench import Bench
from tests.conftest import ETH_P_ALL
from topologies.emulation import system

ARRIVAL_S = 10.0
"""Longest wait for a packet: a switch that others of this machine use too may pause for half a second."""


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
