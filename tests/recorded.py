"""Clients that ask for few keys and write down what they asked and heard, for the linearizability checker."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

from datastore.replication.routed import RoutedClient
from datastore.store.operations import ADD, ANY_VERSION, DELETE, GET, INSERT, PUT
from datastore.verification.history import HistoryWriter

KEYS = 6
KINDS = (GET, GET, GET, PUT, PUT, INSERT, ADD, ADD, ADD, DELETE)
WRITES = (PUT, INSERT, ADD)
HIGH = 9
"""The high word of every key."""


def work(
    connect: Callable[[int], RoutedClient],
    folder: Path,
    number: int,
    stop: threading.Event,
    value_bytes: int,
    most: int = 1 << 62,
) -> None:
    """One recorded client: gets, conditional puts, inserts, adds and deletes, until told to stop or `most` are done.

    connect: makes a client of a number. What nobody answers in 3 s stays open in the history.
    """
    chance = random.Random(number)
    seen: dict[int, int] = {}
    writer = HistoryWriter(folder, number, value_bytes)
    with connect(number) as client:
        done = 0
        while not stop.is_set() and done < most:
            key = chance.randrange(KEYS)
            low = key << 32 | key * 17
            kind = chance.choice(KINDS)
            value = (number << 32 | chance.randrange(1 << 20)).to_bytes(8, "little") if kind in WRITES else b""
            expected = seen.get(key, 1) if kind in (PUT, DELETE) and chance.random() < 0.6 else ANY_VERSION
            row = writer.call(kind, low, HIGH, client.next_sequence, value, expected, 0)
            answer = client.do(kind, low, HIGH, value, expected, timeout_s=3)
            done += 1
            if answer is not None:
                writer.answer(row, answer.status, answer.version, answer.value)
                seen[key] = answer.version or 1
    writer.close()
