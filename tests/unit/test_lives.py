"""Is the end of a thread of another process known at once, and nothing else taken for it?"""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from datastore.base import ROOT
from datastore.store import lives
from datastore.store.layout import FUNCTION_LIFE, INCARNATION, LEASE_LIFE, LEASE_NS, SERVER_LIFE
from datastore.store.table import Table

FIRST, SECOND = 0, lives.LIFE_WORDS
SOON_S, NEVER_S = 10.0, 0.1
STORE = """
import sys, threading, time
from datastore.store.table import Table
table, there = Table.attach(sys.argv[1]), threading.Event()
table.claim_server()
table.begin_function(7)
threading.Thread(target=lambda: (table.renews_lease(), there.set(), time.sleep(60)), daemon=True).start()
there.wait()
print("there", flush=True)
time.sleep(60)
"""


class Holder(threading.Thread):
    """A thread that holds a life until it is told to end."""

    def __init__(self, words: np.ndarray, at: int) -> None:
        super().__init__(daemon=True)
        self.words, self.at, self.there, self.over = words, at, threading.Event(), threading.Event()
        self.start()
        assert self.there.wait(SOON_S)

    def run(self) -> None:
        lives.hold(self.words, self.at)
        self.there.set()
        self.over.wait()

    def end(self) -> None:
        """End, and return once the kernel has ended the thread, which is a moment after Python has."""
        self.over.set()
        self.join()
        deadline = time.monotonic() + SOON_S
        while lives.is_held(self.words, self.at):
            assert time.monotonic() < deadline
            time.sleep(0.001)


def is_told(descriptor: int, timeout_s: float) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


@pytest.fixture
def words() -> np.ndarray:
    return np.zeros(4 * lives.LIFE_WORDS, np.uint64)


def test_nobody_is_watched_where_nobody_lives(words: np.ndarray) -> None:
    assert not lives.is_held(words, FIRST)
    assert lives.watch(words, (FIRST, SECOND)) is None


def test_the_end_of_the_last_of_several_threads_is_told_to_all_who_wait(words: np.ndarray) -> None:
    holders = [Holder(words, FIRST), Holder(words, SECOND)]
    watching = [lives.watch(words, (FIRST, SECOND)) for _ in range(3)]
    descriptors = [descriptor for descriptor in watching if descriptor is not None]
    assert len(descriptors) == 3
    holders[0].end()
    assert not lives.is_held(words, FIRST)
    assert lives.is_held(words, SECOND)
    assert not any(is_told(descriptor, NEVER_S) for descriptor in descriptors)
    holders[1].end()
    assert all(is_told(descriptor, SOON_S) for descriptor in descriptors)
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_life_that_begins_again_is_another(words: np.ndarray) -> None:
    first = Holder(words, FIRST)
    watched = lives.watch(words, (FIRST,))
    assert watched is not None
    first.end()
    assert is_told(watched, SOON_S)
    second = Holder(words, FIRST)
    again = lives.watch(words, (FIRST,))
    assert again is not None
    assert not is_told(again, NEVER_S)
    second.end()
    assert is_told(again, SOON_S)
    os.close(watched)
    os.close(again)


@pytest.fixture
def served() -> Iterator[tuple[Table, subprocess.Popen[str]]]:
    """A table, and a process that is its store and its NF process."""
    name = f"nearstate-test-lives-{secrets.token_hex(4)}"
    table = Table.create(name, 64, 8, 1)
    store = subprocess.Popen([sys.executable, "-c", STORE, name], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert store.stdout
        assert store.stdout.readline() == "there\n"
        yield table, store
    finally:
        store.kill()
        store.wait()
        table.close()
        table.unlink()


def test_a_killed_store_process_ends_the_lease_and_a_stopped_one_does_not(served: tuple[Table, subprocess.Popen[str]]) -> None:
    table, store = served
    table.words[LEASE_NS], table.words[INCARNATION] = 1 << 62, 5
    watched, function = table.watch_server(), table.watch_function()
    assert watched is not None
    assert function is not None
    assert function[0] == 7
    store.send_signal(signal.SIGSTOP)
    assert not is_told(watched, NEVER_S)
    assert table.end_lease() is None
    assert table.words[LEASE_NS] == 1 << 62
    store.kill()
    assert is_told(watched, SOON_S)
    assert is_told(function[1], SOON_S)
    assert table.end_lease() == 5
    assert table.words[LEASE_NS] == 1
    assert table.watch_server() is None
    assert table.watch_function() is None
    os.close(watched)
    os.close(function[1])


@pytest.mark.parametrize(("first", "second"), [(SERVER_LIFE, LEASE_LIFE), (LEASE_LIFE, SERVER_LIFE)])
def test_a_lease_ends_with_the_last_of_the_threads_that_could_answer_or_renew_it(first: int, second: int) -> None:
    table = Table.anonymous("lives", 60, 8, 1)
    table.words[LEASE_NS], table.words[INCARNATION] = 1 << 62, 5
    holders = [Holder(table.words, first)]
    assert table.end_lease() is None
    holders.append(Holder(table.words, second))
    for holder in holders:
        assert table.end_lease() is None
        holder.end()
    assert table.end_lease() == 5
    table.close()


def test_a_thread_of_which_nothing_is_known_may_live() -> None:
    """Where one of the two could not say that it lives, the lease runs out."""
    table = Table.anonymous("lives", 60, 8, 1)
    table.words[INCARNATION] = 5
    Holder(table.words, SERVER_LIFE).end()
    assert table.end_lease() is None
    table.close()


def test_a_second_nf_process_on_a_table_does_not_hide_the_end_of_the_first() -> None:
    table = Table.anonymous("lives", 60, 8, 1)
    first = Holder(table.words, FUNCTION_LIFE)
    watched = table.watch_function()
    table.begin_function(9)
    assert watched is not None
    assert not is_told(watched[1], NEVER_S)
    first.end()
    assert is_told(watched[1], SOON_S)
    os.close(watched[1])
    table.close()


def test_a_table_that_nobody_serves_has_no_lease_to_end() -> None:
    table = Table.anonymous("lives", 60, 8, 1)
    assert table.end_lease() is None
    table.close()
