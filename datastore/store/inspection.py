"""What is in a table, seen without disturbing it; and is it consistent?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datastore.compiled import allocating, jit
from datastore.compiled.memory import fence, load_acquire, trailing_zeros
from datastore.store.layout import (
    BUCKET_WORDS,
    BUCKETS,
    BUCKETS_OFFSET,
    COUNT,
    LOCK,
    OVERFLOW_SHIFT,
    SLOT_WORDS,
    SLOTS,
    TAG_TOPS,
    U0,
    U1,
    UNDO,
    find_place,
    hash32,
    home_bucket,
    partition_at,
    place_of,
    tag_of,
    word,
)
from datastore.store.locking import OWNER_MASK
from datastore.store.partitions import PARTITION_BITS, FlowKey


@jit
def copy_bucket(words: np.ndarray, base: int, bucket: int, records: np.ndarray, held: bool) -> int:
    """Copy a bucket's records to the front of `records`; return how many, or -1 when someone was at work meanwhile.

    records: uint64[SLOTS, slot words]. held: the caller has the lock; without it the lock word's count of turns tells
    whether the copy is whole.
    """
    seen = load_acquire(words, base + LOCK)
    if seen & OWNER_MASK != U0 and not held:
        return -1
    slot_words = word(words, SLOT_WORDS)
    at = base + word(words, BUCKETS_OFFSET) + bucket * word(words, BUCKET_WORDS)
    used = words[at] & TAG_TOPS
    count = 0
    while used != U0:
        slot = at + 1 + (np.int64(trailing_zeros(used)) >> 3) * slot_words
        for n in range(slot_words):
            records[count, n] = words[slot + n]
        count += 1
        used &= used - U1
    fence()
    return count if load_acquire(words, base + LOCK) == seen else -1


@allocating
def check_partition(words: np.ndarray, partition: int, probed: np.ndarray) -> int:
    """Return 0 when a partition at rest is consistent, else which check failed (see `Table.verify`).

    probed: int64[buckets], all zero; how many records probed past each bucket afterwards.
    """
    base = partition_at(words, partition)
    buckets, bucket_words, slot_words = word(words, BUCKETS), word(words, BUCKET_WORDS), word(words, SLOT_WORDS)
    first = base + word(words, BUCKETS_OFFSET)
    if words[base + LOCK] & OWNER_MASK != U0:
        return 1
    if words[base + UNDO] != U0:
        return 2
    count = 0
    for bucket in range(buckets):
        for position in range(SLOTS):
            at = first + bucket * bucket_words
            tag = words[at] >> np.uint64(8 * position) & np.uint64(0xFF)
            if tag == U0:
                continue
            slot = at + 1 + position * slot_words
            hashed = hash32(words, words[slot], words[slot + 1])
            count += 1
            if tag != tag_of(hashed):
                return 3
            if np.int64(words[slot] & PARTITION_BITS) != partition:
                return 4
            if find_place(words, base, words[slot], words[slot + 1], hashed) != place_of(slot, position):
                return 5
            past = home_bucket(words, hashed)
            while past != bucket:
                probed[past] += 1
                past = past + 1 if past + 1 < buckets else 0
    if count != word(words, base + COUNT):
        return 6
    for bucket in range(buckets):
        overflow = np.int64(words[first + bucket * bucket_words] >> OVERFLOW_SHIFT)
        if overflow != probed[bucket] and overflow != 255:
            return 7
    return 0


FAULTS = (
    "", "its lock is held", "its undo word is set", "a tag does not belong to its key", "a key belongs to another partition",
    "a record is not found by its key, or a key is there twice", "its record count is wrong", "an overflow count is wrong",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A record as a tool shows it. expires_in_s: None when it never expires, negative when it has."""

    low: int
    high: int
    version: int
    expires_in_s: int | None
    value: bytes

    @property
    def key(self) -> FlowKey:
        return FlowKey.of_words(self.low, self.high)
