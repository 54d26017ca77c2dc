"""How do store and client speak?

TCP; a challenge first (`datastore/security/challenge.py`), then little-endian words of 64 bits; frames of up to 256 operations
of one size, answered by one frame each, in order:

    0   magic and protocol version (32 bits) | frame bytes (32)
    1   operations in the frame (16) | flags (16; 1: answers) | epoch of the partition map (32)
    2   client id
    3   cluster id
    4.. operations (see `operations`), all of the same size: 40 bytes and room for the value

A client's first operation on a connection is HELLO: extra = its value bytes, stamp = the window it wants. The answer's value
bytes and extra are the table's value bytes and window, its key low is the highest sequence number the store has completed for
this client id: a client that starts anew under an old id goes on from there.

A frame that does not parse is answered by one operation of status BAD_FRAME, and that connection is closed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.store.layout import (
    CLIENT_HEADER_WORDS,
    CLIENT_ID,
    CLIENT_STRIDE,
    CLIENT_USED_S,
    CLIENTS,
    CLUSTER,
    DONE_SEQUENCE,
    DONE_VALUE,
    EPOCH,
    FRAMES,
    OPERATIONS,
    U0,
    VALUE_WORDS,
    WINDOW,
    client_at,
    prefetch_record,
    prefetch_slot,
    word,
)
from datastore.store.locking import refuse
from datastore.store.operations import (
    HELLO,
    KEY_HIGH,
    KEY_LOW,
    OPERATION_STAMP,
    OPERATION_VALUE,
    SEQUENCE,
    execute,
    operation_word,
)
from datastore.store.statuses import BAD_FRAME, BAD_OPERATION, OK, OVERSIZED, TOO_MANY_CLIENTS, WRONG_CLIENT, WRONG_CLUSTER
from datastore.store.table import LARGEST_VALUE_BYTES

PROTOCOL_MAGIC = 0x6E73_7401
"""'nst' and the protocol's version."""
FRAME_HEADER_WORDS = 4
FRAME_OPERATIONS = 256
LARGEST_OPERATION_BYTES = OPERATION_VALUE * 8 + LARGEST_VALUE_BYTES
LARGEST_FRAME_BYTES = FRAME_HEADER_WORDS * 8 + FRAME_OPERATIONS * LARGEST_OPERATION_BYTES
ANSWERS = 1
"""The flag of a frame that holds answers."""

NOT_ITS_OWN = -2
UNUSED_CLIENT_S = 60
"""A client's slot may go to another one after this long without a frame."""

LOW32 = np.uint64(0xFFFFFFFF)


@inline
def write_frame_header(
    buffer: np.ndarray, at: int, operations: int, operation_words: int, flags: int, epoch: int, client: int, cluster: int
) -> None:
    """Write a frame's four header words to a uint64 buffer. client, cluster: uint64."""
    frame_bytes = (FRAME_HEADER_WORDS + operations * operation_words) * 8
    buffer[at] = np.uint64(PROTOCOL_MAGIC) | np.uint64(frame_bytes) << np.uint64(32)
    counts = np.uint64(operations) | np.uint64(flags) << np.uint64(16)
    buffer[at + 1] = counts | np.uint64(epoch) << np.uint64(32)
    buffer[at + 2] = client
    buffer[at + 3] = cluster


@jit
def frame_words(buffer: np.ndarray, at: int, end: int, flags: int) -> int:
    """Return the length in words of the frame at `buffer[at]`, 0 when more of it must arrive, or -1 when it is none.

    buffer: uint64[n]; words up to `end` have arrived and nothing behind them is read. Garbage is noticed by the first word.
    """
    if end - at < 1:
        return 0
    if buffer[at] & LOW32 != np.uint64(PROTOCOL_MAGIC):
        return -1
    frame_bytes = np.int64(buffer[at] >> np.uint64(32))
    if frame_bytes & 7 or frame_bytes > LARGEST_FRAME_BYTES:
        return -1
    if end - at < FRAME_HEADER_WORDS:
        return 0 if frame_bytes > FRAME_HEADER_WORDS * 8 else -1
    count = frame_operations(buffer, at)
    if count < 1 or count > FRAME_OPERATIONS or np.int64(buffer[at + 1] >> np.uint64(16) & np.uint64(0xFFFF)) != flags:
        return -1
    body_bytes = frame_bytes - FRAME_HEADER_WORDS * 8
    if body_bytes % count:
        return -1
    operation_bytes = body_bytes // count
    if operation_bytes & 7 or operation_bytes < OPERATION_VALUE * 8 or operation_bytes > LARGEST_OPERATION_BYTES:
        return -1
    return frame_bytes >> 3 if end - at >= frame_bytes >> 3 else 0


@inline
def frame_operations(buffer: np.ndarray, at: int) -> Any:
    """Return the number of operations a frame's header names."""
    return np.int64(buffer[at + 1] & np.uint64(0xFFFF))


@inline
def frame_epoch(buffer: np.ndarray, at: int) -> Any:
    return np.int64(buffer[at + 1] >> np.uint64(32))


@jit
def find_client(words: np.ndarray, client_id: int, now_s: int, connected: np.ndarray) -> int:
    """Return the slot of a client, given to it now if need be, or -1 when all are in use.

    connected: uint8[slots], 1 where a connection uses the slot. A new one goes to a slot never used, else to the one unused
    for longest, if for at least UNUSED_CLIENT_S. The id is written last: a kill in between leaves the slot free.
    """
    chosen, oldest = -1, max(now_s - UNUSED_CLIENT_S, 0)
    for client in range(word(words, CLIENTS)):
        at = client_at(words, client)
        if words[at + CLIENT_ID] == client_id:
            return client
        used_s = word(words, at + CLIENT_USED_S) if words[at + CLIENT_ID] != U0 else -1
        if connected[client] == 0 and used_s < oldest:
            chosen, oldest = client, used_s
    if chosen >= 0:
        at = client_at(words, chosen)
        words[at + CLIENT_ID] = U0
        for n in range(CLIENT_HEADER_WORDS, word(words, CLIENT_STRIDE)):
            words[at + n] = U0
        words[at + CLIENT_USED_S] = np.uint64(now_s)
        words[at + CLIENT_ID] = client_id
    return chosen


@jit
def highest_sequence(words: np.ndarray, client: int) -> Any:
    """Return, as uint64, the highest sequence number completed for a client."""
    at = client_at(words, client) + CLIENT_HEADER_WORDS
    step = DONE_VALUE + word(words, VALUE_WORDS)
    highest = U0
    for n in range(word(words, WINDOW)):
        highest = max(highest, words[at + n * step + DONE_SEQUENCE])
    return highest


@jit
def hello(words: np.ndarray, client: int, cluster: int, request: np.ndarray, at: int, answer: np.ndarray, answer_at: int) -> int:
    """Answer a HELLO; return its status. client: the slot, -1 when there is none left, NOT_ITS_OWN when the id is not the one
    that the connection's speaker has proven. cluster: the client's, uint64."""
    status = OK
    if client == NOT_ITS_OWN:
        status = WRONG_CLIENT
    elif cluster != words[CLUSTER]:
        status = WRONG_CLUSTER
    elif request[at] >> np.uint64(32) > words[VALUE_WORDS] << np.uint64(3):
        status = OVERSIZED
    elif request[at + OPERATION_STAMP] == U0 or request[at + OPERATION_STAMP] > words[WINDOW]:
        status = BAD_OPERATION
    elif client < 0:
        status = TOO_MANY_CLIENTS
    for n in range(OPERATION_VALUE + word(words, VALUE_WORDS)):
        answer[answer_at + n] = U0
    answer[answer_at] = operation_word(HELLO, status, words[VALUE_WORDS] << np.uint64(3), words[WINDOW])
    answer[answer_at + SEQUENCE] = request[at + SEQUENCE]
    if status == OK:
        answer[answer_at + KEY_LOW] = highest_sequence(words, client)
    else:
        refuse(words, status)
    return status


@jit
def refuse_frame(words: np.ndarray, answer: np.ndarray, answer_at: int) -> int:
    """Write the answer to what is no frame; return its length in words."""
    operation_words = OPERATION_VALUE + word(words, VALUE_WORDS)
    for n in range(operation_words):
        answer[answer_at + FRAME_HEADER_WORDS + n] = U0
    write_frame_header(answer, answer_at, 1, operation_words, ANSWERS, words[EPOCH], U0, words[CLUSTER])
    answer[answer_at + FRAME_HEADER_WORDS] = operation_word(0, refuse(words, BAD_FRAME), 0, 0)
    return FRAME_HEADER_WORDS + operation_words


@jit
def refuse_operations(
    words: np.ndarray, request: np.ndarray, at: int, length: int, status: int, answer: np.ndarray, answer_at: int
) -> int:
    """Answer every operation of a frame with a status, having done none; return the answer's length in words."""
    count = frame_operations(request, at)
    operation_words = (length - FRAME_HEADER_WORDS) // count
    answer_words = OPERATION_VALUE + word(words, VALUE_WORDS)
    write_frame_header(answer, answer_at, count, answer_words, ANSWERS, words[EPOCH], request[at + 2], words[CLUSTER])
    for n in range(count):
        operation, target = at + FRAME_HEADER_WORDS + n * operation_words, answer_at + FRAME_HEADER_WORDS + n * answer_words
        for m in range(answer_words):
            answer[target + m] = request[operation + m] if m > 0 and m < OPERATION_STAMP else U0
        answer[target] = operation_word(request[operation] & np.uint64(0xFF), refuse(words, status), 0, 0)
    return FRAME_HEADER_WORDS + count * answer_words


@jit
def answer_frame(
    words: np.ndarray, owner: int, client: int, now_s: int, request: np.ndarray, at: int, length: int, answer: np.ndarray,
    answer_at: int,
) -> int:  # fmt: skip
    """Do all operations of the frame at `request[at]` and write their answers as one frame; return its length in words.

    length: from `frame_words`. client: the slot of the client whose HELLO opened this connection, or -1. HELLO itself is the
    server's business: here it is a bad operation.
    """
    if request[at + 3] != words[CLUSTER]:
        return refuse_operations(words, request, at, length, WRONG_CLUSTER, answer, answer_at)
    count = frame_operations(request, at)
    operation_words = (length - FRAME_HEADER_WORDS) // count
    answer_words = OPERATION_VALUE + word(words, VALUE_WORDS)
    epoch = frame_epoch(request, at)
    write_frame_header(answer, answer_at, count, answer_words, ANSWERS, words[EPOCH], request[at + 2], words[CLUSTER])
    if client >= 0 and words[client_at(words, client) + CLIENT_ID] != request[at + 2]:
        client = -1
    first = at + FRAME_HEADER_WORDS
    for n in range(count):
        operation = first + n * operation_words
        prefetch_record(words, request[operation + KEY_LOW], request[operation + KEY_HIGH])
    for n in range(count):
        operation = first + n * operation_words
        prefetch_slot(words, request[operation + KEY_LOW], request[operation + KEY_HIGH])
    for n in range(count):
        operation, target = first + n * operation_words, answer_at + FRAME_HEADER_WORDS + n * answer_words
        execute(words, owner, client, epoch, now_s, request, operation, operation_words, answer, target)
    words[FRAMES] += np.uint64(1)
    words[OPERATIONS] += np.uint64(count)
    return FRAME_HEADER_WORDS + count * answer_words
