"""Can any frame make the parser or a network function crash, hang, or touch what is not its own?

Good frames of a trace are mutated (flipped bits, lengths that lie, cut or grown ends, random bytes) and taken through the
parser, with memory that ends where the frame ends, and through the engine with each network function: all by compiled code.
200,000 inputs for each function, 10 million with NEARSTATE_LONG=1. That harm would be found, planted harm shows.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import zlib
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datastore.base import CHECKED
from datastore.compiled import INTERPRETED, jit
from datastore.compiled.memory import copy, load64
from nfs.dataplane import NetworkFunction, declaration
from nfs.dataplane.declaration import MAX_RECORD_BYTES
from nfs.dataplane.frames import FRAME_BYTES, give_frame, take_frame
from nfs.dataplane.headers import FRAGMENT, MALFORMED, NOT_IP, OVERSIZED, TRUNCATED, make_packets, parse
from nfs.dataplane.keys import make_key
from nfs.dataplane.ledger import UNREADABLE, imbalance
from tests.packets import well_formed_ipv6
from tests.replay import HEADROOM, NOWHERE, START_NS, Replay, pass_one
from tests.traces import TRANSLATED, Seeded, make_trace

pytestmark = [pytest.mark.bounds, pytest.mark.skipif(INTERPRETED, reason="millions of inputs need compiled code")]

INPUTS, PARTS = (1_000_000, 10) if os.environ.get("NEARSTATE_LONG") == "1" else (200_000, 1)
"""For each function: so many parts of so many inputs."""
LONGEST = 1600
STEP_NS = 10_000_000
"""Time between two inputs: records expire on the way."""
GUARD = 0xA5
LENGTH_BYTES = np.array([14, 16, 17, 18, 20, 21, 23, 34, 35, 38, 39, 42, 46, 47, 58, 59])
"""Bytes of lengths, offsets, versions, types and protocols in frames without tags and options, quotations too."""
LENGTH_BYTES_6 = np.array([14, 18, 19, 20, 54, 55, 56, 57, 58, 59, 62, 63, 66, 68, 82, 102, 103, 110, 111])
"""The same of IPv6 frames, with up to one extension header."""


@jit
def dice(state: np.ndarray, limit: int) -> int:
    """Return a number below `limit` (xorshift64*, Vigna 2016)."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return np.int64((x * np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(33)) % limit


@jit
def mutate(frame: np.ndarray, length: int, state: np.ndarray, lengths: np.ndarray) -> int:
    """Change `frame` (uint8[LONGEST], `length` bytes of it used) in one of six ways; returns its length then."""
    how = dice(state, 6)
    if how == 0:  # as it is
        return length
    if how == 1 and length > 0:
        for _ in range(1 + dice(state, 8)):
            frame[dice(state, length)] ^= np.uint8(1 << dice(state, 8))
    elif how == 2:
        for _ in range(1 + dice(state, 3)):
            at = lengths[dice(state, lengths.size)]
            if at < length:
                frame[at] = np.uint8(dice(state, 256))
    elif how == 3:
        return dice(state, length + 1)
    elif how == 4:
        longer = length + dice(state, LONGEST - length + 1)
        for at in range(length, min(longer, length + 64)):
            frame[at] = np.uint8(dice(state, 256))
        return longer
    else:
        length = dice(state, 200)
        for at in range(14 if dice(state, 2) else 0, length):  # half of them with the link header of a good one
            frame[at] = np.uint8(dice(state, 256))
        if length > 14 and dice(state, 2):
            frame[14] = np.uint8(0x60 if frame[12] == 0x86 else 0x45)
    return length


@jit
def intact(memory: np.ndarray, begin: int, at: int, end: int) -> bool:
    """Tell whether the frame at byte `begin` has GUARD everywhere but in bytes `at` to `end`."""
    word = np.uint64(0xA5A5A5A5A5A5A5A5)
    for place in range(begin, at, 8):
        if load64(memory, place) != word:
            return False
    place = end
    while place & 7:
        if memory[place] != GUARD:
            return False
        place += 1
    for after in range(place, begin + FRAME_BYTES, 8):  # noqa: SIM110 (compiled code has no generators)
        if load64(memory, after) != word:
            return False
    return True


@jit
def fuzz(engine: Any, inside: Any, outside: Any, frames: Any, words: np.ndarray, client: Any, good: np.ndarray,
         lengths: np.ndarray, lies: np.ndarray, frame: np.ndarray, guard: np.ndarray, packets: np.ndarray, state: np.ndarray,
         statuses: np.ndarray, count: int, now_ns: int) -> int:  # fmt: skip
    """Take `count` inputs through parser, key and engine; counts statuses. Returns the first input that did harm, or -1."""
    for i in range(count):
        chosen = dice(state, lengths.size)
        copy(frame, 0, good[chosen], 0, lengths[chosen])
        length = mutate(frame, lengths[chosen], state, lies)
        side = dice(state, 2)
        status = parse(frame[:length], 0, length, side, packets, 0)
        statuses[status] += 1
        if status == 0:
            make_key(1 + dice(state, 5), 7, packets, 0)
            if packets[0].partition > 255:
                return i
        begin = take_frame(frames)
        copy(frames.memory, begin, guard, 0, FRAME_BYTES)
        copy(frames.memory, begin + HEADROOM, frame, 0, length)
        place = pass_one(engine, inside, outside, frames, words, client, begin + HEADROOM, length, side, now_ns + i * STEP_NS)
        if place != NOWHERE:
            give_frame(frames, begin)
        if frames.control[0] != frames.stack.size or not intact(
            frames.memory, begin, begin + HEADROOM, begin + HEADROOM + length
        ):
            return i
    return -1


def good_frames() -> tuple[np.ndarray, np.ndarray]:
    """Return frames of a trace and as many of IPv6, of all kinds, uint8[n, LONGEST], and their lengths."""
    trace = make_trace(1, 4000, TRANSLATED)
    frames = [*trace.frames, *itertools.islice(itertools.cycle(well_formed_ipv6().values()), 4000)]
    rows = np.zeros((len(frames), LONGEST), np.uint8)
    for row, frame in zip(rows, frames, strict=True):
        row[: len(frame)] = np.frombuffer(frame, np.uint8)
    return rows, np.array([len(frame) for frame in frames])


CLIENT = str(IPv4Address(Seeded(1).clients[0]))
SERVER, *BACKENDS = (str(IPv4Address(server)) for server in Seeded(1).servers)
SETTINGS: dict[str, dict[str, Any]] = {
    "nat": {"external_addresses": [CLIENT]},
    "nat_symmetric": {"external_addresses": [CLIENT]},
    "load_balancer": {
        "virtual_address": str(IPv4Address(SERVER)),
        "ports": "all",
        "backends": [str(IPv4Address(backend)) for backend in BACKENDS],
    },
    "firewall": {"track_window": True, "rules": ["drop udp to 10.128.2.3/32", "accept tcp from 10.128.2.0/24"]},
}
"""So that the trace's own addresses are those that the function cares about."""


def harm_done(name: str, function: NetworkFunction, inputs: int, part: int = 0) -> list[str]:
    """Take mutated frames, others for each `part`, through a function; return what it did that it may not, and its file."""
    file, raised = function.function.__code__.co_filename, []
    given = {name: SETTINGS[name]} if name in SETTINGS else {}
    with pytest.MonkeyPatch.context() as patch:  # what a compiled network function raises cannot pass through the C call
        patch.setattr(sys, "unraisablehook", lambda what: raised.append(f"{file}: raises {what.exc_value!r}"))
        replay = Replay.of(function, settings=given, capacity=1 << 13)
        good, lengths = good_frames()
        lies = np.concatenate([LENGTH_BYTES, LENGTH_BYTES_6])
        statuses, packets = np.zeros(256, np.int64), make_packets(2)
        frame, guard = np.zeros(LONGEST, np.uint8), np.full(FRAME_BYTES, GUARD, np.uint8)
        seed = np.array([0x9E3779B97F4A7C15 + part], np.uint64)
        engine, inside, outside, frames, words, client = replay.parts()
        harmed = fuzz(engine, inside, outside, frames, words, client, good, lengths, lies, frame, guard, packets, seed,
                      statuses, inputs, START_NS)  # fmt: skip
    found = sorted(set(raised))
    if harmed != -1:
        found.append(f"{file}: input {harmed} left bytes changed outside its frame, a frame missing, or a partition that is none")
    ledger = replay.ledger()
    if imbalance(ledger):
        found.append(f"{file}: a verdict that is none")
    found_statuses = {int(status) for status in np.flatnonzero(statuses)}
    assert found_statuses == {0, FRAGMENT, MALFORMED, NOT_IP, OVERSIZED, TRUNCATED, UNREADABLE}
    assert statuses[0] > inputs // 4, "most inputs never reach the network function"
    assert harmed != -1 or ledger["received"] == inputs
    assert not packets[1].tobytes().strip(b"\0")
    if replay.engine.packets[1:].tobytes().strip(b"\0"):
        found.append(f"{file}: writes behind its packet")
    used = replay.frames.stack[-1]
    assert not np.any(np.delete(replay.frames.memory.reshape(-1, FRAME_BYTES), used // FRAME_BYTES, axis=0))
    # a function without a record, and a key of another kind, has counters that are added to, of any of their 8 words
    own = None if function.stateless else function.kind
    for record in replay.table.records():
        size = replay.record_bytes if record.key.kind == own else MAX_RECORD_BYTES
        if record.value[size:].strip(b"\0"):
            return [*found, f"{file}: writes behind its record"]
    return found


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", declaration.names())
def test_no_frame_does_harm(name: str, part: int) -> None:
    assert harm_done(name, declaration.load(name), INPUTS, part) == []


PLANTED = '''"""Does harm?"""
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nfs.dataplane import FLOW, FORWARD, network_function, record


@intrinsic
def write_behind(context, what):
    """Write 8 bytes behind a packet or record, as only a wrong pointer can."""

    def generate(context, builder, signature, arguments):
        word = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        builder.store(ir.Constant(ir.IntType(64), 77), builder.gep(word, [ir.Constant(ir.IntType(64), what.size // 8)]))
        return context.get_dummy_value()

    return types.none(what), generate


@network_function(key=FLOW, state=record(packets="u8"), passes=("not_ip",))
def {name}(packet, record, env):
    record.packets += 1
    {statement}
    return FORWARD
'''


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("record.packets += 1", None),
        ("write_behind(record)", "writes behind its record"),
        ("write_behind(packet)", "writes behind its packet"),
        pytest.param("env.claim_words[packet.source_port & 7] = 0", "raises IndexError('index is out of bounds')",
                     marks=pytest.mark.skipif(not CHECKED, reason="only with NUMBA_BOUNDSCHECK=1; run_tests.sh runs it so")),
    ],
)  # fmt: skip
def test_planted_harm_is_found_and_its_file_named(
    statement: str, complaint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"planted_{zlib.crc32(statement.encode()):x}"
    (tmp_path / f"{name}.py").write_text(PLANTED.format(name=name, statement=statement))
    monkeypatch.syspath_prepend(str(tmp_path))
    function = getattr(importlib.import_module(name), name)
    found = harm_done(name, function, 20_000)
    assert found == ([] if complaint is None else [f"{tmp_path / name}.py: {complaint}"])
