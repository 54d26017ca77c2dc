"""Where packets lie while they are in this process: one area of fixed-size frames, shared by all its ports.

A frame is named by the byte offset of its start. Whoever holds a frame either hands it on (to a port, to the waiting
room) or gives it back; `free + held by ports + held by the engine` is always the total, which the ledger checks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from datastore.base import CHECKED
from datastore.compiled import inline
from datastore.compiled.pages import private_memory

FRAME_BYTES = 2048
"""Frame size: an Ethernet frame of 1,518 bytes behind the 256 bytes the kernel keeps free in front of it (XDP headroom)."""
FRAME_START = ~(FRAME_BYTES - 1)
FREE = 0


class Frames(NamedTuple):
    """The area of one process: `memory` uint8[frames * FRAME_BYTES], a stack of free frames, `control` int64[8]."""

    memory: np.ndarray
    stack: np.ndarray
    control: np.ndarray


def make_frames(count: int = 8192) -> Frames:
    """Return an area of `count` free frames, page-aligned as AF_XDP wants it."""
    memory = np.frombuffer(private_memory(count * FRAME_BYTES), dtype=np.uint8)
    stack = np.arange(count, dtype=np.int64)[::-1] * FRAME_BYTES
    control = np.zeros(8, np.int64)
    control[FREE] = count
    return Frames(memory, np.ascontiguousarray(stack), control)


@inline
def free_frames(frames: Frames) -> Any:
    """Return how many frames nobody holds."""
    return frames.control[FREE]


@inline
def take_frame(frames: Frames) -> Any:
    """Return a free frame's offset, or -1 when there is none."""
    left = frames.control[FREE] - 1
    if left < 0:
        return np.int64(-1)
    frames.control[FREE] = left
    return frames.stack[left]


@inline
def give_frame(frames: Frames, at: int) -> None:
    """Give back the frame that byte `at` lies in."""
    left = frames.control[FREE]
    if CHECKED and left >= frames.stack.size:
        raise IndexError("a frame was given back twice")
    frames.stack[left] = at & FRAME_START
    frames.control[FREE] = left + 1
