"""Records of the store on this host, in its shared memory: what the packet loop does with them under a partition's lock."""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.store import statuses
from datastore.store.layout import STAMP, VALUE
from datastore.store.partitions import PARTITION_BITS
from datastore.store.records import abort_record, commit_record, is_new, open_record
from datastore.store.roles import reign as reign_of
from nfs.dataplane.engine import (
    ALSO,
    C_HIGH,
    C_LOW,
    C_TIMEOUT_S,
    C_VALUE,
    CHANGED,
    CLAIMED_IN,
    CONFLICT,
    EPOCH,
    HERE,
    NOW_NS,
    OWNER,
    REFUSED,
    REPLICATES,
    STAMP_SECONDS,
    TAKEN,
    TIMEOUT_S,
    VALUE_WORDS,
    Engine,
)
from nfs.dataplane.pending import put_pending
from nfs.dataplane.requests import ADD_COUNT, ADDS, CLAIM_WORDS
from nfs.dataplane.steps import ENV_AT, MEMBERS, MEMBERS_END


@jit
def add_to_counters(engine: Engine, words: np.ndarray, source: np.ndarray, at: int) -> None:
    """Do the additions listed from `source[at]` on (count, then keys, words and deltas as in ENV); elsewhere: soon."""
    control = engine.control
    for n in range(min(source[at], ADDS)):
        high, low = np.uint64(source[at + 1 + n]), np.uint64(source[at + 1 + ADDS + n])
        field, delta = source[at + 1 + 2 * ADDS + n], np.uint64(source[at + 1 + 3 * ADDS + n])
        partition = np.int64(low & PARTITION_BITS)
        if field < 0 or field >= control[VALUE_WORDS] or partition >= engine.primary.size:
            continue
        if engine.primary[partition] != HERE:
            put_pending(engine.pending, high, low, field, delta)
            continue
        slot = open_record(words, control[OWNER], low, high, control[EPOCH], control[NOW_NS] // 1_000_000_000)
        if slot >= 0:
            words[slot + VALUE + field] += delta
            commit_record(words, control[OWNER], slot, 0)
            control[CHANGED] = 1
        elif control[REPLICATES]:
            put_pending(engine.pending, high, low, field, delta)


@jit
def add_now(engine: Engine, words: np.ndarray, step: int) -> None:
    """Do the additions of a step's last run."""
    for member in range(engine.steps[step, MEMBERS], engine.steps[step, MEMBERS_END]):
        add_to_counters(engine, words, engine.env, engine.members[member, ENV_AT] + ADD_COUNT)


@jit
def keep_adds(engine: Engine, index: int, step: int) -> None:
    """Remember the additions of a step's last run until packet `index` leaves its flight. The first function that adds counts."""
    engine.adds[index, 0] = 0
    for member in range(engine.steps[step, MEMBERS], engine.steps[step, MEMBERS_END]):
        at = engine.members[member, ENV_AT] + ADD_COUNT
        if engine.env[at] > 0 and engine.adds[index, 0] == 0:
            for n in range(1 + 4 * ADDS):
                engine.adds[index, n] = engine.env[at + n]


@jit
def claim_here(engine: Engine, words: np.ndarray, claim: np.ndarray, at: int) -> int:
    """Let the key of the claim at `claim[at]` hold its words, in the table on this host: TAKEN, CONFLICT or REFUSED."""
    control = engine.control
    now_s = control[NOW_NS] // 1_000_000_000
    partition = np.int64(np.uint64(claim[at + C_LOW]) & PARTITION_BITS)
    reign = reign_of(words, partition)
    slot = open_record(words, control[OWNER], np.uint64(claim[at + C_LOW]), np.uint64(claim[at + C_HIGH]), control[EPOCH], now_s)
    if slot < 0:
        return REFUSED
    if not is_new(words, slot) and words[slot + VALUE] != np.uint64(claim[at + C_VALUE]):
        abort_record(words, control[OWNER], slot)
        return CONFLICT
    for n in range(control[VALUE_WORDS]):
        words[slot + VALUE + n] = np.uint64(claim[at + C_VALUE + n]) if n < CLAIM_WORDS else np.uint64(0)
    commit_record(words, control[OWNER], slot, now_s + np.int64(claim[at + C_TIMEOUT_S]))
    control[ALSO], control[CLAIMED_IN] = partition, reign
    return TAKEN


@inline
def expiry_of(engine: Engine) -> Any:
    """Return the second at which a record that was just used expires; 0: as before."""
    timeout = engine.control[TIMEOUT_S]
    return np.int64(0) if timeout == 0 else engine.control[NOW_NS] // 1_000_000_000 + timeout


@inline
def expiry_worth(engine: Engine, words: np.ndarray, slot: int) -> Any:
    """`expiry_of`, or 0 where the record of a table that replicates has one that is young enough: to renew it is to ship it."""
    expires = expiry_of(engine)
    if engine.control[REPLICATES] and expires != 0 and not is_new(words, slot):
        now_s = engine.control[NOW_NS] // 1_000_000_000
        return expires if due(words[slot + STAMP], now_s, engine.control[TIMEOUT_S]) else np.int64(0)
    return expires


@jit
def set_aside(engine: Engine, words: np.ndarray, slot: int, row: int) -> None:
    """Move the changed value of an open record to row `row` of `values`, the one before behind it, and put the record back."""
    count = engine.control[VALUE_WORDS]
    for n in range(count):
        engine.values[row, n] = words[slot + VALUE + n]
    new = is_new(words, slot)
    abort_record(words, engine.control[OWNER], slot)
    for n in range(count):
        engine.values[row, count + n] = np.uint64(0) if new else words[slot + VALUE + n]


@jit
def put_here(engine: Engine, words: np.ndarray, low: int, high: int, row: int) -> int:
    """Write row `row` of `values` into a record of this host if it still is as it was: OK, VERSION_MISMATCH or another status.

    On a mismatch the row's second half becomes the record as it is.
    """
    control, values = engine.control, engine.values
    count = control[VALUE_WORDS]
    slot = open_record(words, control[OWNER], low, high, control[EPOCH], control[NOW_NS] // 1_000_000_000)
    if slot < 0:
        return -slot
    differs = False
    for n in range(count):
        differs |= words[slot + VALUE + n] != values[row, count + n]
        values[row, count + n] = words[slot + VALUE + n]
    if differs:
        abort_record(words, control[OWNER], slot)
        return statuses.VERSION_MISMATCH
    for n in range(count):
        words[slot + VALUE + n] = values[row, n]
    commit_record(words, control[OWNER], slot, expiry_of(engine))
    return statuses.OK


@inline
def due(stamp: int, now_s: int, timeout: int) -> bool:
    """Whether the record's expiry is worth a write: it was never set, or an eighth of the time-out has passed since."""
    if timeout == 0:
        return False
    left = (np.int64(stamp) - now_s) & STAMP_SECONDS
    return (
        np.int64(stamp) & STAMP_SECONDS == 0 or left > STAMP_SECONDS // 2 or left < timeout - timeout // 8 or left > timeout + 1
    )


@jit
def expiring(engine: Engine, stamp: int, timeout: int) -> Any:
    """Return a stamp with the expiry `timeout` seconds from now (0: the one it has)."""
    if timeout == 0:
        return stamp
    expires = np.uint64(max(1, (engine.control[NOW_NS] // 1_000_000_000 + timeout) & STAMP_SECONDS))
    return stamp & ~np.uint64(STAMP_SECONDS) | expires
