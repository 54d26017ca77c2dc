"""Linearizable under faults, by packets: NF processes count the packets of flows, in stores that are killed, stopped and cut off.

Here the packet loop's own client is at work (`nfs/dataplane/flights.py`, `requests.py`, `answers.py`), on real packets.

Long mode (NEARSTATE_LONG=1): 300,000 packets and 300 faults in each case.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datastore.base.errors import NearstateError
from datastore.verification.history import History, read_history
from datastore.verification.linearizability import LINEARIZABLE, VIOLATION, check_history
from experiments.harness.bench import Bench
from experiments.harness.spec import Experiment, Trial
from tests.conftest import wait_for
from tests.faults import LONG_S, Faults, Kind, copies
from tests.packet_clients import Flow, PacketClients
from tests.rack import emulation_of, settled, working_rack
from topologies.emulation.journal import Journal
from topologies.emulation.processes import Launcher, RunningProcess

LONG = os.environ.get("NEARSTATE_LONG") == "1"
FAULTS = 300 if LONG else 10
PACKETS = 300_000 if LONG else 10_000
LONGEST_S = 5.0 if LONG else 1.2
FLOWS = [Flow(number, number * 37 % 256) for number in range(8)]
"""Few, so that packets from both sides meet at one record; at the beginning their partitions are spread over all hosts."""
VALUE_BYTES = 16
STEADY_S = 0.1
"""A little more than a lease."""
ASTRAY_S, LONGEST_PAUSE = 0.06, 6
"""How often flows are led another way: a failover leads all of them back. The pause between two faults, in such times."""


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, Launcher]]:
    with emulation_of("packet-histories", tmp_path_factory) as made:
        yield made


class PacketFaults(Faults):
    """Faults also of NF processes. They strike while flows are led by NF hosts that do not have their records.

    Of ten faults in a row, six pass; the others are one of each kind that does not.
    """

    def __init__(self, bench: Bench, seed: int) -> None:
        super().__init__(bench, seed, LONGEST_S, [flow.partition for flow in FLOWS])
        self.functions = list(bench.functions)
        self.kinds = (self.kill, self.move, self.restart_coordinator, self.kill_function, *[self.pass_by] * 6)
        self.left: list[Kind] = []
        self.passing = (*self.passing, self.stop_function, self.stop_host)

    def strike(self) -> None:
        self.lead_astray()
        super().strike()
        for _ in range(self.chance.randint(1, LONGEST_PAUSE)):
            time.sleep(ASTRAY_S)
            self.lead_astray()
        if self.chance.random() < 0.3:
            self.lead_back()

    def _kind(self) -> Kind:
        self.left = self.left or self.chance.sample(self.kinds, len(self.kinds))
        return self.left.pop()

    def lead_astray(self) -> None:
        """Have the switch send packets of most flows by any NF host, and their answers by another one.

        A move of such a flow does not end before it is led back.
        """
        for partition in self.chance.sample(self.partitions, len(self.partitions) * 3 // 4):
            self.bench.network.steer([partition], *self.chance.sample(self.functions, 2))

    def lead_back(self) -> None:
        """Have the switch do what the coordinator wants, which does not look whether somebody else steers."""
        self.bench.network.follow(self.bench.status()["steering"])

    def wait_full(self) -> None:
        """Wait until every group has its replicas, and keeps them for a while: a busy box has peers given up in between."""
        wait_for(self._is_steady, "every group has its replicas, and packets go where the coordinator wants", LONG_S)

    def _is_steady(self) -> bool:
        """Lead flows back, which the coordinator may have moved since they last were; tell whether all is there, and stays."""
        self.lead_back()
        before = self._full_epoch()
        time.sleep(STEADY_S)
        return before > 0 and self._full_epoch() == before

    def _full_epoch(self) -> int:
        """Return the map's epoch if all hosts have leases and all groups their replicas, else 0."""
        status = self.bench.status()
        if not all(host["lease_ms"] > 0 for host in status["hosts"].values()):
            return 0
        with suppress(NearstateError):
            self.bench.wait_full(0.2)
            return int(self.bench.status()["map"]["epoch"])
        return 0

    def kill_function(self, host: str) -> None:
        """Kill the NF process, of this host if it has one, and start another one on the table that is there."""
        self.pass_over()
        killed = host if host in self.functions else self.functions[0]
        self.done.append(f"kill function {killed}")
        self.bench.functions[killed].kill()
        time.sleep(self.chance.uniform(0, 0.3))
        self.bench.restart_function(killed)

    def stop_function(self, host: str, seconds: float, hook: str) -> None:
        """Stop an NF process, of this host if it has one."""
        self._stop([self.bench.functions[host if host in self.functions else self.functions[hook == "input"]]], seconds)

    def stop_host(self, host: str, seconds: float, _: str) -> None:
        """Stop a host's store process and its NF process together."""
        there = (self.bench.stores, self.bench.functions)
        self._stop([processes[host] for processes in there if host in processes], seconds)

    def _stop(self, processes: list[RunningProcess], seconds: float) -> None:
        for process in processes:
            process.signal(signal.SIGSTOP)
        time.sleep(seconds)
        for process in processes:
            process.signal(signal.SIGCONT)


@contextmanager
def counting_rack(
    emulation: tuple[Journal, Launcher], placement: str, replicas: int, asynchronous: bool = False
) -> Iterator[tuple[Bench, dict[str, dict[str, Any]]]]:
    """Yield a rack with three stores whose NF processes count packets, and a dict for their statistics at the end.

    asynchronous: packets do not wait until their changes are copied.
    """

    def prepare(bench: Bench) -> None:
        bench.function_main = "tests.counting:main"

    settings = {"coordinated": True, "value_bytes": VALUE_BYTES, "capacity": 8192, "asynchronous": asynchronous}
    trial = Trial("test", "rack", "counted", placement, replicas, {}, settings, 0, 1)
    hosts = {"nf_hosts": 2, "store_hosts": 3} if placement == "centralized" else {"nf_hosts": 3}
    with working_rack(emulation, trial, Experiment("?", "throughput", ({},), network=hosts), prepare) as working:
        yield working


def recorded(bench: Bench, folder: Path, least: int, strike: Callable[[], object], wait_full: Callable[[], object]) -> History:
    """Return what packets recorded while `strike` ran, at least so many of them, and one of each flow from each side in the end.

    wait_full: waits until all is there again. Raises AssertionError when a packet arrived twice, or one of the last did not.
    """
    stop, clients = threading.Event(), PacketClients(bench, folder, FLOWS, seed=least)
    worker = threading.Thread(target=clients.work, args=(stop, least), daemon=True)
    worker.start()
    try:
        strike()
    finally:
        stop.set()
        worker.join(600)
    settled(bench)
    wait_full()
    clients.last()
    clients.close()
    assert clients.twice == [], "no packet arrives twice"
    return read_history(folder)


def numbers(history: History) -> dict[tuple[int, int], list[int]]:
    """Return the numbers given, by flow, in order."""
    given: dict[tuple[int, int], list[int]] = {}
    for row in history.rows[history.rows["answered_ns"] > 0]:
        given.setdefault((int(row["low"]), int(row["high"])), []).append(int(row["version"]))
    return {key: sorted(found) for key, found in given.items()}


def assert_counted_once(history: History) -> None:
    """No number is given twice, and no more are missing than packets did not arrive: told without the checker."""
    sent = Counter((int(row["low"]), int(row["high"])) for row in history.rows)
    for key, given in numbers(history).items():
        assert len(set(given)) == len(given), "a number is given twice"
        assert given[-1] <= sent[key], "more was counted than packets were sent"


def verdict_with(history: History, change: Callable[[np.ndarray], None]) -> str:
    """Return the checker's verdict on a history that was changed."""
    rows = history.rows.copy()
    change(rows)
    return check_history(History(rows, history.value_bytes, history.files)).verdict


def swap(rows: np.ndarray) -> None:
    """Swap the numbers of the first and the last packet of a flow."""
    of_one = np.flatnonzero((rows["low"] == FLOWS[0].low) & (rows["answered_ns"] > 0))
    in_order = of_one[np.argsort(rows["invoked_ns"][of_one])]
    for field in ("version", "answer"):
        rows[field][in_order[[0, -1]]] = rows[field][in_order[[-1, 0]]]


def repeat(rows: np.ndarray) -> None:
    """Give a packet the number that another one of its flow got."""
    of_one = np.flatnonzero((rows["low"] == FLOWS[0].low) & (rows["answered_ns"] > 0))
    middle = of_one[np.argsort(rows["invoked_ns"][of_one])][len(of_one) // 2 :][:2]
    for field in ("version", "answer"):
        rows[field][middle[1]] = rows[field][middle[0]]


@pytest.mark.parametrize(("placement", "replicas"), [("integrated", 2), ("integrated", 3), ("centralized", 2)])
def test_packets_under_faults_are_counted_linearizably(emulation, tmp_path, placement, replicas):
    if LONG:
        faulthandler.cancel_dump_traceback_later()  # pytest's limit is for tests of CI's length
    with counting_rack(emulation, placement, replicas) as (bench, statistics):
        faults = PacketFaults(bench, seed=replicas)

        def strike() -> None:
            while len(faults.done) < FAULTS:
                faults.strike()
            faults.pass_over()
            faults.lead_astray()

        history = recorded(bench, tmp_path / "history", PACKETS, strike, faults.wait_full)
        result = check_history(history)
        assert result.verdict == LINEARIZABLE, "\n".join([*faults.done, *result.explanation])
        assert_counted_once(history)
        held = copies(bench)
        for key, given in numbers(history).items():
            assert [int.from_bytes(value[:8], "little") for _, value in held[key]] == [given[-1]], "what all copies have"
    tell(history, faults, result.seconds, statistics)
    assert verdict_with(history, swap) == VIOLATION
    assert verdict_with(history, repeat) == VIOLATION
    assert sum(counts["writes"] for counts in statistics.values()) > len(history) // 50, "NF processes asked other hosts"


def tell(history: History, faults: Faults, checked_s: float, statistics: dict[str, dict[str, Any]]) -> None:
    """Print what happened, for `pytest -s`."""
    unanswered = int((history.rows["answered_ns"] == 0).sum())
    asked = {name: {kind: counts[kind] for kind in ("fetches", "writes", "conflicts")} for name, counts in statistics.items()}
    print(
        f"\n{len(history):,} packets, {unanswered:,} without an answer, {len(faults.done)} faults, checked in {checked_s:.1f} s"
    )
    print(*faults.done, *asked.items(), sep="\n")


def test_numbers_that_leave_before_they_are_copied_are_given_twice_and_that_is_noticed(emulation, tmp_path):
    """Packets do not wait for copies here. A store is stopped: the NF process of its host counts on until the lease is over."""
    with counting_rack(emulation, "integrated", 2, asynchronous=True) as (bench, _):
        faults = PacketFaults(bench, seed=1)
        primary = bench.status()["map"]["groups"][FLOWS[0].partition]["members"][0]

        def strike() -> None:
            time.sleep(0.2)
            faults.stop(primary, 0.5, "")

        history = recorded(bench, tmp_path / "history", 1000, strike, faults.wait_full)
    assert check_history(history).verdict == VIOLATION
    with pytest.raises(AssertionError, match="a number is given twice"):
        assert_counted_once(history)
