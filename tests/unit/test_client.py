"""The client: pipelining, answers in order, and every operation exactly once whatever breaks."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from datastore.base.errors import NearstateError
from datastore.base.partitioning import PARTITIONS
from datastore.store import client as remote
from datastore.store.client import Client, StoreClosed
from datastore.store.operations import ADD, GET, INSERT, OPERATION_VALUE, PUT
from datastore.store.statuses import ABSENT, OK, STALE_EPOCH
from datastore.store.table import Table
from tests.secrets_of_tests import client as credential
from tests.unit.test_store_server import CLUSTER, VALUE_BYTES, Store, start

__all__ = ["start"]  # the fixture
NOTHING = np.zeros(VALUE_BYTES // 8, np.uint64)
ONE = np.array([1, 0], np.uint64)


def queue(client: Client, opcode: int, low: int, values: np.ndarray = NOTHING, tag: int = 0, stamp: int = 0) -> int:
    return int(remote.request(client.state, 0, opcode, np.uint64(low), np.uint64(1), np.uint64(stamp), values, 0, tag, 0))


def take(client: Client) -> list[tuple[int, int, int]]:
    """Return (tag, status, first value word) of every answer that is there."""
    answers = []
    while (slot := int(remote.next_answer(client.state, 0))) >= 0:
        at = int(remote.answer_at_now(client.state, 0, slot))
        status = int(client.state.window[at]) >> 8 & 0xFF
        answers.append((int(client.state.tags[slot]), status, int(client.state.window[at + OPERATION_VALUE])))
    return answers


def test_a_window_full_of_operations_is_answered_in_order(start):
    with start().client(window=600) as client:
        for tag in range(600):
            low = tag // 2 << 32 | tag // 2 % PARTITIONS
            assert queue(client, INSERT if tag % 2 == 0 else GET, low, np.array([tag, 0], np.uint64), tag) == tag + 1
        assert queue(client, GET, 0) == -1
        client.exchange()
        assert queue(client, GET, 0) == -1, "answers that are not taken keep their room"
        assert take(client) == [(tag, OK, tag // 2 * 2) for tag in range(600)]
        assert queue(client, GET, 0) == 601


def test_an_answer_stays_until_the_next_one_is_taken(start):
    with start().client(window=4) as client:
        for low in range(4):
            queue(client, INSERT, low, np.array([low + 10, 0], np.uint64))
        client.exchange()
        state = client.state
        slot = int(remote.next_answer(state, 0))
        assert queue(client, PUT, 0) == -1
        at = int(remote.answer_at_now(state, 0, slot))
        assert state.window[at + OPERATION_VALUE] == 10
        remote.next_answer(state, 0)
        assert queue(client, GET, 7, tag=5) == 5
        client.exchange()
        assert take(client)[-1] == (5, ABSENT, 0)


def test_values_longer_than_the_records_are_refused_before_they_are_sent(start):
    with start().client() as client, pytest.raises(NearstateError, match="value of 17 bytes: the records have 16"):
        client.insert(1, 1, b"x" * 17)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_bytes": 24}, "oversized"),
        ({"value_bytes": 8}, "keeps values of 16 bytes, this client 8"),
        ({"window": 4096}, "bad_operation"),
        ({"cluster": 4}, "cluster 4.*: wrong_cluster"),
    ],
)
def test_a_client_that_does_not_fit_is_told_why(start, options, message):
    store = start()
    arguments = {"value_bytes": VALUE_BYTES, "cluster": CLUSTER, **options}
    with pytest.raises(NearstateError, match=message) as caught:
        Client([("127.0.0.1", store.port)], 3, credential=credential(3), **arguments).connect()
    assert "\n" not in str(caught.value)


def test_nobody_there_and_nobody_answering():
    with pytest.raises(StoreClosed, match=r"no store answers at 127\.0\.0\.1:1 "):
        Client([("127.0.0.1", 1)], 3, 8, credential=credential(3)).reconnect(attempts=2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(StoreClosed, match="did not answer the challenge"):
        Client([silent.getsockname()], 3, 8, timeout_s=0.2, credential=credential(3)).connect()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 64, b"\0" * 128, b""])
def test_a_stranger_at_the_address_is_recognised(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        stranger = threading.Thread(target=speak)
        stranger.start()
        with pytest.raises(NearstateError, match=r"does not prove|did not answer the challenge"):
            Client([server.getsockname()], 3, 8, timeout_s=1, credential=credential(3)).connect()
        stranger.join()


def test_what_is_unanswered_comes_again_under_the_same_numbers(start):
    store = start()
    with store.client() as client:
        for _ in range(5):
            queue(client, ADD, 1, ONE)
        assert remote.flush(client.state, 0) == 0
        time.sleep(0.05)  # done, but the answers are never read
        client.disconnect()
        queue(client, ADD, 1, ONE)
        client.reconnect()
        client.exchange()
        assert [value for _, _, value in take(client)] == [1, 2, 3, 4, 5, 6]
        assert client.get(1, 1).version == 6
    assert store.statistics()["counters"]["answered_again"] == 5


def test_a_client_that_starts_anew_goes_on_with_its_numbers(start):
    store = start()
    for expected in range(1, 4):
        with store.client(client_id=42) as client:
            assert client.add(1, 1, 0, 1).value[0] == expected


def test_a_newer_connection_of_a_client_replaces_the_older(start):
    store = start()
    with store.client(client_id=42) as old, store.client(client_id=42) as new:
        assert new.add(1, 1, 0, 1).value[0] == 1
        with pytest.raises(StoreClosed):
            old.add(1, 1, 0, 1)
        old.reconnect()
        assert old.get(1, 1).version >= 1


def test_refused_operations_may_be_asked_again_under_the_new_epoch(start):
    store = start()
    with store.client(epoch=0) as client:
        assert client.add(1, 1, 0, 1).status == STALE_EPOCH
        assert client.state.control[0, remote.STORE_EPOCH] == 1
        client.state.identity[remote.EPOCH] = 1
        assert client.add(1, 1, 0, 1).status == OK


def pump(client: Client, total: int, disturb: Callable[[int], None]) -> list[int]:
    """Keep the window full of ADDs of 1 to one record until `total` are answered; return the values in order.

    disturb(answered): called between steps, may break anything. A lost connection is made again and everything goes on.
    """
    answered: list[int] = []
    queued = 0
    while len(answered) < total:
        while queued < total and queue(client, ADD, 1, ONE) >= 0:
            queued += 1
        disturb(len(answered))
        if remote.flush(client.state, 0) < 0 or remote.receive(client.state, 0) < 0:
            client.reconnect(attempts=60)
        for _, status, value in take(client):
            assert status == OK
            answered.append(value)
    return answered


def test_lost_connections_lose_and_double_nothing(start):
    store, rng = start(), random.Random(4)
    with store.client(window=64) as client:

        def disturb(_: int) -> None:
            if rng.random() < 0.3:
                remote.flush(client.state, 0)  # on its way, or done, when the connection breaks
                time.sleep(rng.choice([0, 0.003]))
                client.disconnect()

        assert pump(client, 5000, disturb) == list(range(1, 5001))
    assert store.statistics()["counters"]["answered_again"] > 0


def test_a_store_killed_and_restarted_on_its_memory_loses_and_doubles_nothing(start):
    store, rng, kills = start(keep=True), random.Random(5), [0]
    next_kill = [200]
    with store.client(window=64) as client:

        def disturb(answered: int) -> None:
            if answered >= next_kill[0] and kills[0] < 25:
                time.sleep(rng.random() * 0.0005)
                store.kill()
                store.restart()
                kills[0] += 1
                next_kill[0] = answered + rng.randrange(50, 300)

        assert pump(client, 8000, disturb) == list(range(1, 8001))
    assert kills[0] == 25
    assert store.statistics()["owners"]
    table = Table.attach(store.config["table"])
    table.verify()
    assert [(r.version, int.from_bytes(r.value[:8], "little")) for r in table.records()] == [(8000, 8000)]
    table.close()


def test_clients_of_several_processes_add_up(start):
    store: Store = start()
    children = []
    for n in range(3):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with store.client(client_id=100 + n, window=32) as client:
                    pump(client, 1000, lambda _: None)
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
    with store.client() as client:
        assert int.from_bytes(client.get(1, 1).value[:8], "little") == 3000
