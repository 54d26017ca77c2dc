"""Packets that wait although their state is on this host: until it is committed, or until it is known who has it.

Where stores replicate, a packet that has run through a function on a record in place is *held* until every backup has what it
changed, or saw (output commit). A packet whose partition is on its way from one host to another is *parked* before it reaches
the function, and goes on where the partition then is. Both wait in one queue a partition, in the order in which they came, so
the order within a flow stays.

What a held packet waits for: `changes` of its partition as they were when it had run. They count for as long as this host is the
same primary: one that was deposed in between cannot know what became of them, and the packet is dropped (`uncommitted`). One
that handed the partition over does know: it did so when all its changes were committed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from datastore.compiled import inline
from datastore.compiled.memory import load_acquire
from datastore.store.layout import COMMITTED_AT, ENDED_AT, ROLE, ROLE_BITS, ROLE_MASK, partition_at, word
from datastore.store.roles import rules

# words of a waiting packet
KIND, NEED, REIGN, ALSO_PARTITION, ALSO_NEED, SINCE_NS, STEP, ALSO_REIGN = range(8)
"""ALSO_PARTITION: another partition that the packet changed, how many of its changes it waits for, and their reign; -1: none."""
HELD, PARKED = range(2)
# words of a queue
HEAD, TAIL, PARKED_COUNT, IS_ACTIVE = range(4)
GO, STAY, UNCOMMITTED = range(3)


class Held(NamedTuple):
    """packets: int64[frames, 8]. queues: int64[partitions, 4]. active: int64[2 * partitions], those with a queue (in a pass, each
    can come up anew once).

    parking: int64[partitions], 1 where packets are to be parked, by order. deposed: int64[partitions], the reign of another host
    since which a map leaves this host out, 0: none.
    """

    packets: np.ndarray
    queues: np.ndarray
    active: np.ndarray
    parking: np.ndarray
    deposed: np.ndarray


def make_held(frames: int, partitions: int) -> Held:
    """Return empty queues for so many packets and partitions."""
    queues = np.zeros((partitions, 4), np.int64)
    queues[:, HEAD] = queues[:, TAIL] = -1
    return Held(np.zeros((frames, 8), np.int64), queues, np.zeros(2 * partitions, np.int64),
                np.zeros(partitions, np.int64), np.zeros(partitions, np.int64))  # fmt: skip


@inline
def put_last(held: Held, next_packet: np.ndarray, active: int, partition: int, index: int) -> Any:
    """Append packet `index` to a partition's queue; returns how many queues there are now, `active` before."""
    queue = held.queues[partition]
    next_packet[index] = -1
    if queue[TAIL] < 0:
        queue[HEAD] = index
    else:
        next_packet[queue[TAIL]] = index
    queue[TAIL] = index
    if held.packets[index, KIND] == PARKED:
        queue[PARKED_COUNT] += 1
    if queue[IS_ACTIVE] == 0:
        queue[IS_ACTIVE] = 1
        held.active[active] = partition
        active += 1
    return active


@inline
def put_back(held: Held, next_packet: np.ndarray, active: int, partition: int, index: int) -> Any:
    """As `put_last`, but before all that are parked: the packet was the first of them, or there are none."""
    queue = held.queues[partition]
    if queue[PARKED_COUNT] == 0:
        return put_last(held, next_packet, active, partition, index)
    next_packet[index] = queue[HEAD]
    queue[HEAD] = index
    queue[PARKED_COUNT] += 1
    return np.int64(active)


@inline
def take_first(held: Held, next_packet: np.ndarray, partition: int) -> None:
    """Take the first packet out of a partition's queue; there is one."""
    queue = held.queues[partition]
    index = queue[HEAD]
    if held.packets[index, KIND] == PARKED:
        queue[PARKED_COUNT] -= 1
    queue[HEAD] = next_packet[index]
    if queue[HEAD] < 0:
        queue[TAIL] = -1


@inline
def is_committed(words: np.ndarray, partition: int, need: int) -> Any:
    """Tell whether so many changes of a partition are committed."""
    return np.int64(load_acquire(words, word(words, COMMITTED_AT) + partition)) >= need


@inline
def outcome(words: np.ndarray, partition: int, reign: int, need: int, has_lease: bool) -> Any:
    """Return what became of so many changes of a partition, made in a reign of this host: GO, STAY or UNCOMMITTED.

    The role is read after what is committed: while this host rules, that was said of its own reign. A reign that was handed over
    is written down before the role changes; no lease is needed then, since nobody else ruled before.
    """
    committed = is_committed(words, partition, need)
    role = load_acquire(words, partition_at(words, partition) + ROLE)
    if np.int64(role >> np.uint64(ROLE_BITS)) != reign or not rules(np.int64(role & np.uint64(ROLE_MASK))):
        handed_over = np.int64(load_acquire(words, word(words, ENDED_AT) + partition))
        return GO if reign > 0 and handed_over == reign else UNCOMMITTED
    return GO if committed and has_lease else STAY


@inline
def known_outcome(held: Held, words: np.ndarray, partition: int, reign: int, need: int, has_lease: bool) -> Any:
    """`outcome`, or UNCOMMITTED where only a store process could say more that is gone: without a lease, deposed by a map.

    A store process that lives follows that map, too, and its table says what became of the changes.
    """
    found = outcome(words, partition, reign, need, has_lease)
    if found == STAY and not has_lease and held.deposed[partition] > reign:
        return np.int64(UNCOMMITTED)
    return np.int64(found)


@inline
def judge(held: Held, words: np.ndarray, index: int, partition: int, has_lease: bool) -> Any:
    """Return what to do with a held packet: GO, STAY or UNCOMMITTED."""
    packet = held.packets[index]
    own = known_outcome(held, words, partition, packet[REIGN], packet[NEED], has_lease)
    also = packet[ALSO_PARTITION]
    other = np.int64(GO)
    if also >= 0:
        other = known_outcome(held, words, also, packet[ALSO_REIGN], packet[ALSO_NEED], has_lease)
    if own == UNCOMMITTED or other == UNCOMMITTED:
        return np.int64(UNCOMMITTED)
    return np.int64(GO) if own == GO and other == GO else np.int64(STAY)
