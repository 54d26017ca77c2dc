"""Ports that are memory: rings that no kernel works on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nfs.dataplane.frames import Frames, give_frame, take_frame
from nfs.dataplane.port import AFXDP, FD, IN_FLIGHT, KIND, RESERVE, Port

SLOTS = 256
HEADROOM = 256
"""Where a frame begins in its place, as with AF_XDP."""


def memory_port() -> Port:
    """Return a port whose rings nobody else works on."""
    words = [np.zeros(1, np.uint32) for _ in range(9)]
    control = np.zeros(16, np.int64)
    control[KIND], control[FD], control[RESERVE] = AFXDP, -1, 1 << 40  # never asks for frames to receive into
    ring = [np.zeros(2 * SLOTS, np.uint64) for _ in range(5)]
    return Port(control, words[0], words[1], ring[0], words[2], words[3], ring[1], words[4], words[5], words[6], ring[2],
                words[7], words[8], ring[3], ring[4])  # fmt: skip


def arrive(port: Port, frames: Frames, frame: bytes) -> bool:
    """Put a frame into a port's receive ring; False when there is no room, as a network card drops it."""
    used = (int(port.rx_producer[0]) - int(port.rx_consumer[0])) & 0xFFFFFFFF
    at = int(take_frame(frames)) if used < SLOTS else -1
    if at < 0:
        return False
    at += HEADROOM
    frames.memory[at : at + len(frame)] = np.frombuffer(frame, np.uint8)
    slot = int(port.rx_producer[0]) % SLOTS
    port.rx_ring[2 * slot], port.rx_ring[2 * slot + 1] = at, len(frame)
    port.rx_producer[0] += 1
    return True


def departed(port: Port, frames: Frames) -> Iterator[bytes]:
    """Take what has left by a port out of its ring, in order, and give the frames back."""
    while port.tx_consumer[0] != port.tx_producer[0]:
        slot = int(port.tx_consumer[0]) % SLOTS
        at, length = int(port.tx_ring[2 * slot]), int(port.tx_ring[2 * slot + 1])
        yield frames.memory[at : at + length].tobytes()
        give_frame(frames, at)
        port.tx_consumer[0] += 1
        port.control[IN_FLIGHT] -= 1
