"""How does a process of this host read and write records in place, so that its end in between harms nobody?

A record access is `open_record`, work on the words of its value, `commit_record` (or `abort_record`):

    slot = open_record(words, owner, low, high, epoch, now_s)     lock the partition; find the record or reserve a slot;
                                                                  save stamp and value; set the undo word
    words[slot + VALUE] += 1                                      the value starts at slot + VALUE, the stamp is before it
    commit_record(words, owner, slot, expires_s)                  changed? version + 1; clear the undo word; unlock

A version never goes back for a key, not even when its record is deleted or expires and a new one is made: the new one starts
above the highest version that was ever removed from its partition (the partition's floor).

An expired record counts as absent: opened, it is new (all zero) and becomes a record only by a commit that changes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.compiled.memory import fence, fetch_add, trailing_zeros
from datastore.store.layout import (
    BUCKET_WORDS,
    BUCKETS,
    BUCKETS_OFFSET,
    CHANGE,
    COMPLETION,
    COUNT,
    CURSOR,
    DIRTY_OFFSET,
    EXPIRED,
    EXPIRY_BITS,
    EXPIRY_MASK,
    FLOOR,
    FULL_SWEEP,
    INSERT,
    ONE_VERSION,
    PARTITION_COUNT,
    PRIMARY,
    REMOVE,
    RENEW,
    ROLE,
    ROLE_MASK,
    SLOT_WORDS,
    SLOTS,
    STAMP,
    TAG_TOPS,
    U0,
    U1,
    UNDO,
    UNDO_COPY,
    VALUE,
    VALUE_WORDS,
    count_change,
    count_overflow,
    expired,
    expiry_field,
    find_free,
    find_place,
    hash32,
    partition_at,
    place_of,
    set_tag,
    slot_of,
    tag_of,
    word,
)
from datastore.store.locking import is_primary, lock, refuse, release, wrong_role
from datastore.store.partitions import PARTITION_BITS
from datastore.store.statuses import OK, TABLE_FULL, UNKNOWN_PARTITION


@inline
def base_of(words: np.ndarray, slot: int) -> Any:
    """Return the word index of the partition that an open record belongs to; its key says which."""
    return partition_at(words, np.int64(words[slot] & PARTITION_BITS))


@inline
def begin(words: np.ndarray, base: int, undo: int) -> None:
    """Set the undo word: from here on a kill is rolled back. The undo copy is complete."""
    words[base + COMPLETION] = U0
    fence()
    words[base + UNDO] = np.uint64(undo)
    fence()


@jit
def open_record(words: np.ndarray, owner: int, key_low: int, key_high: int, epoch: int, now_s: int) -> int:
    """Lock the key's partition and return the word index of its slot, or minus a status; then the lock is not held.

    words: uint64[n], the table. owner: from `Table.register_owner`. key_low, key_high: uint64. epoch: of the caller's
    partition map. now_s: seconds of CLOCK_MONOTONIC. A record that does not exist, or has expired, reads all zero.
    Statuses: TABLE_FULL, UNKNOWN_PARTITION, NOT_PRIMARY, STALE_EPOCH, BUSY, ALREADY_OPEN.
    """
    low, high = np.uint64(key_low), np.uint64(key_high)
    partition = np.int64(low & PARTITION_BITS)
    if partition >= word(words, PARTITION_COUNT):
        return -refuse(words, UNKNOWN_PARTITION)
    base = partition_at(words, partition)
    status = lock(words, owner, base)
    if status != OK:
        return -refuse(words, status)
    if not is_primary(words, base, epoch):
        status = wrong_role(words, base, epoch)
        release(words, base)
        return -refuse(words, status)
    place = find_place(words, base, low, high, hash32(words, low, high))
    if place == 0:
        return reserve(words, base, low, high, now_s)
    slot = slot_of(place)
    for n in range(word(words, VALUE_WORDS) + 1):
        words[base + UNDO_COPY + n] = words[slot + STAMP + n]
    if expired(words[slot + STAMP], now_s):
        begin(words, base, place | RENEW)
        clear_value(words, slot)
    else:
        begin(words, base, place | CHANGE)
    return slot


@jit
def clear_value(words: np.ndarray, slot: int) -> None:
    for n in range(word(words, VALUE_WORDS)):
        words[slot + VALUE + n] = U0


@jit
def reserve(words: np.ndarray, base: int, low: int, high: int, now_s: int) -> int:
    """Write a key into a free slot, still without a tag, so nobody finds it before the commit; return the slot."""
    hashed = hash32(words, low, high)
    place = find_free(words, base, hashed)
    if place == 0 and word(words, base + FULL_SWEEP) != now_s:  # at most once a second: a full table stays cheap
        words[base + FULL_SWEEP] = np.uint64(now_s)
        for bucket in range(word(words, BUCKETS)):
            remove_expired(words, base, bucket, now_s)
        place = find_free(words, base, hashed)
    if place == 0:
        release(words, base)
        return -refuse(words, TABLE_FULL)
    slot = slot_of(place)
    begin(words, base, place | INSERT)
    words[slot], words[slot + 1] = low, high
    words[slot + STAMP] = words[base + FLOOR] << np.uint64(EXPIRY_BITS)
    clear_value(words, slot)
    return slot


@inline
def is_new(words: np.ndarray, slot: int) -> Any:
    """Tell whether an open record did not exist, or had expired, when it was opened."""
    kind = word(words, base_of(words, slot) + UNDO) & 0xFF
    return kind in (INSERT, RENEW)


@inline
def changed(words: np.ndarray, base: int, slot: int, new: bool) -> Any:
    """Tell whether an open record's value differs from the one it was opened with."""
    difference = U0
    if new:
        for n in range(word(words, VALUE_WORDS)):
            difference |= words[slot + VALUE + n]
    else:
        for n in range(word(words, VALUE_WORDS)):
            difference |= words[slot + VALUE + n] ^ words[base + UNDO_COPY + 1 + n]
    return difference != U0


@inline
def seal(words: np.ndarray, base: int, slot: int, field: int) -> None:
    """Give an open record its next version and the expiry `field`; a new one becomes findable. The lock stays held."""
    words[slot + STAMP] = (words[slot + STAMP] & ~EXPIRY_MASK) + ONE_VERSION | field
    undo = word(words, base + UNDO)
    if undo & 0xFF == INSERT:
        publish(words, base, undo)
    count_change(words, base, undo)


@jit
def publish(words: np.ndarray, base: int, place: int) -> None:
    """Make a reserved slot a record: overflow counts, tag, record count; a kill in between is recounted."""
    slot = slot_of(place)
    hashed = hash32(words, words[slot], words[slot + 1])
    count_overflow(words, base, place, hashed, True)
    set_tag(words, place, tag_of(hashed))
    words[base + COUNT] += U1


@jit
def commit_record(words: np.ndarray, owner: int, slot: int, expires_s: int) -> int:
    """End the work on an open record and unlock; return 1 when its value had changed and was written, else 0.

    expires_s: the absolute second of CLOCK_MONOTONIC at which the record expires; 0 leaves its expiry alone (a new record
    then never expires). Unchanged, an old record keeps its version and takes the expiry; a new one is taken back.
    """
    fence()
    base = base_of(words, slot)
    kind = word(words, base + UNDO) & 0xFF
    new = kind != CHANGE
    field = U0 if new else words[slot + STAMP] & EXPIRY_MASK
    if expires_s != 0:
        field = expiry_field(expires_s)
    written = 0
    if changed(words, base, slot, new):
        seal(words, base, slot, field)
        written = 1
    elif kind == CHANGE:
        if words[slot + STAMP] & EXPIRY_MASK != field:
            words[slot + STAMP] = words[slot + STAMP] & ~EXPIRY_MASK | field
            count_change(words, base, word(words, base + UNDO))
    elif kind == RENEW:
        restore(words, base, slot)
    release(words, base)
    return written


@jit
def restore(words: np.ndarray, base: int, slot: int) -> None:
    """Put the undo copy back."""
    for n in range(word(words, VALUE_WORDS) + 1):
        words[slot + STAMP + n] = words[base + UNDO_COPY + n]


@jit
def abort_record(words: np.ndarray, owner: int, slot: int) -> None:
    """Put an open record back as it was and unlock. (A reserved slot was never visible: nothing to put back.)"""
    fence()
    base = base_of(words, slot)
    if word(words, base + UNDO) & 0xFF != INSERT:
        restore(words, base, slot)
    release(words, base)


@jit
def take_out(words: np.ndarray, base: int, place: int) -> None:
    """Free a place; its undo word is REMOVE and the lock is held. The key stays in the slot, so a tag brings it back."""
    slot = slot_of(place)
    words[base + FLOOR] = max(words[base + FLOOR], words[slot + STAMP] >> np.uint64(EXPIRY_BITS))
    fence()
    set_tag(words, place, U0)
    count_overflow(words, base, place, hash32(words, words[slot], words[slot + 1]), False)
    words[base + COUNT] -= U1
    count_change(words, base, place)


@jit
def remove_expired(words: np.ndarray, base: int, bucket: int, now_s: int) -> int:
    """Take the expired records out of a bucket; the lock is held; return how many."""
    slot_words = word(words, SLOT_WORDS)
    at = base + word(words, BUCKETS_OFFSET) + bucket * word(words, BUCKET_WORDS)
    freed = 0
    for position in range(SLOTS):
        slot = at + 1 + position * slot_words
        used = words[at] >> np.uint64(8 * position + 7) & U1 != U0
        if used and expired(words[slot + STAMP], now_s):
            place = place_of(slot, position)
            begin(words, base, place | REMOVE)
            take_out(words, base, place)
            fence()
            words[base + UNDO] = U0
            freed += 1
    if freed > 0:
        fetch_add(words, EXPIRED, freed)
    return freed


@jit
def any_expired(words: np.ndarray, base: int, bucket: int, now_s: int) -> bool:
    """Look, without the lock, whether a bucket seems to hold an expired record."""
    at = base + word(words, BUCKETS_OFFSET) + bucket * word(words, BUCKET_WORDS)
    used = words[at] & TAG_TOPS
    while used != U0:
        slot = at + 1 + (np.int64(trailing_zeros(used)) >> 3) * word(words, SLOT_WORDS)
        if expired(words[slot + STAMP], now_s):
            return True
        used &= used - U1
    return False


@jit
def sweep(words: np.ndarray, owner: int, partition: int, now_s: int, buckets: int) -> int:
    """Free the expired records of the partition's next `buckets` buckets; return how many.

    Each call goes on where the last one stopped. The lock is taken only for a bucket that has something to free. Where partitions
    are replicated the primary alone frees, and ships that: a copy is what the primary's frames say, bucket by bucket.
    """
    base = partition_at(words, partition)
    if words[base + COUNT] == U0:
        return 0
    total = word(words, BUCKETS)
    bucket = word(words, base + CURSOR) % total
    freed = 0
    for _ in range(min(buckets, total)):
        if any_expired(words, base, bucket, now_s) and lock(words, owner, base) == OK:
            if words[DIRTY_OFFSET] == U0 or words[base + ROLE] & np.uint64(ROLE_MASK) == np.uint64(PRIMARY):
                freed += remove_expired(words, base, bucket, now_s)
            release(words, base)
        bucket = bucket + 1 if bucket + 1 < total else 0
    words[base + CURSOR] = np.uint64(bucket)
    return freed
