"""The packet loop: what happens between a frame's arrival and its departure, in one thread, run to completion.

    rx burst -> parse -> key -> state access -> NF function -> commit -> tx burst
                                  |                             ^
                                  | record is here: in place    | record is remote: the packet waits in its
                                  +-----------------------------+ frame (no copy) until the reply

Walk one packet A:a -> B:b through it. `receive` parses its frame into `packets[frame number]` and computes its key. When
this host is primary for the key's partition, `process_here` runs the NF on the record in the store's shared memory, under
the partition's lock, and the packet leaves. Else `process_there` looks for a *flight*, the one access in progress for that
key: there is none, so it makes one, asks the primary for the record and lets the packet wait in it. A second packet of the
same flow finds the flight and queues behind: order within a flow never changes, and one fetch serves both. The answer runs
the NF on all that wait; if the record changed it is written back on condition that the version is still the one read, and
the packets leave only when that is answered (output commit). If another instance wrote meanwhile, the answer brings the
current record and the NF runs on it again.

Everything is in arrays made once; the loop allocates nothing. It returns to Python about ten times a second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from datastore.native import inline, jit
from datastore.native.libc import POLLIN, address, now_ns, poll, pollfd
from datastore.store import client as store_client
from datastore.store import operations, statuses
from datastore.store.client import (
    DESCRIPTOR,
    ClientState,
    answer_stamp,
    answer_status,
    answer_tag,
    answer_value_at,
    flush,
    next_answer,
    request,
    room,
)
from datastore.store.layout import EXPIRY_BITS
from datastore.store.table import VALUE, commit_record, open_record, prefetch_record
from nfs.dataplane import ledger as causes
from nfs.dataplane.declaration import DROP, FORWARD, NetworkFunction
from nfs.dataplane.frames import FRAME_BYTES, Frames, free_frames, give_frame
from nfs.dataplane.headers import INSIDE, OUTSIDE, PACKET, parse
from nfs.dataplane.keys import NONE, make_key
from nfs.dataplane.ledger import make_ledger
from nfs.dataplane.port import BURST, Port, reclaim, refill, rx_burst, tx_flush, tx_push, unsent
from nfs.dataplane.requests import ENV

HERE = -1
"""In `primary`: the partition's primary is the store on this host, so access is in place."""

# words of `Engine.control`
(NF, KEY, RECORD_KIND, PASSES, VALUE_WORDS, OWNER, EPOCH, NOW_NS, FLIGHTS_FREE, WAITING, WAITING_LIMIT, HOSTS, DOWN, SPIN_NS) = (
    range(14)
)
CONFLICTS, FETCHES, WRITES, BURSTS = range(14, 18)
# words of a flight
PHASE, HOST, NEXT, WAITING_HEAD, WAITING_TAIL, BATCH_HEAD, BATCH_TAIL, ABSENT, SINCE_NS = range(9)
FETCHING, COMMITTING = 1, 2
RECLAIM_NS = 10_000_000
"""How long the loop sleeps at most while the kernel has frames of ours. Longer than the scheduler's tick (4 ms): an earlier
timer is programmed at every sleep, which costs 15 us on a virtual machine (measured), four times the sleep itself."""
STAMP_SECONDS = (1 << EXPIRY_BITS) - 1
"""Low bits of a record's stamp: the second, modulo 2^20, at which it expires; 0: never."""


class Engine(NamedTuple):
    """State of one packet loop.

    packets: PACKET[frames], by frame number; next_packet: int64[frames], the packet that waits behind this one.
    primary: int64[partitions], HERE or the number of the store host. flights: int64[limit, 9], keys and stamps uint64
    [limit, 3], values uint64[limit, 2 * value words]: the record the NF works on, and the one last committed.
    heads: int64[buckets], hash index of the flights by key.
    """

    control: np.ndarray
    ledger: np.ndarray
    packets: np.ndarray
    next_packet: np.ndarray
    primary: np.ndarray
    env: np.ndarray
    flights: np.ndarray
    flight_keys: np.ndarray
    values: np.ndarray
    free_flights: np.ndarray
    heads: np.ndarray
    addresses: np.ndarray
    lengths: np.ndarray
    scratch: np.ndarray
    pollfds: np.ndarray


def make_engine(function: NetworkFunction, frames: Frames, primary: np.ndarray, owner: int, epoch: int,
                value_words: int, hosts: int, flights: int = 1000, spin_us: float = 5.0) -> Engine:  # fmt: skip
    """Return an engine that runs `function`; `primary` says for each partition HERE or which of `hosts` stores has it."""
    count = frames.stack.size
    control = np.zeros(32, np.int64)
    control[NF] = function.compiled.address
    control[KEY], control[RECORD_KIND], control[PASSES] = function.key, function.kind, function.passes_mask
    control[VALUE_WORDS], control[OWNER], control[EPOCH] = value_words, owner, epoch
    control[FLIGHTS_FREE], control[WAITING_LIMIT], control[HOSTS] = flights, count // 2, hosts
    control[SPIN_NS] = int(spin_us * 1000)
    return Engine(control, make_ledger(), np.zeros(count, PACKET), np.full(count, -1, np.int64),
                  primary.astype(np.int64), np.zeros(1, ENV), np.full((flights, 9), -1, np.int64),
                  np.zeros((flights, 3), np.uint64), np.zeros((flights, 2 * value_words), np.uint64),
                  np.arange(flights, dtype=np.int64), np.full(4 * flights, -1, np.int64),
                  np.zeros(BURST, np.int64), np.zeros(BURST, np.int64), np.zeros(8, np.int64),
                  np.zeros(4 + hosts, np.int64))  # fmt: skip


@intrinsic
def _call(typingctx, function, packet, record, env):
    def generate(context, builder, signature, arguments):
        word = arguments[1].type
        kind = ir.FunctionType(ir.IntType(32), [word, word, word])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])

    return types.int32(types.uintp, types.uintp, types.uintp, types.uintp), generate


@inline
def call_nf(engine: Engine, index: int, words: np.ndarray, at: int) -> Any:
    """Run the NF on packet `index` and the record at word `at` of `words`; returns its verdict."""
    function = np.uintp(engine.control[NF])
    return np.int64(_call(function, address(engine.packets, index), address(words, at), address(engine.env, 0)))


@jit
def leave(engine: Engine, inside: Port, outside: Port, frames: Frames, index: int, verdict: int) -> None:
    """Forward or drop packet `index` and account for it; its frame is handed on or given back."""
    packet = engine.packets[index]
    at = packet.frame
    if verdict == DROP:
        engine.ledger[causes.BY_VERDICT] += 1
        give_frame(frames, at)
        return
    port = outside if packet.arrived_from == INSIDE else inside
    if tx_push(port, frames, at, np.int64(packet.length)):
        engine.ledger[causes.FORWARDED] += 1
    else:
        engine.ledger[causes.TRANSMIT_RING_FULL] += 1
        give_frame(frames, at)


@inline
def drop(engine: Engine, frames: Frames, index: int, cause: int) -> None:
    """Drop packet `index` for a named cause."""
    engine.ledger[cause] += 1
    give_frame(frames, engine.packets[index].frame)


@jit
def process_here(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, index: int) -> None:
    """Run the NF on the packet's record in the store's memory on this host."""
    packet = engine.packets[index]
    control = engine.control
    now_s = control[NOW_NS] // 1_000_000_000
    slot = open_record(words, control[OWNER], packet.key_low, packet.key_high, control[EPOCH], now_s)
    if slot < 0:
        drop(engine, frames, index, causes.TABLE_FULL if -slot == statuses.TABLE_FULL else causes.STATE_REFUSED)
        return
    engine.env[0].idle_timeout_s = 0
    verdict = call_nf(engine, index, words, slot + VALUE)
    timeout = engine.env[0].idle_timeout_s
    expires = 0 if timeout == 0 else now_s + timeout
    commit_record(words, control[OWNER], slot, expires)
    leave(engine, inside, outside, frames, index, verdict)


@inline
def _bucket(engine: Engine, high: int, low: int) -> Any:
    mixed = (np.uint64(high) ^ (np.uint64(low) * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xD6E8FEB86659FD93)
    return np.int64((mixed >> np.uint64(32)) % np.uint64(engine.heads.size))


@jit
def find_flight(engine: Engine, high: int, low: int) -> int:
    """Return the number of the access in progress for this key, or -1."""
    flight = engine.heads[_bucket(engine, high, low)]
    while flight >= 0:
        if engine.flight_keys[flight, 0] == high and engine.flight_keys[flight, 1] == low:
            return flight
        flight = engine.flights[flight, NEXT]
    return flight


@jit
def start_flight(engine: Engine, client: ClientState, high: int, low: int, host: int) -> int:
    """Ask `host` for the record of this key; returns the new flight. The caller made sure that there is room."""
    engine.control[FLIGHTS_FREE] -= 1
    flight = engine.free_flights[engine.control[FLIGHTS_FREE]]
    bucket = _bucket(engine, high, low)
    engine.flight_keys[flight, 0], engine.flight_keys[flight, 1] = high, low
    engine.flights[flight, :] = -1
    engine.flights[flight, NEXT] = engine.heads[bucket]
    engine.flights[flight, PHASE], engine.flights[flight, HOST] = FETCHING, host
    engine.flights[flight, SINCE_NS] = engine.control[NOW_NS]
    engine.heads[bucket] = flight
    engine.control[FETCHES] += 1
    request(client, host, operations.GET, low, high, np.uint64(0), engine.values[flight], 0, flight)
    return flight


@jit
def end_flight(engine: Engine, flight: int) -> None:
    """Forget a finished access."""
    bucket = _bucket(engine, engine.flight_keys[flight, 0], engine.flight_keys[flight, 1])
    before = engine.heads[bucket]
    if before == flight:
        engine.heads[bucket] = engine.flights[flight, NEXT]
    else:
        while engine.flights[before, NEXT] != flight:
            before = engine.flights[before, NEXT]
        engine.flights[before, NEXT] = engine.flights[flight, NEXT]
    engine.flights[flight, PHASE] = 0
    engine.free_flights[engine.control[FLIGHTS_FREE]] = flight
    engine.control[FLIGHTS_FREE] += 1


@jit
def process_there(engine: Engine, frames: Frames, client: ClientState, index: int) -> None:
    """Let the packet wait for its record from the partition's primary."""
    packet = engine.packets[index]
    control = engine.control
    flight = find_flight(engine, packet.key_high, packet.key_low)
    if flight < 0:
        host = engine.primary[packet.partition]
        if control[DOWN] >> host & 1:
            drop(engine, frames, index, causes.STATE_UNREACHABLE)
            return
        if control[FLIGHTS_FREE] == 0 or room(client, host) == 0 or control[WAITING] >= control[WAITING_LIMIT]:
            drop(engine, frames, index, causes.WAITING_ROOM_FULL)
            return
        flight = start_flight(engine, client, packet.key_high, packet.key_low, host)
    elif control[WAITING] >= control[WAITING_LIMIT]:
        drop(engine, frames, index, causes.WAITING_ROOM_FULL)
        return
    engine.next_packet[index] = -1
    tail = engine.flights[flight, WAITING_TAIL]
    if tail < 0:
        engine.flights[flight, WAITING_HEAD] = index
    else:
        engine.next_packet[tail] = index
    engine.flights[flight, WAITING_TAIL] = index
    control[WAITING] += 1


@inline
def _due(stamp: int, now_s: int, timeout: int) -> bool:
    """Whether the record's expiry is worth a write: it was never set, or an eighth of the time-out has passed since."""
    if timeout == 0:
        return False
    left = (np.int64(stamp) - now_s) & STAMP_SECONDS
    return (
        np.int64(stamp) & STAMP_SECONDS == 0 or left > STAMP_SECONDS // 2 or left < timeout - timeout // 8 or left > timeout + 1
    )


@jit
def run_batch(engine: Engine, inside: Port, outside: Port, frames: Frames, client: ClientState, flight: int) -> None:
    """Run the NF on every packet that waits in `flight`, on the record just read; write it back if it changed."""
    flights, values, words = engine.flights, engine.values, engine.control[VALUE_WORDS]
    for i in range(words):
        values[flight, words + i] = values[flight, i]
    timeout = np.int64(0)
    index = flights[flight, WAITING_HEAD]
    while index >= 0:
        engine.env[0].idle_timeout_s = 0
        engine.packets[index].verdict = call_nf(engine, index, values, flight * values.shape[1])
        if engine.env[0].idle_timeout_s != 0:
            timeout = engine.env[0].idle_timeout_s
        index = engine.next_packet[index]
    flights[flight, BATCH_HEAD], flights[flight, BATCH_TAIL] = (flights[flight, WAITING_HEAD], flights[flight, WAITING_TAIL])
    flights[flight, WAITING_HEAD] = flights[flight, WAITING_TAIL] = -1
    changed = False
    for i in range(words):
        changed |= values[flight, words + i] != values[flight, i]
    stamp = engine.flight_keys[flight, 2]
    absent = flights[flight, ABSENT] == 1
    now_s = engine.control[NOW_NS] // 1_000_000_000
    if not changed and (absent or not _due(stamp, now_s, timeout)):
        release(engine, inside, outside, frames, flight)
        end_flight(engine, flight)
        return
    expires = stamp & np.uint64(STAMP_SECONDS)
    if timeout != 0:
        expires = np.uint64(max(1, (now_s + timeout) & STAMP_SECONDS))
    flights[flight, PHASE] = COMMITTING
    engine.control[WRITES] += 1
    request(client, flights[flight, HOST], operations.INSERT if absent else operations.PUT, engine.flight_keys[flight, 1],
            engine.flight_keys[flight, 0], stamp & ~np.uint64(STAMP_SECONDS) | expires, values[flight], 0, flight)  # fmt: skip


@jit
def release(engine: Engine, inside: Port, outside: Port, frames: Frames, flight: int) -> None:
    """Let the packets whose state is now committed leave, in order."""
    index = engine.flights[flight, BATCH_HEAD]
    while index >= 0:
        following = engine.next_packet[index]
        engine.control[WAITING] -= 1
        leave(engine, inside, outside, frames, index, np.int64(engine.packets[index].verdict))
        index = following
    engine.flights[flight, BATCH_HEAD] = engine.flights[flight, BATCH_TAIL] = -1


@jit
def run_again(engine: Engine, flight: int) -> None:
    """Put the packets of a batch that was not committed back in front of those that wait."""
    flights = engine.flights
    if flights[flight, WAITING_TAIL] < 0:
        flights[flight, WAITING_TAIL] = flights[flight, BATCH_TAIL]
    else:
        engine.next_packet[flights[flight, BATCH_TAIL]] = flights[flight, WAITING_HEAD]
    flights[flight, WAITING_HEAD] = flights[flight, BATCH_HEAD]
    flights[flight, BATCH_HEAD] = flights[flight, BATCH_TAIL] = -1


@jit
def abandon(engine: Engine, frames: Frames, flight: int, cause: int) -> None:
    """Drop every packet of a flight for `cause` and forget it."""
    for column in (BATCH_HEAD, WAITING_HEAD):
        index = engine.flights[flight, column]
        while index >= 0:
            following = engine.next_packet[index]
            engine.control[WAITING] -= 1
            drop(engine, frames, index, cause)
            index = following
    end_flight(engine, flight)


@jit
def take_record(engine: Engine, client: ClientState, host: int, slot: int, flight: int) -> None:
    """Copy an answer's record into the flight; a key without a record has all zeros."""
    absent = answer_status(client, host, slot) == statuses.ABSENT
    at = answer_value_at(client, host, slot)
    for i in range(engine.control[VALUE_WORDS]):
        engine.values[flight, i] = np.uint64(0) if absent else client.window[at + i]
    engine.flight_keys[flight, 2] = np.uint64(0) if absent else answer_stamp(client, host, slot)
    engine.flights[flight, ABSENT] = 1 if absent else 0


@jit
def take_answer(engine: Engine, inside: Port, outside: Port, frames: Frames, client: ClientState,
                host: int, slot: int) -> None:  # fmt: skip
    """Go on with the flight that the answer in window slot `slot` of `host` belongs to."""
    flight = answer_tag(client, host, slot)
    status = answer_status(client, host, slot)
    flights = engine.flights
    if flights[flight, PHASE] == COMMITTING and status == statuses.OK:
        engine.flight_keys[flight, 2] = answer_stamp(client, host, slot)
        flights[flight, ABSENT] = 0
        release(engine, inside, outside, frames, flight)
        if flights[flight, WAITING_HEAD] < 0:
            end_flight(engine, flight)
        else:
            run_batch(engine, inside, outside, frames, client, flight)
        return
    conflict = status == statuses.VERSION_MISMATCH or status == statuses.EXISTS
    if status != statuses.OK and status != statuses.ABSENT and not conflict:
        abandon(engine, frames, flight, causes.TABLE_FULL if status == statuses.TABLE_FULL else causes.STATE_REFUSED)
        return
    take_record(engine, client, host, slot, flight)
    if flights[flight, PHASE] == COMMITTING:
        engine.control[CONFLICTS] += 1
        run_again(engine, flight)
    run_batch(engine, inside, outside, frames, client, flight)


@jit
def take_answers(engine: Engine, inside: Port, outside: Port, frames: Frames, client: ClientState) -> int:
    """Take every answer that has arrived; returns how many. A host that hung up gets its bit in `control[DOWN]`."""
    taken = 0
    for host in range(engine.control[HOSTS]):
        if engine.control[DOWN] >> host & 1:
            continue
        if store_client.receive(client, host) < 0:
            engine.control[DOWN] |= 1 << host
            continue
        slot = next_answer(client, host)
        while slot >= 0:
            take_answer(engine, inside, outside, frames, client, host, slot)
            taken += 1
            slot = next_answer(client, host)
    return taken


@jit
def flush_requests(engine: Engine, client: ClientState) -> None:
    """Send each store host what this burst wants of it: one frame of operations."""
    for host in range(engine.control[HOSTS]):
        if not engine.control[DOWN] >> host & 1 and flush(client, host) < 0:
            engine.control[DOWN] |= 1 << host


@jit
def receive(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray,
            client: ClientState, arrived_from: int) -> int:  # fmt: skip
    """Take one burst from one side through the NF; returns how many frames there were."""
    port = inside if arrived_from == INSIDE else outside
    count = rx_burst(port, frames, engine.addresses, engine.lengths, BURST)
    engine.ledger[causes.RECEIVED] += count
    control = engine.control
    stateless = control[KEY] == NONE
    for i in range(count):
        index = engine.addresses[i] // FRAME_BYTES
        status = parse(frames.memory, engine.addresses[i], engine.lengths[i], arrived_from, engine.packets, index)
        if status == 0 and not stateless:
            make_key(control[KEY], control[RECORD_KIND], engine.packets, index)
            if engine.primary[engine.packets[index].partition] == HERE:
                prefetch_record(words, engine.packets[index].key_low, engine.packets[index].key_high)
    for i in range(count):
        index = engine.addresses[i] // FRAME_BYTES
        status = np.int64(engine.packets[index].status)
        if status != 0:
            if control[PASSES] >> status & 1:
                leave(engine, inside, outside, frames, index, np.int64(FORWARD))
            else:
                drop(engine, frames, index, status)
        elif stateless:
            leave(engine, inside, outside, frames, index, call_nf(engine, index, engine.values, 0))
        elif engine.primary[engine.packets[index].partition] == HERE:
            process_here(engine, inside, outside, frames, words, index)
        else:
            process_there(engine, frames, client, index)
    return count


@jit
def wait(engine: Engine, inside: Port, outside: Port, client: ClientState, limit_ns: int) -> None:
    """Sleep until a frame or an answer arrives, at most `limit_ns`; frames that the kernel has not taken yet cut it short."""
    engine.pollfds[0] = pollfd(inside.control[1], POLLIN)
    engine.pollfds[1] = pollfd(outside.control[1], POLLIN)
    count = 2
    for host in range(engine.control[HOSTS]):
        if not engine.control[DOWN] >> host & 1:
            engine.pollfds[count] = pollfd(client.control[host, DESCRIPTOR], POLLIN)
            count += 1
    if unsent(inside) + unsent(outside) > 0:
        limit_ns = min(limit_ns, RECLAIM_NS)
    poll(engine.pollfds, count, max(limit_ns, 0), engine.scratch)


@jit
def run(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState,
        duration_ns: int) -> None:  # fmt: skip
    """Process packets for `duration_ns`, or until a store host hangs up; then return to Python for a moment.

    words: the table of the store on this host (any array when no partition is HERE).
    """
    control = engine.control
    started = last_work = now_ns(engine.scratch)
    down = control[DOWN]
    while control[DOWN] == down:
        now = now_ns(engine.scratch)
        if now - started >= duration_ns:
            break
        control[NOW_NS] = now
        engine.env[0].now_ns = now
        reclaim(inside, frames)
        reclaim(outside, frames)
        refill(inside, frames)
        refill(outside, frames)
        work = receive(engine, inside, outside, frames, words, client, INSIDE)
        work += receive(engine, inside, outside, frames, words, client, OUTSIDE)
        if control[HOSTS] > 0:
            work += take_answers(engine, inside, outside, frames, client)
            flush_requests(engine, client)
        tx_flush(outside, frames)
        tx_flush(inside, frames)
        if work > 0:
            last_work = now
            control[BURSTS] += 1
        elif now - last_work > control[SPIN_NS]:
            wait(engine, inside, outside, client, duration_ns - (now - started))


def waiting(engine: Engine) -> int:
    """Return how many packets are inside, waiting for remote state."""
    return int(engine.control[WAITING])


def conserved(engine: Engine, frames: Frames, ports: list[Port]) -> int:
    """Return how many frames are missing: total - free - held by ports - waiting. Zero unless there is a bug."""
    held = sum(int(port.control[2]) for port in ports)
    filled = sum(
        (int(port.fill_producer[0]) - int(port.rx_consumer[0])) & 0xFFFFFFFF for port in ports if port.fill_ring.size > 2
    )
    return int(frames.stack.size - free_frames(frames) - held - filled - waiting(engine))


__all__ = ["HERE", "INSIDE", "OUTSIDE", "Engine", "conserved", "make_engine", "run", "waiting"]


def warm() -> None:
    """Compile the packet loop: run it for no time on ports that are open nowhere."""
    from nfs.dataplane.declaration import load
    from nfs.dataplane.frames import make_frames
    from nfs.dataplane.port import closed_port

    frames, port = make_frames(1), closed_port()
    engine = make_engine(load("passthrough"), frames, np.full(1, HERE), 0, 1, 1, 0)
    client = store_client.Client([], 1, 8, 1, 1)
    run(engine, port, port, frames, np.zeros(1, np.uint64), client.state, 0)
