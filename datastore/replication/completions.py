"""Completion records: a client's operation was done, with this answer. They travel in the frame of their changes."""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.replication.link import DONE_QUEUE, Shipping
from datastore.store.layout import (
    CLIENT_ID,
    CLIENT_STRIDE,
    CLIENT_USED_S,
    CLIENTS,
    CLIENTS_AT,
    DIRTY_OFFSET,
    DONE_SEQUENCE,
    DONE_VALUE,
    U0,
    VALUE_WORDS,
    WINDOW,
    client_at,
    completion_at,
    word,
)
from datastore.store.operations import KEY_LOW, OPERATION_VALUE, SEQUENCE, done_partition
from datastore.store.partitions import PARTITION_BITS
from datastore.store.protocol import FRAME_HEADER_WORDS, find_client, frame_operations


@jit
def note_completion(shipping: Shipping, partition: int, done: int) -> None:
    """Remember that a completion record belongs to the changes of a partition."""
    shipping.done[partition, shipping.done_end[partition] % DONE_QUEUE] = done
    shipping.done_end[partition] += 1
    shipping.has_done[partition] = 1


@inline
def done_client(words: np.ndarray, done: int) -> Any:
    """Return the word index of the client's slot that a completion record is in."""
    return word(words, CLIENTS_AT) + (done - word(words, CLIENTS_AT)) // word(words, CLIENT_STRIDE) * word(words, CLIENT_STRIDE)


@jit
def write_completion(words: np.ndarray, done: int, out: np.ndarray, at: int) -> int:
    """Write a completion record into a frame; return where it ends."""
    out[at] = words[done_client(words, done) + CLIENT_ID]
    for n in range(DONE_VALUE + word(words, VALUE_WORDS)):
        out[at + 1 + n] = words[done + n]
    return at + 1 + DONE_VALUE + word(words, VALUE_WORDS)


@jit
def write_noted_completion(words: np.ndarray, partition: int, done: int, out: np.ndarray, at: int) -> int:
    """As `write_completion`, for a record that was a partition's when it was noted.

    The client may have gone on a whole window since, with another partition: that one's changes carry what is there now, and
    before them it must not arrive. An empty record takes its room.
    """
    end = write_completion(words, done, out, at)
    if done_partition(words, done) != partition:
        out[at + 1 + DONE_SEQUENCE] = U0
    return end


@jit
def next_completion(words: np.ndarray, partition: int, place: int) -> int:
    """Return the first place from `place` on (client * window + number) whose completion record is a partition's, or -1."""
    window = word(words, WINDOW)
    while place < word(words, CLIENTS) * window:
        client = place // window
        if words[client_at(words, client) + CLIENT_ID] == U0:
            place = (client + 1) * window
            continue
        done = completion_at(words, client, place % window)
        if words[done + DONE_SEQUENCE] != U0 and done_partition(words, done) == partition:
            return place
        place += 1
    return -1


@inline
def first_completion(shipping: Shipping, words: np.ndarray, partition: int) -> Any:
    """Return the first place whose completion record is a partition's, or -1."""
    place = np.int64(-1)
    if shipping.has_done[partition]:
        place = next_completion(words, partition, 0)
        shipping.has_done[partition] = place >= 0
    return place


@inline
def completion_of(words: np.ndarray, place: int) -> Any:
    """Return the word index of the completion record at a place."""
    return completion_at(words, place // word(words, WINDOW), place % word(words, WINDOW))


@jit
def count_completions(shipping: Shipping, words: np.ndarray, partition: int) -> int:
    """Return how many completion records a partition has."""
    count, place = 0, first_completion(shipping, words, partition)
    while place >= 0:
        count += 1
        place = next_completion(words, partition, place + 1)
    return count


@jit
def write_all_completions(shipping: Shipping, words: np.ndarray, partition: int, out: np.ndarray, at: int) -> int:
    """Write every completion record of a partition; return where they end."""
    place = first_completion(shipping, words, partition)
    while place >= 0:
        at = write_completion(words, completion_of(words, place), out, at)
        place = next_completion(words, partition, place + 1)
    return at


@jit
def note_answers(shipping: Shipping, words: np.ndarray, client: int, answer: np.ndarray, at: int) -> None:
    """Note the completion records of the answered frame at `answer[at]`, so that they are shipped with the changes."""
    count = frame_operations(answer, at)
    answer_words = OPERATION_VALUE + word(words, VALUE_WORDS)
    if client < 0 or words[DIRTY_OFFSET] == U0:
        return
    for n in range(count):
        operation = at + FRAME_HEADER_WORDS + n * answer_words
        sequence = answer[operation + SEQUENCE]
        done = completion_at(words, client, sequence)
        partition = np.int64(answer[operation + KEY_LOW] & PARTITION_BITS)
        if sequence != U0 and words[done + DONE_SEQUENCE] == sequence and partition == done_partition(words, done):
            note_completion(shipping, partition, done)


@jit
def forget_completions(shipping: Shipping, words: np.ndarray, partition: int) -> None:
    """Drop the completion records of a partition: an image brings those that hold."""
    place = first_completion(shipping, words, partition)
    while place >= 0:
        words[completion_of(words, place) + DONE_SEQUENCE] = U0
        place = next_completion(words, partition, place + 1)


@jit
def find_room(shipping: Shipping, words: np.ndarray, now_s: int, frame: np.ndarray, at: int, completions: int) -> bool:
    """Give the clients of a frame's completion records slots, and note that they are in use; False when one finds none."""
    for _ in range(completions):
        client = find_client(words, frame[at], now_s, shipping.connected)
        if client < 0:
            return False
        words[client_at(words, client) + CLIENT_USED_S] = np.uint64(now_s)
        at += 1 + DONE_VALUE + word(words, VALUE_WORDS)
    return True


@jit
def read_completions(shipping: Shipping, words: np.ndarray, now_s: int, frame: np.ndarray, at: int, completions: int) -> None:
    """Copy completion records from a frame to the rings of their clients, unless a later one is there."""
    step = DONE_VALUE + word(words, VALUE_WORDS)
    for _ in range(completions):
        client = find_client(words, frame[at], now_s, shipping.connected)
        done = completion_at(words, client, frame[at + 1 + DONE_SEQUENCE])
        if words[done + DONE_SEQUENCE] <= frame[at + 1 + DONE_SEQUENCE]:
            for n in range(step):
                words[done + n] = frame[at + 1 + n]
        at += 1 + step
