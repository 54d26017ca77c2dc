"""Clients that ask for few keys and write down what they asked and heard, for the linearizability checker."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from datastore.coordination.routed import RoutedClient
from datastore.store.client import Answer
from datastore.store.operations import ADD, ANY_VERSION, DELETE, GET, INSERT, PUT
from datastore.store.statuses import OK
from datastore.verification.history import HistoryWriter

KEYS, PORTS = 6, 4
KINDS = (GET, GET, GET, PUT, PUT, INSERT, ADD, ADD, ADD, DELETE)
WRITES = (PUT, INSERT, ADD)
HIGH = 9
"""The high word of every key."""


class RecordedClient:
    """One client of a cluster that writes down what it asks and hears. What nobody answers in `timeout_s` stays open."""

    def __init__(self, client: RoutedClient, writer: HistoryWriter, timeout_s: float = 3.0) -> None:
        self.client, self.writer, self.timeout_s = client, writer, timeout_s
        self.chance = random.Random(client.client_id)
        self.seen: dict[int, int] = {}
        """Versions by key: of the port leases those that are this client's."""
        self.done = 0

    def ask(self, kind: int, low: int, value: bytes = b"", expected: int = ANY_VERSION, expires_s: int = 0) -> Answer | None:
        """Do and record one operation. expires_s: of INSERT, 0: never."""
        row = self.writer.call(kind, low, HIGH, self.client.next_sequence, value, expires_s or expected)
        answer = self.client.do(kind, low, HIGH, value, expected, timeout_s=self.timeout_s, expires_s=expires_s)
        self.done += 1
        if answer is not None:
            self.writer.answer(row, answer.status, answer.version, answer.value)
        return answer

    def change(self) -> None:
        """Ask for or change one of the few records."""
        low = record_key(self.chance.randrange(KEYS))
        kind = self.chance.choice(KINDS)
        expected = self.seen.get(low, 1) if kind in (PUT, DELETE) and self.chance.random() < 0.6 else ANY_VERSION
        answer = self.ask(kind, low, self._value() if kind in WRITES else b"", expected)
        if answer is not None:
            self.seen[low] = answer.version or 1

    def lease(self) -> None:
        """Lease a port for a second or two, give one back, or look whose it is; half of the leases are left to expire."""
        low = port_key(self.chance.randrange(PORTS))
        if low in self.seen:
            version = self.seen.pop(low)
            if self.chance.random() < 0.5:
                self.ask(DELETE, low, expected=version)
        elif self.chance.random() < 0.5:
            self.ask(GET, low)
        else:
            answer = self.ask(INSERT, low, self._value(), expires_s=int(time.monotonic()) + self.chance.choice((1, 1, 2)))
            if answer is not None and answer.status == OK:
                self.seen[low] = answer.version

    def _value(self) -> bytes:
        """Return a value that nobody ever writes again."""
        return (self.client.client_id << 32 | self.done + 1).to_bytes(8, "little")


def record_key(number: int) -> int:
    """Return the low word of a record's key; each is in a partition of its own."""
    return number << 32 | number * 17


def port_key(number: int) -> int:
    """Return the low word of a port's key."""
    return 1 << 40 | number << 32 | 200 + number


def work(
    connect: Callable[[int], RoutedClient], folder: Path, number: int, stop: threading.Event, value_bytes: int, least: int = 0
) -> None:
    """One recorded client: gets, conditional puts, inserts, adds, deletes, port leases; until told to stop and `least` are done.

    connect: makes a client of a number.
    """
    with HistoryWriter(folder, number, value_bytes) as writer, connect(number) as client:
        recorded = RecordedClient(client, writer)
        while not stop.is_set() or recorded.done < least:
            recorded.lease() if recorded.chance.random() < 0.2 else recorded.change()


def read_all(connect: Callable[[int], RoutedClient], folder: Path, number: int, value_bytes: int, times: int) -> None:
    """Record reads of every key, which go to every replica in turn. number: of a client that did nothing yet."""
    with HistoryWriter(folder, number, value_bytes) as writer, connect(number) as client:
        recorded = RecordedClient(client, writer)
        for low in [*map(record_key, range(KEYS)), *map(port_key, range(PORTS))]:
            for _ in range(times):
                assert recorded.ask(GET, low) is not None, f"nobody answers key {low:x}"
