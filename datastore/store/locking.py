"""Who may touch a partition, and what happens to its lock and its half-done work when that process is killed?

A partition's lock word holds the owner number (low 16 bits, 0: free) and how often the lock was taken (high 48 bits): a
reader without the lock sees by the count whether anyone was there meanwhile, and a lock cannot be taken over twice.

Before an owner touches a record it saves what it needs to take the work back, then sets the undo word; clearing the undo
word is the commit. `fence` keeps that order, so a process killed at any instruction leaves a partition that the next owner
puts right: it finds the lock's owner dead, takes the lock over, applies the undo and goes on.

An owner is alive while the kernel holds its lock on byte `OWNER_LOCKS + number` of the table's file. The kernel drops it
when the process is gone, also while it is a zombie, and a new process with the same pid does not have it. (A pid would need
both checks; kill(pid, 0) succeeds for a zombie.) The locks belong to the open file (F_OFD_SETLK), so each owner opens it
anew; a process that forks after registering lends its life to the child.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Any

import numpy as np

from datastore.base.errors import NearstateError
from datastore.compiled import inline, jit
from datastore.compiled.libc import address, libc_fcntl, sched_yield
from datastore.compiled.memory import compare_and_swap, fence, fetch_add, load_acquire, pause, store_release
from datastore.store.layout import (
    CHANGE,
    CHANGES_AT,
    COMPLETION,
    DIRTY_OFFSET,
    DONE_SEQUENCE,
    FIRST,
    INSERT,
    LOCK,
    OWNER_PIDS,
    OWNER_SCRATCH,
    OWNERS,
    PARTITION_COUNT,
    PRIMARY,
    RENEW,
    ROLE,
    ROLE_BITS,
    ROLE_MASK,
    ROLLBACKS,
    STAMP,
    STATUS_COUNTS,
    STRIDE,
    TAKEOVERS,
    U0,
    U1,
    UNDO,
    UNDO_COPY,
    VALUE_WORDS,
    hash32,
    partition_at,
    recount,
    set_tag,
    slot_of,
    tag_of,
    word,
)  # fmt: skip
from datastore.store.statuses import ALREADY_OPEN, BUSY, NOT_PRIMARY, OK, STALE_EPOCH

OWNER_LOCKS = 1 << 40
"""First of the locked bytes, far behind the table's end; record locks may lie there."""

OWNER_MASK = np.uint64(0xFFFF)
ONE_TURN = np.uint64(1 << 16)

SPINS = 200
"""Tries before giving the processor away: a few microseconds, several times as long as a lock is held."""
YIELDS = 1 << 20
"""Tries after that before giving up with BUSY: at least half a second."""

_SEEK_SET, _F_WRLCK, _F_UNLCK = 0, 1, 2
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_FLOCK = struct.Struct("hhqqi4x")


@inline
def number(owner: int) -> Any:
    """Return an owner's number as it stands in lock words; `owner` also carries the descriptor for `is_alive`."""
    return np.uint64(owner) & OWNER_MASK


@jit
def is_alive(words: np.ndarray, owner: int, holder: int) -> bool:
    """Tell whether the kernel still holds the byte lock of owner number `holder`; a failing call counts as alive."""
    at = OWNER_SCRATCH + np.int64(number(owner)) * 4
    words[at], words[at + 1] = np.uint64(_F_WRLCK), np.uint64(OWNER_LOCKS + holder)
    words[at + 2], words[at + 3] = np.uint64(1), np.uint64(0)
    if libc_fcntl(np.int32(owner >> 16), np.int32(_F_OFD_GETLK), address(words, at)) != 0:
        return True
    return np.int64(words[at] & np.uint64(0xFFFF)) != _F_UNLCK


@jit
def roll_back(words: np.ndarray, base: int) -> None:
    """Take back what the undo word says was under way. The lock is held. A second run, after a kill in here, is harmless."""
    undo = word(words, base + UNDO)
    if undo == 0:
        return
    kind, slot = undo & 0xFF, slot_of(undo)
    if kind in (CHANGE, RENEW):
        for n in range(word(words, VALUE_WORDS) + 1):
            words[slot + STAMP + n] = words[base + UNDO_COPY + n]
    else:
        tag = U0 if kind == INSERT else tag_of(hash32(words, words[slot], words[slot + 1]))
        set_tag(words, undo, tag)
        recount(words, base)
        if words[DIRTY_OFFSET] != U0:  # overflow bytes may read otherwise now: copies with as many changes are to be alike
            words[word(words, CHANGES_AT) + (base - word(words, FIRST)) // word(words, STRIDE)] += U1
    done = word(words, base + COMPLETION)
    if done != 0:
        words[done + DONE_SEQUENCE] = U0
    fence()
    words[base + UNDO] = U0
    fence()
    fetch_add(words, ROLLBACKS, 1)


@jit
def wait_for_lock(words: np.ndarray, owner: int, base: int) -> int:
    """Take a lock that was not free at once: wait for a living holder, take over and roll back after a dead one."""
    me = number(owner)
    for attempt in range(SPINS + YIELDS):
        seen = load_acquire(words, base + LOCK)
        holder = seen & OWNER_MASK
        if holder == me:
            return ALREADY_OPEN
        mine = (seen & ~OWNER_MASK) + ONE_TURN | me
        if holder == U0:
            if compare_and_swap(words, base + LOCK, seen, mine) == seen:
                return OK
        elif attempt < SPINS:
            pause()
        elif is_alive(words, owner, np.int64(holder)):
            sched_yield()
        elif compare_and_swap(words, base + LOCK, seen, mine) == seen:
            fetch_add(words, TAKEOVERS, 1)
            roll_back(words, base)
            return OK
    return BUSY


@inline
def lock(words: np.ndarray, owner: int, base: int) -> Any:
    """Take the lock of the partition at `base`; return OK, BUSY or ALREADY_OPEN."""
    seen = load_acquire(words, base + LOCK)
    if seen & OWNER_MASK == U0 and compare_and_swap(words, base + LOCK, seen, seen + ONE_TURN | number(owner)) == seen:
        return OK
    return wait_for_lock(words, owner, base)


@inline
def release(words: np.ndarray, base: int) -> None:
    """Commit: clear the undo word, then free the lock."""
    fence()
    words[base + UNDO] = U0
    fence()
    store_release(words, base + LOCK, words[base + LOCK] & ~OWNER_MASK)


@inline
def role_word(epoch: int, role: int) -> Any:
    return np.uint64(epoch) << np.uint64(ROLE_BITS) | np.uint64(role)


@inline
def is_primary(words: np.ndarray, base: int, epoch: int) -> Any:
    """Tell whether this host is a partition's primary, and was so already in the `epoch` of a request."""
    role = words[base + ROLE]
    return role & np.uint64(ROLE_MASK) == np.uint64(PRIMARY) and role >> np.uint64(ROLE_BITS) <= np.uint64(epoch)


@jit
def refuse(words: np.ndarray, status: int) -> int:
    """Count a status and return it."""
    fetch_add(words, STATUS_COUNTS + status, 1)
    return status


@jit
def wrong_role(words: np.ndarray, base: int, epoch: int) -> int:
    """Return why a partition does not serve a request of `epoch`."""
    return STALE_EPOCH if word(words, base + ROLE) >> ROLE_BITS > epoch else NOT_PRIMARY


@jit
def recover(words: np.ndarray, owner: int) -> int:
    """Put right every partition whose holder is dead, or was an earlier bearer of `owner`'s number; return how many."""
    recovered = 0
    for partition in range(word(words, PARTITION_COUNT)):
        base = partition_at(words, partition)
        seen = load_acquire(words, base + LOCK)
        holder = seen & OWNER_MASK
        if holder == U0 or (holder != number(owner) and is_alive(words, owner, np.int64(holder))):
            continue
        if compare_and_swap(words, base + LOCK, seen, (seen & ~OWNER_MASK) + ONE_TURN | number(owner)) == seen:
            fetch_add(words, TAKEOVERS, 1)
            roll_back(words, base)
            release(words, base)
            recovered += 1
    return recovered


@jit
def set_role(words: np.ndarray, owner: int, partition: int, role: int, epoch: int) -> int:
    """Say what this host is to a partition; an open record of it is finished first. Returns a status."""
    base = partition_at(words, partition)
    status = lock(words, owner, base)
    if status == OK:
        words[base + ROLE] = role_word(epoch, role)
        release(words, base)
    return status


@jit
def lock_now(words: np.ndarray, owner: int, base: int) -> int:
    """`lock`, to be called from Python."""
    return int(lock(words, owner, base))


@jit
def release_now(words: np.ndarray, base: int) -> None:
    """`release`, to be called from Python."""
    release(words, base)


def claim(path: str, candidate: int) -> int | None:
    """Take the byte lock of owner number `candidate` in the file `path`; return the descriptor that holds it, or None.

    Number 0, which locks nothing, stands for being the table's store process.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.fcntl(descriptor, _F_OFD_SETLK, _FLOCK.pack(_F_WRLCK, _SEEK_SET, OWNER_LOCKS + candidate, 1, 0))
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def register(words: np.ndarray, path: str) -> int:
    """Make this process an owner of the table in the file `path`; return the handle that compiled functions take.

    The handle is `descriptor << 16 | number`; closing the descriptor, or the process' end, gives the number back.
    """
    for candidate in range(1, OWNERS + 1):
        descriptor = claim(path, candidate)
        if descriptor is not None:
            words[OWNER_PIDS + candidate] = os.getpid()
            owner = descriptor << 16 | candidate
            recover(words, owner)
            return owner
    raise NearstateError(f"the table has {OWNERS} owners already: stop a process that works on it")


def living_owners(words: np.ndarray, path: str) -> dict[int, int]:
    """Return the pid behind each owner number whose process lives; behind 0 that of the store process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return {n: int(words[OWNER_PIDS + n]) for n in range(OWNERS + 1) if _is_locked(descriptor, n)}
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int, candidate: int) -> bool:
    lock = _FLOCK.pack(_F_WRLCK, _SEEK_SET, OWNER_LOCKS + candidate, 1, 0)
    return bool(_FLOCK.unpack(fcntl.fcntl(descriptor, _F_OFD_GETLK, lock))[0] != _F_UNLCK)
