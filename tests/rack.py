"""The rack in tests: raw packets in at client and server, and what has become of them."""

from __future__ import annotations

import os
import socket
import time

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


def forwarded(bench: Bench, sent: int) -> int:
    """Return how many packets all instances forwarded, once they received `sent` and none waits."""
    deadline = time.monotonic() + ARRIVAL_S
    while True:
        ledgers = [statistics["ledger"] for statistics in bench.function_statistics().values()]
        if sum(ledger["received"] for ledger in ledgers) == sent and not any(ledger["waiting"] for ledger in ledgers):
            return sum(int(ledger["forwarded"]) for ledger in ledgers)
        assert time.monotonic() < deadline, f"{ledgers}: {sent} packets were sent"
        time.sleep(0.01)
