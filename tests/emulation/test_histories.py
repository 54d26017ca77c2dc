"""Linearizable under faults, in the rack: recorded clients of three replicated stores that are killed, stopped and cut off.

Long mode (NEARSTATE_LONG=1): 1,000,000 operations and 1,000 faults.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from datastore.native.errors import NearstateError
from datastore.replication.routed import RoutedClient
from datastore.security.secret import CLIENT
from datastore.store.layout import VALUE
from datastore.store.table import Table
from datastore.verification.history import read_history
from datastore.verification.linearizability import LINEARIZABLE, VIOLATION, check_history
from experiments.harness.bench import COORDINATOR_PORT, STORE_PORT, Bench
from experiments.harness.spec import Experiment, Trial
from tests.conftest import wait_for
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
LONG_S = 60.0
"""Far above what stores and coordinator take to agree."""
VALUE_BYTES = 16
HOOKS = {"input": "iifname", "output": "oifname"}
"""Where packets of one direction pass in a host, and what the interface is called there."""
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
    """Things that happen to a bench's stores, chosen by a seed.

    What passes (a stop, a cut) strikes up to two hosts at a time. A kill waits until all copies are there, and until they are
    again: the last one is not to be killed.
    """

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.chance = bench, random.Random(seed)
        self.kinds = (self.kill, self.move, self.restart_coordinator, *[self.pass_by] * 7)
        self.passing = (self.stop, self.stop, self.cut, self.cut_one_way, self.cut_one_way)
        self.under_way: dict[str, threading.Thread] = {}
        self.done: list[str] = []

    def strike(self) -> None:
        """Do one of them to one host that none passes at."""
        self.chance.choice(self.kinds)(self.chance.choice([host for host in self.bench.stores if host not in self._struck()]))

    def restart_all(self) -> None:
        """Kill and restart every store, one after the other."""
        for host in self.bench.stores:
            self.kill(host)

    def kill(self, host: str) -> None:
        self.pass_over()
        self.done.append(f"kill {host}")
        self.wait_full()
        self.bench.stores[host].kill()
        wait_for(lambda: not any(host in group["members"] + group["learners"] for group in self.bench.status()["map"]["groups"]),
                 f"{host} is in no group", LONG_S)  # fmt: skip
        self.bench.restart_store(host)
        self.wait_full()

    def wait_full(self) -> None:
        """Wait until every group has its replicas, on all hosts: the bench is content with those that are there."""
        wait_for(lambda: all(host["lease_ms"] > 0 for host in self.bench.status()["hosts"].values()), "all have a lease", LONG_S)
        self.bench.wait_full()

    def move(self, host: str) -> None:
        self.done.append(f"move to {host}")
        with contextlib.suppress(NearstateError):  # some are still on their way elsewhere
            self.bench.ask_coordinator({"move": {"partitions": self.chance.sample(range(256), 64), "target": host}})

    def restart_coordinator(self, _: str) -> None:
        self.done.append("restart coordinator")
        assert self.bench.coordinator
        self.bench.coordinator.kill()
        time.sleep(self.chance.uniform(0, 0.3))
        self.bench.restart_coordinator()

    def pass_by(self, host: str) -> None:
        """Begin a fault that passes; return at once, or when one of two others has passed."""
        begin, seconds, hook = (
            self.chance.choice(self.passing),
            0.05 * 100 ** self.chance.random(),
            self.chance.choice(tuple(HOOKS)),
        )
        self.done.append(f"{begin.__name__} {host} {hook if begin == self.cut_one_way else ''} {seconds:.2f} s")
        while len(self._struck()) > 1:
            time.sleep(0.005)
        self.under_way[host] = threading.Thread(target=begin, args=(host, seconds, hook), daemon=True)
        self.under_way[host].start()

    def pass_over(self) -> None:
        """Wait until nothing passes any more."""
        for thread in self.under_way.values():
            thread.join()

    def stop(self, host: str, seconds: float, _: str) -> None:
        self.bench.stores[host].signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.bench.stores[host].signal(signal.SIGCONT)

    def cut(self, host: str, seconds: float, _: str) -> None:
        self.bench.network.cut(host, "storage")
        time.sleep(seconds)
        self.bench.network.mend(host, "storage")

    def cut_one_way(self, host: str, seconds: float, hook: str) -> None:
        self._nft(host, ["nft", "-f", "-"], ONE_WAY.format(hook=hook, side=HOOKS[hook]))
        time.sleep(seconds)
        self._nft(host, ["nft", "delete", "table", "inet", "nearstate_cut"], "")

    def _struck(self) -> list[str]:
        return [host for host, thread in self.under_way.items() if thread.is_alive()]

    def _nft(self, host: str, command: list[str], text: str) -> None:
        with system.network_namespace(self.bench.network.hosts[host].pid):
            system.run(command, dict(os.environ), text)


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


def copies(bench: Bench) -> dict[tuple[int, int], set[tuple[int, bytes]]]:
    """Return every record of the cluster by its key: the different (version, value) that its group's members have of it."""
    groups = bench.status()["map"]["groups"]
    found: dict[tuple[int, int], set[tuple[int, bytes]]] = {}
    for host in bench.stores:
        for each in bench.records(host):
            if host in groups[each.low & 0xFFFF]["members"]:
                found.setdefault((each.low, each.high), set()).add((each.version, each.value))
    return found


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
