"""What stores said: flights go on, packets are released in their order, and what nobody answered for good is asked again."""

from __future__ import annotations

import numpy as np

from datastore.compiled import jit
from datastore.store import client as store_client
from datastore.store import operations, statuses
from datastore.store.client import (
    ClientState,
    answer_sequence,
    answer_stamp,
    answer_status,
    answer_stream,
    answer_tag,
    answer_value_at,
    flush,
    give_up,
    next_answer,
    request,
    request_again,
    room,
)
from datastore.store.layout import DIRTY_OFFSET, U0
from datastore.store.partitions import PARTITION_BITS
from datastore.store.roles import reign as reign_of
from nfs.dataplane import ledger as causes
from nfs.dataplane.declaration import FORWARD, TURN
from nfs.dataplane.engine import (
    ABSENT,
    ADDING,
    AGAIN,
    AGAIN_SEQUENCE,
    AGAIN_STREAM,
    ALSO,
    ATTEMPTS,
    AWAITED,
    BATCH_HEAD,
    BATCH_TAIL,
    BATCH_TIMEOUT_S,
    C_HIGH,
    C_LOW,
    C_TIMEOUT_S,
    C_VALUE,
    CLAIM,
    CLAIMER,
    CLAIMING,
    COMMIT,
    COMMITTED,
    COMMITTING,
    CONFLICT,
    CONFLICTS,
    DOWN,
    FETCHING,
    HERE,
    HOST,
    HOSTS,
    LONGEST_WAIT_NS,
    MOVED,
    NOW_NS,
    PHASE,
    PUT_OFF,
    REFUSED,
    RENEWING,
    REPLICATES,
    RUN,
    SINCE_NS,
    STEP,
    TAKEN,
    TIMEOUT_S,
    VALUE_WORDS,
    WAITING,
    WAITING_HEAD,
    WAITING_TAIL,
    WAITS,
    Engine,
)
from nfs.dataplane.flights import (
    abandon,
    another_attempt,
    claim,
    commit,
    end_flight,
    keep_claim,
    put_off,
    restore,
    run_again,
    take_record,
    write_claim,
)
from nfs.dataplane.frames import Frames
from nfs.dataplane.in_place import add_to_counters, expiring, keep_adds
from nfs.dataplane.late import put_late, send_late
from nfs.dataplane.passage import advance, hold
from nfs.dataplane.pending import send_pending
from nfs.dataplane.port import Port
from nfs.dataplane.steps import REWRITES
from nfs.dataplane.verdicts import cause_of, refused_code, run_functions, step_taken


@jit
def run_batch(engine: Engine, flight: int) -> bool:
    """Run a step's functions on every packet that waits in `flight`, on the record in it; returns whether they claim."""
    flights, values, words = engine.flights, engine.values, engine.control[VALUE_WORDS]
    step = flights[flight, STEP]
    for n in range(words):
        values[flight, words + n] = values[flight, n]
    timeout, claims = np.int64(0), False
    index = flights[flight, WAITING_HEAD]
    while index >= 0:
        if engine.steps[step, REWRITES]:
            engine.packets[index] = engine.originals[index]
        code = run_functions(engine, index, step, values[flight], 0, flights[flight, ATTEMPTS])
        engine.packets[index].verdict = code
        engine.adds[index, 0] = 0
        if engine.control[ADDING]:
            keep_adds(engine, index, step)
        if engine.control[CLAIMER] >= 0:
            keep_claim(engine, flight)
            claims = True
        timeout = max(timeout, engine.control[TIMEOUT_S])
        index = engine.next_packet[index]
    flights[flight, BATCH_HEAD], flights[flight, BATCH_TAIL] = (flights[flight, WAITING_HEAD], flights[flight, WAITING_TAIL])
    flights[flight, WAITING_HEAD] = flights[flight, WAITING_TAIL] = -1
    flights[flight, BATCH_TIMEOUT_S] = timeout
    return claims


@jit
def drive(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState, flight: int,
          state: int) -> None:  # fmt: skip
    """Go on with a flight from `state` until it ends or waits for an answer.

    state: an int64. For each constant in its place this would be compiled once more, which takes seconds.
    """
    flights = engine.flights
    while True:
        if state == RUN:
            state = CLAIM if run_batch(engine, flight) else COMMIT
        if state == CLAIM:
            outcome = claim(engine, words, client, flight)
            if outcome == AWAITED:
                return
            if outcome == REFUSED:
                abandon(engine, frames, flight, causes.STATE_REFUSED)
                return
            state = COMMIT if outcome == TAKEN else RUN
            if outcome == CONFLICT and not another_attempt(engine, frames, flight):
                return
            continue
        if state == COMMIT:
            status = commit(engine, words, client, flight)
            if status < 0:
                return
            if status == statuses.VERSION_MISMATCH:
                engine.control[CONFLICTS] += 1
                restore(engine, flight)
                run_again(engine, flight)
                state = RUN
                continue
            if status != statuses.OK:
                if refused_code(engine, status) == MOVED:
                    run_again(engine, flight)
                    put_off(engine, flight, FETCHING, 0, U0)
                    return
                abandon(engine, frames, flight, cause_of(status))
                return
        release(engine, inside, outside, frames, words, client, flight)
        if flights[flight, WAITING_HEAD] < 0:
            end_flight(engine, flight)
            return
        flights[flight, ATTEMPTS] = 0
        state = RUN


@jit
def release(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState,
            flight: int) -> None:  # fmt: skip
    """Let the packets whose state is now committed go on, in order."""
    step, here = engine.flights[flight, STEP], engine.flights[flight, HOST] == HERE and words[DIRTY_OFFSET] != U0
    index = engine.flights[flight, BATCH_HEAD]
    engine.flights[flight, BATCH_HEAD] = engine.flights[flight, BATCH_TAIL] = -1
    while index >= 0:
        following = engine.next_packet[index]
        engine.control[WAITING] -= 1
        if here and hold_again(engine, words, index, step) == WAITS:
            index = following
            continue
        if engine.adds[index, 0] > 0:
            add_to_counters(engine, words, engine.adds[index], 0)
        if step_taken(engine, frames, index, step, np.int64(engine.packets[index].verdict)):
            advance(engine, inside, outside, frames, words, client, index)
        index = following


@jit
def hold_again(engine: Engine, words: np.ndarray, index: int, step: int) -> int:
    """`hold` of a packet whose flight wrote a record of this host; what it adds is kept already."""
    code = np.int64(engine.packets[index].verdict)
    if code != FORWARD and code != TURN:
        return code
    partition, adds = np.int64(engine.packets[index].partition), engine.adds[index, 0]
    reign = reign_of(words, partition)
    engine.control[ADDING], engine.control[ALSO] = 0, -1
    code = hold(engine, words, index, step, reign, code)
    engine.adds[index, 0] = adds
    return code


@jit
def ask_again(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState) -> None:
    """Ask for all that was put off, of those who have it now."""
    control, flights = engine.control, engine.flights
    for flight in range(flights.shape[0]):
        if control[PUT_OFF] == 0:
            return
        if flights[flight, PHASE] <= 0 or flights[flight, AGAIN] != 1:
            continue
        phase = flights[flight, PHASE]
        low = engine.claims[flight, C_LOW] if phase == CLAIMING else engine.flight_keys[flight, 1]
        host = engine.remote[np.int64(low & PARTITION_BITS) % engine.remote.size]
        if control[NOW_NS] - flights[flight, SINCE_NS] > LONGEST_WAIT_NS:
            abandon(engine, frames, flight, causes.STATE_UNREACHABLE)
        elif control[DOWN] >> host & 1 == 0 and room(client, host) > 0:
            flights[flight, AGAIN] = 0
            control[PUT_OFF] -= 1
            if phase == CLAIMING:
                drive(engine, inside, outside, frames, words, client, flight, np.int64(CLAIM))
            else:
                flights[flight, HOST] = host
                ask_flight(engine, client, flight, host)


@jit
def ask_flight(engine: Engine, client: ClientState, flight: int, host: int) -> None:
    """Ask `host` for what a flight asked another one: the record, or that it be written."""
    flights = engine.flights
    high, low, stamp = engine.flight_keys[flight, 0], engine.flight_keys[flight, 1], engine.flight_keys[flight, 2]
    if flights[flight, PHASE] == FETCHING:
        request(client, host, operations.GET, low, high, np.uint64(0), engine.values[flight], 0, flight)
        return
    opcode = operations.INSERT if flights[flight, ABSENT] == 1 else operations.PUT
    stamp = expiring(engine, stamp, flights[flight, BATCH_TIMEOUT_S])
    request_again(client, host, opcode, low, high, stamp, engine.values[flight], flight, 0,
                  flights[flight, AGAIN_SEQUENCE], np.uint64(flights[flight, AGAIN_STREAM]))  # fmt: skip


@jit
def again(engine: Engine, frames: Frames, client: ClientState, host: int, slot: int) -> None:
    """Put off what the store of `host` refused, or never answered, because it is not, or may not be, the primary."""
    flight = answer_tag(client, host, slot)
    if flight < 0:
        put_late(engine.late, client, host, slot)
        return
    phase = engine.flights[flight, PHASE]
    sequence = answer_sequence(client, host, slot) if phase == COMMITTING else np.int64(0)
    put_off(engine, flight, CLAIMING if phase == RENEWING else phase, sequence, answer_stream(client, host, slot))


@jit
def take_answer(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState,
                host: int, slot: int) -> None:  # fmt: skip
    """Go on with the flight that the answer in window slot `slot` of `host` belongs to."""
    flight = answer_tag(client, host, slot)
    status = answer_status(client, host, slot)
    if engine.control[REPLICATES] and (refused_code(engine, status) == MOVED or status == statuses.LEASE_LAPSED):
        again(engine, frames, client, host, slot)
        return
    if flight < 0:  # an addition: nobody waits for it
        return
    flights = engine.flights
    phase = flights[flight, PHASE]
    conflict = status == statuses.VERSION_MISMATCH or status == statuses.EXISTS
    if status != statuses.OK and status != statuses.ABSENT and not conflict:
        abandon(engine, frames, flight, cause_of(status))
        return
    if phase in (CLAIMING, RENEWING):
        state = claim_answered(engine, frames, client, host, slot, flight)
        if state >= 0:
            drive(engine, inside, outside, frames, words, client, flight, state)
        return
    if phase == COMMITTING and status == statuses.OK:
        engine.flight_keys[flight, 2] = answer_stamp(client, host, slot)
        flights[flight, ABSENT] = 0
        drive(engine, inside, outside, frames, words, client, flight, np.int64(COMMITTED))
        return
    take_record(engine, client, host, slot, flight)
    if phase == COMMITTING:
        engine.control[CONFLICTS] += 1
        run_again(engine, flight)
    drive(engine, inside, outside, frames, words, client, flight, np.int64(RUN))


@jit
def claim_answered(engine: Engine, frames: Frames, client: ClientState, host: int, slot: int, flight: int) -> int:
    """Return where `drive` goes on after the answer to a claim; negative when the flight waits again, or has ended."""
    status = answer_status(client, host, slot)
    if status == statuses.OK:
        return COMMIT
    row = engine.claims[flight]
    if status == statuses.EXISTS and client.window[answer_value_at(client, host, slot)] == row[C_VALUE]:
        engine.flights[flight, PHASE] = RENEWING
        stamp = answer_stamp(client, host, slot)
        write_claim(engine, flight)
        request(client, host, operations.PUT, row[C_LOW], row[C_HIGH], expiring(engine, stamp, np.int64(row[C_TIMEOUT_S])),
                engine.values[engine.values.shape[0] - 1], 0, flight)  # fmt: skip
        return -1
    if status != statuses.EXISTS:  # renewing: changed or gone in this moment
        return CLAIM
    return RUN if another_attempt(engine, frames, flight) else -1


@jit
def lose_host(engine: Engine, client: ClientState, host: int) -> None:
    """The connection to a store is lost. Where another one may take over, what is unanswered counts as refused."""
    engine.control[DOWN] |= 1 << host
    if engine.control[REPLICATES]:
        give_up(client, host, statuses.NOT_PRIMARY)


@jit
def take_answers(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray,
                 client: ClientState) -> int:  # fmt: skip
    """Take every answer that has arrived; returns how many. A host that hung up gets its bit in `control[DOWN]`."""
    taken = 0
    for host in range(engine.control[HOSTS]):
        if engine.control[DOWN] >> host & 1 == 0 and store_client.receive(client, host) < 0:
            lose_host(engine, client, host)
        if engine.control[DOWN] >> host & 1 and not engine.control[REPLICATES]:
            continue
        slot = next_answer(client, host)
        while slot >= 0:
            take_answer(engine, inside, outside, frames, words, client, host, slot)
            taken += 1
            slot = next_answer(client, host)
    return taken


@jit
def flush_requests(engine: Engine, client: ClientState) -> None:
    """Send each store host what this burst wants of it: one frame of operations."""
    if engine.late.count[0] > 0:
        send_late(engine.late, client, engine.remote, engine.control[DOWN])
    else:
        send_pending(engine.pending, client, engine.remote, engine.control[DOWN])
    for host in range(engine.control[HOSTS]):
        if not engine.control[DOWN] >> host & 1 and flush(client, host) < 0:
            lose_host(engine, client, host)
