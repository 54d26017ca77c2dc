"""Records of other hosts: the *flight*, which is the one access in progress for a key, and the packets that wait in it.

A flight asks for a record, may claim another one, and writes the record back on condition that nobody else did meanwhile; what
goes on when an answer arrives is in `answers.py`. Claims of a record on this host wait in a flight, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.store import operations, statuses
from datastore.store.client import ClientState, answer_stamp, answer_status, answer_value_at, request, room
from datastore.store.partitions import PARTITION_BITS
from nfs.dataplane import ledger as causes
from nfs.dataplane.engine import (
    ABSENT,
    AGAIN,
    AGAIN_SEQUENCE,
    AGAIN_STREAM,
    ATTEMPTS,
    AWAITED,
    BATCH_HEAD,
    BATCH_TAIL,
    BATCH_TIMEOUT_S,
    C_HIGH,
    C_LOW,
    C_TIMEOUT_S,
    C_VALUE,
    CLAIMER,
    CLAIMING,
    COMMITTING,
    CONFLICTS,
    DOWN,
    DROP_CAUSE,
    FETCHES,
    FETCHING,
    FLIGHT_WORDS,
    FLIGHTS_FREE,
    HERE,
    HERE_FLIGHTS,
    HOST,
    MOST_ATTEMPTS,
    NEXT,
    NOW_NS,
    PHASE,
    PUT_OFF,
    REFUSED,
    SINCE_NS,
    STEP,
    TIMEOUT_S,
    VALUE_WORDS,
    WAITING,
    WAITING_HEAD,
    WAITING_LIMIT,
    WAITING_TAIL,
    WAITS,
    WRITES,
    Engine,
)
from nfs.dataplane.frames import Frames
from nfs.dataplane.in_place import claim_here, due, expiring, keep_adds, put_here
from nfs.dataplane.requests import CLAIM_LOW, CLAIM_TIMEOUT_S, CLAIM_WORDS
from nfs.dataplane.steps import REWRITES
from nfs.dataplane.verdicts import drop


@inline
def claim_host(engine: Engine, low: int) -> Any:
    """Return where the primary of a claim's partition is; a partition that does not exist is taken modulo."""
    return engine.primary[np.int64(low & PARTITION_BITS) % engine.primary.size]


@jit
def claim_there(engine: Engine, client: ClientState, index: int, step: int, code: int) -> int:
    """Let a packet whose record is here, set aside in the scratch row, wait for a claim elsewhere; returns WAITS or a drop."""
    control, packet = engine.control, engine.packets[index]
    host = claim_host(engine, np.uint64(engine.env[control[CLAIMER] + CLAIM_LOW]))
    if control[DOWN] >> host & 1:
        return DROP_CAUSE + causes.STATE_UNREACHABLE
    if control[FLIGHTS_FREE] == 0 or room(client, host) == 0:
        return DROP_CAUSE + causes.WAITING_ROOM_FULL
    flight = new_flight(engine, packet.key_high, packet.key_low, HERE, step)
    control[HERE_FLIGHTS] += 1
    row = engine.values.shape[0] - 1
    for n in range(engine.values.shape[1]):
        engine.values[flight, n] = engine.values[row, n]
    engine.packets[index].verdict = code
    keep_adds(engine, index, step)
    keep_claim(engine, flight)
    engine.flights[flight, BATCH_HEAD] = engine.flights[flight, BATCH_TAIL] = index
    engine.flights[flight, BATCH_TIMEOUT_S] = control[TIMEOUT_S]
    engine.next_packet[index] = -1
    control[WAITING] += 1
    request_claim(engine, client, flight, host)
    return WAITS


@jit
def keep_claim(engine: Engine, flight: int) -> None:
    """Copy the claim of the last run into the flight."""
    at = engine.control[CLAIMER] + CLAIM_TIMEOUT_S
    for n in range(3 + CLAIM_WORDS):
        engine.claims[flight, n] = np.uint64(engine.env[at + n])


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
def new_flight(engine: Engine, high: int, low: int, host: int, step: int) -> int:
    """Return a new flight for this key. The caller made sure that there is one left."""
    engine.control[FLIGHTS_FREE] -= 1
    flight = engine.free_flights[engine.control[FLIGHTS_FREE]]
    bucket = _bucket(engine, high, low)
    engine.flight_keys[flight, 0], engine.flight_keys[flight, 1] = high, low
    for n in range(FLIGHT_WORDS):
        engine.flights[flight, n] = -1
    engine.flights[flight, NEXT] = engine.heads[bucket]
    engine.flights[flight, PHASE], engine.flights[flight, HOST], engine.flights[flight, STEP] = FETCHING, host, step
    engine.flights[flight, SINCE_NS], engine.flights[flight, ATTEMPTS] = engine.control[NOW_NS], 0
    engine.heads[bucket] = flight
    return flight


@jit
def start_flight(engine: Engine, client: ClientState, high: int, low: int, host: int, step: int) -> int:
    """Ask `host` for the record of this key; returns the new flight. The caller made sure that there is room."""
    flight = new_flight(engine, high, low, host, step)
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
    if engine.flights[flight, AGAIN] == 1:
        engine.control[PUT_OFF] -= 1
    if engine.flights[flight, HOST] == HERE:
        engine.control[HERE_FLIGHTS] -= 1
    engine.free_flights[engine.control[FLIGHTS_FREE]] = flight
    engine.control[FLIGHTS_FREE] += 1


@jit
def process_there(engine: Engine, client: ClientState, index: int, step: int) -> int:
    """Let the packet wait for its record from the partition's primary; returns WAITS, or the code of a drop."""
    packet = engine.packets[index]
    control = engine.control
    if engine.steps[step, REWRITES]:
        engine.originals[index] = engine.packets[index]
    flight = find_flight(engine, packet.key_high, packet.key_low)
    if flight < 0:
        host = engine.primary[packet.partition]
        if control[DOWN] >> host & 1:
            return DROP_CAUSE + causes.STATE_UNREACHABLE
        if control[FLIGHTS_FREE] == 0 or room(client, host) == 0 or control[WAITING] >= control[WAITING_LIMIT]:
            return DROP_CAUSE + causes.WAITING_ROOM_FULL
        flight = start_flight(engine, client, packet.key_high, packet.key_low, host, step)
    return wait_behind(engine, index, flight)


@jit
def wait_behind(engine: Engine, index: int, flight: int) -> int:
    """Let the packet wait in a flight; returns WAITS, or the code of a drop."""
    control = engine.control
    if control[WAITING] >= control[WAITING_LIMIT]:
        return DROP_CAUSE + causes.WAITING_ROOM_FULL
    engine.next_packet[index] = -1
    tail = engine.flights[flight, WAITING_TAIL]
    if tail < 0:
        engine.flights[flight, WAITING_HEAD] = index
    else:
        engine.next_packet[tail] = index
    engine.flights[flight, WAITING_TAIL] = index
    control[WAITING] += 1
    return WAITS


@jit
def request_claim(engine: Engine, client: ClientState, flight: int, host: int) -> None:
    """Ask `host` to insert the flight's claim."""
    claim = engine.claims[flight]
    engine.flights[flight, PHASE] = CLAIMING
    engine.control[WRITES] += 1
    write_claim(engine, flight)
    request(client, host, operations.INSERT, claim[C_LOW], claim[C_HIGH],
            expiring(engine, np.uint64(0), np.int64(claim[C_TIMEOUT_S])), engine.values[engine.values.shape[0] - 1], 0,
            flight)  # fmt: skip


@jit
def write_claim(engine: Engine, flight: int) -> None:
    """Write the words of a flight's claim into the scratch row, as a value."""
    row = engine.values.shape[0] - 1
    for n in range(engine.control[VALUE_WORDS]):
        engine.values[row, n] = engine.claims[flight, C_VALUE + n] if n < CLAIM_WORDS else np.uint64(0)


@jit
def claim(engine: Engine, words: np.ndarray, client: ClientState, flight: int) -> int:
    """Commit the flight's claim, here at once, elsewhere by asking: TAKEN, CONFLICT, REFUSED or AWAITED."""
    host = claim_host(engine, engine.claims[flight, C_LOW])
    if host == HERE:
        return claim_here(engine, words, engine.claims[flight], 0)
    if engine.control[DOWN] >> host & 1 or room(client, host) == 0:
        return REFUSED
    request_claim(engine, client, flight, host)
    return AWAITED


@jit
def commit(engine: Engine, words: np.ndarray, client: ClientState, flight: int) -> int:
    """Write the flight's record back if that is worth it: OK, AWAITED (negative), or the status of a write on this host."""
    flights, values, count = engine.flights, engine.values, engine.control[VALUE_WORDS]
    timeout = flights[flight, BATCH_TIMEOUT_S]
    high, low, stamp = engine.flight_keys[flight, 0], engine.flight_keys[flight, 1], engine.flight_keys[flight, 2]
    if flights[flight, HOST] == HERE:
        engine.control[TIMEOUT_S] = timeout
        return put_here(engine, words, low, high, flight)
    changed = False
    for n in range(count):
        changed |= values[flight, count + n] != values[flight, n]
    absent = flights[flight, ABSENT] == 1
    if not changed and (absent or not due(stamp, engine.control[NOW_NS] // 1_000_000_000, timeout)):
        return statuses.OK
    flights[flight, PHASE] = COMMITTING
    engine.control[WRITES] += 1
    request(client, flights[flight, HOST], operations.INSERT if absent else operations.PUT, low, high,
            expiring(engine, stamp, timeout), values[flight], 0, flight)  # fmt: skip
    return -AWAITED


@jit
def restore(engine: Engine, flight: int) -> None:
    """Take back what the functions did to the flight's record."""
    count = engine.control[VALUE_WORDS]
    for n in range(count):
        engine.values[flight, n] = engine.values[flight, count + n]


@jit
def another_attempt(engine: Engine, frames: Frames, flight: int) -> bool:
    """After a claim that somebody else has: the record as it was, and the batch once more; False when it was given up."""
    engine.control[CONFLICTS] += 1
    engine.flights[flight, ATTEMPTS] += 1
    if engine.flights[flight, ATTEMPTS] > MOST_ATTEMPTS:
        abandon(engine, frames, flight, causes.STATE_REFUSED)
        return False
    restore(engine, flight)
    run_again(engine, flight)
    return True


@jit
def put_off(engine: Engine, flight: int, phase: int, sequence: int, stream: int) -> None:
    """Let a flight ask again from `phase` on when somebody can be asked. sequence, stream: of a write that may have been done."""
    flights = engine.flights
    flights[flight, PHASE], flights[flight, AGAIN] = phase, 1
    flights[flight, AGAIN_SEQUENCE], flights[flight, AGAIN_STREAM] = sequence, np.int64(stream)
    if flights[flight, HOST] == HERE and phase == FETCHING:
        engine.control[HERE_FLIGHTS] -= 1
        flights[flight, HOST] = engine.remote[np.int64(engine.flight_keys[flight, 1] & PARTITION_BITS)]
    engine.control[PUT_OFF] += 1


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
