"""Real store processes and a coordinator on loopback, for tests."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import random
import shutil
import socket
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from datastore.coordination.heartbeats import Timing
from datastore.coordination.routed import RoutedClient, ask
from tests.secrets_of_tests import SECRET, client, key_of
from topologies.emulation.journal import Journal
from topologies.emulation.processes import Launcher, RunningProcess

CLUSTER, VALUE_BYTES, PARTITIONS = 0xC7, 16, 256
HOSTS = ("nf1", "nf2", "nf3")
LEASE_MS = Timing.lease_ns / 1e6
"""The product's default: what holds for users holds here."""
STORE, COORDINATOR = "datastore.process.store:main", "datastore.coordination.process:main"
READY_S = 400.0
"""Longest wait for a process, which compiles what it runs when its sources have changed."""


def free_port() -> int:
    """Return a port that nobody listens on, below those that the kernel gives to whoever connects.

    One of these may be taken before it is listened on, even by an attempt to connect to it: then it is connected to itself.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@cache
def launcher() -> Launcher:
    """Return the launcher of this test run: as in the product, every process is a fork of one that never had threads."""
    journal = Journal(f"cluster-{os.getpid()}")
    logs = Path(tempfile.mkdtemp(prefix="nearstate-cluster-"))
    atexit.register(shutil.rmtree, logs, ignore_errors=True)
    made = Launcher(journal, logs, ("tests.loaded",))
    atexit.register(journal.close)
    atexit.register(made.close)
    made.wait_ready(READY_S)
    return made


class Process:
    """A process that the launcher started, with its control socket; it ends with this one."""

    started = itertools.count(1)

    def __init__(self, target: str, config: dict[str, Any]) -> None:
        """target: a store's or a coordinator's main, as module:function."""
        name = f"{target.split(':')[0]}-{next(self.started)}"
        self.control: RunningProcess = launcher().spawn(name, None, target, config, key=key_of(target, config))
        self.ready = self.control.receive(READY_S)
        assert self.ready is not None
        assert "port" in self.ready, self.ready

    def signal(self, number: int) -> None:
        self.control.signal(number)

    def kill(self) -> None:
        self.control.kill()


class Cluster:
    """Three stores and a coordinator, on free ports of loopback."""

    def __init__(self, folder: Path, replicas: int, state: str = "") -> None:
        """state: of the coordinator; "": a file in `folder`."""
        self.folder, self.ports = folder, {host: free_port() for host in (*HOSTS, "control", "standby")}
        self.tables: list[str] = []
        placement = [[HOSTS[(p + r) % len(HOSTS)] for r in range(replicas)] for p in range(PARTITIONS)]
        self.coordinator_config = {
            "address": "127.0.0.1", "port": self.ports["control"], "cluster": CLUSTER, "replicas": replicas, "hosts": HOSTS,
            "placement": placement, "state": state or str(folder / "coordinator.json"),
        }  # fmt: skip
        self.coordinator = Process(COORDINATOR, self.coordinator_config)
        self.stores = {host: self.start(host) for host in HOSTS}

    def start(self, host: str, port: int = 0) -> Process:
        """Start a store process; port: 0 is the host's own."""
        self.tables.append(f"nearstate-test-{os.getpid()}-{host}-{len(self.tables)}")
        peers = [{"host": name, "address": "127.0.0.1", "port": self.ports[name]} for name in HOSTS if name != host]
        return Process(STORE, {
            "host": host, "table": self.tables[-1], "capacity": 4096, "value_bytes": VALUE_BYTES, "address": "127.0.0.1",
            "port": port or self.ports[host], "cluster": CLUSTER, "create": True,
            "replication": {"coordinators": [["127.0.0.1", self.ports[name]] for name in ("control", "standby")],
                            "peers": peers, "asynchronous": False},
        })  # fmt: skip

    def client(self, number: int) -> RoutedClient:
        addresses = {host: ("127.0.0.1", self.ports[host]) for host in HOSTS}
        return RoutedClient(addresses, ("127.0.0.1", self.ports["control"]), client(number), VALUE_BYTES, CLUSTER)

    def status(self) -> dict[str, Any]:
        return dict(self.ask({"status": True})["status"])

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Ask the coordinator as an administrator."""
        return ask(("127.0.0.1", self.ports["control"]), message, SECRET.administrator())

    def wait_until_full(self, timeout_s: float = 20) -> None:
        """Wait until every host has a lease, every group its members, and nothing is under way."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = self.status()
            groups = status["map"]["groups"]
            here = all(host["lease_ms"] > 0 and host["epoch"] == status["map"]["epoch"] for host in status["hosts"].values())
            replicas = self.coordinator_config["replicas"]
            if here and all(len(g["members"]) == replicas and not g["leaving"] and not g["learners"] for g in groups):
                return
            time.sleep(0.05)
        raise AssertionError(f"groups are not full after {timeout_s} s: {self.status()['log']}")

    def wait_until_gone(self, host: str, timeout_s: float = 20) -> None:
        """Wait until no group counts on a killed host: until then its death is one more fault for those who have its data."""
        deadline = time.monotonic() + timeout_s
        while any(host in group["members"] + group["learners"] for group in self.status()["map"]["groups"]):
            assert time.monotonic() < deadline, self.status()["log"]
            time.sleep(0.02)

    def end(self) -> None:
        for process in (*self.stores.values(), self.coordinator):
            process.kill()
        for name in self.tables:
            Path("/dev/shm", name).unlink(missing_ok=True)
