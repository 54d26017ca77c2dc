"""What does one operation of a remote client do to the table, and how is it done exactly once?

An operation is the same words everywhere: queued at the client, in a frame, at the server. Its answer has the same shape:

    0   opcode (8 bits) | status (8) | value bytes (16) | extra (32)
    1   sequence number, counted by the client for this store, from 1
    2   key low
    3   key high
    4   stamp: version and expiry
    5.. value

GET     answers stamp and value.
PUT     writes the value if the record's version is the stamp's (ANY_VERSION: whatever it is), with the stamp's expiry.
INSERT  writes the value if there is no record, with the stamp's expiry.
ADD     adds value word 0 to the 64-bit field at byte `extra` of the value; a record that is absent starts at zero. The
        stamp's expiry is taken unless it is 0. Answers the new record.
DELETE  removes the record if its version is the stamp's (or ANY_VERSION).
PING    answers.

Exactly once: per client the table keeps a ring of completion records, one per sequence number modulo the window. A mutating
operation that is there already is answered from it. The record is written between undo word and commit, and the undo names
it: a store process killed in between takes back both, or neither. (C. Lee et al.: Implementing linearizability at large
scale and low latency, SOSP 2015.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.compiled.memory import fence, fetch_add, load_acquire, pause
from datastore.store.layout import (
    BACKUP,
    CHANGE,
    CHANGES_AT,
    COMMITTED_AT,
    COMPLETION,
    DIRTY_OFFSET,
    DONE_SEQUENCE,
    DONE_STAMP,
    DONE_STATUS,
    EXPIRY_MASK,
    LOCK,
    PARTITION_COUNT,
    REMOVE,
    REPEATED,
    ROLE,
    ROLE_BITS,
    ROLE_MASK,
    STAMP,
    U0,
    UNDO,
    VALUE,
    VALUE_WORDS,
    completion_at,
    expired,
    find_place,
    hash32,
    partition_at,
    slot_of,
    word,
)
from datastore.store.locking import OWNER_MASK, is_primary, lock, refuse, release, wrong_role
from datastore.store.partitions import PARTITION_BITS
from datastore.store.records import abort_record, base_of, begin, open_record, seal, take_out
from datastore.store.statuses import (
    ABSENT,
    BAD_OPERATION,
    EXISTS,
    OK,
    OVERSIZED,
    STALE_SEQUENCE,
    UNKNOWN_PARTITION,
    VERSION_MISMATCH,
)

HELLO, GET, PUT, INSERT, ADD, DELETE, PING = range(1, 8)
"""8 and up are left for replication."""
OPCODES = 7

OPERATION, SEQUENCE, KEY_LOW, KEY_HIGH, OPERATION_STAMP, OPERATION_VALUE = range(6)
ANY_VERSION = (1 << 44) - 1

GET_TRIES = 16
"""Reads without the lock before taking it; a record is held for well under a microsecond."""

U16 = np.uint64(16)
VERSIONS = ~EXPIRY_MASK
ANY = np.uint64(ANY_VERSION << 20)


@inline
def operation_word(opcode: int, status: int, value_bytes: int, extra: int) -> Any:
    """Return an operation's first word as uint64."""
    low = np.uint64(opcode) | np.uint64(status) << np.uint64(8) | np.uint64(value_bytes) << U16
    return low | np.uint64(extra) << np.uint64(32)


@inline
def copy_record(words: np.ndarray, slot: int, answer: np.ndarray, at: int) -> None:
    """Copy stamp and value of a slot into an answer."""
    for n in range(word(words, VALUE_WORDS) + 1):
        answer[at + OPERATION_STAMP + n] = words[slot + STAMP + n]


@jit
def get(words: np.ndarray, owner: int, epoch: int, now_s: int, low: int, high: int, answer: np.ndarray, at: int) -> int:
    """Copy a record into an answer; normally without the lock, so a reader neither waits nor makes others wait."""
    partition = np.int64(low & PARTITION_BITS)
    if partition >= word(words, PARTITION_COUNT):
        return UNKNOWN_PARTITION
    base, hashed = partition_at(words, partition), hash32(words, low, high)
    for _ in range(GET_TRIES):
        seen = load_acquire(words, base + LOCK)
        if seen & OWNER_MASK != U0:
            pause()
            continue
        status = look_up(words, base, epoch, now_s, low, high, hashed, answer, at)
        fence()
        if load_acquire(words, base + LOCK) == seen:
            return status
    status = lock(words, owner, base)
    if status == OK:
        status = look_up(words, base, epoch, now_s, low, high, hashed, answer, at)
        release(words, base)
    return status


@inline
def is_clean_backup(words: np.ndarray, base: int, partition: int, epoch: int) -> Any:
    """Tell whether this host is a backup of a partition and all it has of it is committed.

    Then its records are the newest committed ones: nothing is committed without it. (J. Terrace, M. Freedman: Object storage
    on CRAQ, USENIX ATC 2009, section 2.3; the clean and dirty of a partition here, of an object there.)
    """
    role = words[base + ROLE]
    if role & np.uint64(ROLE_MASK) != np.uint64(BACKUP) or role >> np.uint64(ROLE_BITS) > np.uint64(epoch):
        return False
    return words[word(words, CHANGES_AT) + partition] == words[word(words, COMMITTED_AT) + partition]


@jit
def look_up(
    words: np.ndarray, base: int, epoch: int, now_s: int, low: int, high: int, hashed: int, answer: np.ndarray, at: int
) -> int:
    """Copy the record, if it is there and this host may answer for it."""
    if not is_primary(words, base, epoch) and not is_clean_backup(words, base, np.int64(low & PARTITION_BITS), epoch):
        return wrong_role(words, base, epoch)
    place = find_place(words, base, low, high, hashed)
    if place == 0 or expired(words[slot_of(place) + STAMP], now_s):
        return ABSENT
    copy_record(words, slot_of(place), answer, at)
    return OK


@inline
def kind_of(words: np.ndarray, base: int) -> Any:
    return word(words, base + UNDO) & 0xFF


@inline
def other_version(words: np.ndarray, slot: int, stamp: int) -> Any:
    """Tell whether a record's version is not the one asked for."""
    return stamp & VERSIONS != ANY and (words[slot + STAMP] ^ stamp) & VERSIONS != U0


@jit
def write_value(words: np.ndarray, slot: int, request: np.ndarray, at: int) -> None:
    """Copy an operation's value into a record; a shorter value is filled up with zeros."""
    given = np.int64(request[at] >> U16 & np.uint64(0xFFFF)) >> 3
    for n in range(word(words, VALUE_WORDS)):
        words[slot + VALUE + n] = request[at + OPERATION_VALUE + n] if n < given else U0


@inline
def done_partition(words: np.ndarray, done: int) -> Any:
    """Return the partition a completion record belongs to."""
    return np.int64(words[done + DONE_STATUS] >> np.uint64(8))


@jit
def complete(words: np.ndarray, base: int, done: int, sequence: int, status: int, answer: np.ndarray, at: int) -> None:
    """Write a completion record. base: the partition whose undo takes it back, or 0 when the table did not change.

    answer: key low is there already. A record says which partition it belongs to: it goes where the partition goes.
    """
    if base != 0:
        words[base + COMPLETION] = np.uint64(done)
        fence()
    words[done + DONE_SEQUENCE] = U0
    fence()
    words[done + DONE_STATUS] = np.uint64(status) | (answer[at + KEY_LOW] & PARTITION_BITS) << np.uint64(8)
    for n in range(word(words, VALUE_WORDS) + 1):
        words[done + DONE_STAMP + n] = answer[at + OPERATION_STAMP + n]
    fence()
    words[done + DONE_SEQUENCE] = sequence
    fence()


@jit
def mutate(
    words: np.ndarray, owner: int, epoch: int, now_s: int, request: np.ndarray, at: int, answer: np.ndarray, answer_at: int,
    done: int,
) -> int:  # fmt: skip
    """Apply a PUT, INSERT, ADD or DELETE and write its completion record; return the status."""
    opcode = np.int64(request[at] & np.uint64(0xFF))
    stamp = request[at + OPERATION_STAMP]
    slot = open_record(words, owner, request[at + KEY_LOW], request[at + KEY_HIGH], epoch, now_s)
    if slot < 0:
        return -slot
    base = base_of(words, slot)
    there = kind_of(words, base) == CHANGE
    status = OK
    if opcode == INSERT:
        status = EXISTS if there else OK
    elif opcode != ADD:
        status = ABSENT if not there else VERSION_MISMATCH if other_version(words, slot, stamp) else OK
    if status != OK:
        if there:
            copy_record(words, slot, answer, answer_at)
        if words[DIRTY_OFFSET] != U0:  # a change of the completion record alone: the answer waits for it
            words[word(words, CHANGES_AT) + np.int64(words[slot] & PARTITION_BITS)] += np.uint64(1)
        abort_record(words, owner, slot)
        complete(words, 0, done, request[at + SEQUENCE], status, answer, answer_at)
        return status
    if opcode == DELETE:
        copy_record(words, slot, answer, answer_at)
        place = word(words, base + UNDO) & ~0xFF
        begin(words, base, place | REMOVE)
        complete(words, base, done, request[at + SEQUENCE], OK, answer, answer_at)
        take_out(words, base, place)
        release(words, base)
        return OK
    field = stamp & EXPIRY_MASK
    if opcode == ADD:
        words[slot + VALUE + (np.int64(request[at] >> np.uint64(32)) >> 3)] += request[at + OPERATION_VALUE]
        if field == U0 and there:
            field = words[slot + STAMP] & EXPIRY_MASK
    else:
        write_value(words, slot, request, at)
    seal(words, base, slot, field)
    copy_record(words, slot, answer, answer_at)
    complete(words, base, done, request[at + SEQUENCE], OK, answer, answer_at)
    release(words, base)
    return OK


@jit
def once(
    words: np.ndarray, owner: int, client: int, epoch: int, now_s: int, request: np.ndarray, at: int, answer: np.ndarray,
    answer_at: int,
) -> int:  # fmt: skip
    """Apply a mutating operation of the client in slot `client`, unless its completion record says it was."""
    sequence = request[at + SEQUENCE]
    value_words = word(words, VALUE_WORDS)
    done = completion_at(words, client, sequence)
    known = words[done + DONE_SEQUENCE]
    if known == sequence:
        base = partition_at(words, done_partition(words, done))
        if not is_primary(words, base, epoch):  # what was done here may have been lost with this host's role
            return refuse(words, wrong_role(words, base, epoch))
        for n in range(value_words + 1):
            answer[answer_at + OPERATION_STAMP + n] = words[done + DONE_STAMP + n]
        fetch_add(words, REPEATED, 1)
        return np.int64(words[done + DONE_STATUS] & np.uint64(0xFF))
    if known > sequence:
        return refuse(words, STALE_SEQUENCE)
    status = mutate(words, owner, epoch, now_s, request, at, answer, answer_at, done)
    if status in (ABSENT, EXISTS, VERSION_MISMATCH):
        refuse(words, status)
    return status


@jit
def malformed(words: np.ndarray, request: np.ndarray, at: int, operation_words: int, client: int) -> int:
    """Return OK, or why an operation's own fields forbid it."""
    opcode = np.int64(request[at] & np.uint64(0xFF))
    value_bytes = np.int64(request[at] >> U16 & np.uint64(0xFFFF))
    if value_bytes & 7 or value_bytes > (operation_words - OPERATION_VALUE) * 8:
        return BAD_OPERATION
    if value_bytes > word(words, VALUE_WORDS) * 8:
        return OVERSIZED
    if opcode < GET or opcode > OPCODES:
        return BAD_OPERATION
    if opcode in (GET, PING):
        return OK
    if client < 0 or request[at + SEQUENCE] == U0:
        return BAD_OPERATION
    if opcode == ADD:
        offset = np.int64(request[at] >> np.uint64(32))
        if offset & 7 or offset + 8 > word(words, VALUE_WORDS) * 8 or value_bytes < 8:
            return BAD_OPERATION
    return OK


@jit
def execute(
    words: np.ndarray, owner: int, client: int, epoch: int, now_s: int, request: np.ndarray, at: int, operation_words: int,
    answer: np.ndarray, answer_at: int,
) -> None:  # fmt: skip
    """Do the operation at `request[at]`, of `operation_words` words, and write its answer to `answer[answer_at]`.

    words: the table. client: the client's slot, or -1 before its HELLO, when only GET and PING are served. epoch: the
    client's. request, answer: uint64[n]; an answer has OPERATION_VALUE + the table's value words.
    """
    value_words = word(words, VALUE_WORDS)
    for n in range(SEQUENCE, OPERATION_STAMP):
        answer[answer_at + n] = request[at + n]
    for n in range(value_words + 1):
        answer[answer_at + OPERATION_STAMP + n] = U0
    opcode = request[at] & np.uint64(0xFF)
    status = malformed(words, request, at, operation_words, client)
    if status != OK:
        refuse(words, status)
    elif opcode == np.uint64(GET):
        low, high = request[at + KEY_LOW], request[at + KEY_HIGH]
        status = get(words, owner, epoch, now_s, low, high, answer, answer_at)
        if status != OK:
            refuse(words, status)
    elif opcode != np.uint64(PING):
        status = once(words, owner, client, epoch, now_s, request, at, answer, answer_at)
    answer[answer_at] = operation_word(opcode, status, value_words * 8, 0)
