"""Secrets, challenges, sealed datagrams and strict reading, each on its own."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from datastore.base.errors import NearstateError
from datastore.coordination.heartbeats import Ping
from datastore.coordination.messages import gossip, read_beat, read_gossip
from datastore.security import strict
from datastore.security.challenge import HELLO, MAGIC, Distrust, Identity, Speaker, prove
from datastore.security.datagrams import INCARNATIONS, WINDOW, Counters, Seals
from datastore.security.door import MOST_OF_A_SOURCE, Door
from datastore.security.secret import ADMINISTRATOR, CLIENT, COORDINATOR, KEY_BYTES, STORE, Credential, Secret, key_file
from datastore.store.table import Table
from tests.secrets_of_tests import SECRET

# ---- the secret ---------------------------------------------------------------------------------------------------------


def test_a_secret_is_kept_in_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    path, secret = tmp_path / "secret", Secret.fresh()
    secret.write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Secret.read(path).key == secret.key
    with pytest.raises(NearstateError, match="choose a new file"):
        secret.write(path)
    path.chmod(0o640)
    with pytest.raises(NearstateError, match=r"mode 0640, so others may read it: chmod 600"):
        Secret.read(path)
    path.chmod(0o600)
    path.write_text("no secret")
    with pytest.raises(NearstateError, match="is no secret: a file of 64 hexadecimal digits is"):
        Secret.read(path)
    with pytest.raises(NearstateError, match="cannot be read: No such file"):
        Secret.read(tmp_path / "none")


def test_every_purpose_and_name_has_a_key_of_its_own() -> None:
    keys = [SECRET.credential(role, name, number).key for role in (CLIENT, STORE, ADMINISTRATOR)
            for name in ("", "a", "ab") for number in (0, 1, 2)]  # fmt: skip
    keys += [SECRET.derive("datagram", name) for name in ("a", "b")] + [SECRET.derive("da", "tagram", "a"), SECRET.key]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == KEY_BYTES for key in keys)
    own = SECRET.credential(CLIENT, "a", 5)
    assert own.for_housekeeping().key == own.key
    assert SECRET.credential(CLIENT, "a", 5 | 1 << 31) == own.for_housekeeping()
    assert own.key.hex() not in repr(own)


def test_a_key_is_handed_over_by_descriptor() -> None:
    descriptor = key_file(SECRET.key)
    assert not os.get_inheritable(descriptor)
    assert Secret.received(descriptor).key == SECRET.key
    assert Credential.received(descriptor, CLIENT, "nf1", 3) == Credential(CLIENT, "nf1", 3, SECRET.key)
    os.close(descriptor)
    with pytest.raises(NearstateError, match="no key behind descriptor"):
        Secret.received(descriptor)
    with Path("/dev/null").open("rb") as nothing, pytest.raises(NearstateError, match="key of 0 bytes"):
        Secret.received(nothing.fileno())


def test_the_hash_secrets_follow_from_the_secret_and_from_nothing_that_is_told() -> None:
    def hashing(secret: Secret) -> bytes:
        table = Table.anonymous("hashing", 28, 8, 1, cluster=7, clients=1, window=1, replication_secret=secret.table_secret)
        return table.words[8:13].tobytes()

    other = Secret(bytes(32))
    assert hashing(SECRET) == hashing(SECRET) != hashing(other)
    assert SECRET.cluster != other.cluster
    assert len({hashing(SECRET)[at : at + 8] for at in range(0, 40, 8)}) == 5


# ---- the challenge ------------------------------------------------------------------------------------------------------


class Open:
    """A door on loopback that a thread keeps, as a store or coordinator does between its turns."""

    def __init__(self, role: int = STORE, name: str = "nf1") -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        listener.setblocking(False)
        self.address = listener.getsockname()
        self.door = Door(listener, SECRET, role, name)
        self.known: list[tuple[socket.socket, Identity]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._over.wait(0.0005):
            self.known += self.door.admit()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, 5)

    def wait_known(self, count: int) -> list[Identity]:
        deadline = time.monotonic() + 5
        while len(self.known) < count:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return [identity for _, identity in self.known]

    def __enter__(self) -> Open:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.door.close()
        for connection, _ in self.known:
            connection.close()


def said_after(connection: socket.socket, data: bytes) -> bytes:
    """Return what the other end says to `data` until it closes the connection; it must do so in time."""
    connection.settimeout(5)
    heard = b""
    try:
        connection.sendall(data)
        while more := connection.recv(4096):
            heard += more
    except ConnectionError:
        pass
    return heard


class Tap(socket.socket):
    """A blocking connection that keeps what is said on it."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(fileno=os.dup(connection.fileno()))
        self.settimeout(5)
        self.said = b""

    def send(self, data: Any, flags: int = 0) -> int:
        sent = super().send(data, flags)
        self.said += data[:sent]
        return sent


def test_both_ends_prove_that_they_know_the_secret() -> None:
    with Open() as door, door.connect() as connection:
        prove(connection, SECRET.credential(CLIENT, "nf2", 7), STORE, "nf1")
        assert door.wait_known(1) == [Identity(CLIENT, "nf2", 7)]
        connection.sendall(b"what follows")
        door.known[0][0].settimeout(5)
        assert door.known[0][0].recv(100) == b"what follows"


@pytest.mark.parametrize(
    ("credential", "wanted", "name"),
    [
        (SECRET.credential(CLIENT, "nf2", 7), COORDINATOR, "nf1"),
        (SECRET.credential(CLIENT, "nf2", 7), STORE, "nf3"),
        (SECRET.credential(CLIENT, "nf2", 0), STORE, "nf1"),
        (SECRET.credential(STORE, "nf2", 7), STORE, "nf1"),
        (SECRET.credential(COORDINATOR, "nf2"), STORE, "nf1"),
    ],
)
def test_who_wants_somebody_else_or_has_no_such_role_is_turned_away(credential: Credential, wanted: int, name: str) -> None:
    with Open() as door, door.connect() as connection:
        with pytest.raises(ConnectionResetError, match="takes nobody of this role and name"):
            prove(connection, credential, wanted, name)
        assert door.known == []


@pytest.mark.parametrize(
    "credential",
    [
        Secret(bytes(32)).credential(STORE, "nf2"),
        Credential(STORE, "nf2", 0, SECRET.credential(STORE, "nf3").key),
        Credential(STORE, "nf2", 0, SECRET.credential(ADMINISTRATOR, "nf2").key),
        Credential(CLIENT, "nf2", 6, SECRET.credential(CLIENT, "nf2", 7).key),
    ],
    ids=["another secret", "another name", "another role", "another number"],
)
def test_who_does_not_know_the_key_is_not_known_and_notices(credential: Credential) -> None:
    with Open() as door, door.connect() as connection:
        with pytest.raises(Distrust, match="does not prove that it knows the secret"):
            prove(connection, credential, STORE, "nf1")
        assert door.known == []


def test_what_was_said_before_proves_nothing() -> None:
    """A recorded exchange, and the listener's own proof sent back to it."""
    with Open() as door:
        with door.connect() as connection:
            tap = Tap(connection)
            assert Speaker(SECRET.credential(STORE, "nf2"), STORE, "nf1").step(tap)
            door.wait_known(1)
        with door.connect() as replayed:
            assert len(said_after(replayed, tap.said)) == 64
        with door.connect() as reflected:
            reflected.sendall(tap.said[: HELLO.size])
            answer = reflected.recv(64, socket.MSG_WAITALL)
            assert said_after(reflected, answer[32:]) == b""
        assert len(door.known) == 1


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n\r\n" * 20, b"\0" * 176, HELLO.pack(MAGIC, 9, STORE, 0, 0, b"a", b"nf1", bytes(32)),
     HELLO.pack(MAGIC, STORE, STORE, 1, 0, b"a", b"nf1", bytes(32)),
     HELLO.pack(MAGIC, STORE, STORE, 0, 0, b"\xff", b"", bytes(32)),
     HELLO.pack(MAGIC, STORE, STORE, 0, 0, b"a\0b", b"", bytes(32))],
)  # fmt: skip
def test_garbage_is_answered_by_silence(data: bytes) -> None:
    with Open() as door, door.connect() as connection:
        assert said_after(connection, data) == b""
        assert door.known == []


def test_who_says_nothing_is_left_after_a_second_and_keeps_nobody_out() -> None:
    with Open() as door:
        silent = [door.connect() for _ in range(3 * MOST_OF_A_SOURCE)]
        with door.connect() as connection:
            began = time.monotonic()
            prove(connection, SECRET.credential(CLIENT, "nf2", 7), STORE, "nf1")
            assert time.monotonic() - began < 0.5
        assert all(said_after(connection, b"") == b"" for connection in silent)
        assert 0.9 < time.monotonic() - began < 3
        for connection in silent:
            connection.close()


def test_a_listener_that_is_silent_is_left_in_time() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        socket.create_connection(silent.getsockname()) as connection,
        pytest.raises(TimeoutError, match=r"did not answer the challenge in 0\.1 s"),
    ):
        prove(connection, SECRET.administrator(), COORDINATOR, timeout_s=0.1)


# ---- datagrams ----------------------------------------------------------------------------------------------------------


def seals(name: str, incarnation: int = 5, secret: Secret = SECRET) -> Seals:
    return Seals(secret, name, [peer for peer in ("nf1", "nf2", "nf3") if peer != name], incarnation)


def test_a_datagram_is_taken_once_from_its_sender_by_its_receiver() -> None:
    one, two, three = seals("nf1"), seals("nf2"), seals("nf3")
    data = one.seal("nf2", b"text")
    assert three.open(data) is None
    assert two.open(data) == ("nf1", b"text")
    assert two.open(data) is None
    assert one.open(data) is None
    for at in range(len(data)):
        assert two.open(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) is None
        assert two.open(data[:at]) is None
    assert two.open(seals("nf1", secret=Secret(bytes(32))).seal("nf2", b"text")) is None
    assert two.open(seals("nf4").seal("nf2", b"text")) is None


def test_datagrams_may_overtake_each_other_but_not_come_again() -> None:
    one, two = seals("nf1"), seals("nf2")
    sent = [one.seal("nf2", b"%d" % n) for n in range(WINDOW + 2)]
    assert two.open(sent[-1])
    assert [bool(two.open(data)) for data in sent] == [False, False, *[True] * (WINDOW - 1), False]
    assert not any(two.open(data) for data in sent)


def test_a_counter_far_ahead_forgets_no_more_than_the_window() -> None:
    counters = Counters()
    assert counters.is_new(1 << 60)
    assert counters.is_new((1 << 60) - WINDOW + 1)
    assert not counters.is_new((1 << 60) - WINDOW)
    assert counters.is_new((1 << 60) + 1)
    assert not counters.is_new(1 << 60)


def test_a_process_that_is_gone_is_not_heard_again_and_two_of_a_name_are() -> None:
    two = seals("nf2")
    gone = seals("nf1", 4).seal("nf2", b"gone")
    first, rival = seals("nf1", 5), seals("nf1", 6)
    assert two.open(first.seal("nf2", b"first"))
    assert two.open(rival.seal("nf2", b"rival"))
    assert two.open(first.seal("nf2", b"still"))
    assert two.open(gone) is None
    for incarnation in range(7, 7 + INCARNATIONS):
        assert two.open(seals("nf1", incarnation).seal("nf2", b"next"))
    assert two.open(first.seal("nf2", b"late")) is None


def test_a_store_speaks_for_itself_alone() -> None:
    ping = Ping("nf1", 5, 6, 7, 8)
    assert read_gossip("nf1", gossip(ping)) == (None, ping)
    assert read_gossip("nf2", gossip(ping)) == (None, None)


# ---- strict reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [b"[" * 2000, b"{" * 17, b'{"a":' * 17, b"Infinity", b"-Infinity", b"NaN", b"1e999", b"-1e400", b"9" * 22, b"\xff", b"", b"{",
     b'["]]]]]]]]]]]]",' + b"[" * 17, b'["\\"]]]]]]]]]]",' + b"[" * 17, b"\x00", b"nul"],
)  # fmt: skip
def test_what_is_deep_long_or_not_finite_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"nested|no number|not finite|digits|decode|Expecting|delimiter"):
        strict.loads(text)


def test_what_is_right_is_read() -> None:
    text = b'{"a": [1, -2.5e3, "[[[[[[[[[[[[[[[[[[[[[[", true, null, {"b": "\\\\\\""}], "c": 18446744073709551615}'
    assert strict.message(text) == {"a": [1, -2500.0, "[" * 22, True, None, {"b": '\\"'}], "c": (1 << 64) - 1}
    assert strict.loads(b"[" * 16 + b"]" * 16)
    with pytest.raises(ValueError, match="no object"):
        strict.message(b"[]")


BEAT = {"host": "nf1", "cluster": 1, "incarnation": 2, "epoch": 3, "sent_ns": 4, "synchronised": [[1, "nf2"]], "released": [1],
        "unreachable": ["nf2"], "lag": 0, "function_ended": 0}  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [{"epoch": -1}, {"epoch": 1 << 40}, {"epoch": 1.0}, {"epoch": True}, {"epoch": "1"}, {"sent_ns": 1 << 63}, {"host": 5},
     {"host": "n" * 65}, {"released": {}}, {"released": [-1]}, {"released": "12"}, {"synchronised": [[1]]}, {"lag": None},
     {"unreachable": [[]]}, {"synchronised": [[1 << 30, "nf2"]]}],
)  # fmt: skip
def test_a_heartbeat_out_of_range_is_none(wrong: dict[str, object]) -> None:
    assert read_beat(dict(BEAT)).epoch == 3
    with pytest.raises(NearstateError, match="not a heartbeat"):
        read_beat({**BEAT, **wrong})
