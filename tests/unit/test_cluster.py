"""A real cluster on loopback: store processes, a coordinator, clients; some are killed, some stopped, and one history is kept."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datastore import __main__ as command_line
from datastore.base.errors import NearstateError
from datastore.coordination import process as coordination
from datastore.coordination.heartbeats import Heartbeat
from datastore.coordination.maps import ClusterMap
from datastore.coordination.report import troubles
from datastore.coordination.state_file import FileState
from datastore.store.operations import ADD, GET
from datastore.store.statuses import OK
from datastore.verification.history import read_history
from datastore.verification.linearizability import LINEARIZABLE, check_history
from tests.cluster import COORDINATOR, HOSTS, LEASE_MS, PARTITIONS, VALUE_BYTES, Cluster, Process, free_port
from tests.recorded import work
from tests.secrets_of_tests import SECRET, secret_file


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
        assert "error" not in cluster.ask({"move": {"partitions": [3], "target": target}})
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
    saved = FileState(Path(cluster.coordinator_config["state"])).load()
    assert saved
    with cluster.client(1) as client:
        client.map = ClusterMap.from_json(saved["map"])
        for key in range(64):
            assert client.do(ADD, key << 32 | key, 9, (1).to_bytes(8, "little"), timeout_s=1).status == OK
    cluster.coordinator = Process(COORDINATOR, cluster.coordinator_config)
    cluster.wait_until_full()


def test_status_and_move_on_the_command_line(cluster, capsys, tmp_path):
    cluster.wait_until_full()
    address = f"127.0.0.1:{cluster.ports['control']}"
    secret_path = tmp_path / "secret"
    SECRET.write(secret_path)
    secret = ("--secret", str(secret_path))
    assert command_line.main(["status", address, *secret]) == 0
    shown = capsys.readouterr().out
    assert "all 256 partitions have 2 copies" in shown
    assert shown.count(" ok ") == len(HOSTS)
    assert command_line.main(["move", *secret, address, "0-9", "nf3"]) == 0
    deadline = time.monotonic() + 20
    while any(group["members"][0] != "nf3" for group in cluster.status()["map"]["groups"][:10]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.stores["nf1"].kill()
    while "MISSING" not in shown:
        assert time.monotonic() < deadline
        assert command_line.main(["status", address, *secret]) == 0
        shown = capsys.readouterr().out
    assert command_line.main(["move", *secret, address, "0-9", "nf9"]) == 1
    assert "unknown store host 'nf9'" in capsys.readouterr().err
    assert command_line.main(["status", "127.0.0.1:1", "--json", *secret]) == 1
    assert "no coordinator answers at 127.0.0.1:1" in capsys.readouterr().err


def test_a_move_of_what_is_on_its_way_elsewhere_is_refused(tmp_path):
    config = {"address": "127.0.0.1", "port": 0, "cluster": 1, "replicas": 2, "hosts": HOSTS,
              "placement": [["nf1", "nf2"]] * PARTITIONS, "state": str(tmp_path / "state.json"),
              "secret": secret_file()}  # fmt: skip
    process = coordination.Coordination(config)
    try:
        for name in HOSTS:
            beat = Heartbeat(name, 1, 5, 1, 0)
            process.coordinator.hear(time.monotonic_ns(), beat)
        assert "epoch" in process.command({"move": {"partitions": [2, 3], "target": "nf3"}})
        told = process.command({"move": {"partitions": [1, 3], "target": "nf2"}})
        assert told == {"error": "partition 3 is on its way to nf3: move it again once it is there"}
        assert "epoch" in process.command({"move": {"partitions": [3, 4], "target": "nf3"}})
        assert "epoch" in process.command({"move": {"partitions": [5], "target": "nf1"}})  # it is there
        assert process.coordinator.moves == dict.fromkeys((2, 3, 4), "nf3")
    finally:
        process.close()


def test_a_coordinator_that_cannot_save_changes_nothing_and_says_why(tmp_path):
    class FullDisk(FileState):
        def save(self, document: dict[str, Any]) -> None:
            raise NearstateError("no space")

    config = {"address": "127.0.0.1", "port": 0, "cluster": 1, "replicas": 2, "hosts": HOSTS,
              "placement": [["nf1", "nf2"]] * PARTITIONS, "state": str(tmp_path / "state.json"),
              "secret": secret_file()}  # fmt: skip
    process = coordination.Coordination(config)
    try:
        process.state = FullDisk(tmp_path / "state.json")
        process.coordinator.move([3], "nf3")
        assert not process.publish()
        assert process.status()["trouble"] == "no space"
        assert process.coordinator.moves == {}
        told = process.saved_command({"move": {"partitions": [3], "target": "nf3"}})
        assert told == {"error": "no space"}
        assert "status" in process.saved_command({"status": True})
        process.state = FileState(tmp_path / "state.json")
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
def test_a_second_process_of_a_name_is_refused_and_told(cluster):
    cluster.wait_until_full()
    impostor = cluster.start("nf1", port=free_port())
    try:
        deadline = time.monotonic() + 10
        while not cluster.status()["hosts"]["nf1"]["rival"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert "two processes call themselves nf1" in "\n".join(cluster.status()["log"])
        assert any("two processes call themselves nf1" in line for line in troubles(cluster.status()))
        with cluster.client(1) as client:
            answer = client.do(ADD, 3 << 32 | 3, 9, (1).to_bytes(8, "little"))
            assert answer is not None
            assert answer.status == OK
    finally:
        impostor.kill()


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
                cluster.coordinator = Process(COORDINATOR, cluster.coordinator_config)
        faults += 1
    stop.set()
    for client in clients:
        client.join(30)
    result = check_history(read_history(folder))
    assert result.verdict == LINEARIZABLE, "\n".join(result.explanation)
    assert faults == 6
    assert result.operations > 500
