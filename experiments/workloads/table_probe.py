"""What does a packet's state cost as the table grows? The engine's own work on frames that come from memory, without a network.

A port that is open nowhere gets its receive ring filled by hand, a burst at a time, with packets of flows in random order; the
engine's `receive` then does all it does for a burst: parse, key, prefetch, open record, network function, commit, queue to
leave. Only that is timed, and the median burst counts: what else the machine does meanwhile does not. `passthrough`, which
keeps no state, is what the state is compared against.

Beside it the floor of the machine, over an area as large as the table:

    dependent      one cache line at a time, its address read from the line before: what a miss takes
    independent    lines whose addresses are known beforehand: what a miss takes when many are under way
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.base.partitioning import PARTITIONS
from datastore.compiled import jit
from datastore.compiled.libc import now_ns
from datastore.store.client import Client, ClientState
from datastore.store.table import Table
from experiments.workloads.generator import Source, make_source, write_frame
from experiments.workloads.traffic import Traffic
from nfs.dataplane.engine import HERE, NOW_NS, Engine, make_engine
from nfs.dataplane.frames import FRAME_BYTES, FREE, Frames, make_frames
from nfs.dataplane.headers import INSIDE
from nfs.dataplane.ledger import FORWARDED
from nfs.dataplane.loop import receive_now
from nfs.dataplane.port import BURST, IN_FLIGHT, PENDING, Port, closed_port
from nfs.dataplane.steps import load_chain

LINE_WORDS = 8
"""64-bit words of a cache line of 64 bytes."""
CHUNK = 1024
"""Accesses timed together."""
FRAME_LENGTH = 60
AREA_FRAMES = 8 * BURST
"""Frames in turn, as an NF's ring has them; few enough to stay in the nearest caches, as packets just arrived are."""
MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02")
SERVER = "10.128.0.1"


def fed_port() -> Port:
    """Return a port that is open nowhere and whose receive ring can be filled by hand."""
    return closed_port()._replace(
        rx_producer=np.zeros(1, np.uint32), rx_consumer=np.zeros(1, np.uint32), rx_ring=np.zeros(2 * BURST, np.uint64)
    )


@jit
def pass_over(source: Source, order: np.ndarray, times: np.ndarray, engine: Engine, inside: Port, outside: Port, frames: Frames,
              words: np.ndarray, client: ClientState) -> None:  # fmt: skip
    """Take one packet of each flow in `order` through the engine; times[n]: the ns of burst n, without making the packets."""
    for burst in range(times.size):
        for i in range(BURST):
            at = burst * BURST + i
            frame = at % AREA_FRAMES * FRAME_BYTES
            source.flows[0] = order[at % order.size]
            write_frame(source, frames.memory, frame, FRAME_LENGTH, 0, 0, 0)
            slot = (np.int64(inside.rx_producer[0]) + i) & (BURST - 1)
            inside.rx_ring[2 * slot], inside.rx_ring[2 * slot + 1] = np.uint64(frame), np.uint64(FRAME_LENGTH)
        inside.rx_producer[0] = np.uint32(np.int64(inside.rx_producer[0]) + BURST)
        started = now_ns(engine.scratch)
        engine.control[NOW_NS] = started
        receive_now(engine, inside, outside, frames, words, client, INSIDE)
        times[burst] = now_ns(engine.scratch) - started
        outside.control[IN_FLIGHT] = outside.control[PENDING] = 0  # they have left
        frames.control[FREE] = 0  # no frame is anybody's to take: those of dropped packets come back to the ring, too


@jit
def chase(lines: np.ndarray, first: int, times: np.ndarray, scratch: np.ndarray) -> int:
    """Follow the chain from line `first`, CHUNK lines for each of `times` (ns); returns the line after. lines[8 i]: i's next."""
    line = np.int64(first)
    for chunk in range(times.size):
        started = now_ns(scratch)
        for _ in range(CHUNK):
            line = np.int64(lines[line * LINE_WORDS])
        scratch[2] = line  # before the clock is read again
        times[chunk] = now_ns(scratch) - started
    return line


@jit
def gather(lines: np.ndarray, order: np.ndarray, times: np.ndarray, scratch: np.ndarray) -> None:
    """Read the lines named by `order`, CHUNK of them for each of `times` (ns)."""
    for chunk in range(times.size):
        total = np.uint64(0)
        started = now_ns(scratch)
        for i in range(CHUNK):
            total += lines[order[chunk * CHUNK + i] * LINE_WORDS]
        scratch[2] = np.int64(total)
        times[chunk] = now_ns(scratch) - started


def floor_ns(area_bytes: int, accesses: int, random: np.random.Generator) -> tuple[float, float]:
    """Return the ns of one dependent and of one independent access to a random line of an area."""
    count = max(2, area_bytes // (8 * LINE_WORDS))
    lines, scratch = np.zeros(count * LINE_WORDS, np.uint64), np.zeros(8, np.int64)
    cycle = random.permutation(count)
    lines[cycle * LINE_WORDS] = np.roll(cycle, -1).astype(np.uint64)
    times = np.zeros(-(-accesses // CHUNK), np.int64)
    warmed = chase(lines, 0, times.copy(), scratch)
    chase(lines, warmed, times, scratch)
    dependent = float(np.median(times)) / CHUNK
    gather(lines, random.integers(0, count, times.size * CHUNK), times, scratch)
    return dependent, float(np.median(times)) / CHUNK


class Bed:
    """The engine with one network function and a table of its own, and the packets of `flows` flows to go through it."""

    def __init__(self, name: str, flows: int, capacity: int, value_bytes: int) -> None:
        self.table = Table.private(capacity, value_bytes)
        self.frames = make_frames(AREA_FRAMES)
        self.frames.control[FREE] = 0
        self.inside, self.outside = fed_port(), closed_port()
        primary = np.full(PARTITIONS, HERE)
        self.engine = make_engine(load_chain([name], {}, value_bytes), self.frames, primary, self.table.register_owner(), 1,
                                  value_bytes // 8, 0)  # fmt: skip
        self.client = Client([], 1, value_bytes, 1, 1)
        self.source = make_source(Traffic(flows=1), *MACS, SERVER)
        self.passed = 0

    def packet_ns(self, order: np.ndarray) -> float:
        """Take one packet of each flow of `order`, in whole bursts, through; returns the ns of one, by the median burst."""
        times = np.zeros(-(-len(order) // BURST), np.int64)
        self.passed += len(times) * BURST
        pass_over(self.source, order, times, self.engine, self.inside, self.outside, self.frames, self.table.words,
                  self.client.state)  # fmt: skip
        return float(np.median(times)) / BURST

    @property
    def lost(self) -> int:
        """How many packets were not forwarded: zero, or what was measured is something else."""
        return self.passed - int(self.engine.ledger[FORWARDED])

    def close(self) -> None:
        self.table.close()


def measure(name: str, flows: int, capacity: int, value_bytes: int, packets: int, passes: int, seed: int) -> dict[str, Any]:
    """Return the metrics of one table size: medians of `passes` passes over `packets` packets of random flows each."""
    random = np.random.default_rng(seed)
    state, bare = Bed(name, flows, capacity, value_bytes), Bed("passthrough", flows, PARTITIONS, value_bytes)
    bare.packet_ns(np.arange(packets, dtype=np.int64) % flows)
    first_ns = state.packet_ns(random.permutation(flows).astype(np.int64))
    with_ns, without_ns = [], []
    for _ in range(passes):  # in turn, so that what the machine does meanwhile meets both
        order = np.resize(random.permutation(flows), packets).astype(np.int64)
        with_ns.append(state.packet_ns(order))
        without_ns.append(bare.packet_ns(order))
    table_bytes = state.table.words.nbytes
    floors = np.median([floor_ns(table_bytes, packets, random) for _ in range(passes)], axis=0)
    metrics = {"packet_ns": float(np.median(with_ns)), "passthrough_ns": float(np.median(without_ns)),
               "state_ns": float(np.median(with_ns) - np.median(without_ns)), "first_packet_ns": first_ns,
               "dependent_access_ns": float(floors[0]), "independent_access_ns": float(floors[1]),
               "table_mbytes": table_bytes / 1e6}  # fmt: skip
    lost = state.lost + bare.lost
    for bed in (state, bare):
        bed.close()
    return {"metrics": metrics, "lost": lost}


def main(config: dict[str, Any], control: Any) -> None:
    """Process target: {"nf", "value_bytes", "packets", "passes", "seed"}. Answers {"flows", "capacity"} until {"stop": true}."""
    control.send({"ready": True})
    while (message := control.receive(None)) is not None and not message.get("stop"):
        control.send(measure(config["nf"], message["flows"], message["capacity"], config["value_bytes"], config["packets"],
                             config["passes"], config["seed"]))  # fmt: skip


def warm() -> None:
    """Compile the probe: a few packets through a small table."""
    measure("passthrough", 1, PARTITIONS, 8, 1, 1, 1)
