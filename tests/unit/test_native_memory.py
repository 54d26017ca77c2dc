"""Are shared words atomic among processes, header fields read at any byte, and accesses outside refused when checked?"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.base import CHECKED
from datastore.compiled import INTERPRETED, jit
from datastore.compiled.libc import sched_yield
from datastore.compiled.memory import (
    compare_and_swap,
    copy,
    fetch_add,
    leading_zeros,
    load16,
    load32,
    load64,
    load_acquire,
    network16,
    network32,
    put_network16,
    put_network32,
    store16,
    store32,
    store64,
    store_release,
    trailing_zeros,
)

PROCESSES, ROUNDS = 4, 20_000


def shared(words: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, words * 8), np.uint64)


def in_children(work: Callable[[int], None], count: int = PROCESSES) -> None:
    """Run work(0), work(1) ... each in a forked child; every one must succeed."""
    children = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                work(number)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * count


@jit
def add_many(words: np.ndarray, rounds: int) -> None:
    for _ in range(rounds):
        fetch_add(words, 0, 1)


@jit
def swap_many(words: np.ndarray, rounds: int) -> None:
    for _ in range(rounds):
        seen = load_acquire(words, 1)
        while compare_and_swap(words, 1, seen, seen + np.uint64(3)) != seen:
            seen = load_acquire(words, 1)


@jit
def locked_many(words: np.ndarray, rounds: int, me: int) -> None:
    """Increment word 3, plainly, under a spin lock in word 2."""
    for _ in range(rounds):
        while compare_and_swap(words, 2, 0, me) != np.uint64(0):
            sched_yield()
        words[3] += np.uint64(1)
        store_release(words, 2, 0)


def test_processes_lose_no_update() -> None:
    words = shared(8)
    add_many(words, 0), swap_many(words, 0), locked_many(words, 0, 1)  # compiled before the fork

    def work(number: int) -> None:
        add_many(words, ROUNDS)
        swap_many(words, ROUNDS)
        locked_many(words, ROUNDS, number + 1)

    in_children(work)
    assert [int(word) for word in words[:4]] == [PROCESSES * ROUNDS, 3 * PROCESSES * ROUNDS, 0, PROCESSES * ROUNDS]


@jit
def ping_pong(words: np.ndarray, rounds: int, parity: int) -> int:
    """Wait for word 0 to have this parity, check that word 1 was written before it, write both; returns the mismatches."""
    wrong = 0
    for _ in range(rounds):
        turn = load_acquire(words, 0)
        while np.int64(turn) & 1 != parity:
            sched_yield()
            turn = load_acquire(words, 0)
        wrong += words[1] != turn * np.uint64(7)
        words[1] = (turn + np.uint64(1)) * np.uint64(7)
        store_release(words, 0, turn + np.uint64(1))
    return wrong


def test_a_loop_sees_what_another_process_stores_and_in_order() -> None:
    words = shared(8)
    ping_pong(words, 0, 0)
    in_children(lambda number: os._exit(int(ping_pong(words, 2000, number) != 0)), count=2)
    assert int(words[0]) == 4000


@jit
def read_all(data: np.ndarray, at: int, out: np.ndarray) -> None:
    out[0], out[1], out[2] = load16(data, at), load32(data, at), load64(data, at)
    out[3], out[4] = network16(data, at), network32(data, at)


@pytest.mark.bounds
@given(st.binary(min_size=8, max_size=40), st.data())
def test_fields_at_any_byte_read_as_struct_reads_them(content: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(content) - 8))
    out = np.zeros(5, np.uint64)
    read_all(np.frombuffer(content, np.uint8), at, out)
    formats = ("<H", "<I", "<Q", ">H", ">I")
    assert [int(value) for value in out] == [struct.unpack_from(layout, content, at)[0] for layout in formats]


@jit
def write_one(data: np.ndarray, kind: int, at: int, value: int) -> None:
    if kind == 0:
        store16(data, at, value)
    elif kind == 1:
        store32(data, at, value)
    elif kind == 2:
        store64(data, at, value)
    elif kind == 3:
        put_network16(data, at, value)
    else:
        put_network32(data, at, value)


@jit
def read_one(data: np.ndarray, kind: int, at: int) -> int:
    if kind == 0:
        return np.int64(load16(data, at))
    if kind == 1:
        return np.int64(load32(data, at))
    if kind == 2:
        return np.int64(load64(data, at))
    if kind == 3:
        return np.int64(network16(data, at))
    return np.int64(network32(data, at))


WIDTHS = (("<H", 2), ("<I", 4), ("<Q", 8), (">H", 2), (">I", 4))


@pytest.mark.bounds
@given(st.integers(0, len(WIDTHS) - 1), st.integers(0, 11), st.integers(0, 2**62))
def test_fields_at_any_byte_are_written_without_touching_others(kind: int, at: int, value: int) -> None:
    data = np.full(20, 0xEE, np.uint8)
    layout, width = WIDTHS[kind]
    write_one(data, kind, at, value)
    wanted = bytearray(b"\xee" * 20)
    struct.pack_into(layout, wanted, at, value % 2 ** (8 * width))
    assert data.tobytes() == bytes(wanted)


@jit
def copy_some(target: np.ndarray, target_at: int, source: np.ndarray, source_at: int, count: int) -> None:
    copy(target, target_at, source, source_at, count)


@pytest.mark.bounds
@pytest.mark.parametrize("kind", [np.uint8, np.uint64])
def test_copies_count_elements_and_may_overlap(kind: type) -> None:
    data = np.arange(16).astype(kind)
    copy_some(data, 2, data, 0, 10)
    assert data.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15]


@jit
def count_zeros(value: int) -> tuple[int, int]:
    return np.int64(trailing_zeros(np.uint64(value))), np.int64(leading_zeros(np.uint64(value)))


def test_zero_bits_are_counted_from_both_ends() -> None:
    for bit in range(63):
        assert count_zeros(1 << bit) == (bit, 63 - bit)
    assert count_zeros(0) == (64, 64)
    assert count_zeros(0b1011000) == (3, 57)


@jit
def atomic_at(words: np.ndarray, index: int) -> int:
    return np.int64(load_acquire(words, index)) + np.int64(fetch_add(words, index, 1))


@jit
def element(words: np.ndarray, index: int) -> int:
    return np.int64(words[index])


@pytest.mark.bounds
@pytest.mark.skipif(not CHECKED, reason="only with NUMBA_BOUNDSCHECK=1; run_tests.sh runs it so")
def test_indices_do_not_count_from_the_end() -> None:
    words = np.arange(4, dtype=np.uint64)
    assert element(words, 3) == 3
    for index in (-1, -4, 4):
        with pytest.raises(IndexError):
            element(words, index)


@pytest.mark.bounds
@pytest.mark.skipif(not CHECKED, reason="only with NUMBA_BOUNDSCHECK=1; run_tests.sh runs it so")
@pytest.mark.parametrize("kind", range(len(WIDTHS)))
def test_checked_accesses_outside_raise(kind: int) -> None:
    width = WIDTHS[kind][1]
    data = np.zeros(16, np.uint8)
    read_one(data, kind, 16 - width), write_one(data, kind, 16 - width, 1)
    for at in (-1, 17 - width, 16, 1 << 40):
        with pytest.raises(IndexError):
            read_one(data, kind, at)
        with pytest.raises(IndexError):
            write_one(data, kind, at, 1)
    for arguments in ((0, 0, 17), (1, 0, 16), (0, 1, 16), (-1, 0, 4), (0, -1, 4)):
        with pytest.raises(IndexError):
            copy_some(data, arguments[0], data, arguments[1], arguments[2])
    for index in (-1, 2):
        with pytest.raises(IndexError):
            atomic_at(np.zeros(2, np.uint64), index)


def test_tests_of_compiled_code_test_compiled_code() -> None:
    assert not INTERPRETED, "unset NUMBA_DISABLE_JIT; only tests marked python_mode run uncompiled"
