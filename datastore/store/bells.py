"""How do processes that share a table wake each other?

A network function that changed records in place wakes the store process, which ships them; the store process wakes those whose
packets wait until that is committed. A bell is a datagram socket with an abstract address: it goes when its process does, lies in
the host's network namespace, and needs no clean-up. It is rung only when its owner says that it sleeps, so that two busy
processes make no system call for each other:

    sleeper   asleep + 1; has the other side's count changed? then not; else ppoll, on the bell too; asleep = 0
    ringer    makes work; count + 1; asleep? a datagram

Both additions are atomic ones, which no later load can overtake: one of the two sees what the other did.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import NamedTuple

import numpy as np

from datastore.compiled import inline, jit
from datastore.compiled.libc import MSG_DONTWAIT, MSG_NOSIGNAL, address, recv, sendto
from datastore.compiled.memory import fetch_add
from datastore.store.layout import COMMITS, IN_PLACE, OWNER_ASLEEP, OWNERS, STORE_ASLEEP, U0

ADDRESS_BYTES = 110
"""A `struct sockaddr_un`."""
STORE = 0
"""The number of the store process' bell; those of other owners are their owner numbers."""
_DRAIN = 64


class Bells(NamedTuple):
    """control: int64[3], this process' descriptor, the number of its bell, bytes of each address. addresses: uint8[64 * 110]."""

    control: np.ndarray
    addresses: np.ndarray
    scratch: np.ndarray


class Bell:
    """This process' bell, and the addresses of the others' of the same table."""

    def __init__(self, words: np.ndarray, descriptor: int, owner: int) -> None:
        """descriptor: of the table's file; what it is tells the table from all others. owner: number, or STORE."""
        status = os.fstat(descriptor)
        paths = [f"\0nearstate/{status.st_dev:x}-{status.st_ino:x}/{number:02}".encode() for number in range(OWNERS + 1)]
        self.state = Bells(np.array([-1, owner & 0xFFFF, 2 + len(paths[0])], np.int64), np.zeros(64 * ADDRESS_BYTES, np.uint8),
                           np.zeros(_DRAIN, np.uint8))  # fmt: skip
        for number, path in enumerate(paths):
            packed = struct.pack("H108s", socket.AF_UNIX, path)
            self.state.addresses[number * ADDRESS_BYTES : (number + 1) * ADDRESS_BYTES] = np.frombuffer(packed, np.uint8)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._socket.bind(paths[owner & 0xFFFF])
        self.state.control[0] = self._socket.fileno()
        self._path = paths[owner & 0xFFFF]

    def fileno(self) -> int:
        """Return the descriptor that is readable when the bell was rung."""
        return self._socket.fileno()

    def ring_own(self) -> None:
        """Wake this process' compiled loop, from another thread."""
        with contextlib.suppress(OSError):
            self._socket.sendto(b"\0", self._path)

    def close(self) -> None:
        """Give the bell back."""
        self.state.control[0] = -1
        self._socket.close()


def silent() -> Bells:
    """Return the bells of a process that has none: ringing does nothing."""
    return Bells(np.array([-1, 0, 0], np.int64), np.zeros(64 * ADDRESS_BYTES, np.uint8), np.zeros(_DRAIN, np.uint8))


@jit
def ring(bells: Bells, number: int) -> None:
    """Wake the owner of bell `number`, if it is there; never waits."""
    if bells.control[0] < 0 or number < 0 or number > OWNERS:
        return
    sendto(np.int32(bells.control[0]), address(bells.scratch, 0), np.uintp(1), np.int32(MSG_DONTWAIT | MSG_NOSIGNAL),
           address(bells.addresses, number * ADDRESS_BYTES), np.int32(bells.control[2]))  # fmt: skip


@jit
def hear(bells: Bells) -> None:
    """Take what was rung, so that the bell is quiet again."""
    for _ in range(_DRAIN):
        if bells.control[0] < 0 or recv(bells.control[0], bells.scratch, 0, _DRAIN) < 0:
            return


@inline
def changed_in_place(words: np.ndarray, bells: Bells) -> None:
    """Tell the store process that records changed."""
    fetch_add(words, IN_PLACE, 1)
    if words[STORE_ASLEEP] != U0:
        ring(bells, STORE)


@jit
def wake_owners(words: np.ndarray, bells: Bells) -> None:
    """Wake every process that sleeps until something is committed."""
    fetch_add(words, COMMITS, 1)
    for owner in range(1, OWNERS + 1):
        if words[OWNER_ASLEEP + owner] != U0:
            ring(bells, owner)
