"""System calls from compiled code: symbols of libc, which Numba's cache can keep (ctypes pointers it cannot)."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from datastore.compiled import INTERPRETED, inline, jit

EINTR, EAGAIN, EBUSY, ENOBUFS, ECONNRESET, EINPROGRESS = 4, 11, 16, 105, 104, 115
MSG_DONTWAIT, MSG_NOSIGNAL = 0x40, 0x4000
POLLIN, POLLOUT = 1, 4
CLOCK_MONOTONIC = 1

_int, _long, _pointer = types.int32, types.int64, types.uintp

sendto = types.ExternalFunction("sendto", _long(_int, _pointer, _pointer, _int, _pointer, _int))
"""sendto(fd, data, bytes, flags, address, address_bytes)"""
libc_send = types.ExternalFunction("send", _long(_int, _pointer, _pointer, _int))
libc_recv = types.ExternalFunction("recv", _long(_int, _pointer, _pointer, _int))
libc_ppoll = types.ExternalFunction("ppoll", _int(_pointer, _long, _pointer, _pointer))
libc_close = types.ExternalFunction("close", _int(_int))
libc_fcntl = types.ExternalFunction("fcntl", _int(_int, _int, _pointer))
sched_yield = types.ExternalFunction("sched_yield", _int())
getpid = types.ExternalFunction("getpid", _int())
kill = types.ExternalFunction("kill", _int(_int, _int))
_errno_location = types.ExternalFunction("__errno_location", _pointer())
_clock_gettime = types.ExternalFunction("clock_gettime", _int(_int, _pointer))


@intrinsic
def _load_int(typingctx, pointer):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(32).as_pointer()))

    return types.int32(types.uintp), generate


@jit
def errno() -> int:
    """Return the error number of this thread's last failed system call."""
    return np.int64(_load_int(_errno_location()))


@inline
def now_ns(scratch: np.ndarray) -> Any:
    """Return CLOCK_MONOTONIC in nanoseconds; `scratch` is an int64 array of at least 2 elements, overwritten.

    All processes of the emulation read this one clock (DESIGN, section 10). No system call: the vDSO answers.
    """
    _clock_gettime(np.int32(CLOCK_MONOTONIC), np.uintp(scratch.ctypes.data))
    return scratch[0] * 1_000_000_000 + scratch[1]


@inline
def address(array: np.ndarray, index: int) -> Any:
    """Return the address of element `index` of an array, for a system call or an NF."""
    return np.uintp(array.ctypes.data) + np.uintp(index * array.itemsize)


@inline
def send(fd: int, data: np.ndarray, start: int, end: int) -> Any:
    """Send bytes `start` to `end` of a uint8 array without waiting; return the count sent or minus the error number."""
    if start < 0 or end > data.size or start > end:
        raise IndexError("send outside the buffer")
    sent = libc_send(np.int32(fd), address(data, start), np.uintp(end - start), np.int32(MSG_DONTWAIT | MSG_NOSIGNAL))
    return sent if sent >= 0 else -np.int64(errno())


@inline
def recv(fd: int, data: np.ndarray, start: int, end: int) -> Any:
    """Receive into bytes `start` to `end` of a uint8 array without waiting; return the count (0: closed) or minus errno."""
    if start < 0 or end > data.size or start > end:
        raise IndexError("receive outside the buffer")
    got = libc_recv(np.int32(fd), address(data, start), np.uintp(end - start), np.int32(MSG_DONTWAIT))
    return got if got >= 0 else -np.int64(errno())


@inline
def poll(entries: np.ndarray, count: int, timeout_ns: int, scratch: np.ndarray) -> Any:
    """Wait until one of the first `count` descriptors is ready or `timeout_ns` passed; return how many are ready.

    entries: int64 array, one packed `struct pollfd` each, made by `pollfd`. scratch: int64 array of at least 2 elements.
    """
    scratch[0], scratch[1] = timeout_ns // 1_000_000_000, timeout_ns % 1_000_000_000
    return libc_ppoll(address(entries, 0), count, np.uintp(scratch.ctypes.data), np.uintp(0))


@inline
def pollfd(fd: int, events: int) -> Any:
    """Return a `struct pollfd` packed into one int64 (int fd; short events; short revents)."""
    return np.int64(fd) & np.int64(0xFFFFFFFF) | np.int64(events) << np.int64(32)


@inline
def doze(entries: np.ndarray, duration_ns: int, scratch: np.ndarray) -> None:
    """Sleep for `duration_ns`; entries: int64[>= 1] and scratch: int64[>= 2] are overwritten."""
    entries[0] = pollfd(-1, POLLIN)
    poll(entries, 1, duration_ns, scratch)


if INTERPRETED:  # the same calls from plain Python, for tests, debuggers and the simulators
    _libc = ctypes.CDLL(None, use_errno=True)

    def _plain(name: str, result: Any, *kinds: Any) -> Any:
        """Return a function of libc by the kinds of its result and arguments."""
        function = getattr(_libc, name)
        function.restype, function.argtypes = result, kinds
        return lambda *arguments: function(*map(int, arguments))

    libc_send = _plain("send", ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc_recv = _plain("recv", ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc_fcntl = _plain("fcntl", ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    libc_ppoll = _plain("ppoll", ctypes.c_int, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    libc_close = _plain("close", ctypes.c_int, ctypes.c_int)
    sched_yield = _plain("sched_yield", ctypes.c_int)
    getpid = _plain("getpid", ctypes.c_int)
    kill = _plain("kill", ctypes.c_int, ctypes.c_int, ctypes.c_int)
    sendto = _plain(
        "sendto", ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int
    )

    def errno() -> int:
        return ctypes.get_errno()

    def now_ns(scratch: np.ndarray) -> Any:
        return time.monotonic_ns()
