"""How packets enter and leave a process: bursts of frames on one network interface, by AF_XDP or by AF_PACKET.

    rx_burst   frames that arrived                    kernel -> frames
    tx_push    queue a frame to leave      tx_flush   tell the kernel; few system calls per burst
    reclaim    frames that have left       refill     empty frames for the kernel to receive into

A port takes every frame of its interface. With AF_XDP none of them reaches the kernel's own stack.
"""

from __future__ import annotations

import fcntl
import struct
import termios
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types

from datastore.compiled import inline, jit
from datastore.compiled.libc import EAGAIN, EBUSY, EINTR, ENOBUFS, MSG_DONTWAIT, address, errno, sendto
from datastore.compiled.memory import copy, load_acquire, put_network16, store_release
from nfs.dataplane.frames import FRAME_BYTES, Frames, free_frames, give_frame, make_frames, take_frame

AFXDP, AFPACKET = 0, 1
KINDS = {"afxdp": AFXDP, "afpacket": AFPACKET}
BURST = 64
"""Frames handled together: state accesses, wake-ups and system calls are paid once per burst."""

# control words of a port
KIND, FD, IN_FLIGHT, TX_PRODUCER, PENDING, TX_REFUSED, RESERVE, DROPPED = range(8)


class Port(NamedTuple):
    """One interface's rings. `*_producer`, `*_consumer`, `*_flags`: uint32[1] shared with the kernel; rings: uint64."""

    control: np.ndarray
    rx_producer: np.ndarray
    rx_consumer: np.ndarray
    rx_ring: np.ndarray
    tx_producer: np.ndarray
    tx_consumer: np.ndarray
    tx_ring: np.ndarray
    tx_flags: np.ndarray
    fill_producer: np.ndarray
    fill_consumer: np.ndarray
    fill_ring: np.ndarray
    done_producer: np.ndarray
    done_consumer: np.ndarray
    done_ring: np.ndarray
    messages: np.ndarray


class OpenPort(NamedTuple):
    """An open interface: its compiled side, the socket's descriptor, and the objects that keep its memory alive.

    statistics: returns the frames that the kernel dropped, since the port was opened, before this process could see them, by
    reason.
    """

    port: Port
    fd: int
    kind: str
    statistics: Callable[[], dict[str, int]]
    keep: tuple[Any, ...]


def closed_port(ring_slots: int = 64) -> Port:
    """Return a port that is open nowhere: nothing arrives, and what leaves stays in the ring. For compiling and for tests."""
    control = np.zeros(16, np.int64)
    control[KIND], control[FD] = AFXDP, -1
    word, ring = np.zeros(1, np.uint32), np.zeros(2 * ring_slots, np.uint64)
    return Port(control, word, word, ring, word, word, ring, word, word, word, ring, word, word, ring, ring)


@jit
def rx_burst(port: Port, frames: Frames, addresses: np.ndarray, lengths: np.ndarray, limit: int) -> int:
    """Take up to `limit` arrived frames: byte offset of each packet's start and its length; returns how many.

    addresses, lengths: int64 arrays of at least `limit` elements.
    """
    if port.control[KIND] == AFPACKET:
        return receive_messages(port, frames, addresses, lengths, limit)
    consumer = port.rx_consumer[0]
    ready = np.int64(np.uint32(load_acquire(port.rx_producer, 0) - consumer))
    count = min(limit, ready)
    mask = np.int64(port.rx_ring.size // 2 - 1)
    for i in range(count):
        slot = (np.int64(consumer) + i) & mask
        addresses[i] = np.int64(port.rx_ring[2 * slot])
        lengths[i] = np.int64(port.rx_ring[2 * slot + 1] & np.uint64(0xFFFFFFFF))
    if count > 0:
        store_release(port.rx_consumer, 0, np.uint32(np.int64(consumer) + count))
    return count


def mark(port: Port) -> int:
    """Return a mark behind the frames that have arrived so far, for `has_passed`."""
    return int(port.rx_producer[0])


def has_passed(port: Port, marked: int) -> bool:
    """Tell whether all frames before a mark have been taken: with AF_XDP; with AF_PACKET, whether there are none to take."""
    if port.control[KIND] == AFPACKET:
        return not struct.unpack("i", fcntl.ioctl(int(port.control[FD]), termios.FIONREAD, bytes(4)))[0]
    return (int(port.rx_consumer[0]) - marked) & 0xFFFFFFFF < 1 << 31


@jit
def refill(port: Port, frames: Frames) -> None:
    """Hand the kernel free frames to receive into, keeping `control[RESERVE]` frames for the process itself."""
    if port.control[KIND] == AFPACKET:
        return
    producer = np.int64(port.fill_producer[0])
    used = np.int64(np.uint32(producer - np.int64(load_acquire(port.fill_consumer, 0))))
    slots = port.fill_ring.size
    count = min(slots - used, free_frames(frames) - port.control[RESERVE])
    if count < 32 and used > slots // 2:
        return
    for i in range(count):
        port.fill_ring[(producer + i) & (slots - 1)] = np.uint64(take_frame(frames))
    if count > 0:
        store_release(port.fill_producer, 0, np.uint32(producer + count))


@jit
def tx_push(port: Port, frames: Frames, at: int, length: int) -> bool:
    """Queue the packet of `length` bytes at byte `at` to leave; False when the ring is full (the caller keeps the frame)."""
    slots = port.tx_ring.size // 2
    if port.control[IN_FLIGHT] >= slots:
        return False
    slot = port.control[TX_PRODUCER] & (slots - 1)
    port.tx_ring[2 * slot] = np.uint64(at)
    port.tx_ring[2 * slot + 1] = np.uint64(length)
    port.control[TX_PRODUCER] += 1
    port.control[IN_FLIGHT] += 1
    port.control[PENDING] += 1
    return True


@jit
def tx_flush(port: Port, frames: Frames) -> None:
    """Give everything queued to the kernel. AF_XDP in copy mode sends 32 frames per system call."""
    pending = port.control[PENDING]
    if pending == 0:
        return
    if port.control[KIND] == AFPACKET:
        send_messages(port, frames)
        return
    store_release(port.tx_producer, 0, np.uint32(port.control[TX_PRODUCER]))
    port.control[PENDING] = 0
    for _ in range(pending // 16 + 2):
        if load_acquire(port.tx_consumer, 0) == np.uint32(port.control[TX_PRODUCER]):
            break
        code = sendto(np.int32(port.control[FD]), np.uintp(0), np.uintp(0), np.int32(MSG_DONTWAIT), np.uintp(0), np.int32(0))
        if code < 0:
            reason = errno()
            if reason != EAGAIN and reason != EBUSY and reason != ENOBUFS and reason != EINTR:
                port.control[TX_REFUSED] += 1
                break


@jit
def reclaim(port: Port, frames: Frames) -> None:
    """Take back the frames that have left; if some have not been sent yet, kick the kernel again."""
    if port.control[KIND] == AFPACKET:
        return
    consumer = np.int64(port.done_consumer[0])
    count = np.int64(np.uint32(np.int64(load_acquire(port.done_producer, 0)) - consumer))
    mask = port.done_ring.size - 1
    for i in range(count):
        give_frame(frames, np.int64(port.done_ring[(consumer + i) & mask]))
    if count > 0:
        store_release(port.done_consumer, 0, np.uint32(consumer + count))
        port.control[IN_FLIGHT] -= count
    if load_acquire(port.tx_consumer, 0) != load_acquire(port.tx_producer, 0):
        sendto(np.int32(port.control[FD]), np.uintp(0), np.uintp(0), np.int32(MSG_DONTWAIT), np.uintp(0), np.int32(0))


@inline
def unsent(port: Port) -> Any:
    """Return how many frames have been queued and not yet taken back."""
    return port.control[IN_FLIGHT]


# AF_PACKET: recvmmsg and sendmmsg over an array of `struct mmsghdr`, one for each frame of a burst
MESSAGE_WORDS = 8  # struct mmsghdr: 56 bytes of msghdr, int msg_len, padding
VECTOR_WORDS = 2  # struct iovec
AUXILIARY_WORDS = 5  # a control message with struct tpacket_auxdata, see packet(7)
TAG_BYTES = 4
TAG_VALID = 1 << 4  # TP_STATUS_VLAN_VALID
_recvmmsg = types.ExternalFunction("recvmmsg", types.int32(types.int32, types.uintp, types.uint32, types.int32, types.uintp))
_sendmmsg = types.ExternalFunction("sendmmsg", types.int32(types.int32, types.uintp, types.uint32, types.int32))


@inline
def _point_message(port: Port, frames: Frames, i: int, at: int, length: int) -> None:
    """Let message `i` describe `length` bytes at byte `at` of the frames."""
    iovec = BURST * MESSAGE_WORDS + VECTOR_WORDS * i
    port.messages[iovec] = np.uint64(address(frames.memory, at))
    port.messages[iovec + 1] = np.uint64(length)
    header = MESSAGE_WORDS * i
    port.messages[header + 2] = np.uint64(address(port.messages, iovec))
    port.messages[header + 3] = np.uint64(1)
    port.messages[header + 4] = port.messages[header + 5] = np.uint64(0)


@inline
def _auxiliary(i: int) -> Any:
    """Return the word of `messages` where message `i` has its control message."""
    return BURST * (MESSAGE_WORDS + VECTOR_WORDS) + AUXILIARY_WORDS * i


@inline
def _put_tag_back(port: Port, frames: Frames, i: int, at: int) -> Any:
    """Return where the frame received at byte `at` begins. The kernel takes an outer VLAN tag out: it goes in again, before."""
    auxiliary = _auxiliary(i)
    if not port.messages[auxiliary + 2] & np.uint64(TAG_VALID):
        return at
    copy(frames.memory, at - TAG_BYTES, frames.memory, at, 12)
    put_network16(frames.memory, at + 8, np.int64(port.messages[auxiliary + 4] >> np.uint64(16) & np.uint64(0xFFFF)))
    put_network16(frames.memory, at + 10, np.int64(port.messages[auxiliary + 4] & np.uint64(0xFFFF)))
    return at - TAG_BYTES


@jit
def receive_messages(port: Port, frames: Frames, addresses: np.ndarray, lengths: np.ndarray, limit: int) -> int:
    """`rx_burst` by recvmmsg: one system call a burst, one copy a frame."""
    wanted = min(limit, BURST, free_frames(frames) - port.control[RESERVE])
    if wanted <= 0:
        return 0
    for i in range(wanted):
        addresses[i] = take_frame(frames) + TAG_BYTES
        _point_message(port, frames, i, addresses[i], FRAME_BYTES - TAG_BYTES)
        port.messages[MESSAGE_WORDS * i + 4] = np.uint64(address(port.messages, _auxiliary(i)))
        port.messages[MESSAGE_WORDS * i + 5] = np.uint64(AUXILIARY_WORDS * 8)
        port.messages[_auxiliary(i) + 2] = np.uint64(0)
    got = _recvmmsg(np.int32(port.control[FD]), address(port.messages, 0), np.uint32(wanted), np.int32(MSG_DONTWAIT), np.uintp(0))
    count = max(0, np.int64(got))
    for i in range(count):
        begin = _put_tag_back(port, frames, i, addresses[i])
        lengths[i] = np.int64(port.messages[MESSAGE_WORDS * i + 7] & np.uint64(0xFFFFFFFF)) + addresses[i] - begin
        addresses[i] = begin
    for i in range(count, wanted):
        give_frame(frames, addresses[i])
    return count


@jit
def send_messages(port: Port, frames: Frames) -> None:
    """`tx_flush` by sendmmsg; a frame that the kernel refuses (its queue is full) is dropped and counted as refused."""
    slots = port.tx_ring.size // 2
    first = port.control[TX_PRODUCER] - port.control[PENDING]
    while port.control[PENDING] > 0:
        count = min(BURST, port.control[PENDING])
        for i in range(count):
            slot = (first + i) & (slots - 1)
            _point_message(port, frames, i, np.int64(port.tx_ring[2 * slot]), np.int64(port.tx_ring[2 * slot + 1]))
        sent = _sendmmsg(np.int32(port.control[FD]), address(port.messages, 0), np.uint32(count), np.int32(MSG_DONTWAIT))
        if sent <= 0:
            sent = 1
            port.control[TX_REFUSED] += 1
        for i in range(sent):
            give_frame(frames, np.int64(port.tx_ring[2 * ((first + i) & (slots - 1))]))
        first += sent
        port.control[PENDING] -= sent
        port.control[IN_FLIGHT] -= sent


def warm() -> None:
    """Load what Python calls of a port."""
    port, frames = closed_port(), make_frames(1)
    refill(port, frames)
    reclaim(port, frames)
    unsent(port)
    free_frames(frames)
