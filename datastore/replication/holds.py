"""Which answers must wait, and until when?

An operation is answered when every change it made, or saw, is committed. The answers of a connection leave in order, so its
operations wait in a queue: each with its partition, the changes it waits for, and since when this host was the partition's
primary. If that ends first, nobody here can know whether the change lives on: the answer becomes NOT_PRIMARY, and the client
asks the new primary, under the same sequence number.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from datastore.compiled import jit
from datastore.replication.completions import note_answers
from datastore.replication.link import Shipping
from datastore.store.layout import DIRTY_OFFSET, PARTITION_COUNT, U0, VALUE_WORDS, lease_holds, word
from datastore.store.operations import KEY_LOW, OPERATION_VALUE
from datastore.store.partitions import PARTITION_BITS
from datastore.store.protocol import FRAME_HEADER_WORDS, answer_frame, frame_operations, refuse_operations
from datastore.store.roles import changes, committed, reign, role, rules
from datastore.store.statuses import ABSENT, EXISTS, LEASE_LAPSED, NOT_PRIMARY, OK, VERSION_MISMATCH

# words of a held operation, and of a held frame
PARTITION, CHANGES, REIGN, ANSWER_AT = range(4)
LAST_OPERATION, END_WORDS = range(2)
# words of `counts`
FIRST, LAST, FIRST_FRAME, LAST_FRAME = range(4)
STATUS = np.uint64(0xFF00)


class Holds(NamedTuple):
    """operations: int64[connections, n, 4]; frames: int64[connections, m, 2]; both rings; counts: int64[connections, 4]."""

    operations: np.ndarray
    frames: np.ndarray
    counts: np.ndarray


def make_holds(connections: int, operations: int, frames: int) -> Holds:
    """Return queues for so many connections, operations and frames of each."""
    return Holds(
        np.zeros((connections, operations, 4), np.int64),
        np.zeros((connections, frames, 2), np.int64),
        np.zeros((connections, 4), np.int64),
    )


@jit
def has_room(holds: Holds, connection: int, operations: int) -> bool:
    """Tell whether a frame of so many operations can be held."""
    counts = holds.counts[connection]
    return (
        counts[LAST] - counts[FIRST] + operations <= holds.operations.shape[1]
        and counts[LAST_FRAME] - counts[FIRST_FRAME] < holds.frames.shape[1]
    )


@jit
def waits_for(words: np.ndarray, answer: np.ndarray, at: int) -> int:
    """Return the number of changes that must be committed before the answer at `answer[at]` may leave, or -1: none."""
    status = answer[at] >> np.uint64(8) & np.uint64(0xFF)
    partition = np.int64(answer[at + KEY_LOW] & PARTITION_BITS)
    if words[DIRTY_OFFSET] == U0 or partition >= word(words, PARTITION_COUNT) or not rules(role(words, partition)):
        return -1
    if status not in (OK, ABSENT, EXISTS, VERSION_MISMATCH):
        return -1
    seen = changes(words, partition)
    return seen if committed(words, partition) < seen else -1


@jit
def hold(holds: Holds, words: np.ndarray, connection: int, answer: np.ndarray, at: int, count: int, operation_words: int) -> None:
    """Queue the frame of `count` answers whose header is at `answer[at]`, as far as they must wait; there is room."""
    counts = holds.counts[connection]
    for n in range(count):
        answer_at = at + FRAME_HEADER_WORDS + n * operation_words
        due = waits_for(words, answer, answer_at)
        if due >= 0:
            partition = np.int64(answer[answer_at + KEY_LOW] & PARTITION_BITS)
            entry = holds.operations[connection, counts[LAST] % holds.operations.shape[1]]
            entry[PARTITION], entry[CHANGES], entry[REIGN] = partition, due, reign(words, partition)
            entry[ANSWER_AT] = answer_at
            counts[LAST] += 1
    frame = holds.frames[connection, counts[LAST_FRAME] % holds.frames.shape[1]]
    frame[LAST_OPERATION], frame[END_WORDS] = counts[LAST], at + FRAME_HEADER_WORDS + count * operation_words
    counts[LAST_FRAME] += 1


@jit
def lapse(answer: np.ndarray, at: int, count: int, operation_words: int) -> None:
    """Have the frame of `count` answers whose header is at `answer[at]` say that this host's lease was over when they were made.

    What was done is done once: asked again under the same number, it is answered from its completion record.
    """
    for n in range(count):
        first = at + FRAME_HEADER_WORDS + n * operation_words
        answer[first] = answer[first] & ~STATUS | np.uint64(LEASE_LAPSED) << np.uint64(8)


@jit
def let_go(holds: Holds, words: np.ndarray, connection: int, answers: np.ndarray) -> int:
    """Return up to which word of `answers` whole frames may leave now, or -1: none of those held."""
    counts = holds.counts[connection]
    while counts[FIRST] < counts[LAST]:
        entry = holds.operations[connection, counts[FIRST] % holds.operations.shape[1]]
        partition = entry[PARTITION]
        if reign(words, partition) != entry[REIGN] or not rules(role(words, partition)):
            at = entry[ANSWER_AT]
            answers[at] = answers[at] & ~STATUS | np.uint64(NOT_PRIMARY) << np.uint64(8)
        elif committed(words, partition) < entry[CHANGES]:
            break
        counts[FIRST] += 1
    end = -1
    while counts[FIRST_FRAME] < counts[LAST_FRAME]:
        frame = holds.frames[connection, counts[FIRST_FRAME] % holds.frames.shape[1]]
        if frame[LAST_OPERATION] > counts[FIRST]:
            break
        end = frame[END_WORDS]
        counts[FIRST_FRAME] += 1
    return end


@jit
def forget(holds: Holds, connection: int) -> None:
    """Let a connection that is gone hold nothing."""
    for n in range(4):
        holds.counts[connection, n] = 0


@jit
def serve_frame(
    shipping: Shipping, holds: Holds, words: np.ndarray, owner: int, client: int, connection: int, now_ns: int,
    request: np.ndarray, at: int, length: int, answer: np.ndarray, answer_at: int,
) -> int:  # fmt: skip
    """Do a client's frame (see `answer_frame`), and hold its answers as long as they must wait; return their words.

    client: the slot of the client in the frame's header. `has_room` was true.
    """
    operation_words = OPERATION_VALUE + word(words, VALUE_WORDS)
    count = frame_operations(request, at)
    if not lease_holds(words, now_ns):
        written = refuse_operations(words, request, at, length, LEASE_LAPSED, answer, answer_at)
    else:
        written = answer_frame(words, owner, client, now_ns // 1_000_000_000, request, at, length, answer, answer_at)
        note_answers(shipping, words, client, answer, answer_at)
    if words[DIRTY_OFFSET] != U0:
        hold(holds, words, connection, answer, answer_at, count, operation_words)
    return written
