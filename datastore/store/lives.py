"""When has a thread of another process of this host ended? Known at once, however long the kernel then takes to end the process.

At its end a process loses its memory first, then its locks and connections, and becomes a process that has ended (pidfd_open(2))
last: 6 to 15 ms of work for one of ours, three times as long where others want the core. What the kernel does before all that is
to mark the robust mutexes that the thread holds, and to wake whoever waits for them (pthread_mutexattr_setrobust(3),
get_robust_list(2), futex(2)). So a thread holds one for as long as it lives, in the table, which others watch and never take:

    lock word    0 nobody | thread number | FUTEX_WAITERS | FUTEX_OWNER_DIED

A thread whose word is marked runs no more: it changes nothing, and sends nothing that is not sent.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import threading
import time
from collections.abc import Sequence

import numpy as np

from datastore.base.threads import take_precedence

LIFE_WORDS = 8
"""Room for a `pthread_mutex_t`: 40 bytes on x86-64, 48 on arm64."""
_SHARED, _ROBUST = 1, 1
_WAITERS, _OWNER_DIED, _THREAD = 0x8000_0000, 0x4000_0000, 0x3FFF_FFFF
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}
_EVERYBODY = 0x7FFF_FFFF
LOOK_AGAIN_NS = 50_000_000
_libc = ctypes.CDLL(None, use_errno=True)
_kept = threading.local()
"""The tables in which a thread holds lives: the C library has a list of these mutexes, so their memory must stay."""


def hold(words: np.ndarray, at: int) -> None:
    """Have the calling thread be known as living at word `at` (LIFE_WORDS of them), until it ends.

    Raises OSError where the C library keeps its mutexes otherwise than described above.
    """
    mutex, attributes = ctypes.c_void_p(words.ctypes.data + at * words.itemsize), (ctypes.c_char * 64)()
    words[at : at + LIFE_WORDS] = 0
    for step in (
        _libc.pthread_mutexattr_init(attributes),
        _libc.pthread_mutexattr_setpshared(attributes, _SHARED),
        _libc.pthread_mutexattr_setrobust(attributes, _ROBUST),
        _libc.pthread_mutex_init(mutex, attributes),
        _libc.pthread_mutex_lock(mutex),
    ):
        if step:
            raise OSError(step, f"no robust mutex: {os.strerror(step)}")
    lock = _lock_word(words, at)
    if int(lock[0]) & _THREAD != threading.get_native_id():
        words[at : at + LIFE_WORDS] = 0
        raise OSError(0, "the C library's mutexes do not begin with the number of their thread")
    lock[0] = int(lock[0]) | _WAITERS  # the kernel wakes only where somebody may wait
    _kept.tables = [*getattr(_kept, "tables", []), words]


def leave(words: np.ndarray, at: int) -> None:
    """Have the calling thread be known as ended where it held a life, though it goes on."""
    _libc.pthread_mutex_unlock(ctypes.c_void_p(words.ctypes.data + at * words.itemsize))
    _lock_word(words, at)[0] = _OWNER_DIED
    _kept.tables = [kept for kept in _kept.tables if kept is not words]


def is_held(words: np.ndarray, at: int) -> bool:
    """Tell whether a thread holds the life at word `at`, and runs."""
    return _runs(int(_lock_word(words, at)[0]))


def watch(words: np.ndarray, lives: Sequence[int]) -> int | None:
    """Return a descriptor that is readable once no thread holds any of `lives`; None if none does. The caller closes it.

    A thread waits for that, before all others. Raises OSError where it cannot wait.
    """
    number = _SYS_FUTEX.get(platform.machine())
    if number is None:
        raise OSError(0, f"futex(2) has no known number on {platform.machine()}")
    if not any(is_held(words, at) for at in lives):
        return None
    seen = [int(_lock_word(words, at)[0]) for at in lives]
    descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    told = os.dup(descriptor)

    def wait() -> None:
        take_precedence()
        for at, lock in zip(lives, seen):
            _wait(number, words, at, lock)
        os.eventfd_write(told, 1)
        os.close(told)

    threading.Thread(target=wait, name="watch", daemon=True).start()
    return descriptor


def _wait(number: int, words: np.ndarray, at: int, seen: int) -> None:
    """Wait until the thread that held the life at `at` when its lock word was `seen` has ended; who held none then, by now.

    The kernel wakes one of those that wait, and nobody where the thread ended before it had said that somebody may wait. So this
    wakes the others, and looks again after a while by itself.
    """
    lock = _lock_word(words, at)
    address, look_again = ctypes.c_void_p(lock.ctypes.data), (ctypes.c_long * 2)(0, LOOK_AGAIN_NS)
    if not seen & _THREAD:
        seen = int(lock[0])
    while _runs(now := int(lock[0])) and (now ^ seen) & _THREAD == 0:
        ctypes.set_errno(0)
        _libc.syscall(ctypes.c_long(number), address, _FUTEX_WAIT, ctypes.c_uint32(now), look_again, None, 0)
        if ctypes.get_errno() not in (0, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):  # a sandbox without futex(2)
            time.sleep(LOOK_AGAIN_NS / 1e9)
    _libc.syscall(ctypes.c_long(number), address, _FUTEX_WAKE, _EVERYBODY, None, None, 0)


def _runs(lock: int) -> bool:
    """Tell whether the thread of a lock word runs."""
    return bool(lock & _THREAD) and not lock & _OWNER_DIED


def _lock_word(words: np.ndarray, at: int) -> np.ndarray:
    return words[at : at + 1].view(np.uint32)
