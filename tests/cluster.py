"""Real store processes and a coordinator on loopback, for tests."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import time
import traceback
from pathlib import Path
from typing import Any

from datastore.replication import coordination
from datastore.replication.routed import RoutedClient, ask
from datastore.store import server
from tests.secrets_of_tests import SECRET, client, secret_file
from topologies.emulation.processes import Control

CLUSTER, VALUE_BYTES, PARTITIONS = 0xC7, 16, 256
HOSTS = ("nf1", "nf2", "nf3")
LEASE_MS = 400
"""Five times the default: the tests' box is busy, and who is not heard in time is taken for dead."""


def free_port() -> int:
    """Return a port that nobody listens on, below those that the kernel gives to whoever connects.

    One of these may be taken before it is listened on, even by an attempt to connect to it: then it is connected to itself.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Process:
    """A forked process with a control socket that ends with this one."""

    def __init__(self, target: Any, config: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            ours.close()
            try:
                target(config, Control(theirs))
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        theirs.close()
        self.control = Control(ours)
        self.ready = self.control.receive(120)
        assert self.ready is not None
        assert "port" in self.ready, self.ready

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.pid:
            self.signal(signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


class Cluster:
    """Three stores and a coordinator, on free ports of loopback."""

    def __init__(self, folder: Path, replicas: int, state: str = "") -> None:
        """state: of the coordinator; "": a file in `folder`."""
        self.folder, self.ports = folder, {host: free_port() for host in (*HOSTS, "control", "standby")}
        self.tables: list[str] = []
        self.secret = secret_file()
        placement = [[HOSTS[(p + r) % len(HOSTS)] for r in range(replicas)] for p in range(PARTITIONS)]
        self.coordinator_config = {
            "address": "127.0.0.1", "port": self.ports["control"], "cluster": CLUSTER, "replicas": replicas, "hosts": HOSTS,
            "placement": placement, "state": state or str(folder / "coordinator.json"), "lease_ms": LEASE_MS,
            "secret": self.secret,
        }  # fmt: skip
        self.coordinator = Process(coordination.main, self.coordinator_config)
        self.stores = {host: self.start(host) for host in HOSTS}

    def start(self, host: str, port: int = 0) -> Process:
        """Start a store process; port: 0 is the host's own."""
        self.tables.append(f"nearstate-test-{os.getpid()}-{host}-{len(self.tables)}")
        peers = [{"host": name, "address": "127.0.0.1", "port": self.ports[name]} for name in HOSTS if name != host]
        return Process(server.main, {
            "host": host, "table": self.tables[-1], "capacity": 4096, "value_bytes": VALUE_BYTES, "address": "127.0.0.1",
            "port": port or self.ports[host], "cluster": CLUSTER, "create": True, "secret": self.secret,
            "replication": {"coordinators": [["127.0.0.1", self.ports[name]] for name in ("control", "standby")],
                            "peers": peers, "asynchronous": False, "lease_ms": LEASE_MS},
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
        os.close(self.secret)
