"""Can anything that is said to a listening socket end its process, or change something, with the secret or without?

Good frames, datagrams and lines are mutated and said to a store (TCP, UDP), to a coordinator and to a controller (UNIX): as
somebody who knows nothing, and after the challenge in each role. All processes must live on and keep map and records.
1,000 inputs for each, a million with NEARSTATE_LONG=1.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from datastore.coordination.heartbeats import Heartbeat, Ping, Pong
from datastore.coordination.messages import beat_message, gossip
from datastore.replication.frames import CLAIM, IMAGE, REPLICATE_WORDS, REPLICATES
from datastore.security.challenge import HELLO, MAGIC, prove
from datastore.security.datagrams import Seals
from datastore.security.secret import ADMINISTRATOR, CLIENT, COORDINATOR, STORE
from datastore.store.operations import ADD, DELETE, GET, INSERT, OPERATION_VALUE, PUT, operation_word
from datastore.store.protocol import FRAME_HEADER_WORDS, write_frame_header
from tests.cluster import CLUSTER, Cluster
from tests.secrets_of_tests import SECRET
from tests.unit.test_strangers import cluster, greeting, report, unchanged

__all__ = ["cluster", "unchanged"]

INPUTS = 1_000_000 if os.environ.get("NEARSTATE_LONG") == "1" else 1_000
ROOT = Path(__file__).resolve().parents[2]
LIES = (b"Infinity", b"-1", b"1e999", b"NaN", b"9" * 30, b"[" * 2000, b'{"a":' * 50, b"null", b"true", b'""', b"[]", b"1.5",
        b"\xff\xfe")  # fmt: skip


def mutated(chance: random.Random, good: bytes) -> bytes:
    """Return `good` with bits flipped, cut, grown, with a lie in it, or something else altogether."""
    data = bytearray(good)
    match chance.randrange(5):
        case 0:
            for _ in range(chance.randrange(1, 8)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 1:
            del data[chance.randrange(len(data)) :]
        case 2:
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(8)] = chance.choice(LIES)
        case 3:
            data += chance.randbytes(chance.randrange(400))
        case _:
            return chance.randbytes(chance.randrange(1, 600))
    return bytes(data)


def operations() -> bytes:
    """Return a frame with an operation of every kind, of a client that nobody is."""
    kinds, words = (GET, PUT, INSERT, ADD, DELETE), OPERATION_VALUE + 2
    frame = np.zeros(FRAME_HEADER_WORDS + words * len(kinds), np.uint64)
    write_frame_header(frame, 0, len(kinds), words, 0, 1, np.uint64(0x7FFF_FFF0), np.uint64(CLUSTER))
    for n, kind in enumerate(kinds):
        at = FRAME_HEADER_WORDS + n * words
        frame[at : at + 4] = operation_word(kind, 0, 16, 0), 1, 7, 9
    return frame.tobytes()


def change(flags: int) -> bytes:
    """Return a store's frame with a bucket and a completion, for a replica that joined when nobody did."""
    body = REPLICATE_WORDS + 2 + 5 + 1 + 5
    frame = np.zeros(FRAME_HEADER_WORDS + body, np.uint64)
    write_frame_header(frame, 0, 1, body, REPLICATES, 1, np.uint64(0), np.uint64(CLUSTER))
    at = FRAME_HEADER_WORDS
    frame[at], frame[at + 1], frame[at + 7] = 7 | flags << 16 | 1 << 32, 2 | 0xFFFF_FFFF << 32, 1 << 32
    frame[at + REPLICATE_WORDS] = 1
    return frame.tobytes()


HELLOS = [HELLO.pack(MAGIC, role, STORE, 0, number, b"nf2", b"nf1", bytes(32)) for role, number in ((CLIENT, 5), (STORE, 0))]
FRAMES = [operations(), greeting(0x7FFF_FFF0, CLUSTER)]
CHANGES = [change(0), change(IMAGE), change(CLAIM)]
PINGS = [gossip(Ping("nf2", CLUSTER, 1, 1, 1), Pong("nf2", 1, 1, 1, False))]
BEATS = [json.dumps(beat_message(Heartbeat("nf2", CLUSTER, 1 << 60, 1, 0, ((7, "nf3"),), (9,), ("nf3",)))).encode() + b"\n"]
REPORTS = [json.dumps(report("nf2")).encode() + b"\n", b'{"map": 0}\n']
COMMANDS = [b'{"move": {"partitions": [1, 2], "target": "somebody"}}\n', b'{"status": true}\n', b'{"moves": true}\n',
            b'{"map": 1}\n']  # fmt: skip
STEERING = [json.dumps({"command": "follow", "instances": ["nf1"] * 256}).encode() + b"\n", b'{"command": "settled"}\n',
            b'{"command": "chain", "stages": [["nf1"], ["nf2"]]}\n', b'{"command": "where"}\n', b'{"command": "show"}\n',
            b'{"command": "steer", "partitions": [3, 4], "instance": "nf2", "return": "nf1"}\n']  # fmt: skip


def say(connect: Callable[[], socket.socket], good: list[bytes], seed: int, count: int = INPUTS) -> None:
    """Say mutated inputs on as few connections as the other end allows."""
    chance, connection, said = random.Random(seed), connect(), 0
    while said < count:
        connection.settimeout(5)
        with contextlib.suppress(ConnectionError):
            for _ in range(min(50, count - said)):
                connection.sendall(mutated(chance, chance.choice(good)))
                said += 1
                connection.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while connection.recv(1 << 20):
                        pass
                connection.settimeout(5)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # keeps no port
        connection.close()
        connection = connect()
    connection.close()


def dialled(port: int, role: int = 0, name: str = "", number: int = 0, wanted: int = STORE) -> Callable[[], socket.socket]:
    """Return what connects to a port, as somebody unknown or after the challenge."""

    def connect() -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port), 5)
        if role:
            prove(connection, SECRET.credential(role, name, number), wanted)
        return connection

    return connect


@pytest.mark.parametrize(("port", "good"), [("nf1", HELLOS + FRAMES + CHANGES), ("control", HELLOS + COMMANDS + BEATS + REPORTS)])
def test_strangers_end_and_change_nothing(unchanged: Cluster, port: str, good: list[bytes]) -> None:
    say(dialled(unchanged.ports[port]), good, 1)


@pytest.mark.parametrize(("role", "number", "good"), [(CLIENT, 5, FRAMES + CHANGES), (STORE, 0, CHANGES + FRAMES)])
def test_who_is_known_to_a_store_ends_and_changes_nothing(unchanged: Cluster, role: int, number: int, good: list[bytes]) -> None:
    say(dialled(unchanged.ports["nf1"], role, "nf2", number), good, 2)


@pytest.mark.parametrize(("role", "number", "good"), [(CLIENT, 5, REPORTS), (STORE, 0, BEATS), (ADMINISTRATOR, 0, COMMANDS)])
def test_who_is_known_to_a_coordinator_ends_and_changes_nothing(
    unchanged: Cluster, role: int, number: int, good: list[bytes]
) -> None:
    say(dialled(unchanged.ports["control"], role, "nf2", number, COORDINATOR), good, 3)


@pytest.mark.parametrize("is_sealed", [False, True])
def test_datagrams_end_and_change_nothing(unchanged: Cluster, is_sealed: bool) -> None:
    chance, seals = random.Random(4), Seals(SECRET, "nf2", ["nf1"], time.time_ns())
    address = ("127.0.0.1", unchanged.ports["nf1"])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as speaker:
        for n in range(INPUTS):
            text = mutated(chance, PINGS[0])[:1900]
            speaker.sendto(seals.seal("nf1", text) if is_sealed else text, address)
            if n % 50 == 49:
                time.sleep(0.001)  # what a full buffer drops is not heard


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A controller without a switch, and where it hears commands."""
    topology, path = tmp_path / "topology.json", tmp_path / "commands"
    topology.write_text(json.dumps({"client": 1, "server": 2, "instances": {"nf1": [3, 4], "nf2": [5, 6]}, "storage": {},
                                    "others": {}}))  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as switches, socket.socket(socket.AF_UNIX) as commands:
        commands.bind(str(path))
        commands.listen()
        process = subprocess.Popen(
            [sys.executable, "-m", "topologies.controller.app", str(topology), str(switches.fileno()), str(commands.fileno())],
            cwd=ROOT, env={**os.environ, "OSKEN_HUB_TYPE": "native"}, pass_fds=[switches.fileno(), commands.fileno()],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    yield process, path
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_commands_end_and_change_nothing(controller: tuple[subprocess.Popen[bytes], Path]) -> None:
    process, path = controller

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(path))
        return connection

    def where() -> object:
        with connect() as connection:
            connection.settimeout(30)
            connection.sendall(b'{"command": "where"}\n')
            return json.loads(connection.makefile("rb").readline())

    before = where()
    say(connect, STEERING, 5)
    time.sleep(0.2)
    assert process.poll() is None
    assert where() == before
