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

import numpy as np

from datastore.compiled import jit
from datastore.compiled.libc import POLLIN, now_ns, poll, pollfd
from datastore.compiled.memory import fetch_add, load_acquire
from datastore.compiled.reference import by_reference
from datastore.store import client as store_client
from datastore.store.bells import changed_in_place, hear
from datastore.store.client import DESCRIPTOR, ClientState
from datastore.store.layout import COMMITS, DIRTY_OFFSET, OWNER_ASLEEP, U0
from datastore.store.locking import OWNER_MASK
from nfs.dataplane import ledger as causes
from nfs.dataplane.answers import ask_again, flush_requests, take_answers
from nfs.dataplane.echo import take_echo
from nfs.dataplane.engine import (
    BURSTS,
    BY_ADDRESS,
    CALLED,
    CAME_NS,
    CHANGED,
    DOWN,
    HELD_NS,
    HERE,
    HOSTS,
    NOW_NS,
    OWNER,
    PASSES,
    PUT_OFF,
    QUEUES,
    RECLAIM_NS,
    REPLICATES,
    SEEN_COMMITS,
    SPIN_NS,
    STAGE,
    WAITING,
    WAITING_LIMIT,
    WAITS,
    Engine,
    make_engine,
)
from nfs.dataplane.fragments import EMPTY, HOLD_NS, any_held, find_flow, hold, oldest_ns, remember_first, take_held, take_oldest
from nfs.dataplane.frames import FRAME_BYTES, Frames, free_frames, give_frame
from nfs.dataplane.headers import INSIDE, parse
from nfs.dataplane.passage import advance_burst, note_oldest, release_held
from nfs.dataplane.pending import nearly_full
from nfs.dataplane.port import BURST, Port, reclaim, refill, rx_burst, tx_flush, unsent
from nfs.dataplane.verdicts import drop, leave


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
        engine.stages[index, STAGE], engine.stages[index, CAME_NS] = 0, control[NOW_NS]
        if status == causes.FRAGMENT:
            status = later_fragment(engine, frames, index)
        if status == 0:
            engine.burst[flows] = index
            flows += 1
            first = remember_first(engine.fragments, engine.packets, index, frames.memory, control[NOW_NS])
            if first and any_held(engine.room):
                flows = release_fragments(engine, frames, index, flows)
        elif status == WAITS:
            continue
        elif status == causes.UNREADABLE and take_echo(
            engine, frames.memory, engine.addresses[i], engine.lengths[i], arrived_from
        ):
            give_frame(frames, engine.addresses[i])
            engine.ledger[causes.RECEIVED] -= 1
        elif control[PASSES] >> status & 1:
            leave(engine, inside, outside, frames, index)
        else:
            drop(engine, frames, index, status)
    if flows > 0:
        advance_burst(engine, inside, outside, frames, words, client, arrived_from, flows)
    return count


@jit
def later_fragment(engine: Engine, frames: Frames, index: int) -> int:
    """Return the status of a later fragment: 0 when it has a flow, WAITS when it waits for its first one, else a cause."""
    packet, control = engine.packets[index], engine.control
    if find_flow(engine.fragments, engine.packets, index, frames.memory, control[NOW_NS]):
        return 0
    status = np.int64(packet.status)
    if status != causes.FRAGMENT or packet.fragment_offset == 0:
        return status
    if control[BY_ADDRESS]:
        return 0
    if control[PASSES] >> status & 1:
        return status
    if control[WAITING] >= control[WAITING_LIMIT]:
        return causes.WAITING_ROOM_FULL
    evicted = hold(engine.room, engine.packets, index, frames.memory, control[NOW_NS])
    if evicted == index:
        return status
    control[WAITING] += 1
    if evicted != EMPTY:
        let_go(engine, frames, evicted, causes.FRAGMENT_ROOM_FULL)
    return WAITS


@jit
def let_go(engine: Engine, frames: Frames, index: int, cause: int) -> None:
    """Drop a fragment that has waited for its first one."""
    engine.control[WAITING] -= 1
    drop(engine, frames, index, cause)


@jit
def release_fragments(engine: Engine, frames: Frames, index: int, flows: int) -> int:
    """Append to the burst, in order of arrival, what waits for first fragment `index`; returns how many go on then."""
    control, end = engine.control, take_held(engine.room, engine.packets, index, frames.memory, engine.burst, flows)
    on = flows
    for n in range(flows, end):
        held = engine.burst[n]
        if not find_flow(engine.fragments, engine.packets, held, frames.memory, control[NOW_NS]):
            let_go(engine, frames, held, np.int64(engine.packets[held].status))
            continue
        control[WAITING] -= 1
        engine.stages[held, CAME_NS] = control[NOW_NS]
        engine.burst[on] = held
        on += 1
    return on


@jit
def expire_fragments(engine: Engine, frames: Frames) -> None:
    """Drop the fragments that have waited too long for their first one."""
    room = engine.room
    while any_held(room) and engine.control[NOW_NS] - oldest_ns(room) > HOLD_NS:
        index = take_oldest(room)
        if index != EMPTY:
            let_go(engine, frames, index, causes.FRAGMENT)


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
def turn(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState, now: int,
         imagined: bool) -> int:  # fmt: skip
    """One pass: frames and answers in, what may go on out; returns how much there was to do. now: the clock, in nanoseconds.

    imagined: the clock is imagined and stands still in a pass (the simulator's); else it is read anew before packets are let go.
    """
    control = engine.control
    control[NOW_NS] = now
    if any_held(engine.room):
        expire_fragments(engine, frames)
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
        clock_ns = now if imagined else now_ns(engine.scratch)
        work += release_held(engine, inside, outside, frames, words, client, clock_ns)
    if control[HOSTS] > 0:
        flush_requests(engine, client)
    if control[CHANGED]:
        control[CHANGED] = 0
        if words[DIRTY_OFFSET] != U0:
            changed_in_place(words, engine.bells)
    tx_flush(outside, frames)
    tx_flush(inside, frames)
    return work


@jit
def turn_at(engine: Engine, inside: Port, outside: Port, frames: Frames, words: np.ndarray, client: ClientState,
            now: int) -> int:  # fmt: skip
    """`turn` under an imagined clock, for callers that hold tuples."""
    return turn(by_reference(engine), by_reference(inside), by_reference(outside), by_reference(frames), words,
                by_reference(client), now, True)  # fmt: skip


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
    """`run`, on references (see `datastore/compiled/reference.py`)."""
    control = engine.control
    started = last_work = now_ns(engine.scratch)
    down = control[DOWN]
    while control[DOWN] == down and control[CALLED] == 0:
        now = now_ns(engine.scratch)
        if now - started >= duration_ns:
            break
        work = turn(engine, inside, outside, frames, words, client, now, False)
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


def warm() -> None:
    """Compile the packet loop: run it for no time on ports that are open nowhere."""
    from nfs.dataplane.frames import make_frames
    from nfs.dataplane.port import closed_port
    from nfs.dataplane.steps import load_chain

    frames, port = make_frames(1), closed_port()
    engine = make_engine(load_chain(["passthrough"], {}, 8), frames, np.full(1, HERE), 0, 1, 1, 0)
    client = store_client.Client([], 1, 8, 1, 1)
    run(engine, port, port, frames, np.zeros(1, np.uint64), client.state, 0)
    note_oldest(engine, np.zeros(1, np.int64))
