"""What does a backup do with a frame of its primary? All of it under the partition's lock, or nothing (`shipping.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.compiled.memory import fence, trailing_zeros
from datastore.replication.completions import find_room, forget_completions, read_completions
from datastore.replication.frames import (
    ACK_WORDS,
    CLAIM,
    COUNTED_FLAG,
    DUPLICATE,
    GAP,
    IMAGE,
    LOW16,
    LOW32,
    NEWS,
    NO_BASE,
    REPLICATE_WORDS,
)
from datastore.replication.link import COUNTS, EPOCH, JOINED, MEMBER, SERIAL, STANDING, Shipping
from datastore.store.layout import (
    BACKUP,
    BUCKET_WORDS,
    BUCKETS,
    BUCKETS_OFFSET,
    CHANGES_AT,
    COMMITTED_AT,
    COUNT,
    DONE_VALUE,
    FLOOR,
    NO_ROLE,
    ROLE,
    SLOT_WORDS,
    U0,
    U1,
    VALUE_WORDS,
    partition_at,
    word,
)
from datastore.store.locking import lock, release, role_word
from datastore.store.roles import changes, reign, role, rules
from datastore.store.statuses import BAD_FRAME, OK, STALE_EPOCH, TOO_MANY_CLIENTS, UNKNOWN_PARTITION


@inline
def judge(is_first: bool, epoch: int, joined: int, base: int, serial: int, my_epoch: int, my_joined: int, my_serial: int) -> Any:
    """Return what to do with a frame, given the last one applied: OK (apply it), DUPLICATE, STALE_EPOCH or GAP.

    is_first: it needs none before it: an image, or a claim that is right. STALE_EPOCH is also the answer to a frame for a replica
    that this host does not know to be; nobody joins in epoch 0.
    """
    if epoch < my_epoch or joined != my_joined or joined == 0:
        return STALE_EPOCH
    if epoch > my_epoch:
        return OK if is_first else GAP
    if serial <= my_serial:
        return DUPLICATE
    return OK if is_first or base <= my_serial else GAP


@inline
def is_right(shipping: Shipping, words: np.ndarray, frame: np.ndarray, at: int) -> Any:
    """Tell whether a frame that claims how much this host has of the earlier primary is right, or one of this primary was before:
    then all that changed since is in it."""
    partition, epoch = np.int64(frame[at] & LOW16), np.int64(frame[at + 1] & LOW32)
    if shipping.followed[partition, EPOCH] == epoch:
        return reign(words, partition) == epoch
    return shipping.followed[partition, EPOCH] == np.int64(frame[at + 2]) and changes(words, partition) == np.int64(frame[at + 5])


@jit
def check_body(words: np.ndarray, frame: np.ndarray, at: int, length: int) -> int:
    """Return OK when a frame's buckets and completions fill its `length` words and name places that exist."""
    buckets, completions = np.int64(frame[at] >> np.uint64(32)), np.int64(frame[at + 7] >> np.uint64(32))
    end, slot_words = at + length, word(words, SLOT_WORDS)
    to = at + REPLICATE_WORDS
    for _ in range(buckets):
        if to + 2 > end or frame[to] >> np.uint64(8) >= words[BUCKETS]:
            return BAD_FRAME
        bits = frame[to] & np.uint64(0x7F)
        to += 2
        while bits != U0:
            to += slot_words
            bits &= bits - U1
    step = 1 + DONE_VALUE + word(words, VALUE_WORDS)
    return OK if completions >= 0 and completions <= (end - to) // step and to + completions * step == end else BAD_FRAME


@jit
def apply(
    shipping: Shipping, words: np.ndarray, owner: int, now_s: int, frame: np.ndarray, at: int, length: int, ack: np.ndarray,
    ack_at: int,
) -> int:  # fmt: skip
    """Apply the frame, without its header, of `length` words at `frame[at]`; return the words of the acknowledgment, 0 or 3."""
    if length < REPLICATE_WORDS:
        ack[ack_at], ack[ack_at + 1], ack[ack_at + 2] = np.uint64(BAD_FRAME << 16), U0, U0
        return ACK_WORDS
    if np.int64(frame[at] & LOW16) >= shipping.done_end.size:
        return acknowledge(frame, at, UNKNOWN_PARTITION, ack, ack_at)
    partition = np.int64(frame[at] & LOW16)
    status = check_body(words, frame, at, length)
    if status != OK:
        return acknowledge(frame, at, status, ack, ack_at)
    flags = np.int64(frame[at] >> np.uint64(16) & LOW16)
    if flags & NEWS:
        hear_news(shipping, words, owner, frame, at)
        return 0
    epoch, joined = np.int64(frame[at + 1] & LOW32), np.int64(frame[at + 1] >> np.uint64(32))
    followed = shipping.followed[partition]
    my_epoch = reign(words, partition)
    my_serial = followed[SERIAL] if my_epoch == followed[EPOCH] else -1
    is_first, base = flags & IMAGE != 0, np.int64(frame[at + 2])
    if flags & CLAIM:
        is_first, base = is_right(shipping, words, frame, at), NO_BASE
    status = judge(is_first, epoch, joined, base, np.int64(frame[at + 3]), my_epoch, followed[JOINED], my_serial)
    if status == OK and my_epoch == epoch and rules(role(words, partition)):
        status = STALE_EPOCH
    if status == OK:
        status = overwrite(shipping, words, owner, now_s, frame, at, length, partition)
    return acknowledge(frame, at, OK if status == DUPLICATE else status, ack, ack_at)


@inline
def acknowledge(frame: np.ndarray, at: int, status: int, ack: np.ndarray, ack_at: int) -> Any:
    """Write the acknowledgment of a frame; return its words."""
    ack[ack_at] = frame[at] & LOW16 | np.uint64(status) << np.uint64(16)
    ack[ack_at + 1], ack[ack_at + 2] = frame[at + 1], frame[at + 3]
    return ACK_WORDS


@jit
def overwrite(
    shipping: Shipping, words: np.ndarray, owner: int, now_s: int, frame: np.ndarray, at: int, length: int, partition: int,
) -> int:  # fmt: skip
    """Make the partition read as a frame, of `length` words, says it does; return OK. Or BUSY or TOO_MANY_CLIENTS: nothing is
    done then."""
    to, base = at + REPLICATE_WORDS, partition_at(words, partition)
    flags, epoch = np.int64(frame[at] >> np.uint64(16) & LOW16), np.int64(frame[at + 1] & LOW32)
    status = lock(words, owner, base)
    if status != OK:
        return status
    completions = np.int64(frame[at + 7] >> np.uint64(32))
    to_completions = at + length - completions * (1 + DONE_VALUE + word(words, VALUE_WORDS))
    if not find_room(shipping, words, now_s, frame, to_completions, completions):
        release(words, base)
        return TOO_MANY_CLIENTS
    words[base + ROLE] = role_word(epoch, NO_ROLE)  # a kill from here on leaves a partition that nobody may use
    fence()
    shipping.followed[partition, EPOCH] = -1
    shipping.followed[partition, STANDING] &= ~COUNTS
    if flags & IMAGE:
        for bucket in range(word(words, BUCKETS)):
            words[base + word(words, BUCKETS_OFFSET) + bucket * word(words, BUCKET_WORDS)] = U0
        forget_completions(shipping, words, partition)
    read_buckets(words, base, frame, to, np.int64(frame[at] >> np.uint64(32)))
    shipping.has_done[partition] |= completions > 0
    read_completions(shipping, words, now_s, frame, to_completions, completions)
    words[base + FLOOR], words[base + COUNT] = frame[at + 6], frame[at + 7] & LOW32
    words[word(words, CHANGES_AT) + partition] = frame[at + 4]
    words[word(words, COMMITTED_AT) + partition] = U0 if flags & CLAIM else frame[at + 5]
    shipping.followed[partition, EPOCH], shipping.followed[partition, SERIAL] = epoch, np.int64(frame[at + 3])
    fence()
    stand(shipping, words, partition, flags & COUNTED_FLAG)
    release(words, base)
    return OK


@jit
def stand(shipping: Shipping, words: np.ndarray, partition: int, counted: int) -> None:
    """Make this host a backup if it counts, as the primary says with `counted`, and is a member; the lock is held."""
    followed = shipping.followed[partition]
    followed[STANDING] |= COUNTS if counted else 0
    if followed[STANDING] == MEMBER | COUNTS:
        words[partition_at(words, partition) + ROLE] = role_word(followed[EPOCH], BACKUP)
    else:
        words[partition_at(words, partition) + ROLE] = role_word(followed[EPOCH], NO_ROLE)


@jit
def read_buckets(words: np.ndarray, base: int, frame: np.ndarray, at: int, buckets: int) -> int:
    """Copy buckets' first words and slots from a frame; return where they end."""
    first, slot_words = base + word(words, BUCKETS_OFFSET), word(words, SLOT_WORDS)
    for _ in range(buckets):
        target = first + np.int64(frame[at] >> np.uint64(8)) * word(words, BUCKET_WORDS)
        bits = frame[at] & np.uint64(0x7F)
        words[target] = frame[at + 1]
        at += 2
        while bits != U0:
            slot = target + 1 + np.int64(trailing_zeros(bits)) * slot_words
            for n in range(slot_words):
                words[slot + n] = frame[at + n]
            at += slot_words
            bits &= bits - U1
    return at


@jit
def hear_news(shipping: Shipping, words: np.ndarray, owner: int, frame: np.ndarray, at: int) -> None:
    """Learn what is committed, and that this host counts, if nothing was missed before."""
    partition = np.int64(frame[at] & LOW16)
    base, epoch = partition_at(words, partition), np.int64(frame[at + 1] & LOW32)
    followed = shipping.followed[partition]
    if followed[EPOCH] != epoch or reign(words, partition) != epoch or followed[SERIAL] != np.int64(frame[at + 3]):
        return
    if followed[JOINED] != np.int64(frame[at + 1] >> np.uint64(32)):
        return
    if rules(role(words, partition)) or lock(words, owner, base) != OK:
        return
    words[word(words, COMMITTED_AT) + partition] = frame[at + 5]
    stand(shipping, words, partition, np.int64(frame[at] >> np.uint64(16)) & COUNTED_FLAG)
    release(words, base)
