"""Additions to counters that a store refused or never answered: kept until another one answers, under their first names.

An addition that was done and whose answer was lost must not be done again, so it keeps its sequence number and stream
(`store/client.py`). While any waits here no new ones are sent, so there is room for all that were under way.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from datastore.compiled import jit
from datastore.store import operations
from datastore.store.client import ClientState, answer_sequence, answer_stream, answer_tag, request_again, room, slot_at
from datastore.store.layout import U0
from datastore.store.partitions import PARTITION_BITS

KEY_HIGH, KEY_LOW, WORD, DELTA, SEQUENCE, STREAM = range(6)


class Late(NamedTuple):
    """entries: uint64[n, 6], the first count[0] of them in use; values: uint64[1]."""

    entries: np.ndarray
    count: np.ndarray
    values: np.ndarray


def make_late(hosts: int) -> Late:
    """Return an empty list with room for every addition that a client of so many hosts can have under way."""
    return Late(np.zeros((1024 * (hosts + 1), 6), np.uint64), np.zeros(1, np.int64), np.zeros(1, np.uint64))


@jit
def put_late(late: Late, client: ClientState, host: int, slot: int) -> bool:
    """Keep the addition whose refusal is in window slot `slot` of `host`; False when there is no room, which cannot be."""
    count = late.count[0]
    if count >= late.entries.shape[0]:
        return False
    at, entry = slot_at(client, host, slot), late.entries[count]
    entry[KEY_LOW], entry[KEY_HIGH] = client.window[at + operations.KEY_LOW], client.window[at + operations.KEY_HIGH]
    entry[WORD], entry[DELTA] = np.uint64(-1 - answer_tag(client, host, slot)), client.deltas[host * client.limits[0] + slot]
    entry[SEQUENCE], entry[STREAM] = np.uint64(answer_sequence(client, host, slot)), answer_stream(client, host, slot)
    late.count[0] = count + 1
    return True


@jit
def send_late(late: Late, client: ClientState, remote: np.ndarray, down: int) -> None:
    """Ask for them again where their partitions are now, as far as those hosts can be reached and have room."""
    kept = 0
    for n in range(late.count[0]):
        entry = late.entries[n]
        host = remote[np.int64(entry[KEY_LOW] & PARTITION_BITS)]
        if down >> host & 1 or room(client, host) == 0:
            for m in range(6):
                late.entries[kept, m] = entry[m]
            kept += 1
            continue
        late.values[0] = entry[DELTA]
        word = np.int64(entry[WORD])
        request_again(client, host, operations.ADD, entry[KEY_LOW], entry[KEY_HIGH], U0, late.values, -1 - word, word * 8,
                      np.int64(entry[SEQUENCE]), entry[STREAM])  # fmt: skip
    late.count[0] = kept
