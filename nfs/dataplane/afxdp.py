"""Ports by AF_XDP: rings shared with the kernel, every frame of the interface, none of them through its stack.

libxdp (package libxdp1) creates the socket and loads its own redirecting XDP program. On veth the kernel copies between
its buffers and our frames, but nothing else of its network stack runs.
"""

from __future__ import annotations

import contextlib
import ctypes as C
import os
import socket
import struct
import time
from functools import cache, partial
from typing import Any

import numpy as np

from datastore.base.errors import NearstateError
from datastore.compiled.libc import EBUSY
from nfs.dataplane.frames import FRAME_BYTES, Frames
from nfs.dataplane.port import AFXDP, FD, KIND, RESERVE, TX_PRODUCER, OpenPort, Port

RING_SLOTS = 4096
AF_XDP = 44
SOL_XDP, XDP_STATISTICS, XDP_MAX_TX_SKB_BUDGET = 283, 7, 9
BIND_NEED_WAKEUP = 1 << 3
BUSY_S = 1.0
HANDLE = 0
"""Where `OpenPort.keep` has libxdp's socket."""


class Ring(C.Structure):
    """struct xsk_ring_prod and xsk_ring_cons of libxdp's xsk.h."""

    _fields_ = [("cached_producer", C.c_uint32), ("cached_consumer", C.c_uint32), ("mask", C.c_uint32),
                ("size", C.c_uint32), ("producer", C.c_void_p), ("consumer", C.c_void_p), ("ring", C.c_void_p),
                ("flags", C.c_void_p)]  # fmt: skip


class UmemConfig(C.Structure):
    """struct xsk_umem_config."""

    _fields_ = [("fill_size", C.c_uint32), ("completion_size", C.c_uint32), ("frame_size", C.c_uint32),
                ("frame_headroom", C.c_uint32), ("flags", C.c_uint32)]  # fmt: skip


class SocketConfig(C.Structure):
    """struct xsk_socket_config."""

    _fields_ = [("rx_size", C.c_uint32), ("tx_size", C.c_uint32), ("libxdp_flags", C.c_uint32),
                ("xdp_flags", C.c_uint32), ("bind_flags", C.c_uint16)]  # fmt: skip


_SILENT = C.CFUNCTYPE(C.c_int, C.c_int, C.c_char_p, C.c_void_p)(lambda level, text, arguments: 0)


@cache
def library() -> Any:
    """Return libxdp, loaded once, its chatter about missing optional sections silenced. Raises NearstateError without it."""
    try:
        loaded = C.CDLL("libxdp.so.1", use_errno=True)
    except OSError as error:
        raise NearstateError(f"AF_XDP needs libxdp, which did not load ({error}): apt-get install libxdp1") from error
    loaded.libxdp_set_print(_SILENT)
    for name in ("libbpf.so.1", "libbpf.so.0"):
        with contextlib.suppress(OSError, AttributeError):
            C.CDLL(name).libbpf_set_print(_SILENT)
            break
    return loaded


class Umem:
    """The frames as the kernel knows them; the first port's fill and completion rings come with it."""

    def __init__(self, frames: Frames) -> None:
        self.fill, self.completion = Ring(), Ring()
        self.handle = C.c_void_p()
        self.taken = False
        code = library().xsk_umem__create(
            C.byref(self.handle), C.c_void_p(frames.memory.ctypes.data), C.c_uint64(frames.memory.size),
            C.byref(self.fill), C.byref(self.completion),
            C.byref(UmemConfig(RING_SLOTS, RING_SLOTS, FRAME_BYTES, 0, 0)))  # fmt: skip
        if code:
            raise NearstateError(f"AF_XDP: registering {frames.memory.size >> 20} MiB of frames failed: {os.strerror(-code)}; "
                                 "it needs root (CAP_NET_RAW) and locked memory (ulimit -l)")  # fmt: skip

    def rings(self) -> tuple[Ring, Ring]:
        """Return a fill and a completion ring for one more port."""
        if self.taken:
            return Ring(), Ring()
        self.taken = True
        return self.fill, self.completion


def _words(pointer: int, count: int, kind: Any) -> np.ndarray:
    return np.ctypeslib.as_array(C.cast(pointer, C.POINTER(kind)), (count,))


class InterfaceBusy(NearstateError):
    """Another AF_XDP socket has the interface."""


def open_ports(interfaces: list[str], frames: Frames) -> list[OpenPort]:
    """Open queue 0 of each interface over one area of frames. Raises NearstateError with the interface and the reason.

    The kernel lets go of a killed process' sockets some milliseconds after its end, so a busy interface is tried again.
    """
    deadline = time.monotonic() + BUSY_S
    first: NearstateError | None = None  # later ones may be about what we had open ourselves a moment ago
    while True:
        umem = Umem(frames)
        opened: list[OpenPort] = []
        try:
            for interface in interfaces:
                opened.append(_open_port(interface, frames, umem))
            return opened
        except NearstateError as error:
            for port in opened:
                library().xsk_socket__delete(port.keep[HANDLE])
            library().xsk_umem__delete(umem.handle)
            first = first or error
            if not isinstance(error, InterfaceBusy) or time.monotonic() > deadline:
                raise first from None
        time.sleep(0.005)


def _open_port(interface: str, frames: Frames, umem: Umem) -> OpenPort:
    fill, completion = umem.rings()
    rx, tx = Ring(), Ring()
    handle = C.c_void_p()
    config = SocketConfig(RING_SLOTS, RING_SLOTS, 0, 0, BIND_NEED_WAKEUP)
    code = library().xsk_socket__create_shared(
        C.byref(handle), interface.encode(), 0, umem.handle, C.byref(rx), C.byref(tx), C.byref(fill), C.byref(completion),
        C.byref(config))  # fmt: skip
    if code:
        kind = InterfaceBusy if code == -EBUSY else NearstateError
        raise kind(f"AF_XDP socket on interface {interface!r} failed: {os.strerror(-code)}; is the interface here, up, and "
                   "free of another AF_XDP socket?")  # fmt: skip
    fd = library().xsk_socket__fd(handle)
    _raise_budget(fd)
    u32, u64 = C.c_uint32, C.c_uint64
    control = np.zeros(16, np.int64)
    control[KIND], control[FD], control[RESERVE] = AFXDP, fd, 256
    port = Port(control,
                _words(rx.producer, 1, u32), _words(rx.consumer, 1, u32), _words(rx.ring, 2 * RING_SLOTS, u64),
                _words(tx.producer, 1, u32), _words(tx.consumer, 1, u32), _words(tx.ring, 2 * RING_SLOTS, u64),
                _words(tx.flags, 1, u32),
                _words(fill.producer, 1, u32), _words(fill.consumer, 1, u32), _words(fill.ring, RING_SLOTS, u64),
                _words(completion.producer, 1, u32), _words(completion.consumer, 1, u32),
                _words(completion.ring, RING_SLOTS, u64),
                np.zeros(1, np.uint64))  # fmt: skip
    control[TX_PRODUCER] = int(port.tx_producer[0])
    return OpenPort(port, fd, "afxdp", partial(statistics, fd), (handle, rx, tx, fill, completion, umem, frames))


def _raise_budget(fd: int) -> None:
    """Let one system call send a whole burst (Linux 6.17 and later; before, it is 32 frames)."""
    duplicate = socket.socket(AF_XDP, socket.SOCK_RAW, 0, fileno=os.dup(fd))
    try:
        duplicate.setsockopt(SOL_XDP, XDP_MAX_TX_SKB_BUDGET, 128)
    except OSError:
        pass
    finally:
        duplicate.close()


def statistics(fd: int) -> dict[str, int]:
    """Return XDP_STATISTICS: frames dropped for want of an empty frame or of room in the receive ring."""
    duplicate = socket.socket(AF_XDP, socket.SOCK_RAW, 0, fileno=os.dup(fd))
    try:
        raw = duplicate.getsockopt(SOL_XDP, XDP_STATISTICS, 48)
    finally:
        duplicate.close()
    dropped, invalid_rx, invalid_tx, ring_full, _, _ = struct.unpack("6Q", raw.ljust(48, b"\0"))
    return {"no_empty_frame": dropped, "ring_full": ring_full, "invalid": invalid_rx + invalid_tx}
