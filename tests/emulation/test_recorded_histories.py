"""Eight real clients on hot keys of a real store, some killed at work: is what they recorded linearizable?"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from datastore import __main__ as command_line
from datastore.base.partitioning import PARTITIONS
from datastore.store.client import Client
from datastore.store.operations import GET
from datastore.store.partitions import PartitionMap
from datastore.store.statuses import OK
from datastore.verification.history import HistoryWriter, read_history
from datastore.verification.linearizability import LINEARIZABLE, VIOLATION, check_history
from datastore.verification.recorder import RecordedClient
from tests.conftest import Bench, make_bench
from tests.secrets_of_tests import client as credential
from topologies.emulation import system

CLIENTS, KEYS, OPERATIONS, VALUE_BYTES, CLUSTER, PORT = 8, 3, 2500, 16, 78, 7078
HERE = PartitionMap(1, (("store",),) * PARTITIONS).to_json()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory):
    yield from make_bench("test-histories", tmp_path_factory.mktemp("logs"), ("experiments.harness.preload",))


@pytest.fixture
def table(bench: Bench):
    name = f"nearstate-test-histories-{os.getpid()}"
    bench.journal.shared_memory(name)
    yield name
    bench.end_processes()
    Path("/dev/shm", name).unlink(missing_ok=True)


def work(folder: Path, number: int, operations: int) -> None:
    """What one client does: everything a client can ask, on few keys; conditional writes from what it saw last."""
    chance = random.Random(number)
    seen = [1] * KEYS
    with Client([("10.9.0.1", PORT)], number, VALUE_BYTES, CLUSTER, credential=credential(number)) as client:
        client.connect()
        writer = HistoryWriter(folder, number, VALUE_BYTES)
        recorded = RecordedClient(client, writer)
        for n in range(operations):
            key = chance.randrange(KEYS)
            value = (number << 32 | n).to_bytes(8, "little")
            match chance.randrange(10):
                case 0:
                    answer = recorded.insert(key, 5, value)
                case 1:
                    answer = recorded.put(key, 5, value)
                case 2 | 3:
                    answer = recorded.put(key, 5, value, seen[key])
                case 4 if chance.random() < 0.3:
                    answer = recorded.delete(key, 5, seen[key])
                case 4 | 5 | 6:
                    answer = recorded.add(key, 5, 8, 1)
                case _:
                    answer = recorded.get(key, 5)
            seen[key] = answer.version or 1
        writer.close()


def start(bench: Bench, folder: Path, number: int, operations: int) -> int:
    """Start a client process in the clients' namespace; return its pid."""
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        code = 1
        try:
            with system.network_namespace(bench.hosts[1].pid):
                work(folder, number, operations)
            code = 0
        finally:
            os._exit(code)
    return pid


def test_what_eight_clients_record_is_linearizable_though_some_are_killed(bench, table, tmp_path, capsys):
    store, clients = bench.host("store"), bench.host("clients")
    bench.cable((store, "net"), (clients, "net"), addresses=("10.9.0.1/24", "10.9.0.2/24"))
    bench.spawn("store", store, "datastore.process.store:main",
                {"host": "store", "table": table, "capacity": 4096, "value_bytes": VALUE_BYTES, "address": "10.9.0.1",
                 "port": PORT, "cluster": CLUSTER, "epoch": 1, "map": HERE, "create": True})  # fmt: skip
    folder = tmp_path / "history"
    lasting = [start(bench, folder, number, OPERATIONS) for number in range(1, CLIENTS - 1)]
    chance, number = random.Random(4), 100
    for _ in range(6):
        killed = [start(bench, folder, number + n, 1 << 30) for n in range(2)]
        number += 2
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not all(list(folder.glob(f"{number - n}-*")) for n in (1, 2)):
            time.sleep(0.005)
        time.sleep(chance.uniform(0.05, 0.2))
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in lasting] == [0] * len(lasting)
    history = read_history(folder)
    assert len(history.files) == CLIENTS - 2 + 12
    assert len(history) > (CLIENTS - 2) * OPERATIONS
    assert command_line.main(["check", str(folder)]) == 0
    print(capsys.readouterr().out)
    result = check_history(history)
    assert result.verdict == LINEARIZABLE, "\n".join(result.explanation)
    assert result.refused == 0
    assert {file.unanswered for file in history.files} <= {0, 1}
    rows = history.rows.copy()
    reads = np.flatnonzero((rows["kind"] == GET) & (rows["status"] == OK) & (rows["answered_ns"] > 0))
    rows["version"][reads[len(reads) // 2]] += 1
    changed = type(history)(rows, history.value_bytes, history.files)
    assert check_history(changed).verdict == VIOLATION, "one answer of another version is found"
