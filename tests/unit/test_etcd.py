"""Several coordinators on a real etcd: one leads, another goes on, who was replaced can neither save nor grant."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from datastore.native.errors import NearstateError
from datastore.replication import coordination
from datastore.replication.etcd import MARGIN_S, TTL_S, EtcdState
from datastore.replication.routed import RoutedClient
from datastore.store.operations import ADD
from datastore.store.statuses import OK
from tests.cluster import PARTITIONS, Cluster, Process, free_port

pytestmark = pytest.mark.skipif(not shutil.which("etcd"), reason="etcd is not installed: apt-get install etcd-server")
READY_S = 20.0


class Etcd:
    """A server of one member on loopback."""

    def __init__(self, folder: Path) -> None:
        self.port, self._peer_port, self._folder = free_port(), free_port(), folder
        self.url = f"etcd://127.0.0.1:{self.port}/test"
        self.start()

    def start(self) -> None:
        client, peer = (f"http://127.0.0.1:{port}" for port in (self.port, self._peer_port))
        with (self._folder / "etcd.log").open("ab") as log:
            command = ["etcd", "--data-dir", str(self._folder / "etcd"), "--listen-client-urls", client,
                       "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                       "--initial-cluster", f"default={peer}"]  # fmt: skip
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + READY_S
        while True:
            try:
                EtcdState(self.url, "probe").load()
                return
            except NearstateError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    server = Etcd(tmp_path)
    yield server
    server.kill()


def leader(etcd: Etcd, name: str) -> EtcdState:
    state = EtcdState(etcd.url, name)
    assert state.campaign(lambda: False)
    return state


def test_what_was_saved_is_loaded_by_the_next_leader(etcd):
    first = leader(etcd, "first")
    assert first.load() is None
    for number in range(3):
        first.save({"number": number})
    second = EtcdState(etcd.url, "second")
    assert not second.campaign(lambda: True)  # not while the first one leads
    first.close()
    assert second.campaign(lambda: False)
    assert second.load() == {"number": 2}
    second.save({"number": 3})
    first._until_s = time.monotonic() + 100  # it has not noticed
    with pytest.raises(NearstateError, match="another coordinator leads: second"):
        first.save({"number": 9})
    assert not first.leads()
    assert second.load() == {"number": 3}
    second.close()


def test_a_late_request_of_a_leader_changes_nothing(etcd):
    state = leader(etcd, "one")
    state.load()
    state.save({"number": 1})
    state._revision -= 1  # as if the answer to a save had been lost
    with pytest.raises(NearstateError, match="once more"):
        state.save({"number": 2})
    state.save({"number": 3})
    assert state.load() == {"number": 3}
    state.close()


def test_while_etcd_is_away_nobody_leads_for_long_and_then_again(etcd):
    state = leader(etcd, "one")
    state.load()
    etcd.kill()
    with pytest.raises(NearstateError, match="etcd does not answer at"):
        state.save({"number": 1})
    with pytest.raises(NearstateError, match="did not answer a moment ago"):
        state.save({"number": 1})
    time.sleep(TTL_S)
    assert not state.leads()
    etcd.start()
    assert state.campaign(lambda: False)
    assert state.load() is None
    state.save({"number": 1})
    state.close()


@pytest.mark.parametrize("url", ["etcd://", "etcd://host/prefix", "etcd://host:port/prefix", "etcd://host:2379"])
def test_an_address_that_is_none_says_so(url):
    with pytest.raises(NearstateError, match="write etcd://host:port"):
        EtcdState(url, "one")


def add(client: RoutedClient, key: int) -> None:
    answer = client.do(ADD, key << 32 | key % PARTITIONS, 9, (1).to_bytes(8, "little"), timeout_s=2)
    assert answer is not None
    assert answer.status == OK


def test_a_standby_goes_on_while_the_leader_sleeps(etcd, tmp_path):
    cluster, standby = Cluster(tmp_path, 2, etcd.url), None
    try:
        cluster.wait_until_full()
        standby = Process(coordination.main, {**cluster.coordinator_config, "port": free_port()})
        assert standby.ready is not None
        assert standby.ready.get("leads") is False
        with cluster.client(1) as client:
            add(client, 3)
            cluster.coordinator.signal(signal.SIGSTOP)
            time.sleep(TTL_S + 5 * MARGIN_S)
            for key in range(32):  # stores go on meanwhile
                add(client, key)
        standby.control.send({"status": True})
        assert (standby.control.receive(5) or {})["status"]["map"]["epoch"] >= 1  # it leads
        cluster.coordinator.signal(signal.SIGCONT)
        time.sleep(0.5)
        with pytest.raises(NearstateError, match="no coordinator answers"):  # who slept leads no more, and does not listen
            cluster.status()
    finally:
        cluster.end()
        if standby:
            standby.kill()
