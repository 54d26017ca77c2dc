"""A real cluster on loopback: store processes, a coordinator, clients; some are killed, some stopped, and one history is kept."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datastore import __main__ as command_line
from datastore.native.errors import NearstateError
from datastore.replication import coordination
from datastore.replication.maps import ClusterMap
from datastore.replication.routed import RoutedClient, ask
from datastore.store import server
from datastore.store.operations import ADD, GET
from datastore.store.statuses import OK
from datastore.verification.history import read_history
from datastore.verification.linearizability import LINEARIZABLE, check_history
from tests.recorded import work
from topologies.emulation.processes import Control

CLUSTER, VALUE_BYTES, PARTITIONS = 0xC7, 16, 256
HOSTS = ("nf1", "nf2", "nf3")
LEASE_MS = 400
"""Five times the default: the tests' box is busy, and who is not heard in time is taken for dead."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


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

    def __init__(self, folder: Path, replicas: int) -> None:
        self.folder, self.ports = folder, {host: free_port() for host in (*HOSTS, "control")}
        self.tables: list[str] = []
        placement = [[HOSTS[(p + r) % len(HOSTS)] for r in range(replicas)] for p in range(PARTITIONS)]
        self.coordinator_config = {
            "address": "127.0.0.1", "port": self.ports["control"], "cluster": CLUSTER, "replicas": replicas, "hosts": HOSTS,
            "placement": placement, "state": str(folder / "coordinator.json"), "lease_ms": LEASE_MS,
        }  # fmt: skip
        self.coordinator = Process(coordination.main, self.coordinator_config)
        self.stores = {host: self.start(host) for host in HOSTS}

    def start(self, host: str) -> Process:
        self.tables.append(f"nearstate-test-{os.getpid()}-{host}-{len(self.tables)}")
        peers = [{"host": name, "address": "127.0.0.1", "port": self.ports[name]} for name in HOSTS if name != host]
        return Process(server.main, {
            "host": host, "table": self.tables[-1], "capacity": 4096, "value_bytes": VALUE_BYTES, "address": "127.0.0.1",
            "port": self.ports[host], "cluster": CLUSTER, "create": True,
            "replication": {"coordinator": ["127.0.0.1", self.ports["control"]], "secret": 5, "peers": peers,
                            "asynchronous": False, "lease_ms": LEASE_MS},
        })  # fmt: skip

    def client(self, number: int) -> RoutedClient:
        addresses = {host: ("127.0.0.1", self.ports[host]) for host in HOSTS}
        return RoutedClient(addresses, ("127.0.0.1", self.ports["control"]), number, VALUE_BYTES, CLUSTER)

    def status(self) -> dict[str, Any]:
        answer = ask(("127.0.0.1", self.ports["control"]), {"status": True})
        return dict(answer["status"])

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


@pytest.fixture
def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    made = Cluster(tmp_path, getattr(request, "param", 2))
    yield made
    made.end()


def test_what_was_answered_survives_its_primary(cluster):
    with cluster.client(1) as client:
        versions = {}
        for key in range(64):
            answer = client.do(ADD, key << 32 | key % PARTITIONS, 9, (key + 1).to_bytes(8, "little"))
            assert answer.status == OK
            versions[key] = answer.version
        cluster.stores["nf1"].kill()
        began = time.monotonic()
        for key in range(64):
            answer = client.do(GET, key << 32 | key % PARTITIONS, 9)
            assert (answer.status, answer.version) == (OK, versions[key])
            assert int.from_bytes(answer.value[:8], "little") == key + 1
        assert time.monotonic() - began < 10
        cluster.wait_until_gone("nf1")
        cluster.stores["nf1"] = cluster.start("nf1")
        cluster.wait_until_full()
        cluster.stores["nf2"].kill()
        for key in range(64):
            answer = client.do(GET, key << 32 | key % PARTITIONS, 9)
            assert answer is not None, cluster.status()
            assert answer.version == versions[key]


def test_a_move_loses_nothing(cluster):
    with cluster.client(1) as client:
        assert client.do(ADD, 3, 9, (5).to_bytes(8, "little")).status == OK
        target = next(host for host in HOSTS if host not in cluster.status()["map"]["groups"][3]["members"])
        assert "error" not in ask(("127.0.0.1", cluster.ports["control"]), {"move": {"partitions": [3], "target": target}})
        deadline = time.monotonic() + 10
        while cluster.status()["map"]["groups"][3]["members"][0] != target:
            assert time.monotonic() < deadline
            assert client.do(ADD, 3, 9, (1).to_bytes(8, "little")).status == OK
        before = client.do(GET, 3, 9)
        assert before.version == int.from_bytes(before.value[:8], "little") - 4


def test_while_the_coordinator_is_down_nothing_stops(cluster):
    cluster.wait_until_full()
    cluster.coordinator.kill()
    time.sleep(2 * LEASE_MS / 1000)
    with cluster.client(1) as client:
        client.map = ClusterMap.from_json(json.loads(Path(cluster.coordinator_config["state"]).read_text())["map"])
        for key in range(64):
            assert client.do(ADD, key << 32 | key, 9, (1).to_bytes(8, "little"), timeout_s=1).status == OK
    cluster.coordinator = Process(coordination.main, cluster.coordinator_config)
    cluster.wait_until_full()


def test_status_and_move_on_the_command_line(cluster, capsys):
    cluster.wait_until_full()
    address = f"127.0.0.1:{cluster.ports['control']}"
    assert command_line.main(["status", address]) == 0
    shown = capsys.readouterr().out
    assert "all 256 partitions have 2 copies" in shown
    assert shown.count(" ok ") == len(HOSTS)
    assert command_line.main(["move", address, "0-9", "nf3"]) == 0
    deadline = time.monotonic() + 20
    while any(group["members"][0] != "nf3" for group in cluster.status()["map"]["groups"][:10]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.stores["nf1"].kill()
    while "MISSING" not in shown:
        assert time.monotonic() < deadline
        assert command_line.main(["status", address]) == 0
        shown = capsys.readouterr().out
    assert command_line.main(["move", address, "0-9", "nf9"]) == 1
    assert "unknown store host 'nf9'" in capsys.readouterr().err
    assert command_line.main(["status", "127.0.0.1:1", "--json"]) == 1
    assert "no coordinator answers at 127.0.0.1:1" in capsys.readouterr().err


def test_a_coordinator_that_cannot_save_changes_nothing_and_says_why(tmp_path):
    class FullDisk(coordination.FileState):
        def save(self, document: dict[str, Any]) -> None:
            raise NearstateError("no space")

    config = {"address": "127.0.0.1", "port": 0, "cluster": 1, "replicas": 2, "hosts": HOSTS,
              "placement": [["nf1", "nf2"]] * PARTITIONS, "state": str(tmp_path / "state.json")}  # fmt: skip
    process = coordination.Coordination(config)
    try:
        process.state = FullDisk(tmp_path / "state.json")
        process.coordinator.move([3], "nf3")
        assert not process.publish()
        assert process.status()["trouble"] == "no space"
        assert process.coordinator.moves == {}
        process.state = coordination.FileState(tmp_path / "state.json")
        process.coordinator.move([3], "nf3")
        assert process.publish()
        assert process.status()["trouble"] == ""
    finally:
        process.close()
    again = coordination.Coordination(config)
    again.close()
    assert again.coordinator.moves == {3: "nf3"}
    with pytest.raises(NearstateError, match="is of cluster 1, not 2"):
        coordination.Coordination({**config, "cluster": 2})


@pytest.mark.parametrize("cluster", [2, 3], indirect=True)
def test_histories_under_kills_and_stops_are_linearizable(cluster, tmp_path):
    chance, stop = random.Random(7), threading.Event()
    folder = tmp_path / "histories"
    clients = [
        threading.Thread(target=work, args=(cluster.client, folder, n, stop, VALUE_BYTES), daemon=True) for n in range(1, 9)
    ]
    for client in clients:
        client.start()
    faults = 0
    for _ in range(6):
        time.sleep(chance.uniform(0.2, 0.5))
        host = chance.choice(HOSTS)
        match chance.randrange(3):
            case 0:
                cluster.wait_until_full()  # the last copy is not to be killed
                cluster.stores[host].kill()
                time.sleep(chance.uniform(0.0, 0.3))
                cluster.stores[host] = cluster.start(host)
                cluster.wait_until_full()
            case 1:
                cluster.stores[host].signal(signal.SIGSTOP)
                time.sleep(chance.uniform(0.05, 0.6))
                cluster.stores[host].signal(signal.SIGCONT)
            case 2:
                cluster.coordinator.kill()
                time.sleep(chance.uniform(0.0, 0.2))
                cluster.coordinator = Process(coordination.main, cluster.coordinator_config)
        faults += 1
    stop.set()
    for client in clients:
        client.join(30)
    result = check_history(read_history(folder))
    assert result.verdict == LINEARIZABLE, "\n".join(result.explanation)
    assert faults == 6
    assert result.operations > 500
