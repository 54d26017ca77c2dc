"""Faults that strike a bench's stores while clients are at work, and what the stores hold when they are over."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence

from datastore.base.errors import NearstateError
from datastore.base.partitioning import PARTITIONS
from experiments.harness.bench import Bench
from tests.conftest import wait_for
from topologies.emulation import system

LONG_S = 60.0
"""Far above what stores and coordinator take to agree."""
SHORTEST_S = 0.05
"""Of a fault that passes: some are over before a lease of 80 ms is."""
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

Kind = Callable[[str], None]
"""Begins a fault at a host; returns when it is over, unless it passes."""
Passing = Callable[[str, float, str], None]
"""A fault that passes: at a host, for so many seconds, in one direction (`HOOKS`)."""


class Faults:
    """Things that happen to a bench's stores, chosen by a seed.

    What passes (a stop, a cut) strikes up to two hosts at a time. A kill waits until all copies are there, and until they are
    again: the last one is not to be killed.
    """

    def __init__(self, bench: Bench, seed: int, longest_s: float = 5.0, partitions: Sequence[int] = range(PARTITIONS)) -> None:
        """longest_s: of a fault that passes. partitions: those that are moved, a quarter at a time."""
        self.bench, self.chance = bench, random.Random(seed)
        self.longest_s, self.partitions = longest_s, partitions
        self.kinds: tuple[Kind, ...] = (self.kill, self.move, self.restart_coordinator, *[self.pass_by] * 7)
        self.passing: tuple[Passing, ...] = (self.stop, self.stop, self.cut, self.cut_one_way, self.cut_one_way)
        self.under_way: dict[str, threading.Thread] = {}
        self.done: list[str] = []

    def strike(self) -> None:
        """Do one of them to one host that none passes at."""
        self._kind()(self.chance.choice([host for host in self.bench.stores if host not in self._struck()]))

    def _kind(self) -> Kind:
        """Return which one is next."""
        return self.chance.choice(self.kinds)

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
            moved = self.chance.sample(self.partitions, len(self.partitions) // 4)
            self.bench.ask_coordinator({"move": {"partitions": moved, "target": host}})

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
            SHORTEST_S * (self.longest_s / SHORTEST_S) ** self.chance.random(),
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


def copies(bench: Bench) -> dict[tuple[int, int], set[tuple[int, bytes]]]:
    """Return every record of the cluster by its key: the different (version, value) that its group's members have of it."""
    groups = bench.status()["map"]["groups"]
    found: dict[tuple[int, int], set[tuple[int, bytes]]] = {}
    for host in bench.stores:
        for each in bench.records(host):
            if host in groups[each.low & 0xFFFF]["members"]:
                found.setdefault((each.low, each.high), set()).add((each.version, each.value))
    return found
