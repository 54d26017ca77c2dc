"""Is the end of a process known at once, and is nothing else taken for one?

The kernel closes a process' connections at its end. A process that closes its connection itself says so before.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datastore.coordination import process as coordination
from datastore.coordination.heartbeats import Heartbeat
from datastore.coordination.messages import LineSocket, beat_message
from datastore.security.challenge import Speaker
from datastore.security.secret import CLIENT, COORDINATOR, STORE, Credential
from tests.secrets_of_tests import SECRET, secret_file

HOSTS = ("nf1", "nf2")
PARTITIONS = 4
STEERING = {"instances": HOSTS, "steering": ["nf1", "nf2"] * 2, "aligned": True, "controller": ""}


def read_all(line: LineSocket) -> None:
    """Take all that has arrived: to close a connection with something unread resets it."""
    with contextlib.suppress(BlockingIOError):
        while line.connection.recv(1 << 16):
            pass


class Hosts:
    """A coordinator, and what the processes of two hosts would say to it."""

    def __init__(self, folder: Path, steering: dict[str, Any] | None) -> None:
        self.process = coordination.Coordination({
            "address": "127.0.0.1", "port": 0, "cluster": 1, "replicas": 2, "hosts": HOSTS, "steering": steering,
            "placement": [list(HOSTS), list(HOSTS[::-1])] * 2, "state": str(folder / "state.json"),
            "secret": secret_file(),
        })  # fmt: skip
        self.stores = {host: self.connect(SECRET.credential(STORE, host)) for host in HOSTS}
        clients = {host: SECRET.credential(CLIENT, host, number) for number, host in enumerate(HOSTS, 1)}
        self.instances = {host: self.connect(clients[host]) for host in HOSTS} if steering else {}
        self.told: dict[str, Any] = {}
        self.speak(*self.stores, *(f"{host} instance" for host in self.instances))

    def connect(self, credential: Credential) -> LineSocket:
        connection = socket.create_connection(("127.0.0.1", self.process.port))
        connection.setblocking(False)
        challenge = Speaker(credential, COORDINATOR)
        while not challenge.step(connection):
            self.process.turn(0.001)
        return LineSocket(connection)

    def speak(self, *speakers: str, **report: Any) -> None:
        """Have stores ("nf1") send heartbeats and NF processes ("nf1 instance") reports, and the coordinator hear them."""
        for speaker in speakers:
            host, _, is_instance = speaker.partition(" ")
            epoch = self.process.coordinator.map.epoch
            if is_instance:
                told = {"host": host, "cluster": 1, "epoch": epoch, "parked": [], "quiet": [], **report}
                self.instances[host].send({"instance": told})
            else:
                beat = Heartbeat(host, 1, HOSTS.index(host) + 1, epoch, time.monotonic_ns())
                self.stores[host].send(beat_message(beat))
        self.turn()

    def end(self, lines: dict[str, LineSocket], host: str) -> None:
        """End a process: the kernel closes its connection, in which it had read everything."""
        read_all(lines[host])
        lines[host].close()
        self.turn()

    def turn(self) -> None:
        """Have the coordinator take all that was sent."""
        deadline = time.monotonic() + 5
        while select.select([self.process.selector], [], [], 0.05)[0]:
            self.process.turn(0)
            assert time.monotonic() < deadline

    def gone(self) -> list[tuple[str, str]]:
        """Return which hosts the coordinator gave up, and why."""
        return [(failover["host"], failover["why"]) for failover in self.process.status()["failovers"]]

    def close(self) -> None:
        for line in (*self.stores.values(), *self.instances.values()):
            line.close()
        self.process.close()


@pytest.fixture
def hosts(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    made = Hosts(tmp_path, getattr(request, "param", STEERING))
    yield made
    made.close()


def lease_ms(hosts: Hosts, host: str) -> float:
    return float(hosts.process.status()["hosts"][host]["lease_ms"])


@pytest.mark.parametrize("hosts", [None], indirect=True)
def test_a_store_process_that_ends_is_replaced_before_its_lease_is_over(hosts: Hosts) -> None:
    before_ns = time.monotonic_ns()
    hosts.speak("nf1")
    hosts.end(hosts.stores, "nf1")
    assert hosts.gone() == [("nf1", "ended")]
    assert hosts.process.coordinator.map.ended == {"nf1": 1}
    assert {group.members for group in hosts.process.coordinator.map.groups} == {("nf2",)}
    assert hosts.process.coordinator.failovers[0].at_ns >= before_ns


def test_the_lease_goes_on_while_an_nf_process_works_on_the_table(hosts: Hosts) -> None:
    hosts.speak("nf1")
    hosts.end(hosts.stores, "nf1")
    if lease_ms(hosts, "nf1") > 0:  # else this box stopped for a lease, and the lease has run out
        assert hosts.gone() == []
    hosts.speak("nf1 instance", "nf2", store_ended=1)
    assert hosts.gone()[0][0] == "nf1"
    assert hosts.process.coordinator.map.ended == {"nf1": 1}


def test_an_earlier_process_of_the_host_has_ended_before_and_says_nothing_of_this_one(hosts: Hosts) -> None:
    hosts.speak("nf1 instance", store_ended=77)
    assert hosts.process.coordinator.map.ended == {}


def test_a_host_whose_processes_have_both_ended_has_no_lease(hosts: Hosts) -> None:
    for lines in (hosts.instances, hosts.stores):
        hosts.end(lines, "nf1")
    assert hosts.process.coordinator.map.ended == {"nf1": 1}
    assert ("nf1", "ended") in hosts.gone()


def test_an_nf_process_that_was_never_heard_may_work_on_the_table(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path, STEERING)
    try:
        hosts.process.switchover.instances["nf1"].heard_ns = 0  # type: ignore[union-attr]
        hosts.process.attendance.instances.pop("nf1")
        hosts.end(hosts.stores, "nf1")
        assert hosts.process.coordinator.map.ended == {}
    finally:
        hosts.close()


def test_an_nf_process_that_ends_loses_its_packets_at_once(hosts: Hosts) -> None:
    hosts.end(hosts.instances, "nf1")
    assert hosts.gone()[0] == ("nf1", "instance ended")
    assert hosts.process.switchover is not None
    assert set(hosts.process.switchover.steering) == {"nf2"}
    assert hosts.process.coordinator.map.ended == {}


@pytest.mark.parametrize("who", ["stores", "instances"])
def test_a_process_that_says_that_it_parts_has_not_ended(hosts: Hosts, who: str) -> None:
    lines = getattr(hosts, who)
    lines["nf1"].send({"parting": True})
    hosts.end(lines, "nf1")
    assert hosts.process.coordinator.map.ended == {}
    assert [why for _, why in hosts.gone() if "ended" in why] == []


@pytest.mark.parametrize("hosts", [None], indirect=True)
def test_a_reset_is_no_proof_of_an_end(hosts: Hosts) -> None:
    """A socket that is closed with unread bytes resets the connection, and so does one whose process parts in vain."""
    hosts.speak("nf1")
    time.sleep(0.01)
    hosts.stores["nf1"].close()  # its grants are unread
    hosts.turn()
    assert hosts.process.coordinator.map.ended == {}


def test_a_store_that_connects_again_has_not_ended(hosts: Hosts) -> None:
    """Its first connection was lost without a word; then the NF process beside it ends, alone."""
    hosts.end(hosts.stores, "nf1")
    hosts.stores["nf1"] = hosts.connect(SECRET.credential(STORE, "nf1"))
    hosts.speak("nf1")
    hosts.end(hosts.instances, "nf1")
    assert hosts.process.coordinator.map.ended == {}
    assert ("nf1", "ended") not in hosts.gone()


def test_an_nf_process_that_left_an_earlier_table_keeps_no_lease_of_the_next(hosts: Hosts) -> None:
    hosts.speak("nf1 instance", store_ended=77)
    hosts.end(hosts.stores, "nf1")
    assert hosts.process.coordinator.map.ended == {"nf1": 1}


def test_a_lost_host_is_one_failover_until_it_is_a_member_again(hosts: Hosts) -> None:
    coordinator = hosts.process.coordinator
    for _ in range(3):
        coordinator._give_up(1, "nf1", "unreachable", "nf2")
    coordinator._give_up(2, "nf1", "silent")
    assert hosts.gone() == [("nf1", "unreachable")]
    hosts.speak("nf1")
    coordinator._give_up(3, "nf1", "silent")
    assert hosts.gone() == [("nf1", "unreachable"), ("nf1", "silent")]


def test_a_process_that_is_known_to_have_ended_is_refused(hosts: Hosts) -> None:
    hosts.speak("nf1 instance", store_ended=1)
    grant = hosts.process.coordinator.hear(time.monotonic_ns(), Heartbeat("nf1", 1, 1, 1, 0))
    assert grant.lease_ns == 0
    assert "known to have ended" in grant.refusal
    grant = hosts.process.coordinator.hear(time.monotonic_ns(), Heartbeat("nf1", 1, 9, 0, 0))
    assert grant.refusal == ""


@pytest.mark.parametrize("hosts", [None], indirect=True)
def test_a_reset_that_a_send_was_told_of_is_no_end(hosts: Hosts) -> None:
    """The kernel tells one call of a reset; to the next `recv` the connection looks closed."""
    nf1 = hosts.process.attendance.stores["nf1"]
    read_all(hosts.stores["nf1"])
    hosts.stores["nf1"].connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    hosts.stores["nf1"].close()
    hosts.process._tell(nf1, {"heard": True})
    hosts.turn()
    assert "nf1" not in hosts.process.attendance.stores
    assert hosts.process.coordinator.map.ended == {}


@pytest.mark.parametrize("hosts", [None], indirect=True)
def test_a_stream_that_ended_before_something_was_sent_is_an_end(hosts: Hosts) -> None:
    nf1 = hosts.process.attendance.stores["nf1"]
    read_all(hosts.stores["nf1"])
    hosts.stores["nf1"].close()
    for _ in range(3):
        hosts.process._tell(nf1, {"heard": True})
        time.sleep(0.01)
    hosts.turn()
    assert hosts.process.coordinator.map.ended == {"nf1": 1}


def test_leases_are_renewed_while_the_disk_is_slow(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision waits for far longer than a lease until it is saved: who has one keeps it, and nobody hears of the decision."""
    process, beats = hosts.process, threading.Event()
    heard: list[tuple[str, dict[str, Any]]] = []
    lease_ns, first = process.coordinator.timing.lease_ns, process.coordinator.map.epoch
    save = process.state.save

    def slowly(document: dict[str, Any]) -> None:
        time.sleep(10 * lease_ns / 1e9)
        save(document)

    def beat() -> None:
        while not beats.wait(process.coordinator.timing.heartbeat_ns / 1e9):
            for number, host in enumerate(HOSTS, 1):
                hosts.stores[host].send(beat_message(Heartbeat(host, 1, number, first, time.monotonic_ns())))
                heard.extend((host, message["grant"]) for message in hosts.stores[host].receive() if "grant" in message)

    speaker = threading.Thread(target=beat)
    speaker.start()
    try:
        deadline = time.monotonic() + 10
        while not all(lease_ms(hosts, host) > lease_ns / 2e6 for host in HOSTS):
            process.turn(0.01)
            assert time.monotonic() < deadline
        monkeypatch.setattr(process.state, "save", slowly)
        assert process.saved_command({"move": {"partitions": [0], "target": "nf2"}}) == {"epoch": first}
        for host in HOSTS:
            assert lease_ms(hosts, host) > 0
            leases = [grant for sender, grant in heard if sender == host and grant["lease_ns"]]
            assert len(leases) > 10
            assert {grant["epoch"] for grant in leases} == {first}
        assert hosts.gone() == []
    finally:
        beats.set()
        speaker.join()
    monkeypatch.undo()
    hosts.turn()
    assert (process.state.load() or {})["moves"] == {"0": "nf2"}
    assert hosts.gone() == []


def test_nobody_without_a_lease_is_given_one_while_state_is_saved(hosts: Hosts) -> None:
    coordinator, now_ns = hosts.process.coordinator, time.monotonic_ns()
    hosts.speak("nf1", "nf2")
    beat = Heartbeat("nf1", 1, 1, coordinator.map.epoch, now_ns)
    state = coordinator.hosts["nf1"]
    renewed = coordinator.renew(state.granted_until_ns - 1, beat, beat.epoch)
    assert renewed is not None
    assert renewed.lease_ns == coordinator.timing.lease_ns
    assert renewed.map is None
    before_ns = state.granted_until_ns
    for wrong in (replace(beat, incarnation=2), replace(beat, epoch=beat.epoch + 1), replace(beat, cluster=2),
                  replace(beat, host="nf3")):  # fmt: skip
        assert coordinator.renew(now_ns, wrong, beat.epoch) is None
    assert coordinator.renew(before_ns, beat, beat.epoch) is None
    coordinator.end(now_ns, "nf1", 1)
    assert coordinator.renew(now_ns - 1, beat, beat.epoch) is None
    assert state.granted_until_ns == now_ns
