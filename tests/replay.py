"""Many frames through the engine's own receive path without a network, one by one: by compiled code, unlike `rig.py`.

    trace -> inside or outside port -> parse -> key -> record -> network function -> the other port -> what left

Every frame is taken through alone and in order, by compiled code, with all state in this process. Time goes on by `STEP_NS` a
frame, so that a trace is short against every time-out unless it is meant to be long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from datastore.base.partitioning import PARTITIONS
from datastore.compiled import jit
from datastore.compiled.memory import copy, store_release
from datastore.store.client import Client, ClientState
from datastore.store.layout import VALUE
from datastore.store.records import abort_record, open_record
from datastore.store.table import Table
from nfs.dataplane import steps
from nfs.dataplane.declaration import MAX_RECORD_BYTES, NetworkFunction, load
from nfs.dataplane.engine import EPOCH, HERE, NOW_NS, OWNER, Engine, make_engine
from nfs.dataplane.frames import FRAME_BYTES, Frames, give_frame, make_frames, take_frame
from nfs.dataplane.headers import INSIDE, OUTSIDE, PACKET, parse
from nfs.dataplane.keys import NONE, make_key
from nfs.dataplane.ledger import FORWARDED, RECEIVED, to_counts
from nfs.dataplane.loop import receive_now
from nfs.dataplane.port import IN_FLIGHT, PENDING, TX_PRODUCER, Port
from nfs.dataplane.steps import make_chain
from nfs.verification.rings import SLOTS, memory_port
from tests.traces import Trace
from tests.translated import Box

HEADROOM = 256
"""Bytes before each packet in its frame, as AF_XDP leaves them."""
NOWHERE = -1
STEP_NS = 10_000
START_NS = 1_000_000_000_000
VALUE_BYTES = 128
"""Twice the largest record, so that a write behind one is seen."""
RECORD_WORDS = MAX_RECORD_BYTES // 8
SEEN = np.dtype([("packet", PACKET), ("record", "u8", (RECORD_WORDS,))], align=True)


@jit
def arrive(port: Port, at: int, length: int) -> None:
    """Let one frame of `length` bytes at byte `at` of the frames be received by the port."""
    slot = np.int64(port.rx_producer[0]) & (SLOTS - 1)
    port.rx_ring[2 * slot] = np.uint64(at)
    port.rx_ring[2 * slot + 1] = np.uint64(length)
    store_release(port.rx_producer, 0, np.uint32(np.int64(port.rx_producer[0]) + 1))


@jit
def departed(port: Port) -> int:
    """Take the one frame that waits to leave by the port; returns its slot, or NOWHERE."""
    if port.control[PENDING] == 0:
        return NOWHERE
    if port.control[PENDING] != 1:
        raise ValueError("one frame entered, several leave")
    port.control[PENDING] = port.control[IN_FLIGHT] = 0
    return (port.control[TX_PRODUCER] - 1) & (SLOTS - 1)


@jit
def pass_one(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState,
             at: int, length: int, side: int, now_ns: int) -> int:  # fmt: skip
    """Take the frame at byte `at` through the engine; returns 2 * slot of the ring it leaves by + that side, or NOWHERE."""
    arrive(inside if side == INSIDE else outside, at, length)
    engine.control[NOW_NS] = now_ns
    if receive_now(engine, inside, outside, frames, words, client, side) != 1:
        raise ValueError("the engine did not take the frame")
    slot = departed(inside)
    if slot != NOWHERE:
        return 2 * slot + INSIDE
    slot = departed(outside)
    return NOWHERE if slot == NOWHERE else 2 * slot + OUTSIDE


@jit
def read_record(engine: Engine, words: np.ndarray, now_ns: int, seen: np.ndarray, i: int) -> None:
    """Copy the record of the packet in element 0 of `engine.packets` to `seen[i]`; zeros when there is none."""
    packet, control = engine.packets[0], engine.control
    slot = open_record(words, control[OWNER], packet.key_low, packet.key_high, control[EPOCH], now_ns // 1_000_000_000)
    if slot >= 0:
        for n in range(RECORD_WORDS):
            seen[i].record[n] = words[slot + VALUE + n]
        abort_record(words, control[OWNER], slot)


@jit
def look(engine: Engine, words: np.ndarray, given: np.ndarray, length: int, side: int, seen: np.ndarray, i: int,
         now_ns: int) -> None:  # fmt: skip
    """Note in `seen[i]` what the parser says of a frame, and its record of the chain's first step as it is now."""
    step = 0
    engine.packets[0].key_high = engine.packets[0].key_low = np.uint64(0)
    if parse(given, 0, length, side, engine.packets, 0) == 0 and engine.steps[step, steps.KEY] != NONE:
        make_key(engine.steps[step, steps.KEY], engine.steps[step, steps.KIND], engine.packets, 0)
        read_record(engine, words, now_ns, seen, i)
    seen[i].packet = engine.packets[0]


@jit
def replay(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState,
           given: np.ndarray, lengths: np.ndarray, sides: np.ndarray, left_by: np.ndarray, views: np.ndarray, seen: np.ndarray,
           now_ns: int) -> None:  # fmt: skip
    """Take `given` (uint8[n, FRAME_BYTES]) through the engine; rows and `lengths` become what left, `left_by` by which side.

    seen: SEEN[n], what was known before of each of `views`: the frames as somebody inside has them, of the same lengths.
    """
    for i in range(lengths.size):
        look(engine, words, views[i], lengths[i], sides[i], seen, i, now_ns + i * STEP_NS)
        at = take_frame(frames) + HEADROOM
        copy(frames.memory, at, given[i], 0, lengths[i])
        place = pass_one(engine, inside, outside, frames, words, client, at, lengths[i], sides[i], now_ns + i * STEP_NS)
        left_by[i] = NOWHERE
        if place != NOWHERE:
            left_by[i] = place & 1
            ring = (inside if place & 1 == INSIDE else outside).tx_ring
            at, length = np.int64(ring[place & ~1]), np.int64(ring[place | 1])
            copy(given[i], 0, frames.memory, at, length)
            lengths[i] = length
            give_frame(frames, at)


def rows_of(given: Sequence[bytes]) -> np.ndarray:
    """Return frames as uint8[n, FRAME_BYTES]."""
    rows = np.zeros((len(given), FRAME_BYTES), np.uint8)
    for row, frame in zip(rows, given, strict=True):
        row[: len(frame)] = np.frombuffer(frame, np.uint8)
    return rows


@dataclass
class Replay:
    """A chain of network functions in an engine of its own, with its records in a private table."""

    engine: Engine
    inside: Port
    outside: Port
    frames: Frames
    table: Table
    client: Client
    record_bytes: int
    now_ns: int = START_NS
    seen: np.ndarray = field(default_factory=lambda: np.zeros(0, SEEN))

    @classmethod
    def of(cls, *chosen: str | NetworkFunction, settings: Mapping[str, Any] | None = None, capacity: int = 1 << 15) -> Replay:
        """Return one for a chain of functions, by name or as declared. settings: by function, by setting. capacity: records."""
        functions = [load(function) if isinstance(function, str) else function for function in chosen]
        chain = make_chain(functions, settings or {}, VALUE_BYTES)
        frames, table = make_frames(64), Table.private(capacity, VALUE_BYTES)
        engine = make_engine(chain, frames, np.full(PARTITIONS, HERE), table.register_owner(), 1, VALUE_BYTES // 8, 0)
        return cls(engine, memory_port(), memory_port(), frames, table, Client([], 1, VALUE_BYTES, 1, 1),
                   sum(function.state.itemsize for function in chain.functions))  # fmt: skip

    def parts(self) -> tuple[Any, ...]:
        """Return what the compiled functions take first."""
        return self.engine, self.inside, self.outside, self.frames, self.table.words, self.client.state

    def __call__(self, given: Sequence[bytes], sides: Sequence[int]) -> list[tuple[int, bytes] | None]:
        """Return for each frame (the side it left by, its bytes then), or None where it did not leave.

        `seen` has afterwards, frame by frame, what the parser said and its record as it was before.
        """
        self.seen = np.zeros(len(given), SEEN)
        return self._take(given, sides, given, self.seen)

    def box(self, trace: Trace) -> Box:
        """Return what takes frames of a trace; `seen` is of the trace's frames, whatever they were translated to."""
        self.seen = np.zeros(len(trace.frames), SEEN)

        def take(numbers: Sequence[int], frames: Sequence[bytes], sides: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
            begin, end = numbers[0], numbers[-1] + 1
            for number, left in zip(
                numbers, self._take(frames, sides, trace.frames[begin:end], self.seen[begin:end]), strict=True
            ):
                if left:
                    yield number, *left

        return take

    def _take(
        self, given: Sequence[bytes], sides: Sequence[int], views: Sequence[bytes], seen: np.ndarray
    ) -> list[tuple[int, bytes] | None]:
        rows, lengths = rows_of(given), np.array([len(frame) for frame in given])
        left_by = np.zeros(len(given), np.int64)
        engine, inside, outside, frames, words, client = self.parts()
        replay(engine, inside, outside, frames, words, client, rows, lengths, np.array(sides), left_by, rows_of(views), seen,
               self.now_ns)  # fmt: skip
        self.now_ns += len(given) * STEP_NS
        return [None if side == NOWHERE else (int(side), row[:length].tobytes())
                for side, row, length in zip(left_by, rows, lengths, strict=True)]  # fmt: skip

    def ledger(self) -> dict[str, int]:
        """Return the engine's counts by cause."""
        return to_counts(self.engine.ledger)


__all__ = ["FORWARDED", "RECEIVED", "Replay", "arrive", "departed", "memory_port", "pass_one"]
