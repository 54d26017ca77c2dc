"""A packet's way through its steps: its record is here, or asked for elsewhere, or the packet waits (`held.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.compiled.memory import load_acquire
from datastore.store import statuses
from datastore.store.client import ClientState
from datastore.store.layout import COMMITS, DIRTY_OFFSET, U0, VALUE, lease_holds, partition_at, prefetch_record
from datastore.store.locking import is_primary
from datastore.store.records import commit_record, open_record
from datastore.store.roles import changes
from datastore.store.roles import reign as reign_of
from nfs.dataplane import ledger as causes
from nfs.dataplane.declaration import FORWARD, TURN
from nfs.dataplane.engine import (
    ADDING,
    ALSO,
    BATCH_HEAD,
    C_LOW,
    CAME_NS,
    CHANGED,
    CLAIMED_IN,
    CLAIMER,
    CONFLICT,
    CONFLICTS,
    DOWN,
    DROP_CAUSE,
    EPOCH,
    FLIGHTS_FREE,
    HERE,
    HERE_FLIGHTS,
    LONGEST_WAIT_NS,
    MOST_ATTEMPTS,
    MOVED,
    NEVER,
    NOW_NS,
    OWNER,
    PHASE,
    QUEUES,
    REFUSED,
    REPLICATES,
    SEEN_COMMITS,
    STAGE,
    STEPS,
    TAKEN,
    TURNED,
    WAITING,
    WAITING_HEAD,
    WAITING_LIMIT,
    WAITS,
    Engine,
)
from nfs.dataplane.flights import claim_host, claim_there, find_flight, process_there, wait_behind
from nfs.dataplane.frames import Frames
from nfs.dataplane.headers import INSIDE
from nfs.dataplane.held import (
    ALSO_NEED,
    ALSO_PARTITION,
    ALSO_REIGN,
    GO,
    HEAD,
    HELD,
    IS_ACTIVE,
    NEED,
    PARKED,
    PARKED_COUNT,
    REIGN,
    STAY,
    TAIL,
    is_committed,
    judge,
    put_back,
    put_last,
    take_first,
)
from nfs.dataplane.held import KIND as WAITS_HOW
from nfs.dataplane.held import SINCE_NS as WAITS_SINCE_NS
from nfs.dataplane.held import STEP as WAITS_AT
from nfs.dataplane.in_place import add_now, add_to_counters, claim_here, expiry_of, expiry_worth, keep_adds, put_here, set_aside
from nfs.dataplane.keys import NONE, make_key
from nfs.dataplane.port import Port
from nfs.dataplane.requests import CLAIM_TIMEOUT_S
from nfs.dataplane.steps import KEY, KIND, REWRITES
from nfs.dataplane.verdicts import leave, refused_code, run_functions, step_of, step_taken


@jit
def process_here(engine: Engine, words: np.ndarray, client: ClientState, index: int, step: int) -> int:
    """Run a step's functions on the packet's record in the store's memory on this host; returns the verdict's code."""
    packet = engine.packets[index]
    control = engine.control
    if engine.steps[step, REWRITES]:
        engine.originals[index] = engine.packets[index]
    if control[HERE_FLIGHTS] > 0 or (control[REPLICATES] and control[FLIGHTS_FREE] < engine.flights.shape[0]):
        flight = find_flight(engine, packet.key_high, packet.key_low)
        if flight >= 0:
            return wait_behind(engine, index, flight)
    slot = open_record(words, control[OWNER], packet.key_low, packet.key_high, control[EPOCH], control[NOW_NS] // 1_000_000_000)
    if slot < 0:
        return refused_code(engine, -slot)
    code = run_functions(engine, index, step, words, slot + VALUE, 0)
    if control[CLAIMER] >= 0:
        return claim_and_commit(engine, words, client, index, step, slot, code)
    commit_record(words, control[OWNER], slot, expiry_worth(engine, words, slot))
    if control[ADDING] and not control[REPLICATES]:
        add_now(engine, words, step)
    return code


@jit
def claim_and_commit(engine: Engine, words: np.ndarray, client: ClientState, index: int, step: int, slot: int, code: int) -> int:
    """`process_here` for a run that claims: without the lock, as long as it takes; returns the verdict's code or WAITS."""
    packet = engine.packets[index]
    control, row = engine.control, engine.values.shape[0] - 1
    attempt = np.int64(0)
    for _ in range(MOST_ATTEMPTS):
        if control[CLAIMER] < 0:
            commit_record(words, control[OWNER], slot, expiry_of(engine))
            break
        set_aside(engine, words, slot, row)
        at = control[CLAIMER] + CLAIM_TIMEOUT_S
        host = claim_host(engine, np.uint64(engine.env[at + C_LOW]))
        if host != HERE:
            return claim_there(engine, client, index, step, code)
        outcome = claim_here(engine, words, engine.env, at)
        if outcome == REFUSED:
            return DROP_CAUSE + causes.TABLE_FULL
        if outcome == TAKEN:
            status = put_here(engine, words, packet.key_low, packet.key_high, row)
            if status == statuses.OK:
                break
            if status != statuses.VERSION_MISMATCH:
                return refused_code(engine, status)
        control[CONFLICTS] += 1
        attempt += outcome == CONFLICT
        if engine.steps[step, REWRITES]:
            engine.packets[index] = engine.originals[index]
        slot = open_record(words, control[OWNER], packet.key_low, packet.key_high, control[EPOCH],
                           control[NOW_NS] // 1_000_000_000)  # fmt: skip
        if slot < 0:
            return refused_code(engine, -slot)
        code = run_functions(engine, index, step, words, slot + VALUE, attempt)
    if control[ADDING] and not control[REPLICATES]:
        add_now(engine, words, step)
    return code


@inline
def reachable(engine: Engine, words: np.ndarray, partition: int) -> Any:
    """Tell whether a store that can be asked has a partition, as far as is known here, and its packets are not to be parked.

    A store process that is gone commits nothing any more: its table, which this process still maps, is then not worked on.
    """
    if engine.held.parking[partition]:
        return False
    if engine.primary[partition] == HERE:
        own = engine.remote[partition]
        if own >= 0 and engine.control[DOWN] >> own & 1:
            return False
        return is_primary(words, partition_at(words, partition), engine.control[EPOCH])
    return engine.control[DOWN] >> engine.primary[partition] & 1 == 0


@inline
def must_park(engine: Engine, words: np.ndarray, partition: int) -> Any:
    """Tell whether a packet cannot go on: nobody can be asked, or one before it waits whom it would overtake elsewhere."""
    queue = engine.held.queues
    if queue[partition, PARKED_COUNT] > 0 or (engine.primary[partition] != HERE and queue[partition, HEAD] >= 0):
        return True
    return not reachable(engine, words, partition)


@jit
def park(engine: Engine, index: int, step: int, partition: int, is_first: bool) -> int:
    """Let a packet wait until its partition is somewhere; returns WAITS, or the code of a drop. is_first: before all that do."""
    control, packet = engine.control, engine.held.packets[index]
    if control[WAITING] >= control[WAITING_LIMIT]:
        return DROP_CAUSE + causes.WAITING_ROOM_FULL
    packet[WAITS_HOW], packet[WAITS_AT], packet[WAITS_SINCE_NS] = PARKED, step, control[NOW_NS]
    if is_first:
        control[QUEUES] = put_back(engine.held, engine.next_packet, control[QUEUES], partition, index)
    else:
        control[QUEUES] = put_last(engine.held, engine.next_packet, control[QUEUES], partition, index)
    control[WAITING] += 1
    return WAITS


@jit
def hold(engine: Engine, words: np.ndarray, index: int, step: int, reign: int, code: int) -> int:
    """Let a packet that ran on a record of this host wait until what it changed, or saw, is committed; returns WAITS, or the
    code of a drop. reign: of its partition, from before it ran."""
    control, packet = engine.control, engine.held.packets[index]
    partition = np.int64(engine.packets[index].partition)
    if code == MOVED:
        if engine.steps[step, REWRITES]:
            engine.packets[index] = engine.originals[index]
        return park(engine, index, step, partition, True)  # `must_park` let it pass: whoever is parked came after it
    if code != FORWARD and code != TURN:
        if code != WAITS and control[ADDING]:
            add_now(engine, words, step)
        return code
    engine.packets[index].verdict = code
    engine.adds[index, 0] = 0
    if control[ADDING]:
        keep_adds(engine, index, step)
    packet[WAITS_HOW], packet[WAITS_AT], packet[WAITS_SINCE_NS], packet[REIGN] = HELD, step, control[NOW_NS], reign
    packet[NEED], packet[ALSO_PARTITION] = changes(words, partition), control[ALSO]
    if control[ALSO] >= 0:
        packet[ALSO_NEED], packet[ALSO_REIGN] = changes(words, control[ALSO]), control[CLAIMED_IN]
    if not is_committed(words, partition, packet[NEED]):
        control[CHANGED] = 1
    control[QUEUES] = put_last(engine.held, engine.next_packet, control[QUEUES], partition, index)
    control[WAITING] += 1
    return WAITS


@jit
def access(engine: Engine, words: np.ndarray, client: ClientState, index: int, step: int) -> int:
    """`take_step` where the record is; nothing stands before it."""
    partition = np.int64(engine.packets[index].partition)
    if engine.primary[partition] != HERE:
        return process_there(engine, client, index, step)
    if words[DIRTY_OFFSET] == U0:
        return process_here(engine, words, client, index, step)
    engine.control[ALSO] = -1
    reign = reign_of(words, partition)
    return hold(engine, words, index, step, reign, process_here(engine, words, client, index, step))


@jit
def release_held(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState,
                 clock_ns: int) -> int:  # fmt: skip
    """Let go what waited here and need not any more; returns how many packets. clock_ns: read after the records were, so that
    what is let go was looked up while this host had its lease."""
    control, held = engine.control, engine.held
    released = 0
    if words[DIRTY_OFFSET] != U0:
        control[SEEN_COMMITS] = np.int64(load_acquire(words, COMMITS))
    has_lease = words[DIRTY_OFFSET] == U0 or lease_holds(words, clock_ns)
    kept = 0
    queues = control[QUEUES]
    for n in range(queues):
        partition = held.active[n]
        released += release_partition(engine, inside, outside, frames, words, client, partition, has_lease)
        if held.queues[partition, HEAD] < 0:
            held.queues[partition, IS_ACTIVE] = 0
        else:
            held.active[kept] = partition
            kept += 1
    for n in range(queues, control[QUEUES]):  # packets that went on in here may have begun to wait elsewhere
        held.active[kept] = held.active[n]
        kept += 1
    control[QUEUES] = kept
    return released


@jit
def release_partition(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState,
                      partition: int, has_lease: bool) -> int:  # fmt: skip
    """`release_held` of one partition, in order, up to the first packet that must stay."""
    held, control = engine.held, engine.control
    last, released = held.queues[partition, TAIL], 0
    while held.queues[partition, HEAD] >= 0:
        index = held.queues[partition, HEAD]
        packet = held.packets[index]
        step, code = packet[WAITS_AT], np.int64(engine.packets[index].verdict)
        if packet[WAITS_HOW] == PARKED:
            late = control[NOW_NS] - packet[WAITS_SINCE_NS] > LONGEST_WAIT_NS
            if not late and not reachable(engine, words, partition):
                break
            take_first(held, engine.next_packet, partition)
            control[WAITING] -= 1
            code = DROP_CAUSE + causes.STATE_UNREACHABLE if late else access(engine, words, client, index, step)
        else:
            outcome = judge(held, words, index, partition, has_lease)
            if outcome == STAY and (has_lease or control[NOW_NS] - packet[WAITS_SINCE_NS] <= LONGEST_WAIT_NS):
                break  # without a lease for so long the store is gone, and nobody will say what became of it
            take_first(held, engine.next_packet, partition)
            control[WAITING] -= 1
            if outcome != GO:
                code = DROP_CAUSE + causes.UNCOMMITTED
            elif engine.adds[index, 0] > 0:
                add_to_counters(engine, words, engine.adds[index], 0)
        released += 1
        if code != WAITS and step_taken(engine, frames, index, step, code):
            advance(engine, inside, outside, frames, words, client, index)
        if index == last or index == held.queues[partition, HEAD]:
            break
    return released


@jit
def note_oldest(engine: Engine, oldest: np.ndarray) -> None:
    """Write into `oldest`, int64[partitions], when the oldest packet of each partition that waits here came; NEVER: none does."""
    oldest[:] = NEVER
    flights = engine.flights
    for flight in range(flights.shape[0]):
        if flights[flight, PHASE] > 0:
            note_oldest_of(engine, oldest, flights[flight, WAITING_HEAD])
            note_oldest_of(engine, oldest, flights[flight, BATCH_HEAD])
    for n in range(engine.control[QUEUES]):
        note_oldest_of(engine, oldest, engine.held.queues[engine.held.active[n], HEAD])


@jit
def note_oldest_of(engine: Engine, oldest: np.ndarray, index: int) -> None:
    """`note_oldest` of the packet `index` and all that wait behind it; -1: there is none."""
    while index >= 0:
        partition = np.int64(engine.packets[index].partition)
        oldest[partition] = min(oldest[partition], engine.stages[index, CAME_NS])
        index = engine.next_packet[index]


@jit
def take_step(engine: Engine, words: np.ndarray, client: ClientState, index: int, step: int) -> int:
    """Run a step's functions on packet `index`, whose key is known; returns the verdict's code, or WAITS."""
    if engine.steps[step, KEY] != NONE:
        if engine.control[REPLICATES]:
            partition = np.int64(engine.packets[index].partition)
            if must_park(engine, words, partition):
                return park(engine, index, step, partition, False)
        return access(engine, words, client, index, step)
    code = run_functions(engine, index, step, engine.values[engine.values.shape[0] - 1], 0, 0)
    if engine.control[ADDING]:
        add_now(engine, words, step)
    return code


@jit
def advance(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState,
            index: int) -> None:  # fmt: skip
    """Take a packet through the steps it has before it, until it leaves, is dropped, or waits."""
    while engine.stages[index, STAGE] & (TURNED - 1) < engine.control[STEPS]:
        step = step_of(engine, index)
        if engine.steps[step, KEY] != NONE:
            make_key(engine.steps[step, KEY], engine.steps[step, KIND], engine.packets, index)
        code = take_step(engine, words, client, index, step)
        if code == WAITS or not step_taken(engine, frames, index, step, code):
            return
    leave(engine, inside, outside, frames, index)


@jit
def find_keys(engine: Engine, words: np.ndarray, step: int, count: int) -> None:
    """Make the step's keys of the first `count` packets of `burst`, and ask for the memory of all their records at once."""
    key, kind = engine.steps[step, KEY], engine.steps[step, KIND]
    for i in range(count):
        index = engine.burst[i]
        make_key(key, kind, engine.packets, index)
        if engine.primary[engine.packets[index].partition] == HERE:
            prefetch_record(words, engine.packets[index].key_low, engine.packets[index].key_high)


@jit
def advance_burst(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState,
                  arrived_from: int, count: int) -> None:  # fmt: skip
    """`advance` for the first `count` packets of `burst`, a step at a time, so that their cache misses overlap."""
    steps, burst = engine.control[STEPS], engine.burst
    for stage in range(steps):
        step = stage if arrived_from == INSIDE else steps - 1 - stage
        if engine.steps[step, KEY] != NONE:
            find_keys(engine, words, step, count)
        on = 0
        for i in range(count):
            index = burst[i]
            code = take_step(engine, words, client, index, step)
            if code == WAITS or not step_taken(engine, frames, index, step, code):
                continue
            if engine.stages[index, STAGE] & TURNED:
                advance(engine, inside, outside, frames, words, client, index)
                continue
            burst[on] = index
            on += 1
        count = on
    for i in range(count):
        leave(engine, inside, outside, frames, burst[i])
