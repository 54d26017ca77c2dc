"""Linearizable under faults, in the rack: recorded clients of three replicated stores that are killed, stopped and cut off.

Long mode (NEARSTATE_LONG=1): 1,000,000 operations and 1,000 faults.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from datastore.replication.routed import RoutedClient
from datastore.store.table import Table
from datastore.verification.history import read_history
from datastore.verification.linearizability import LINEARIZABLE, check_history
from experiments.harness.bench import COORDINATOR_PORT, STORE_PORT, Bench
from experiments.harness.spec import Experiment, Trial
from tests.rack import emulation_of, working_rack
from tests.recorded import work
from topologies.emulation import system
from topologies.emulation.journal import Journal
from topologies.emulation.processes import Launcher

LONG = os.environ.get("NEARSTATE_LONG") == "1"
FAULTS = 1000 if LONG else 25
CLIENTS = 8
OPERATIONS = (1_000_000 if LONG else 25_000) // CLIENTS
"""Of each client, for each number of replicas: two runs make 50,000 operations and 50 faults."""
LEASE_MS = 250.0
VALUE_BYTES = 16
ONE_WAY = """
table inet nearstate_cut {{
  chain {hook} {{
    type filter hook {hook} priority -300; policy accept;
    {side} "storage" drop
  }}
}}
"""


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, Launcher]]:
    with emulation_of("histories", tmp_path_factory) as made:
        yield made


class Faults:
    """Things that happen to a bench's stores, one at a time, chosen by a seed. What is killed is filled again before the next."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.chance = bench, random.Random(seed)
        self.kinds = (self.kill, self.stop, self.stop, self.stop, self.cut, self.cut_one_way, self.cut_one_way, self.move,
                      self.restart_coordinator)  # fmt: skip
        self.done: list[str] = []

    def strike(self) -> None:
        """Do one of them to one host."""
        host, kind = self.chance.choice(list(self.bench.stores)), self.chance.choice(self.kinds)
        self.done.append(f"{kind.__name__} {host}")
        kind(host)

    def kill(self, host: str) -> None:
        self.bench.wait_full()  # the last copy is not to be killed
        self.bench.stores[host].kill()
        while any(host in g["members"] + g["learners"] for g in self.bench.status()["map"]["groups"]):
            time.sleep(0.02)
        self.bench.restart_store(host)
        self.bench.wait_full()

    def stop(self, host: str) -> None:
        pause_s = self.chance.choice((0.05, 0.2, 0.5, 5.0 if LONG else 1.0))
        self.bench.stores[host].signal(signal.SIGSTOP)
        time.sleep(pause_s)
        self.bench.stores[host].signal(signal.SIGCONT)

    def cut(self, host: str) -> None:
        self.bench.network.cut(host, "storage")
        time.sleep(self.chance.uniform(0.05, 0.8))
        self.bench.network.mend(host, "storage")

    def cut_one_way(self, host: str) -> None:
        hook, side = self.chance.choice((("input", "iifname"), ("output", "oifname")))
        self._nft(host, ["nft", "-f", "-"], ONE_WAY.format(hook=hook, side=side))
        time.sleep(self.chance.uniform(0.05, 0.8))
        self._nft(host, ["nft", "delete", "table", "inet", "nearstate_cut"], "")

    def move(self, host: str) -> None:
        self.bench.ask_coordinator({"move": {"partitions": self.chance.sample(range(256), 64), "target": host}})
        time.sleep(0.2)

    def restart_coordinator(self, _: str) -> None:
        assert self.bench.coordinator
        self.bench.coordinator.kill()
        time.sleep(self.chance.uniform(0, 0.3))
        self.bench.restart_coordinator()

    def _nft(self, host: str, command: list[str], text: str) -> None:
        pid = str(self.bench.network.hosts[host].pid)
        subprocess.run(["nsenter", "-t", pid, "-n", *command], input=text, text=True, check=True, timeout=20)


def record(bench: Bench, folder: Path, number: int, stop: threading.Event) -> None:
    """Work as recorded client `number` on the host `control`."""
    addresses = {host: (bench.storage_address(host), STORE_PORT) for host in bench.stores}
    coordinator = (bench.storage_address("control"), COORDINATOR_PORT)

    def connect(number: int) -> RoutedClient:
        return RoutedClient(addresses, coordinator, number, VALUE_BYTES, bench.cluster_id)

    with system.network_namespace(bench.network.hosts["control"].pid):
        work(connect, folder, number, stop, VALUE_BYTES, OPERATIONS)


def copies(bench: Bench) -> dict[tuple[int, int], set[tuple[int, bytes]]]:
    """Return every record of the cluster by its key: the different (version, value) that its group's members have of it."""
    groups = bench.status()["map"]["groups"]
    found: dict[tuple[int, int], set[tuple[int, bytes]]] = {}
    for host in bench.stores:
        table = Table.attach(bench.table_name(host))
        for found_record in table.records():
            if host in groups[found_record.low & 0xFFFF]["members"]:
                key = (found_record.low, found_record.high)
                found.setdefault(key, set()).add((found_record.version, found_record.value))
        table.close()
    return found


@pytest.mark.parametrize("replicas", [2, 3])
def test_histories_under_faults_are_linearizable(emulation, tmp_path, replicas):
    settings = {"coordinated": True, "lease_ms": LEASE_MS, "value_bytes": VALUE_BYTES, "capacity": 8192}
    trial = Trial("test", "rack", "", "integrated", replicas, {}, settings, 0, 1)
    experiment = Experiment("?", "throughput", ({},), network={"nf_hosts": 3})
    with working_rack(emulation, trial, experiment) as (bench, _):
        stop, folder = threading.Event(), tmp_path / "histories"
        clients = [threading.Thread(target=record, args=(bench, folder, n, stop), daemon=True) for n in range(1, CLIENTS + 1)]
        for client in clients:
            client.start()
        faults = Faults(bench, seed=replicas)
        while len(faults.done) < FAULTS:
            time.sleep(faults.chance.uniform(0.02, 0.1))
            faults.strike()
        bench.wait_full()
        for client in clients:
            client.join(600)
        stop.set()
        bench.wait_full()
        history = read_history(folder)
        result = check_history(history)
        assert result.verdict == LINEARIZABLE, "\n".join([*faults.done, *result.explanation])
        assert result.operations >= 0.9 * CLIENTS * OPERATIONS
        time.sleep(0.1)
        assert all(len(seen) == 1 for seen in copies(bench).values())


def test_a_planted_wrong_answer_is_noticed(emulation, tmp_path):
    """The same clients; one record of one backup is changed behind the protocol's back."""
    settings = {"coordinated": True, "lease_ms": LEASE_MS, "value_bytes": VALUE_BYTES, "capacity": 8192}
    trial = Trial("test", "rack", "", "integrated", 2, {}, settings, 0, 1)
    experiment = Experiment("?", "throughput", ({},), network={"nf_hosts": 3})
    with working_rack(emulation, trial, experiment) as (bench, _):
        folder = tmp_path / "histories"
        record(bench, folder, 1, threading.Event())
        for host in bench.stores:
            table = Table.attach(bench.table_name(host))
            words = table.words
            for found_record in list(table.records()):
                at = np.flatnonzero(words == np.uint64(found_record.low))
                words[at + 3] += np.uint64(1 << 40)
            table.close()
        record(bench, folder, 2, threading.Event())
        assert check_history(read_history(folder)).verdict != LINEARIZABLE
