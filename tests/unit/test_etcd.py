"""Several coordinators on a real etcd: one leads, another goes on, who was replaced can neither save nor grant."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datastore.base.errors import NearstateError
from datastore.coordination.etcd import MARGIN_S, TTL_S, EtcdState, now_s
from datastore.coordination.routed import RoutedClient
from datastore.store.operations import ADD
from datastore.store.statuses import OK
from tests.cluster import COORDINATOR, PARTITIONS, Cluster, Process, free_port

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
    first._term.over, first._term.until_s = False, now_s() + 100  # it has not noticed
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


@pytest.fixture
def pair(etcd: Etcd, tmp_path: Path) -> Iterator[tuple[Cluster, Process]]:
    """A cluster of two copies, and a coordinator beside its own that stands by."""
    cluster = Cluster(tmp_path, 2, etcd.url)
    processes: list[Process] = []
    try:
        cluster.wait_until_full()
        standby = Process(COORDINATOR, {**cluster.coordinator_config, "port": cluster.ports["standby"]})
        processes.append(standby)
        assert standby.ready is not None
        assert standby.ready.get("leads") is False
        yield cluster, standby
    finally:
        for process in processes:
            process.kill()
        cluster.end()


def asked(process: Process) -> dict[str, Any]:
    """Return what a coordinator answers when it is asked for its status beside the network."""
    process.control.send({"status": True})
    return process.control.receive(5) or {}


def wait_until_led(standby: Process, hosts: int) -> dict[str, Any]:
    """Wait until the standby leads and so many stores hold leases of it; return its status."""
    deadline = time.monotonic() + 20
    while True:
        answer = asked(standby)
        if "status" in answer and sum(host["lease_ms"] > 0 for host in answer["status"]["hosts"].values()) >= hosts:
            return dict(answer["status"])
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)


def test_a_standby_goes_on_while_the_leader_sleeps_who_then_grants_nothing(pair):
    cluster, standby = pair
    assert "stands by" in asked(standby)["error"]
    with cluster.client(1) as client:
        add(client, 3)
        cluster.coordinator.signal(signal.SIGSTOP)
        for key in range(32):  # stores go on meanwhile, by their promises
            add(client, key)
        assert wait_until_led(standby, 3)["map"]["epoch"] >= 1
        cluster.coordinator.signal(signal.SIGCONT)
        time.sleep(0.5)
        with pytest.raises(NearstateError, match="no coordinator answers"):  # who slept leads no more, and does not listen
            cluster.status()
        for key in range(32):
            add(client, key)


def test_a_standby_takes_over_from_a_killed_leader_and_acts_on_the_next_loss(pair):
    cluster, standby = pair
    with cluster.client(1) as client:
        for key in range(32):
            add(client, key)
        cluster.coordinator.kill()
        epoch = wait_until_led(standby, 3)["map"]["epoch"]
        client.coordinator = ("127.0.0.1", cluster.ports["standby"])
        cluster.stores["nf2"].kill()
        for key in range(32):  # also those whose primary was on the host that is gone
            add(client, key)
        assert wait_until_led(standby, 2)["map"]["epoch"] > epoch


def test_when_etcd_dies_under_a_leader_stores_go_on_and_it_leads_again_afterwards(etcd, tmp_path):
    cluster = Cluster(tmp_path, 2, etcd.url)
    try:
        cluster.wait_until_full()
        with cluster.client(1) as client:
            add(client, 3)
            etcd.kill()
            time.sleep(TTL_S + 5 * MARGIN_S)
            for key in range(32):
                add(client, key)
            etcd.start()
            wait_until_led(cluster.coordinator, 3)
            cluster.wait_until_full()
            add(client, 3)
    finally:
        cluster.end()
