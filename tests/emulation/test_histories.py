"""Linearizable under faults, in the rack: recorded clients of three replicated stores that are killed, stopped and cut off.

Long mode (NEARSTATE_LONG=1): 1,000,000 operations and 1,000 faults.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from datastore.coordination.routed import RoutedClient
from datastore.security.secret import CLIENT
from datastore.store.layout import VALUE
from datastore.store.table import Table
from datastore.verification.history import read_history
from datastore.verification.linearizability import LINEARIZABLE, VIOLATION, check_history
from experiments.harness.bench import COORDINATOR_PORT, STORE_PORT, Bench
from experiments.harness.spec import Experiment, Trial
from tests.faults import Faults, copies
from tests.rack import emulation_of, working_rack
from tests.recorded import HIGH, KEYS, read_all, record_key, work
from topologies.emulation import system
from topologies.emulation.journal import Journal
from topologies.emulation.processes import Launcher

LONG = os.environ.get("NEARSTATE_LONG") == "1"
FAULTS = 1000 if LONG else 25
CLIENTS = 8
OPERATIONS = (1_000_000 if LONG else 25_000) // CLIENTS
"""Of each client, for each number of replicas: two runs make 50,000 operations and 50 faults."""
VALUE_BYTES = 16


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, Launcher]]:
    with emulation_of("histories", tmp_path_factory) as made:
        yield made


def connection(bench: Bench, number: int) -> RoutedClient:
    """Return client `number` of the bench's stores."""
    addresses = {host: (bench.storage_address(host), STORE_PORT) for host in bench.stores}
    credential = bench.secret.credential(CLIENT, "recorded", number)
    return RoutedClient(addresses, (bench.storage_address("control"), COORDINATOR_PORT), credential, VALUE_BYTES,
                        bench.cluster_id)  # fmt: skip


def record(bench: Bench, folder: Path, number: int, stop: threading.Event, least: int = OPERATIONS) -> None:
    """Work as recorded client `number` on the host `control`."""
    with system.network_namespace(bench.network.hosts["control"].pid):
        work(partial(connection, bench), folder, number, stop, VALUE_BYTES, least)


@pytest.mark.parametrize("replicas", [2, 3])
def test_histories_under_faults_are_linearizable(emulation, tmp_path, replicas):
    if LONG:
        faulthandler.cancel_dump_traceback_later()  # pytest's limit is for tests of CI's length
    settings = {"coordinated": True, "value_bytes": VALUE_BYTES, "capacity": 8192}
    trial = Trial("test", "rack", "", "integrated", replicas, {}, settings, 0, 1)
    experiment = Experiment("?", "throughput", ({},), network={"nf_hosts": 3})
    with working_rack(emulation, trial, experiment) as (bench, _):
        stop, folder = threading.Event(), tmp_path / "histories"
        clients = [threading.Thread(target=record, args=(bench, folder, n, stop), daemon=True) for n in range(1, CLIENTS + 1)]
        for client in clients:
            client.start()
        faults = Faults(bench, seed=replicas)
        faults.restart_all()
        while len(faults.done) < FAULTS:
            time.sleep(faults.chance.uniform(0.02, 0.1))
            faults.strike()
        faults.pass_over()
        faults.wait_full()
        stop.set()
        for client in clients:
            client.join(600)
        with system.network_namespace(bench.network.hosts["control"].pid):
            read_all(partial(connection, bench), folder, CLIENTS + 1, VALUE_BYTES, times=2 * replicas)
        history = read_history(folder)
        result = check_history(history)
        assert result.verdict == LINEARIZABLE, "\n".join([*faults.done, *result.explanation])
        assert sum(file.operations >= OPERATIONS for file in history.files) == CLIENTS, "every client got through"
        time.sleep(0.1)
        assert all(len(seen) == 1 for seen in copies(bench).values())


def test_a_planted_wrong_answer_is_noticed(emulation, tmp_path):
    """The same clients; the backups' copies of records are changed behind the protocol's back."""
    settings = {"coordinated": True, "value_bytes": VALUE_BYTES, "capacity": 8192}
    trial = Trial("test", "rack", "", "integrated", 2, {}, settings, 0, 1)
    experiment = Experiment("?", "throughput", ({},), network={"nf_hosts": 3})
    with working_rack(emulation, trial, experiment) as (bench, _):
        stopped, folder = threading.Event(), tmp_path / "histories"
        stopped.set()
        record(bench, folder, 1, stopped, least=500)
        groups, changed = bench.status()["map"]["groups"], 0
        for host in bench.stores:
            table = Table.attach(bench.table_name(host))
            for low in map(record_key, range(KEYS)):
                if groups[low & 0xFF]["members"][1] == host:
                    slots = np.flatnonzero((table.words[:-VALUE] == low) & (table.words[1 : 1 - VALUE] == HIGH))
                    table.words[slots + VALUE] += np.uint64(1 << 40)
                    changed += len(slots)
            table.close()
        assert changed > 0
        with system.network_namespace(bench.network.hosts["control"].pid):
            read_all(partial(connection, bench), folder, 2, VALUE_BYTES, times=4)
        assert check_history(read_history(folder)).verdict == VIOLATION
