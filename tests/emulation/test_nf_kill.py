"""`kill -9` of the NF process under load, 100 times: does the store serve on, whole, and does the next NF find its state?"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from datastore.base.partitioning import PARTITIONS
from datastore.store.client import Client
from datastore.store.partitions import PartitionMap
from datastore.store.statuses import OK
from datastore.store.table import Table
from nfs.dataplane import declaration
from nfs.dataplane.ledger import imbalance
from tests.conftest import Bench, ask, make_bench
from tests.packets import SERVER
from tests.secrets_of_tests import client as credential
from topologies.emulation import system

KILLS, FLOWS, FRAME_BYTES, OFFERED_KPPS = 100, 50, 128, 30
CLUSTER, STORE_PORT = 77, 7077
HERE = PartitionMap(1, (("nf",),) * PARTITIONS).to_json()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from make_bench("test-nf-kill", tmp_path_factory.mktemp("logs"), ("experiments.harness.preload",))


@pytest.fixture
def table(bench: Bench) -> Iterator[str]:
    name = f"nearstate-test-nf-kill-{os.getpid()}"
    bench.journal.shared_memory(name)
    yield name
    bench.end_processes()
    Path("/dev/shm", name).unlink(missing_ok=True)


def counters(table: Table) -> dict[tuple[int, int], tuple[int, int]]:
    """Return (packets, bytes) by key; every record must be whole: bytes are packets times the frames' one size."""
    found = {}
    for record in table.records():
        out, out_bytes, back, back_bytes = (int(word) for word in np.frombuffer(record.value, np.uint64)[:4])
        assert (out_bytes, back, back_bytes) == (out * (FRAME_BYTES - 4), 0, 0), f"torn record {record}"
        found[record.low, record.high] = (out, out_bytes)
    return found


def test_100_kills_under_load_leave_the_store_whole_and_serving(bench: Bench, table: str) -> None:
    seeded = random.Random(1)
    client, nf, server = (bench.host(name) for name in ("client", "nf", "server"))
    bench.cable((client, "net"), (nf, "inside"))
    bench.cable((server, "net"), (nf, "outside"))
    store = bench.spawn("store", nf, "datastore.process.store:main",
                        {"host": "nf", "table": table, "capacity": 4096, "value_bytes": 32, "address": "127.0.0.1",
                         "port": STORE_PORT, "cluster": CLUSTER, "epoch": 1, "map": HERE, "create": True})  # fmt: skip
    config = {"chain": ["traffic_counter"], "host": "nf", "inside": "inside", "outside": "outside", "port_kind": "afxdp",
              "value_bytes": 32, "capacity": 1, "map": HERE, "client_id": 1, "cluster": CLUSTER, "table": table,
              "stores": [{"host": "nf", "address": "127.0.0.1", "port": STORE_PORT}]}  # fmt: skip
    generator = bench.spawn("generator", client, "experiments.workloads.generator:main",
                            {"interface": "net", "source_mac": "02:00:00:00:00:01", "next_hop_mac": "02:00:00:00:00:02",
                             "server": SERVER, "traffic": {"flows": FLOWS, "frame_bytes": FRAME_BYTES}})  # fmt: skip
    with system.network_namespace(nf.pid):
        remote = Client([("127.0.0.1", STORE_PORT)], 9, 32, CLUSTER, 1, credential=credential(9))
        remote.connect()
    process = bench.spawn("nf", nf, "nfs.dataplane.process:main", config)
    generator.send({"step": 1, "offered_kpps": OFFERED_KPPS, "seconds": 300})
    before: dict[tuple[int, int], tuple[int, int]] = {}
    grown = 0
    for kill in range(KILLS):
        time.sleep(seeded.uniform(0.005, 0.06))
        process.kill()
        state = Table.attach(table)
        state.register_owner()  # puts right what the dead process held, as the next NF does
        state.verify()
        now = counters(state)
        assert all(now[key] >= value for key, value in before.items()), f"a counter went back at kill {kill}"
        grown += now != before
        before = now
        _ask_store(remote, now)
        assert store.poll() is None
        repaired = state.statistics()["counters"]
        state.close()
        process = bench.spawn("nf", nf, "nfs.dataplane.process:main", config)
    assert grown > KILLS * 0.9, "there was load: counters grew between the kills"
    assert len(before) == FLOWS
    assert generator.receive(0) is None, "the load lasted until the last kill"
    time.sleep(0.1)
    statistics = ask(process, {"statistics": True})
    assert imbalance(statistics["ledger"]) == 0
    assert statistics["ledger"]["forwarded"] > 0
    assert statistics["ledger"]["state_refused"] == 0
    print(f"{KILLS} kills: {repaired['lock_takeovers']} locks taken over, {repaired['rollbacks']} records rolled back")
    remote.close()


def _ask_store(remote: Client, expected: dict[tuple[int, int], tuple[int, int]]) -> None:
    """Read one record by the network: the store answers, and what it answers is what the table holds."""
    if not expected:
        return
    (low, high), (packets, _) = next(iter(expected.items()))
    assert low >> 16 & 0xFF == declaration.load("traffic_counter").kind
    answer = remote.get(low, high)
    assert answer.status == OK
    assert int(np.frombuffer(answer.value, np.uint64)[0]) == packets
