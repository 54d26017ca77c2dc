"""Where is what in a table's memory?

Everything is an array of 64-bit words, shared by all processes of a host that use the table:

    header       one page: sizes, hash secrets, counters, who holds which owner number
    progress     in a table that replicates, of each partition: changes so far; those committed; the last reign handed over
    partition 0  header: lock | role | count | undo | completion | version floor | sweep cursor | last full sweep
                         undo copy: stamp and value of the record being worked on
                 dirty: in a table that replicates, a byte a bucket: what changed since it was last shipped
                 buckets: [7 tags + overflow] [7 slots of key low | key high | stamp | value]
    partition 1  ...
    clients      per remote client: id, window ..., then its ring of completion records

A bucket's first word holds seven one-byte tags (7 hash bits | 0x80; 0: the slot is free), matched all at once, and in its
top byte how many records of the partition probed past this full bucket (the idea of F14, N. Bronson and X. Shi, 2019).
A lookup goes on to the next bucket only while that count is not zero; at 255 it saturates and stays.

Replicas of a partition are alike word for word: same sizes, same secrets, each record in the same slot. So what replication
ships is slots and first words of buckets, and what it must remember is a bit for each (see `replication/shipping.py`).

Bytes per record at 70 % fill: (24 + value + 8/7) / 0.7, that is 1.48 (8-byte values) to 1.45 times the payload (64).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.compiled.memory import prefetch, trailing_zeros

MAGIC_NUMBER = 0x656C_6261_7472_6165  # "eartable"
LAYOUT_VERSION = 5
HEADER_WORDS = 512
"""One page."""

# Header: what every access reads (never written after creation), in the first two cache lines.
MAGIC, LAYOUT, VALUE_WORDS, BUCKETS, PARTITION_COUNT, FIRST, STRIDE, BUCKETS_OFFSET = range(8)
SECRETS, HASH_SECRETS = 8, 5
SLOT_WORDS, BUCKET_WORDS, DIRTY_OFFSET = 13, 14, 15
"""DIRTY_OFFSET: from a partition's header to its dirty bytes; 0: the table does not replicate."""
# Header: what the store process and the tools read.
EPOCH, CLUSTER, CLIENTS, WINDOW, CLIENTS_AT, CLIENT_STRIDE, TOTAL_WORDS, CAPACITY, ADDRESS, PORT = range(16, 26)
CHANGES_AT, COMMITTED_AT, LEASE_NS, STORE_ASLEEP, IN_PLACE, COMMITS = range(26, 32)
"""Where the progress words of partition 0 are; until when (CLOCK_MONOTONIC) the coordinator lets this host answer, 0: for ever;
whether the store process sleeps; how often others said that they changed records; how often it said that more is committed."""
# Header: counters.
STATUS_COUNTS = 32
TAKEOVERS, ROLLBACKS, EXPIRED, FRAMES, OPERATIONS, CONNECTIONS, REPEATED = range(56, 63)
COUNTERS = {
    "lock_takeovers": TAKEOVERS, "rollbacks": ROLLBACKS, "expired": EXPIRED, "frames": FRAMES, "operations": OPERATIONS,
    "connections": CONNECTIONS, "answered_again": REPEATED,
}  # fmt: skip
# Header: where the third progress word of partition 0 is: since when this host was primary when it last handed it over.
ENDED_AT = 63
# Header: the process behind each owner number; behind number 0 the store process.
OWNER_PIDS = 64
OWNERS = 63
"""Owner numbers are 1 to 63; 0 is nobody."""

# Header: four words for each owner number, room for a `struct flock`.
OWNER_SCRATCH = 128
# Header: whether each owner sleeps until something is committed (see `bells.py`).
OWNER_ASLEEP = 384

# Header: until when the peers' promises let this host answer; which process of the host serves the table (see `Heartbeat`).
PROMISE_NS, INCARNATION = 448, 449

# Header: the number of the NF process on the table, and lives (`lives.py`): of the store process' threads that change the table
# and that renew the lease, and of that NF process.
FUNCTION, SERVER_LIFE, LEASE_LIFE, FUNCTION_LIFE = 450, 456, 464, 472

# A partition's header.
LOCK, ROLE, COUNT, UNDO, COMPLETION, FLOOR, CURSOR, FULL_SWEEP, UNDO_COPY = range(9)

# A bucket and a slot.
SLOTS = 7
STAMP, VALUE = 2, 3

# A client's header, and a completion record of its ring.
CLIENT_ID, CLIENT_USED_S = range(2)
CLIENT_HEADER_WORDS = 8
DONE_SEQUENCE, DONE_STATUS, DONE_STAMP, DONE_VALUE = range(4)

# A stamp: 44 bits of version, 20 bits of expiry.
EXPIRY_BITS = 20
ONE_VERSION = np.uint64(1 << EXPIRY_BITS)
EXPIRY_MASK = np.uint64((1 << EXPIRY_BITS) - 1)
HALF_RANGE = np.uint64(1 << EXPIRY_BITS - 1)
LONGEST_LIFE_S = (1 << EXPIRY_BITS - 1) - 1
"""About six days: expiry seconds are compared with wrap-around."""

# A partition's role on this host, in its role word `epoch << ROLE_BITS | role`. The epoch: since when its primary is primary.
ROLE_BITS, ROLE_MASK = 2, 3
NO_ROLE, PRIMARY, BACKUP, RETIRING = range(4)
"""BACKUP: what is committed may be read here. RETIRING: a primary that takes no more requests and ships what it has."""
COMMITTED_ALWAYS = 1 << 62
"""What `committed` says of a partition without backups."""
BUCKET_DIRTY = 7
"""The bit of a dirty byte that stands for the bucket's first word alone; bits 0 to 6 are its slots."""

# What the undo word says is being done to its place: `place | kind`.
CHANGE, INSERT, RENEW, REMOVE = 1, 2, 3, 4
"""A record is changed in place; a free slot is filled; an expired record starts anew; a record is taken out."""

U0, U1, U32 = np.uint64(0), np.uint64(1), np.uint64(32)
BYTE = np.uint64(0xFF)
ONES = np.uint64(0x0101010101010101)
TAG_TOPS = np.uint64(0x0080808080808080)
OVERFLOW_ONE = np.uint64(1 << 56)
OVERFLOW_SHIFT = np.uint64(56)


@inline
def word(words: np.ndarray, at: int) -> Any:
    """Return a word as int64: mixing uint64 with Numba's int64 indices would make floats."""
    return np.int64(words[at])


@inline
def lease_holds(words: np.ndarray, now_ns: int) -> Any:
    """Tell whether this host may answer at `now_ns`, a clock that was read after the state was.

    The coordinator's lease and the peers' promises are two words, since two threads of the store process write them.
    """
    return words[LEASE_NS] == U0 or now_ns < word(words, LEASE_NS) or now_ns < word(words, PROMISE_NS)


@inline
def partition_at(words: np.ndarray, partition: int) -> Any:
    """Return the word index of a partition's header."""
    return word(words, FIRST) + np.int64(partition) * word(words, STRIDE)


@inline
def client_at(words: np.ndarray, client: int) -> Any:
    """Return the word index of a client's slot in the table."""
    return word(words, CLIENTS_AT) + client * word(words, CLIENT_STRIDE)


@inline
def completion_at(words: np.ndarray, client: int, sequence: int) -> Any:
    """Return the word index of the completion record that a client's operation `sequence` (uint64) has or will have."""
    place = np.int64(np.uint64(sequence) % words[WINDOW])
    return client_at(words, client) + CLIENT_HEADER_WORDS + place * (DONE_VALUE + word(words, VALUE_WORDS))


@inline
def hash32(words: np.ndarray, low: int, high: int) -> Any:
    """Return 32 hash bits of a key as int64: multilinear hashing under the table's secrets.

    Strongly universal (D. Lemire, O. Kaser: Strongly universal string hashing is fast, 2014): whoever chooses flows
    without knowing the secrets cannot make them collide more often than chance does. low, high: uint64.
    """
    total = words[SECRETS] + words[SECRETS + 1] * (low & np.uint64(0xFFFFFFFF)) + words[SECRETS + 2] * (low >> U32)
    total += words[SECRETS + 3] * (high & np.uint64(0xFFFFFFFF)) + words[SECRETS + 4] * (high >> U32)
    return np.int64(total >> U32)


@inline
def home_bucket(words: np.ndarray, hashed: int) -> Any:
    """Return the bucket, counted within its partition, where the probing of a hash begins."""
    return (hashed >> 7) * word(words, BUCKETS) >> 25


@inline
def tag_of(hashed: int) -> Any:
    """Return the tag byte of a hash as uint64."""
    return np.uint64(hashed & 0x7F | 0x80)


@inline
def matches(tags: int, tag: int) -> Any:
    """Return a word with the top bit of byte n set where tag n may equal `tag`; a match is never missed.

    The zero-byte test of Hacker's Delight, section 6-1: it may also mark a byte above a true match.
    """
    difference = tags ^ tag * ONES
    return (difference - ONES) & ~difference & TAG_TOPS


@inline
def place_of(slot: int, position: int) -> Any:
    """Pack a slot's word index and its position in the bucket; the low byte is left for the kind of an undo word."""
    return np.int64(slot) << 16 | np.int64(position) << 8


@inline
def slot_of(place: int) -> Any:
    return np.int64(place) >> 16


@inline
def position_of(place: int) -> Any:
    return np.int64(place) >> 8 & 0xFF


@inline
def bucket_of(words: np.ndarray, place: int) -> Any:
    """Return the word index of the bucket that holds a place."""
    return slot_of(place) - 1 - position_of(place) * word(words, SLOT_WORDS)


@inline
def expired(stamp: int, now_s: int) -> Any:
    """Tell whether a stamp's expiry lies in the past; the seconds wrap around, 0 never comes."""
    field = stamp & EXPIRY_MASK
    return field != U0 and ((np.uint64(now_s) - field) & EXPIRY_MASK) < HALF_RANGE


@inline
def expiry_field(expires_s: int) -> Any:
    """Return the 20 bits, as uint64, of an absolute second of CLOCK_MONOTONIC; never 0, which means never."""
    field = np.uint64(expires_s) & EXPIRY_MASK
    return field if field != U0 else U1


@jit
def prefetch_record(words: np.ndarray, key_low: int, key_high: int) -> None:
    """Fetch into the cache what `open_record` of this key touches first."""
    low, high = np.uint64(key_low), np.uint64(key_high)
    base = partition_at(words, np.int64(low & np.uint64(0xFFFF)))
    bucket = home_bucket(words, hash32(words, low, high))
    at = base + word(words, BUCKETS_OFFSET) + bucket * word(words, BUCKET_WORDS)
    prefetch(words, base)
    prefetch(words, base + 8)
    prefetch(words, at)
    prefetch(words, at + 8)


@jit
def prefetch_slot(words: np.ndarray, key_low: int, key_high: int) -> None:
    """Fetch the slot whose tag in the home bucket matches; the bucket should be there (`prefetch_record`)."""
    low, high = np.uint64(key_low), np.uint64(key_high)
    partition = np.int64(low & np.uint64(0xFFFF))
    if partition >= word(words, PARTITION_COUNT):
        return
    hashed = hash32(words, low, high)
    first = partition_at(words, partition) + word(words, BUCKETS_OFFSET)
    at = first + home_bucket(words, hashed) * word(words, BUCKET_WORDS)
    found = matches(words[at], tag_of(hashed))
    if found != U0:
        prefetch(words, at + 1 + (np.int64(trailing_zeros(found)) >> 3) * word(words, SLOT_WORDS))


@jit
def find_place(words: np.ndarray, base: int, low: int, high: int, hashed: int) -> Any:
    """Return the place of a key in the partition at `base`, or 0. Safe without the lock; then the answer is a guess."""
    tag = tag_of(hashed)
    buckets, bucket_words, slot_words = word(words, BUCKETS), word(words, BUCKET_WORDS), word(words, SLOT_WORDS)
    first = base + word(words, BUCKETS_OFFSET)
    bucket = home_bucket(words, hashed)
    for _ in range(buckets):
        at = first + bucket * bucket_words
        tags = words[at]
        found = matches(tags, tag)
        while found != U0:
            position = np.int64(trailing_zeros(found)) >> 3
            slot = at + 1 + position * slot_words
            if words[slot] == low and words[slot + 1] == high:
                return place_of(slot, position)
            found &= found - U1
        if tags >> OVERFLOW_SHIFT == U0:
            return np.int64(0)
        bucket = bucket + 1 if bucket + 1 < buckets else 0
    return np.int64(0)


@jit
def find_free(words: np.ndarray, base: int, hashed: int) -> Any:
    """Return the first free place on the probing path of a hash, or 0 when the partition is full."""
    buckets, bucket_words = word(words, BUCKETS), word(words, BUCKET_WORDS)
    first = base + word(words, BUCKETS_OFFSET)
    bucket = home_bucket(words, hashed)
    for _ in range(buckets):
        at = first + bucket * bucket_words
        free = ~words[at] & TAG_TOPS
        if free != U0:
            position = np.int64(trailing_zeros(free)) >> 3
            return place_of(at + 1 + position * word(words, SLOT_WORDS), position)
        bucket = bucket + 1 if bucket + 1 < buckets else 0
    return np.int64(0)


@inline
def mark_dirty(words: np.ndarray, base: int, bucket: int, bit: int) -> None:
    """Remember that something of a bucket changed; the lock is held and the table replicates."""
    at = base + word(words, DIRTY_OFFSET) + (bucket >> 3)
    words[at] |= U1 << np.uint64((bucket & 7) * 8 + bit)


@jit
def count_change(words: np.ndarray, base: int, place: int) -> None:
    """Remember, if the table replicates, that a place changed; the lock is held. Too often is harmless: the same is shipped."""
    if words[DIRTY_OFFSET] != U0:
        bucket = (bucket_of(words, place) - base - word(words, BUCKETS_OFFSET)) // word(words, BUCKET_WORDS)
        mark_dirty(words, base, bucket, position_of(place))
        words[word(words, CHANGES_AT) + np.int64(words[slot_of(place)] & np.uint64(0xFFFF))] += U1


@jit
def count_overflow(words: np.ndarray, base: int, place: int, hashed: int, inserting: bool) -> None:
    """Count a record in or out of the overflow byte of each bucket it probed past."""
    buckets, bucket_words = word(words, BUCKETS), word(words, BUCKET_WORDS)
    first = base + word(words, BUCKETS_OFFSET)
    bucket, last = home_bucket(words, hashed), bucket_of(words, place)
    at = first + bucket * bucket_words
    while at != last:
        if words[at] >> OVERFLOW_SHIFT != BYTE:
            words[at] = words[at] + OVERFLOW_ONE if inserting else words[at] - OVERFLOW_ONE
            if words[DIRTY_OFFSET] != U0:
                mark_dirty(words, base, bucket, BUCKET_DIRTY)
        bucket = bucket + 1 if bucket + 1 < buckets else 0
        at = first + bucket * bucket_words


@jit
def set_tag(words: np.ndarray, place: int, tag: int) -> None:
    """Store a tag byte (uint64; 0 frees the slot) of a place."""
    at, shift = bucket_of(words, place), np.uint64(position_of(place) * 8)
    words[at] = words[at] & ~(BYTE << shift) | tag << shift


@jit
def recount(words: np.ndarray, base: int) -> None:
    """Rebuild the record count and the overflow bytes of a partition from its tags and keys."""
    buckets, bucket_words, slot_words = word(words, BUCKETS), word(words, BUCKET_WORDS), word(words, SLOT_WORDS)
    first = base + word(words, BUCKETS_OFFSET)
    for bucket in range(buckets):
        words[first + bucket * bucket_words] &= ~(BYTE << OVERFLOW_SHIFT)
    count = 0
    for bucket in range(buckets):
        at = first + bucket * bucket_words
        used = words[at] & TAG_TOPS
        while used != U0:
            position = np.int64(trailing_zeros(used)) >> 3
            slot = at + 1 + position * slot_words
            hashed = hash32(words, words[slot], words[slot + 1])
            count_overflow(words, base, place_of(slot, position), hashed, True)
            count += 1
            used &= used - U1
    words[base + COUNT] = np.uint64(count)
