"""The store process: many clients, bad ones among them, slow ones, and control messages."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datastore.base.errors import NearstateError
from datastore.base.partitioning import PARTITIONS
from datastore.process import server
from datastore.process import store as store_process
from datastore.process.server import CLIENT_PLACES
from datastore.process.store import StoreProcess
from datastore.security.challenge import prove
from datastore.security.secret import CLIENT, STORE
from datastore.store.client import Client, StoreClosed
from datastore.store.layout import LEASE_NS, PRIMARY
from datastore.store.operations import GET, OPERATION_VALUE, operation_word
from datastore.store.partitions import PartitionMap
from datastore.store.protocol import FRAME_HEADER_WORDS, PROTOCOL_MAGIC, write_frame_header
from datastore.store.statuses import ABSENT, BAD_FRAME, LEASE_LAPSED, NOT_PRIMARY, OK, STALE_EPOCH
from datastore.store.table import Table
from tests.secrets_of_tests import SECRET, secret_file
from tests.secrets_of_tests import client as credential
from topologies.emulation.processes import Control

CLUSTER, VALUE_BYTES = 9, 16
MAP = PartitionMap(1, (("here",),) * PARTITIONS)
_numbers = itertools.count()


class Store:
    """A store process of ours: the real `main`, forked, with a real control socket."""

    def __init__(self, **changes: Any) -> None:
        self.config = {
            "host": "here", "table": f"nearstate-test-{os.getpid()}-store{next(_numbers)}", "capacity": 4096,
            "value_bytes": VALUE_BYTES, "address": "127.0.0.1", "port": 0, "cluster": CLUSTER, "epoch": 1,
            "map": MAP.to_json(), "create": True, "secret": secret_file(), **changes,
        }  # fmt: skip
        self.start()

    def start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            ours.close()
            with contextlib.suppress(BaseException):
                store_process.main(self.config, Control(theirs))
            os._exit(0)
        theirs.close()
        self.control = Control(ours)
        self.ready = self.receive()
        self.port = self.ready.get("port", 0)

    def receive(self) -> dict[str, Any]:
        message = self.control.receive(400)
        assert message is not None
        return message

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self.control.send(message)
        return self.receive()

    def statistics(self) -> dict[str, Any]:
        return dict(self.ask({"statistics": True})["statistics"])

    def client(self, client_id: int = 1, **options: Any) -> Client:
        options.setdefault("credential", credential(client_id))
        client = Client([("127.0.0.1", self.port)], client_id, VALUE_BYTES, CLUSTER, **options)
        client.connect()
        return client

    def connect(self) -> socket.socket:
        """Return a connection of somebody unknown."""
        return socket.create_connection(("127.0.0.1", self.port), 5)

    def proven(self, number: int, role: int = CLIENT, name: str = "test") -> socket.socket:
        """Return a connection that has answered the challenge and said nothing else yet."""
        connection = self.connect()
        prove(connection, SECRET.credential(role, name, number), STORE, "here")
        return connection

    def kill(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def restart(self) -> None:
        """Start again on the same memory and port."""
        self.config.update(create=False, port=self.port)
        self.start()

    def close(self) -> None:
        self.kill()
        self.control.close()
        (Path("/dev/shm") / self.config["table"]).unlink(missing_ok=True)


@pytest.fixture
def start() -> Iterator[Callable[..., Store]]:
    """Start stores; they are gone afterwards."""
    stores: list[Store] = []

    def make(**changes: Any) -> Store:
        stores.append(Store(**changes))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def request_to_get(cluster: int) -> np.ndarray:
    """Return the frame in which client 7 asks for one record."""
    request = np.zeros(FRAME_HEADER_WORDS + OPERATION_VALUE + VALUE_BYTES // 8, np.uint64)
    write_frame_header(request, 0, 1, request.size - FRAME_HEADER_WORDS, 0, 1, np.uint64(7), np.uint64(cluster))
    request[FRAME_HEADER_WORDS] = operation_word(GET, 0, 0, 0)
    return request


def gone(connection: socket.socket) -> bool:
    """Tell whether the store closes a connection, whatever it sends before."""
    connection.settimeout(5)
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_two_clients_see_one_table(start):
    store = start()
    with store.client(1) as one, store.client(2) as other:
        assert one.insert(5, 6, b"first").status == OK
        assert other.get(5, 6).value == b"first".ljust(VALUE_BYTES, b"\0")
        version = other.get(5, 6).version
        assert other.put(5, 6, b"second", version).version == version + 1
        assert one.add(5, 6, 8, 3).value == b"second\0\0\3".ljust(VALUE_BYTES, b"\0")
        assert one.add(5, 6, 8, -1).value[8] == 2
        assert one.delete(5, 6).status == OK
        assert other.get(5, 6).status == ABSENT
        assert other.ping().status == OK


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64, PROTOCOL_MAGIC.to_bytes(4, "little") + b"\xff" * 60])
def test_garbage_closes_its_own_connection_only(start, garbage):
    store = start()
    with store.client() as client, store.proven(2) as stranger:
        client.insert(5, 6, b"x")
        stranger.sendall(garbage)
        answer = stranger.recv(4096)
        assert answer[:4] == PROTOCOL_MAGIC.to_bytes(4, "little")
        assert answer[33] == BAD_FRAME
        assert gone(stranger)
        assert client.get(5, 6).status == OK
    assert store.statistics()["statuses"]["bad_frame"] == 1


def test_half_a_frame_waits_and_a_lost_peer_is_forgotten(start):
    store = start()
    with store.client() as client:
        for number in range(CLIENT_PLACES * 2):  # more than there is room for at once
            with store.proven(2 + number) as stranger:
                stranger.sendall(PROTOCOL_MAGIC.to_bytes(4, "little") + (104).to_bytes(4, "little"))
        deadline = time.monotonic() + 5
        while client.insert(5, 6, b"x").status not in (OK, 3):
            assert time.monotonic() < deadline
        assert client.get(5, 6).status == OK


def test_one_connection_too_many_is_closed_and_room_comes_back(start):
    store = start()
    opened = [store.proven(2 + number) for number in range(CLIENT_PLACES + 3)]
    assert all(gone(extra) for extra in opened[CLIENT_PLACES:])
    for connection in opened:
        connection.close()
    deadline = time.monotonic() + 5
    while True:
        try:
            with store.client() as client:
                assert client.ping().status == OK
            break
        except StoreClosed:
            assert time.monotonic() < deadline


def test_a_peer_that_does_not_read_stalls_nobody_else(start):
    store = start()
    with store.client(1) as client, store.proven(2) as lazy:
        frame = PROTOCOL_MAGIC.to_bytes(4, "little") + (32 + 256 * 40).to_bytes(4, "little")
        frame += (256 | 1 << 32).to_bytes(8, "little") + (0).to_bytes(8, "little") + CLUSTER.to_bytes(8, "little")
        frame += (b"\x07" + b"\0" * 39) * 256
        lazy.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 64 << 20:
                sent += lazy.send(frame[sent % len(frame) :])
        assert len(frame) < sent < 64 << 20, "the store reads on although its answers are not taken"
        assert all(client.insert(n, 1, b"").status == OK for n in range(20))
        lazy.setblocking(True)
        lazy.settimeout(5)
        expected, received = sent // len(frame) * (32 + 256 * (40 + VALUE_BYTES)), 0
        while received < expected:
            received += len(lazy.recv(1 << 20))
        assert received == expected


def test_a_map_changes_roles_and_epoch(start):
    store = start()
    with store.client(1) as old:
        assert old.insert(5, 6, b"x").status == OK
        new_map = PartitionMap(2, tuple(("here",) if n % 2 else ("there",) for n in range(PARTITIONS)))
        assert store.ask({"map": new_map.to_json()}) == {"epoch": 2}
        assert old.get(5, 6).status == STALE_EPOCH
        with store.client(2, epoch=2) as new:
            assert new.get(5, 6).status == OK
            assert new.insert(4, 6, b"").status == NOT_PRIMARY
        assert "not a partition map" in store.ask({"map": {"epoch": 3}})["error"]
    assert store.statistics()["primary_partitions"] == PARTITIONS // 2


def test_a_process_that_was_stopped_finds_its_lease_over():
    """Stopped after it looked at the clock and before it read the request, which was asked when the lease was over."""
    table = Table.anonymous("stopped", 60, VALUE_BYTES, 1, epoch=0, clients=4, window=8, replication_secret=9)
    table.set_role(0, PRIMARY, 1)
    state = server.new_state(table.words, -1, peers=1)
    mine, its = socket.socketpair()
    with mine, its:
        its.setblocking(False)
        server.occupy(state, 0, its.fileno(), CLIENT, 7)
        statuses = []
        for lease_ns in (10**12, -1):
            table.words[LEASE_NS] = time.monotonic_ns() + lease_ns
            request = request_to_get(cluster=0)
            request[FRAME_HEADER_WORDS + 2] = 1 << 32
            mine.send(request.tobytes())
            server.converse(state, table.register_owner(), 0)
            answer = np.frombuffer(mine.recv(4096), np.uint64)
            statuses.append(int(answer[FRAME_HEADER_WORDS]) >> 8 & 0xFF)
    assert statuses == [ABSENT, LEASE_LAPSED]
    table.close()


def test_who_is_too_late_for_the_next_turn_serves_everybody_once_nevertheless():
    name = f"nearstate-test-{os.getpid()}-late{next(_numbers)}"
    table = Table.create(name, 64, VALUE_BYTES, epoch=1, cluster=CLUSTER, clients=4)
    ours, theirs = socket.socketpair()
    try:
        table.set_role(0, True, 1)
        state = server.new_state(table.words, -1)
        theirs.setblocking(False)
        server.occupy(state, 0, theirs.detach(), CLIENT)
        ours.send(request_to_get(CLUSTER).tobytes())
        server.serve(state, table.register_owner(), time.monotonic_ns() - 1_000_000)
        ours.settimeout(0)
        assert ours.recv(65536)
    finally:
        ours.close()
        table.close()
        table.unlink()


def test_records_expire_and_are_swept_while_idle(start):
    store = start()
    with store.client() as client:
        soon = int(time.monotonic()) + 1
        for n in range(50):
            client.insert(n, 1, b"x", expiry=soon % (1 << 20))
        client.insert(99, 1, b"x")
        assert store.statistics()["records"] == 51
        deadline = time.monotonic() + 30
        while store.statistics()["records"] > 1:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert store.statistics()["counters"]["expired"] == 50
        assert client.get(99, 1).status == OK


@pytest.mark.parametrize("how", ["message", "signal", "control closed"])
def test_a_stopped_store_leaves_nothing(start, how):
    store = start()
    name = Path("/dev/shm") / store.config["table"]
    assert name.exists()
    if how == "message":
        store.control.send({"stop": True})
    elif how == "signal":
        os.kill(store.pid, signal.SIGTERM)
    else:
        store.control.close()
    assert os.waitpid(store.pid, 0)[1] == 0
    store.pid = 0
    assert not name.exists()


def test_mistakes_get_one_clear_line(start):
    store = start()
    taken = Store(port=store.port)
    assert "cannot listen on 127.0.0.1" in taken.ready["error"]
    taken.close()
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"value_bytes": 12}, "multiple of 8"),
        ({"create": False, "table": "nearstate-none"}, "no table 'nearstate-none'"),
        ({"create": False, "table": store.config["table"]}, "served already"),
        ({"map": {}}, "not a partition map"),
    ]
    for changes, message in mistakes:
        with pytest.raises(NearstateError, match=message) as caught:
            StoreProcess({**store.config, "port": 0, "table": store.config["table"] + "-other", **changes})
        assert "\n" not in str(caught.value)
    assert store.statistics()["server_pid"] == store.pid


def test_an_idle_store_sleeps(start):
    store = start()
    ticks = [cpu_ticks(store.pid)]
    time.sleep(1)
    ticks.append(cpu_ticks(store.pid))
    assert ticks[1] - ticks[0] <= 5  # of 100: mostly the sweep


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_statistics_are_json_and_the_table_stays_whole(start):
    store = start()
    with store.client() as client:
        for n in range(300):
            client.insert(n << 32 | n % PARTITIONS, n, b"v")
        statistics = store.statistics()
    assert statistics["records"] == 300
    assert statistics["port"] == store.port
    assert statistics["address"] == "127.0.0.1"
    assert json.loads(json.dumps(statistics))["counters"]["operations"] >= 300
    table = Table.attach(store.config["table"])
    table.verify()
    table.close()
