"""What can somebody do who knows nothing, or only a key of its own? Each of these once ended a process or changed something."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datastore.base.errors import NearstateError
from datastore.coordination import process as coordination
from datastore.coordination.heartbeats import Heartbeat
from datastore.coordination.messages import LONGEST_LINE, LineSocket, beat_message
from datastore.coordination.routed import ask
from datastore.process.server import CLIENT_PLACES
from datastore.replication.frames import ACK_WORDS, IMAGE, REPLICATE_WORDS, REPLICATES
from datastore.security.challenge import prove
from datastore.security.secret import ADMINISTRATOR, CLIENT, COORDINATOR, STORE, Credential
from datastore.store.operations import ADD, GET, HELLO, OPERATION_STAMP, OPERATION_VALUE
from datastore.store.protocol import FRAME_HEADER_WORDS, PROTOCOL_MAGIC, write_frame_header
from datastore.store.statuses import BAD_FRAME, OK, STALE_EPOCH, WRONG_CLIENT
from tests.cluster import CLUSTER, HOSTS, LEASE_MS, PARTITIONS, Cluster
from tests.secrets_of_tests import SECRET, secret_file
from tests.secrets_of_tests import client as credential
from tests.unit.test_store_server import CLUSTER as STORE_CLUSTER
from tests.unit.test_store_server import Store, start

__all__ = ["start"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two copies of everything, of which one record; after each test all of it must be there, nobody replaced."""
    running = Cluster(tmp_path_factory.mktemp("cluster"), 2)
    try:
        running.wait_until_full()
        with running.client(1) as client:
            answer = client.do(ADD, 7, 9, (5).to_bytes(8, "little"))
            assert answer
            assert answer.status == OK
        yield running
    finally:
        running.end()


@pytest.fixture
def unchanged(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, whose map, processes and record a test must not change."""
    before = cluster.status()["map"]
    yield cluster
    for process in (*cluster.stores.values(), cluster.coordinator):
        assert process.control.poll() is None, "a process has ended"
    status = cluster.status()
    assert status["map"] == before
    assert status["moves"] == {}
    with cluster.client(time.monotonic_ns() % (1 << 31)) as client:
        for kind, value in ((GET, b""), (ADD, (0).to_bytes(8, "little"))):
            answer = client.do(kind, 7, 9, value)
            assert answer, "nobody serves the record"
            assert answer.status == OK
            assert answer.value[0] == 5


def reach(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 5)


def heard(connection: socket.socket) -> bytes:
    """Return all that the other end says until it closes, which it does in time."""
    connection.settimeout(5)
    data = b""
    with contextlib.suppress(ConnectionError):
        while more := connection.recv(65536):
            data += more
    return data


def image(partition: int, joined: int) -> bytes:
    """Return a frame that makes whoever believes it a backup of `partition`, without a record, in an epoch of the far future."""
    frame = np.zeros(FRAME_HEADER_WORDS + REPLICATE_WORDS, np.uint64)
    write_frame_header(frame, 0, 1, REPLICATE_WORDS, REPLICATES, 1 << 20, np.uint64(0), np.uint64(CLUSTER))
    frame[FRAME_HEADER_WORDS] = partition | IMAGE << 16
    frame[FRAME_HEADER_WORDS + 1] = 1 << 20 | joined << 32
    frame[FRAME_HEADER_WORDS + 3] = 1
    return frame.tobytes()


def greeting(client_id: int, cluster: int, value_bytes: int = 16) -> bytes:
    frame = np.zeros(FRAME_HEADER_WORDS + OPERATION_VALUE, np.uint64)
    write_frame_header(frame, 0, 1, OPERATION_VALUE, 0, 1, np.uint64(client_id), np.uint64(cluster))
    frame[FRAME_HEADER_WORDS] = HELLO | value_bytes << 32
    frame[FRAME_HEADER_WORDS + OPERATION_STAMP] = 64
    return frame.tobytes()


# ---- knowing nothing ----------------------------------------------------------------------------------------------------


def test_an_image_from_nowhere_wipes_nothing(unchanged: Cluster) -> None:
    for host in HOSTS:
        with reach(unchanged.ports[host]) as connection:
            connection.sendall(b"".join(image(partition, 0) for partition in range(PARTITIONS)))
            assert heard(connection) == b""


@pytest.mark.parametrize(
    "data",
    [
        b'{"ping": {"host": "nf2", "cluster": Infinity, "incarnation": 1, "epoch": 1, "sent_ns": 1}}',
        b'{"pong": {"host": "nf2", "epoch": 1e999, "incarnation": 1, "sent_ns": 1, "promise": true}}',
        b"[" * 2000,
        b'{"ping":' * 2000,
        b"",
        b"\xff" * 1400,
    ],
)
def test_a_datagram_from_nowhere_ends_no_store(unchanged: Cluster, data: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as speaker:
        for host in HOSTS:
            speaker.sendto(data, ("127.0.0.1", unchanged.ports[host]))
    time.sleep(2 * LEASE_MS / 1000)


@pytest.mark.parametrize(
    "line",
    [
        b'{"beat": {"host": "nf1", "cluster": Infinity, "incarnation": 1, "epoch": 1, "sent_ns": 1}}\n',
        b"[" * 2000 + b"\n",
        b'{"map": ' * 2000 + b"\n",
        json.dumps({"move": {"partitions": list(range(PARTITIONS)), "target": "nf3"}}).encode() + b"\n",
        b'{"status": true}\n',
        b'{"map": 0}\n',
        json.dumps(beat_message(Heartbeat("nf1", CLUSTER, 1 << 60, 1, 0))).encode() + b"\n",
    ],
)
def test_a_line_from_nowhere_is_answered_by_silence(unchanged: Cluster, line: bytes) -> None:
    with reach(unchanged.ports["control"]) as connection:
        connection.sendall(line)
        assert heard(connection) == b""


def test_idle_connections_shut_nobody_out(unchanged: Cluster) -> None:
    """As many as a store has places, at every listener; heartbeats go on meanwhile, and they are closed after a second."""
    ports = [unchanged.ports[host] for host in (*HOSTS, "control")]
    idle = [reach(port) for _ in range(2 * CLIENT_PLACES) for port in ports]
    began = time.monotonic()
    with unchanged.client(99) as client:
        assert client.do(GET, 7, 9, timeout_s=2)
    assert [heard(connection) for connection in idle] == [b""] * len(idle)
    assert time.monotonic() - began < 4
    for connection in idle:
        connection.close()


def test_the_cluster_number_is_told_to_nobody(start: Callable[..., Store]) -> None:
    store = start(cluster=0x1234_5678)
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 400, PROTOCOL_MAGIC.to_bytes(4, "little") + b"\xff" * 300, greeting(1, 0)):
        with store.connect() as connection:
            connection.sendall(garbage)
            assert heard(connection) == b""


def test_a_greeting_from_nowhere_takes_no_connection_away(start: Callable[..., Store]) -> None:
    store = start()
    with store.client(1) as client:
        with store.connect() as stranger:
            stranger.sendall(greeting(1, STORE_CLUSTER))
            assert heard(stranger) == b""
        assert client.ping().status == OK


# ---- knowing a key of one's own ---------------------------------------------------------------------------------------


def test_a_client_has_its_own_id_alone(start: Callable[..., Store]) -> None:
    store = start()
    with store.client(1) as client, store.proven(2) as other:
        for client_id in (1, 1 | 1 << 32, 0):
            other.sendall(greeting(client_id, STORE_CLUSTER))
            assert other.recv(4096)[33] == WRONG_CLIENT
        other.sendall(greeting(2 | 5 << 32, STORE_CLUSTER))
        assert other.recv(4096)[33] == OK
        assert client.ping().status == OK
    with pytest.raises(NearstateError, match="wrong_client"):
        store.client(3, credential=credential(4))
    with pytest.raises(NearstateError, match="does not prove that it knows the secret"):
        store.client(3, credential=Credential(CLIENT, "test", 3, credential(4).key))
    with pytest.raises(NearstateError, match="without a credential cannot connect"):
        store.client(3, credential=None)


def test_a_client_sends_no_frame_of_a_store(unchanged: Cluster) -> None:
    for host in HOSTS:
        with reach(unchanged.ports[host]) as connection:
            prove(connection, credential(50), STORE, host)
            connection.sendall(image(7, 0))
            assert heard(connection)[33] == BAD_FRAME


def test_a_store_sends_no_operation_and_a_stranger_of_that_role_nothing(unchanged: Cluster) -> None:
    with reach(unchanged.ports["nf1"]) as connection:
        prove(connection, SECRET.credential(STORE, "nf2"), STORE, "nf1")
        connection.sendall(greeting(1, CLUSTER))
        assert heard(connection)[33] == BAD_FRAME
    with reach(unchanged.ports["nf1"]) as connection:
        prove(connection, SECRET.credential(STORE, "nf9"), STORE, "nf1")
        assert heard(connection) == b""


def test_an_image_for_a_replica_that_never_joined_is_refused(unchanged: Cluster) -> None:
    """Also of a peer: nobody joins in epoch 0."""
    with reach(unchanged.ports["nf1"]) as connection:
        prove(connection, SECRET.credential(STORE, "nf2"), STORE, "nf1")
        connection.sendall(b"".join(image(partition, 0) for partition in range(PARTITIONS)))
        connection.settimeout(5)
        words = FRAME_HEADER_WORDS + ACK_WORDS
        acknowledged = np.frombuffer(connection.recv(PARTITIONS * words * 8, socket.MSG_WAITALL), np.uint64).reshape(-1, words)
        assert set(acknowledged[:, FRAME_HEADER_WORDS] >> np.uint64(16)) == {STALE_EPOCH}


def test_a_speaker_is_heard_in_its_role_alone(unchanged: Cluster) -> None:
    address = ("127.0.0.1", unchanged.ports["control"])
    beat = beat_message(Heartbeat("nf1", CLUSTER, 1 << 60, 1, 0))
    move = {"move": {"partitions": [7], "target": "nf3"}}
    told = "may not speak as"
    client, peer = credential(3, "nf1"), SECRET.credential(STORE, "nf2")
    for speaker, message in (
        (client, beat), (client, move), (client, {"status": True}), (client, {"moves": True}), (peer, beat), (peer, move),
        (SECRET.administrator(), beat),
    ):  # fmt: skip
        assert told in ask(address, message, speaker)["error"]
    assert ask(address, {"map": 0}, client)["map"]["epoch"] == unchanged.status()["map"]["epoch"]
    assert ask(address, {"moves": True}, SECRET.administrator()) == {"moves": 0}


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (b'{"move": {"partitions": [Infinity], "target": "nf3"}}', b""),
        (b'{"move": {"partitions": [1e300], "target": "nf3"}}', b"no whole number"),
        (b'{"move": {"partitions": [' + b"9" * 19 + b'], "target": "nf3"}}', b"no whole number"),
        (b'{"move": {"partitions": 7, "target": "nf3"}}', b"no list"),
        (b'{"move": {"partitions": [7], "target": ["nf3"]}}', b"no name"),
        (b"[" * 2000, b""),
        (b"5", b""),
        (b" " * (LONGEST_LINE + 1), b""),
        (b'{"beat": 5}', b"error"),
        (b'{"instance": 5}', b""),
        (b'{"instance": {"host": ""}}', b"may not speak"),
    ],
)
def test_what_an_administrator_says_wrong_ends_its_connection_at_most(unchanged: Cluster, line: bytes, answer: bytes) -> None:
    with reach(unchanged.ports["control"]) as connection:
        prove(connection, SECRET.administrator(), COORDINATOR)
        connection.sendall(line + b"\n")
        if answer:
            assert answer in connection.recv(4096)
        else:
            assert heard(connection) == b""


def test_places_are_kept_for_administrators_and_peers(cluster: Cluster) -> None:
    """All places of clients are taken and stay so; then a store comes anew, and an administrator looks."""
    opened = []
    for number in range(CLIENT_PLACES + 8):
        connection = reach(cluster.ports["nf1"])
        with contextlib.suppress(ConnectionError):
            prove(connection, credential(100 + number), STORE, "nf1")
        opened.append(connection)
    assert sum(is_open(connection) for connection in opened) == CLIENT_PLACES
    cluster.stores["nf2"].kill()
    cluster.wait_until_gone("nf2")
    cluster.stores["nf2"] = cluster.start("nf2")
    cluster.wait_until_full()
    with reach(cluster.ports["nf1"]) as connection:
        prove(connection, SECRET.credential(ADMINISTRATOR, ""), STORE, "nf1")
        connection.sendall(greeting(900, CLUSTER))
        assert connection.recv(4096)[33] == OK
    assert sum(is_open(connection) for connection in opened) == CLIENT_PLACES
    for connection in opened:
        connection.close()


def is_open(connection: socket.socket) -> bool:
    """Tell whether the other end has not closed a connection on which nothing is said."""
    connection.settimeout(0.01)
    try:
        return bool(connection.recv(1))
    except TimeoutError:
        return True
    except ConnectionError:
        return False


def test_who_is_idle_for_long_gives_way(start: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.process.store.IDLE_NS", 300_000_000)
    store = start()
    idle = [store.proven(100 + number) for number in range(CLIENT_PLACES)]
    time.sleep(0.4)
    with store.client(2) as client:
        assert client.ping().status == OK
        assert sum(is_open(connection) for connection in idle) == CLIENT_PLACES - 1
    for connection in idle:
        connection.close()


# ---- the coordinator's instances --------------------------------------------------------------------------------------


@pytest.fixture
def steered(tmp_path: Path) -> Iterator[coordination.Coordination]:
    """A coordinator that steers packets to nf1 and nf2, turned by a thread."""
    config = {"address": "127.0.0.1", "port": 0, "cluster": 1, "replicas": 1, "hosts": HOSTS, "secret": secret_file(),
              "placement": [["nf1"]] * PARTITIONS, "state": str(tmp_path / "state.json"),
              "steering": {"instances": ["nf1", "nf2"], "steering": ["nf1"] * PARTITIONS, "aligned": False,
                           "controller": ""}}  # fmt: skip
    process, over = coordination.Coordination(config), threading.Event()

    def turn() -> None:
        while not over.is_set():
            process.turn(0.005)

    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    yield process
    over.set()
    thread.join()
    process.close()


def report(host: str, /, **changes: Any) -> dict[str, Any]:
    return {"instance": {"host": host, "cluster": 1, "epoch": 1, "parked": [], "quiet": [], **changes}}


def instance(process: coordination.Coordination, host: str, key_of: str = "") -> LineSocket:
    connection = reach(process.port)
    prove(connection, credential(3, key_of or host), COORDINATOR)
    return LineSocket(connection)


def messages(line: LineSocket, seconds: float = 0.3) -> list[dict[str, Any]]:
    """Return what is said in this time."""
    said: list[dict[str, Any]] = []
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            said += line.receive()
            time.sleep(0.005)
    return said


def test_a_report_takes_over_the_orders_of_nobody_else(steered: coordination.Coordination) -> None:
    line = instance(steered, "nf1")
    line.send(report("nf1"))
    assert {"heard": True} in messages(line)
    with reach(steered.port) as stranger:
        stranger.sendall(json.dumps(report("nf1")).encode() + b"\n")
        assert heard(stranger) == b""
    other = instance(steered, "nf1", key_of="nf2")
    other.send(report("nf1"))
    assert "client nf2 may not speak as client nf1" in messages(other)[0]["error"]
    (mine,) = steered.attendance.instances.values()
    assert mine.connection.getpeername() == line.connection.getsockname()
    line.close()
    other.close()


@pytest.mark.parametrize(
    "changes",
    [{"epoch": -1}, {"epoch": 1e300}, {"parked": [PARTITIONS]}, {"parked": [-1]}, {"quiet": 5}, {"quiet": [[]]},
     {"parked": [0] * (PARTITIONS + 1)}, {"host": None}, {"cluster": "x"}],
)  # fmt: skip
def test_a_report_out_of_range_ends_its_connection_alone(steered: coordination.Coordination, changes: dict[str, Any]) -> None:
    line = instance(steered, "nf1")
    line.send(report("nf1", **changes))
    assert {"heard": True} not in messages(line, 0.2)
    again = instance(steered, "nf1")
    again.send(report("nf1"))
    assert {"heard": True} in messages(again)
    line.close()
    again.close()
