"""Ports by AF_PACKET: for machines without AF_XDP. Every frame is copied by a system call shared by the burst."""

from __future__ import annotations

import os
import socket
import struct
from functools import partial

import numpy as np

from datastore.base.errors import NearstateError
from nfs.dataplane.frames import Frames
from nfs.dataplane.port import (
    AFPACKET,
    AUXILIARY_WORDS,
    BURST,
    DROPPED,
    FD,
    KIND,
    MESSAGE_WORDS,
    RESERVE,
    VECTOR_WORDS,
    OpenPort,
    Port,
)

ETH_P_ALL = 0x0003
SOL_PACKET, PACKET_STATISTICS, PACKET_AUXDATA, PACKET_IGNORE_OUTGOING, PACKET_QDISC_BYPASS = 263, 6, 8, 23, 20
PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC = 1, 1
TX_SLOTS = 2048


def open_port(interface: str, frames: Frames) -> OpenPort:
    """Open `interface` by a raw packet socket. Raises NearstateError with the interface and the reason."""
    try:
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        raw.bind((interface, ETH_P_ALL))
        raw.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        raw.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
        raw.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)  # tells the VLAN tag that the kernel takes out
        membership = struct.pack("iHH8s", socket.if_nametoindex(interface), PACKET_MR_PROMISC, 0, b"")
        raw.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, membership)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    except OSError as error:
        raise NearstateError(f"AF_PACKET socket on interface {interface!r} failed: {error.strerror}; it needs root "
                             "(CAP_NET_RAW) and the interface in this namespace") from error  # fmt: skip
    raw.setblocking(False)
    control = np.zeros(16, np.int64)
    control[KIND], control[FD], control[RESERVE] = AFPACKET, raw.fileno(), 256

    def one() -> np.ndarray:
        return np.zeros(1, np.uint32)

    def empty_ring() -> np.ndarray:
        return np.zeros(2, np.uint64)

    port = Port(control, one(), one(), empty_ring(), one(), one(), np.zeros(2 * TX_SLOTS, np.uint64), one(), one(), one(),
                empty_ring(), one(), one(), empty_ring(),
                np.zeros(BURST * (MESSAGE_WORDS + VECTOR_WORDS + AUXILIARY_WORDS), np.uint64))  # fmt: skip
    return OpenPort(port, raw.fileno(), "afpacket", partial(statistics, port), (raw, frames))


def statistics(port: Port) -> dict[str, int]:
    """Return frames dropped because the socket's buffer was full; the kernel's PACKET_STATISTICS starts anew at each read."""
    duplicate = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0, fileno=os.dup(int(port.control[FD])))
    try:
        _, drops = struct.unpack("II", duplicate.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    finally:
        duplicate.close()
    port.control[DROPPED] += drops
    return {"buffer_full": int(port.control[DROPPED])}
