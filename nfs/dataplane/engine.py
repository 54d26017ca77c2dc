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

A chain of network functions is a sequence of *steps*, each with one record: functions that keep their records under the same
key share one, so that they cost one access. A packet takes the steps in order, from outside in the opposite one, and begins
a step when its state of the step before is committed. A function's *claim* (see `requests.py`) is committed before its record:

    run the functions -> claim -> commit the record -> add to counters -> next step, or leave
          ^                |            |
          +--- conflict ---+------------+

Where stores replicate, a packet on a record of this host waits in `held` until that is committed, and while a partition moves
its packets wait there too (`held.py`). What a store did not answer for good is asked again of the next primary (`again`).

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
from datastore.native.memory import fetch_add, load_acquire
from datastore.native.reference import by_reference
from datastore.replication.shipping import changes
from datastore.store import client as store_client
from datastore.store import operations, statuses
from datastore.store.bells import Bells, changed_in_place, hear, silent
from datastore.store.client import (
    DESCRIPTOR,
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
from datastore.store.layout import COMMITS, DIRTY_OFFSET, EXPIRY_BITS, OWNER_ASLEEP, ROLE, ROLE_BITS, U0, partition_at
from datastore.store.locking import OWNER_MASK, is_primary
from datastore.store.partitions import PARTITION_BITS
from datastore.store.table import STAMP, VALUE, abort_record, commit_record, is_new, open_record, prefetch_record
from nfs.dataplane import ledger as causes
from nfs.dataplane.declaration import DROP, FORWARD, TURN
from nfs.dataplane.fragments import find_flow, make_fragments, remember_first
from nfs.dataplane.frames import FRAME_BYTES, Frames, free_frames, give_frame
from nfs.dataplane.headers import INSIDE, OUTSIDE, PACKET, parse
from nfs.dataplane.held import (
    ALSO_NEED,
    ALSO_PARTITION,
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
    Held,
    is_committed,
    judge,
    lease_holds,
    make_held,
    put_last,
    take_first,
)
from nfs.dataplane.held import KIND as WAITS_HOW
from nfs.dataplane.held import SINCE_NS as WAITS_SINCE_NS
from nfs.dataplane.held import STEP as WAITS_AT
from nfs.dataplane.keys import NONE, make_key
from nfs.dataplane.late import Late, make_late, put_late, send_late
from nfs.dataplane.ledger import make_ledger
from nfs.dataplane.pending import Pending, make_pending, nearly_full, put_pending, send_pending
from nfs.dataplane.port import BURST, Port, reclaim, refill, rx_burst, tx_flush, tx_push, unsent
from nfs.dataplane.requests import ADD_COUNT, ADDS, ATTEMPT, CAUSE, CLAIM_LOW, CLAIM_TIMEOUT_S, CLAIM_WORDS, IDLE_TIMEOUT_S
from nfs.dataplane.requests import NOW_NS as ENV_NOW_NS
from nfs.dataplane.rewrite import turn_around, write_back
from nfs.dataplane.steps import ENV_AT, FUNCTION, KEY, KIND, MEMBERS, MEMBERS_END, OFFSET, REWRITES, Chain

HERE = -1
"""In `primary`: the partition's primary is the store on this host, so access is in place."""

# words of `Engine.control`
PASSES, VALUE_WORDS, OWNER, EPOCH, NOW_NS, FLIGHTS_FREE, WAITING, WAITING_LIMIT, HOSTS, DOWN, SPIN_NS = range(11)
CONFLICTS, FETCHES, WRITES, BURSTS = range(11, 15)
STEPS, FIRST_ATTEMPT, TIMEOUT_S, CLAIMER, ADDING, HERE_FLIGHTS = range(15, 21)
REPLICATES, QUEUES, CHANGED, CALLED, PUT_OFF, ALSO, SEEN_COMMITS = range(21, 28)
"""TIMEOUT_S, CLAIMER, ADDING: what the last run of a step's functions asked for (its time-out, the env that claims or -1,
whether it adds). HERE_FLIGHTS: flights of records on this host, which wait for a claim elsewhere. REPLICATES: partitions may
change hosts. QUEUES: partitions with waiting packets. CHANGED: records of this host changed in this pass. CALLED: another thread
wants the loop to return. PUT_OFF: flights that are to be asked again. ALSO: partition of the last claim here, -1: none."""
# words of a flight
PHASE, HOST, NEXT, WAITING_HEAD, WAITING_TAIL, BATCH_HEAD, BATCH_TAIL, ABSENT, SINCE_NS, STEP, ATTEMPTS, BATCH_TIMEOUT_S = range(
    12
)
AGAIN, AGAIN_SEQUENCE, AGAIN_STREAM = range(12, 15)
"""AGAIN: 1 while nobody has been asked. The sequence number and stream of a write that may have been done; 0: none was."""
FLIGHT_WORDS = 15
FETCHING, CLAIMING, RENEWING, COMMITTING = 1, 2, 3, 4
# where `drive` goes on
RUN, CLAIM, COMMIT, COMMITTED = range(4)
# how a claim ends, or that its answer is awaited
TAKEN, CONFLICT, AWAITED, REFUSED = range(4)
# words of a claim, as it waits in a flight
C_TIMEOUT_S, C_HIGH, C_LOW, C_VALUE = 0, 1, 2, 3
DROP_CAUSE = 16
"""A verdict code of DROP_CAUSE + n is DROP with the ledger's cause n."""
WAITS, MOVED = 255, 254
"""Verdict codes: the packet waits; its partition is not (or no longer) here, and nothing was done."""
MOST_ATTEMPTS = 4096
"""Runs of a function on one packet; far above what any function should claim."""
TURNED = 1 << 8
RECLAIM_NS = 10_000_000
"""How long the loop sleeps at most while the kernel has frames of ours. Longer than the scheduler's tick (4 ms): an earlier
timer is programmed at every sleep, which costs 15 us on a virtual machine (measured), four times the sleep itself."""
LONGEST_WAIT_NS = 2_000_000_000
"""How long a packet waits for somebody to have its partition: far above a failover."""
HELD_NS = 2_000_000
"""How long the loop sleeps at most while packets wait here; normally the store rings (`bells.py`)."""
STAMP_SECONDS = (1 << EXPIRY_BITS) - 1
"""Low bits of a record's stamp: the second, modulo 2^20, at which it expires; 0: never."""


class Engine(NamedTuple):
    """State of one packet loop.

    packets: PACKET[frames], by frame number; originals: the same before a function that rewrites saw them; next_packet:
    int64[frames], the packet that waits behind this one; stages: int64[frames], steps taken. steps, members: see `steps.py`.
    env: int64[n], what the functions know and ask for. primary: int64[partitions], HERE or the number of the store host.
    flights: int64[limit, FLIGHT_WORDS], keys and stamps uint64[limit, 3], values uint64[limit + 1, 2 * value words]: the
    record the functions work on, and the one last committed (the last row is scratch). claims: uint64[limit, 7]. adds:
    int64[frames, ...], the counters a waiting packet adds to. heads: int64[buckets], hash index of the flights by key. remote:
    int64[partitions], the number of the host whose store answers for it, be it this host's. held, late, bells: see there.
    """

    control: np.ndarray
    ledger: np.ndarray
    packets: np.ndarray
    originals: np.ndarray
    next_packet: np.ndarray
    stages: np.ndarray
    steps: np.ndarray
    members: np.ndarray
    env: np.ndarray
    primary: np.ndarray
    flights: np.ndarray
    flight_keys: np.ndarray
    values: np.ndarray
    claims: np.ndarray
    adds: np.ndarray
    pending: Pending
    fragments: np.ndarray
    free_flights: np.ndarray
    heads: np.ndarray
    remote: np.ndarray
    held: Held
    late: Late
    bells: Bells
    addresses: np.ndarray
    lengths: np.ndarray
    burst: np.ndarray
    scratch: np.ndarray
    pollfds: np.ndarray


def make_engine(chain: Chain, frames: Frames, primary: np.ndarray, owner: int, epoch: int,
                value_words: int, hosts: int, flights: int = 1000, spin_us: float = 5.0, replicates: bool = False,
                bells: Bells | None = None) -> Engine:  # fmt: skip
    """Return an engine that runs `chain`; `primary` says for each partition HERE or which of `hosts` stores has it.

    replicates: partitions may change hosts while it runs; then `bells` are those of the table on this host, if there is one.

    flights: fewer than the client's window (1,024 operations a host), so that a flight always finds room for its next request.
    """
    count = frames.stack.size
    control = np.zeros(32, np.int64)
    control[PASSES], control[STEPS] = chain.passes_mask, len(chain.steps)
    control[VALUE_WORDS], control[OWNER], control[EPOCH] = value_words, owner, epoch
    control[FLIGHTS_FREE], control[WAITING_LIMIT], control[HOSTS] = flights, count // 2, hosts
    control[SPIN_NS], control[REPLICATES] = int(spin_us * 1000), replicates
    index, waiting = np.full(count, -1, np.int64), np.zeros(count, np.int64)
    return Engine(control, make_ledger(), np.zeros(count, PACKET), np.zeros(count if chain.rewrites else 1, PACKET), index,
                  waiting, chain.steps, chain.members, chain.env, primary.astype(np.int64),
                  np.full((flights, FLIGHT_WORDS), -1, np.int64), np.zeros((flights, 3), np.uint64),
                  np.zeros((flights + 1, 2 * value_words), np.uint64), np.zeros((flights, 3 + CLAIM_WORDS), np.uint64),
                  np.zeros((count, 1 + 4 * ADDS), np.int64), make_pending(), make_fragments(), np.arange(flights, dtype=np.int64),
                  np.full(4 * flights, -1, np.int64), primary.astype(np.int64), make_held(count, primary.size),
                  make_late(hosts if replicates else 0), bells or silent(), np.zeros(BURST, np.int64), np.zeros(BURST, np.int64),
                  np.zeros(BURST, np.int64), np.zeros(8, np.int64), np.zeros(5 + hosts, np.int64))  # fmt: skip


@intrinsic
def _call(typingctx, function, packet, record, env):
    def generate(context, builder, signature, arguments):
        word = arguments[1].type
        kind = ir.FunctionType(ir.IntType(32), [word, word, word])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])

    return types.int32(types.uintp, types.uintp, types.uintp, types.uintp), generate


@inline
def step_of(engine: Engine, index: int) -> Any:
    """Return the number of the step that packet `index` is at; there is one."""
    stage = engine.stages[index] & (TURNED - 1)
    return stage if engine.packets[index].arrived_from == INSIDE else engine.control[STEPS] - 1 - stage


@jit
def run_functions(engine: Engine, index: int, step: int, words: np.ndarray, at: int, attempt: int) -> int:
    """Run a step's functions on packet `index` and the record at word `at` of `words`; returns the verdict's code.

    What they ask for is in `control` (TIMEOUT_S, CLAIMER, ADDING) and in their envs.
    """
    control, env, members = engine.control, engine.env, engine.members
    control[TIMEOUT_S], control[CLAIMER], control[ADDING] = 0, -1, 0
    first, end = engine.steps[step, MEMBERS], engine.steps[step, MEMBERS_END]
    inside = engine.packets[index].arrived_from == INSIDE
    code = np.int64(FORWARD)
    for n in range(first, end):
        member = n if inside else end - 1 - (n - first)
        at_env = members[member, ENV_AT]
        env[at_env + ENV_NOW_NS] = control[NOW_NS]
        env[at_env + IDLE_TIMEOUT_S] = env[at_env + CAUSE] = env[at_env + CLAIM_TIMEOUT_S] = env[at_env + ADD_COUNT] = 0
        env[at_env + ATTEMPT] = attempt
        code = np.int64(_call(np.uintp(members[member, FUNCTION]), address(engine.packets, index),
                              address(words, at + members[member, OFFSET]), address(env, at_env)))  # fmt: skip
        control[TIMEOUT_S] = max(control[TIMEOUT_S], env[at_env + IDLE_TIMEOUT_S])
        if env[at_env + CLAIM_TIMEOUT_S] > 0:
            control[CLAIMER] = at_env
        control[ADDING] |= env[at_env + ADD_COUNT]
        if code != FORWARD:
            cause = env[at_env + CAUSE]
            if code == DROP and cause > causes.FORWARDED and cause < causes.WAITING:
                code = DROP_CAUSE + cause
            for after in range(n + 1, end):
                env[members[after if inside else end - 1 - (after - first), ENV_AT] + ADD_COUNT] = 0
            break
    return code


@jit
def leave(engine: Engine, inside: Port, outside: Port, frames: Frames, index: int) -> None:
    """Forward packet `index` and account for it; its frame is handed on."""
    packet = engine.packets[index]
    at = packet.frame
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


@inline
def cause_of(status: int) -> Any:
    """Return the ledger's cause for a store's status that is an error."""
    return causes.TABLE_FULL if status == statuses.TABLE_FULL else causes.STATE_REFUSED


@inline
def refused_code(engine: Engine, status: int) -> Any:
    """Return the code for a record of this host that a function could not get."""
    if engine.control[REPLICATES] and (status == statuses.NOT_PRIMARY or status == statuses.STALE_EPOCH):
        return MOVED
    return DROP_CAUSE + cause_of(status)


@jit
def step_taken(engine: Engine, frames: Frames, index: int, step: int, code: int) -> bool:
    """Do what the verdict of a step says, now that its state is committed; returns False when the packet was dropped."""
    if code != FORWARD and code != TURN:
        drop(engine, frames, index, code - DROP_CAUSE if code >= DROP_CAUSE else causes.BY_VERDICT)
        return False
    if engine.steps[step, REWRITES]:
        write_back(frames.memory, engine.packets, index)
    engine.stages[index] += 1
    if code == TURN:
        if engine.stages[index] & TURNED:
            drop(engine, frames, index, causes.BY_VERDICT)
            return False
        turn_around(frames.memory, engine.packets, index)
        engine.stages[index] = TURNED
    return True


@jit
def add_to_counters(engine: Engine, words: np.ndarray, source: np.ndarray, at: int) -> None:
    """Do the additions listed from `source[at]` on (count, then keys, words and deltas as in ENV); elsewhere: soon."""
    control = engine.control
    for n in range(min(source[at], ADDS)):
        high, low = np.uint64(source[at + 1 + n]), np.uint64(source[at + 1 + ADDS + n])
        field, delta = source[at + 1 + 2 * ADDS + n], np.uint64(source[at + 1 + 3 * ADDS + n])
        partition = np.int64(low & PARTITION_BITS)
        if field < 0 or field >= control[VALUE_WORDS] or partition >= engine.primary.size:
            continue
        if engine.primary[partition] != HERE:
            put_pending(engine.pending, high, low, field, delta)
            continue
        slot = open_record(words, control[OWNER], low, high, control[EPOCH], control[NOW_NS] // 1_000_000_000)
        if slot >= 0:
            words[slot + VALUE + field] += delta
            commit_record(words, control[OWNER], slot, 0)
            control[CHANGED] = 1
        elif control[REPLICATES]:
            put_pending(engine.pending, high, low, field, delta)


@jit
def add_now(engine: Engine, words: np.ndarray, step: int) -> None:
    """Do the additions of a step's last run."""
    for member in range(engine.steps[step, MEMBERS], engine.steps[step, MEMBERS_END]):
        add_to_counters(engine, words, engine.env, engine.members[member, ENV_AT] + ADD_COUNT)


@jit
def keep_adds(engine: Engine, index: int, step: int) -> None:
    """Remember the additions of a step's last run until packet `index` leaves its flight. The first function that adds counts."""
    engine.adds[index, 0] = 0
    for member in range(engine.steps[step, MEMBERS], engine.steps[step, MEMBERS_END]):
        at = engine.members[member, ENV_AT] + ADD_COUNT
        if engine.env[at] > 0 and engine.adds[index, 0] == 0:
            for n in range(1 + 4 * ADDS):
                engine.adds[index, n] = engine.env[at + n]


@jit
def claim_here(engine: Engine, words: np.ndarray, claim: np.ndarray, at: int) -> int:
    """Let the key of the claim at `claim[at]` hold its words, in the table on this host: TAKEN, CONFLICT or REFUSED."""
    control = engine.control
    now_s = control[NOW_NS] // 1_000_000_000
    slot = open_record(words, control[OWNER], np.uint64(claim[at + C_LOW]), np.uint64(claim[at + C_HIGH]), control[EPOCH], now_s)
    if slot < 0:
        return REFUSED
    if not is_new(words, slot) and words[slot + VALUE] != np.uint64(claim[at + C_VALUE]):
        abort_record(words, control[OWNER], slot)
        return CONFLICT
    for n in range(control[VALUE_WORDS]):
        words[slot + VALUE + n] = np.uint64(claim[at + C_VALUE + n]) if n < CLAIM_WORDS else np.uint64(0)
    commit_record(words, control[OWNER], slot, now_s + np.int64(claim[at + C_TIMEOUT_S]))
    control[ALSO] = np.int64(np.uint64(claim[at + C_LOW]) & PARTITION_BITS)
    return TAKEN


@inline
def expiry_of(engine: Engine) -> Any:
    """Return the second at which a record that was just used expires; 0: as before."""
    timeout = engine.control[TIMEOUT_S]
    return np.int64(0) if timeout == 0 else engine.control[NOW_NS] // 1_000_000_000 + timeout


@inline
def expiry_worth(engine: Engine, words: np.ndarray, slot: int) -> Any:
    """`expiry_of`, or 0 where the record of a table that replicates has one that is young enough: to renew it is to ship it."""
    expires = expiry_of(engine)
    if engine.control[REPLICATES] and expires != 0 and not is_new(words, slot):
        now_s = engine.control[NOW_NS] // 1_000_000_000
        return expires if _due(words[slot + STAMP], now_s, engine.control[TIMEOUT_S]) else np.int64(0)
    return expires


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
def set_aside(engine: Engine, words: np.ndarray, slot: int, row: int) -> None:
    """Move the changed value of an open record to row `row` of `values`, the one before behind it, and put the record back."""
    count = engine.control[VALUE_WORDS]
    for n in range(count):
        engine.values[row, n] = words[slot + VALUE + n]
    new = is_new(words, slot)
    abort_record(words, engine.control[OWNER], slot)
    for n in range(count):
        engine.values[row, count + n] = np.uint64(0) if new else words[slot + VALUE + n]


@jit
def put_here(engine: Engine, words: np.ndarray, low: int, high: int, row: int) -> int:
    """Write row `row` of `values` into a record of this host if it still is as it was: OK, VERSION_MISMATCH or another status.

    On a mismatch the row's second half becomes the record as it is.
    """
    control, values = engine.control, engine.values
    count = control[VALUE_WORDS]
    slot = open_record(words, control[OWNER], low, high, control[EPOCH], control[NOW_NS] // 1_000_000_000)
    if slot < 0:
        return -slot
    differs = False
    for n in range(count):
        differs |= words[slot + VALUE + n] != values[row, count + n]
        values[row, count + n] = words[slot + VALUE + n]
    if differs:
        abort_record(words, control[OWNER], slot)
        return statuses.VERSION_MISMATCH
    for n in range(count):
        words[slot + VALUE + n] = values[row, n]
    commit_record(words, control[OWNER], slot, expiry_of(engine))
    return statuses.OK


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


@inline
def reachable(engine: Engine, words: np.ndarray, partition: int) -> Any:
    """Tell whether somebody who can be asked has a partition, as far as is known here, and its packets are not to be parked."""
    if engine.held.parking[partition]:
        return False
    if engine.primary[partition] == HERE:
        return is_primary(words, partition_at(words, partition), engine.control[EPOCH])
    return engine.control[DOWN] >> engine.primary[partition] & 1 == 0


@jit
def park(engine: Engine, index: int, step: int, partition: int) -> int:
    """Let a packet wait until its partition is somewhere; returns WAITS, or the code of a drop."""
    control, packet = engine.control, engine.held.packets[index]
    if control[WAITING] >= control[WAITING_LIMIT]:
        return DROP_CAUSE + causes.WAITING_ROOM_FULL
    packet[WAITS_HOW], packet[WAITS_AT], packet[WAITS_SINCE_NS] = PARKED, step, control[NOW_NS]
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
        return park(engine, index, step, partition)
    if code != FORWARD and code != TURN:
        if code != WAITS and control[ADDING]:
            add_now(engine, words, step)
        return code
    engine.packets[index].verdict = code
    engine.adds[index, 0] = 0
    if control[ADDING]:
        keep_adds(engine, index, step)
    packet[WAITS_HOW], packet[WAITS_AT], packet[REIGN] = HELD, step, reign
    packet[NEED], packet[ALSO_PARTITION] = changes(words, partition), control[ALSO]
    if control[ALSO] >= 0:
        packet[ALSO_NEED] = changes(words, control[ALSO])
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
    reign = np.int64(words[partition_at(words, partition) + ROLE] >> np.uint64(ROLE_BITS))
    return hold(engine, words, index, step, reign, process_here(engine, words, client, index, step))


@jit
def release_held(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState) -> int:
    """Let go what waited here and need not any more; returns how many packets. The clock is read anew: what is let go was
    looked up while this host had its lease."""
    control, held = engine.control, engine.held
    released = 0
    if words[DIRTY_OFFSET] != U0:
        control[SEEN_COMMITS] = np.int64(load_acquire(words, COMMITS))
    has_lease = words[DIRTY_OFFSET] == U0 or lease_holds(words, now_ns(engine.scratch))
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
            role = words[partition_at(words, partition) + ROLE]
            outcome = judge(held, words, index, partition, role, has_lease)
            if outcome == STAY:
                break
            take_first(held, engine.next_packet, partition)
            control[WAITING] -= 1
            if outcome != GO:
                code = DROP_CAUSE + causes.UNCOMMITTED
            elif engine.adds[index, 0] > 0:
                add_to_counters(engine, words, engine.adds[index], 0)
        released += 1
        if code != WAITS and step_taken(engine, frames, index, step, code):
            advance(engine, inside, outside, frames, words, client, index)
        if index == last:
            break
    return released


@jit
def take_step(engine: Engine, words: np.ndarray, client: ClientState, index: int, step: int) -> int:
    """Run a step's functions on packet `index`, whose key is known; returns the verdict's code, or WAITS."""
    if engine.steps[step, KEY] != NONE:
        if engine.control[REPLICATES]:
            partition = np.int64(engine.packets[index].partition)
            if engine.held.queues[partition, PARKED_COUNT] > 0 or not reachable(engine, words, partition):
                return park(engine, index, step, partition)
        return access(engine, words, client, index, step)
    code = run_functions(engine, index, step, engine.values[engine.values.shape[0] - 1], 0, 0)
    if engine.control[ADDING]:
        add_now(engine, words, step)
    return code


@jit
def advance(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState,
            index: int) -> None:  # fmt: skip
    """Take a packet through the steps it has before it, until it leaves, is dropped, or waits."""
    while engine.stages[index] & (TURNED - 1) < engine.control[STEPS]:
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
            if engine.stages[index] & TURNED:
                advance(engine, inside, outside, frames, words, client, index)
                continue
            burst[on] = index
            on += 1
        count = on
    for i in range(count):
        leave(engine, inside, outside, frames, burst[i])


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
def expiring(engine: Engine, stamp: int, timeout: int) -> Any:
    """Return a stamp with the expiry `timeout` seconds from now (0: the one it has)."""
    if timeout == 0:
        return stamp
    expires = np.uint64(max(1, (engine.control[NOW_NS] // 1_000_000_000 + timeout) & STAMP_SECONDS))
    return stamp & ~np.uint64(STAMP_SECONDS) | expires


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
    if not changed and (absent or not _due(stamp, engine.control[NOW_NS] // 1_000_000_000, timeout)):
        return statuses.OK
    flights[flight, PHASE] = COMMITTING
    engine.control[WRITES] += 1
    request(client, flights[flight, HOST], operations.INSERT if absent else operations.PUT, low, high,
            expiring(engine, stamp, timeout), values[flight], 0, flight)  # fmt: skip
    return -AWAITED


@jit
def drive(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState, flight: int,
          state: int) -> None:  # fmt: skip
    """Go on with a flight from `state` until it ends or waits for an answer."""
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
    reign = np.int64(words[partition_at(words, partition) + ROLE] >> np.uint64(ROLE_BITS))
    engine.control[ADDING], engine.control[ALSO] = 0, -1
    code = hold(engine, words, index, step, reign, code)
    engine.adds[index, 0] = adds
    return code


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
                drive(engine, inside, outside, frames, words, client, flight, CLAIM)
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
        drive(engine, inside, outside, frames, words, client, flight, COMMITTED)
        return
    take_record(engine, client, host, slot, flight)
    if phase == COMMITTING:
        engine.control[CONFLICTS] += 1
        run_again(engine, flight)
    drive(engine, inside, outside, frames, words, client, flight, RUN)


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


@jit
def receive(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray,
            client: ClientState, arrived_from: int) -> int:  # fmt: skip
    """Take one burst from one side through the NF; returns how many frames there were."""
    port = inside if arrived_from == INSIDE else outside
    if nearly_full(engine.pending):
        return 0
    count = rx_burst(port, frames, engine.addresses, engine.lengths, BURST)
    engine.ledger[causes.RECEIVED] += count
    control = engine.control
    flows = 0
    for i in range(count):
        index = engine.addresses[i] // FRAME_BYTES
        status = parse(frames.memory, engine.addresses[i], engine.lengths[i], arrived_from, engine.packets, index)
        engine.stages[index] = 0
        if status == causes.FRAGMENT:
            if find_flow(engine.fragments, engine.packets, index, frames.memory, control[NOW_NS]):
                status = 0
        elif status == 0:
            remember_first(engine.fragments, engine.packets, index, frames.memory, control[NOW_NS])
        if status == 0:
            engine.burst[flows] = index
            flows += 1
        elif control[PASSES] >> status & 1:
            leave(engine, inside, outside, frames, index)
        else:
            drop(engine, frames, index, status)
    if flows > 0:
        advance_burst(engine, inside, outside, frames, words, client, arrived_from, flows)
    return count


@jit
def receive_now(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState,
                arrived_from: int) -> int:  # fmt: skip
    """`receive`, for callers that hold tuples; the packet loop's own code, not compiled once more for them."""
    return receive(by_reference(engine), by_reference(inside), by_reference(outside), by_reference(frames), words,
                   by_reference(client), arrived_from)  # fmt: skip


@jit
def wait(engine: Engine, inside: Port, outside: Port, words: np.ndarray, client: ClientState, limit_ns: int) -> None:
    """Sleep until a frame or an answer arrives, at most `limit_ns`; frames that the kernel has not taken yet cut it short."""
    control = engine.control
    engine.pollfds[0] = pollfd(inside.control[1], POLLIN)
    engine.pollfds[1] = pollfd(outside.control[1], POLLIN)
    count = 2
    for host in range(engine.control[HOSTS]):
        if not engine.control[DOWN] >> host & 1:
            engine.pollfds[count] = pollfd(client.control[host, DESCRIPTOR], POLLIN)
            count += 1
    if unsent(inside) + unsent(outside) > 0:
        limit_ns = min(limit_ns, RECLAIM_NS)
    if not control[REPLICATES]:
        poll(engine.pollfds, count, max(limit_ns, 0), engine.scratch)
        return
    if control[QUEUES] + control[PUT_OFF] + engine.late.count[0] > 0:
        limit_ns = min(limit_ns, HELD_NS)
    engine.pollfds[count] = pollfd(engine.bells.control[0], POLLIN)
    asleep = OWNER_ASLEEP + np.int64(np.uint64(control[OWNER]) & OWNER_MASK)
    if words[DIRTY_OFFSET] != U0 and control[QUEUES] > 0:
        fetch_add(words, asleep, 1)
        if np.int64(load_acquire(words, COMMITS)) != control[SEEN_COMMITS]:
            limit_ns = 0
    poll(engine.pollfds, count + 1, max(limit_ns, 0), engine.scratch)
    if words[DIRTY_OFFSET] != U0:
        words[asleep] = U0
    if engine.pollfds[count] >> 48 != 0:
        hear(engine.bells)


@jit
def run(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState,
        duration_ns: int) -> None:  # fmt: skip
    """Process packets for `duration_ns`, or until a store host hangs up; then return to Python for a moment.

    words: the table of the store on this host (any array when no partition is HERE).
    """
    loop(by_reference(engine), by_reference(inside), by_reference(outside), by_reference(frames), words, by_reference(client),
         duration_ns)  # fmt: skip


@jit
def loop(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState,
         duration_ns: int) -> None:  # fmt: skip
    """`run`, on references (see `datastore/native/reference.py`)."""
    control = engine.control
    started = last_work = now_ns(engine.scratch)
    down = control[DOWN]
    while control[DOWN] == down and control[CALLED] == 0:
        now = now_ns(engine.scratch)
        if now - started >= duration_ns:
            break
        control[NOW_NS] = now
        reclaim(inside, frames)
        reclaim(outside, frames)
        refill(inside, frames)
        refill(outside, frames)
        work = 0
        for side in range(2):
            work += receive(engine, inside, outside, frames, words, client, side)
        if control[HOSTS] > 0:
            work += take_answers(engine, inside, outside, frames, words, client)
            if control[PUT_OFF] > 0:
                ask_again(engine, inside, outside, frames, words, client)
        if control[QUEUES] > 0:
            work += release_held(engine, inside, outside, frames, words, client)
        if control[HOSTS] > 0:
            flush_requests(engine, client)
        if control[CHANGED]:
            control[CHANGED] = 0
            if words[DIRTY_OFFSET] != U0:
                changed_in_place(words, engine.bells)
        tx_flush(outside, frames)
        tx_flush(inside, frames)
        if work > 0:
            last_work = now
            control[BURSTS] += 1
        elif now - last_work > control[SPIN_NS]:
            wait(engine, inside, outside, words, client, duration_ns - (now - started))


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
    from nfs.dataplane.frames import make_frames
    from nfs.dataplane.port import closed_port
    from nfs.dataplane.steps import load_chain

    frames, port = make_frames(1), closed_port()
    engine = make_engine(load_chain(["passthrough"], {}, 8), frames, np.full(1, HERE), 0, 1, 1, 0)
    client = store_client.Client([], 1, 8, 1, 1)
    run(engine, port, port, frames, np.zeros(1, np.uint64), client.state, 0)
