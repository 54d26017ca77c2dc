"""Additions to counters on other hosts, gathered until they are sent: those to one counter become one operation.

A hash table of (key, word) with the sum of the deltas. It is emptied with every burst, as far as the windows of the store
hosts have room; while it is nearly full no frames are received, so no addition is ever lost for want of room.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from datastore.compiled import jit
from datastore.store import operations
from datastore.store.client import ClientState, request, room
from datastore.store.layout import U0
from datastore.store.partitions import PARTITION_BITS

SLOTS = 4096
LIMIT = SLOTS // 2
BURST_ADDITIONS = 64 * 2 * 4 + 1024
"""What a burst from both sides, and answers that release waiting packets, may add at most before the table is looked at."""
RESERVE = 24
"""Window slots of a host left to the flights."""
KEY_HIGH, KEY_LOW, WORD, DELTA = range(4)


class Pending(NamedTuple):
    """slots: uint64[SLOTS, 4]; used: int64[SLOTS], 1 where a slot is; order: int64[SLOTS], used slots; count: int64[1]."""

    slots: np.ndarray
    used: np.ndarray
    order: np.ndarray
    count: np.ndarray
    values: np.ndarray


def make_pending() -> Pending:
    """Return an empty table."""
    return Pending(np.zeros((SLOTS, 4), np.uint64), np.zeros(SLOTS, np.int64), np.zeros(SLOTS, np.int64), np.zeros(1, np.int64),
                   np.zeros(1, np.uint64))  # fmt: skip


@jit
def nearly_full(pending: Pending) -> bool:
    """Tell whether a burst might not find room."""
    return pending.count[0] > LIMIT - BURST_ADDITIONS


@jit
def put_pending(pending: Pending, high: int, low: int, word: int, delta: int) -> None:
    """Add `delta` (uint64) to what waits for 64-bit word `word` of the record of a key."""
    slots = pending.slots
    mixed = (high ^ low * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(word)) * np.uint64(0xD6E8FEB86659FD93)
    at = np.int64(mixed >> np.uint64(52))
    while pending.used[at] == 1:
        if slots[at, KEY_HIGH] == high and slots[at, KEY_LOW] == low and slots[at, WORD] == np.uint64(word):
            slots[at, DELTA] += delta
            return
        at = (at + 1) & (SLOTS - 1)
    pending.used[at] = 1
    slots[at, KEY_HIGH], slots[at, KEY_LOW], slots[at, WORD], slots[at, DELTA] = high, low, np.uint64(word), delta
    pending.order[pending.count[0]] = at
    pending.count[0] += 1


@jit
def send_pending(pending: Pending, client: ClientState, primary: np.ndarray, down: int) -> None:
    """Queue additions as operations, as far as there is room; what stays is kept for the next time.

    Their tags are -1 - word: nobody waits for the answers, but a refused one is asked again (`late.py`).
    """
    kept = 0
    for n in range(pending.count[0]):
        at = pending.order[n]
        slot = pending.slots[at]
        host = primary[np.int64(slot[KEY_LOW] & PARTITION_BITS)]
        if down >> host & 1 or room(client, host) <= RESERVE:
            pending.order[kept] = at
            kept += 1
            continue
        pending.values[0] = slot[DELTA]
        word = np.int64(slot[WORD])
        request(client, host, operations.ADD, slot[KEY_LOW], slot[KEY_HIGH], U0, pending.values, 0, -1 - word, word * 8)
        pending.used[at] = 0
    if kept < pending.count[0]:
        tidy(pending, kept)


@jit
def tidy(pending: Pending, kept: int) -> None:
    """Put the additions that stay where a search finds them, now that others before them have gone."""
    pending.count[0] = 0
    for n in range(kept):
        at = pending.order[n]
        pending.used[at] = 0
        slot = pending.slots[at]
        put_pending(pending, slot[KEY_HIGH], slot[KEY_LOW], np.int64(slot[WORD]), slot[DELTA])
