"""The store process: how are remote clients served from the table, without an interpreter in the way?

One compiled loop around ppoll: whatever has arrived on a connection is read with one call, all operations of all whole frames
in it are done, and all answers are sent with one call. A client that does not read its answers is not read from either, until
its send buffer has room again. Between requests a bounded number of buckets is swept of expired records.

A connection gets a place in the loop when Python has seen by a challenge who speaks (`datastore/security/door.py`):

    place   0 ... 63        clients, one for each id; who is idle for long gives way
            64 ... 67       administrators
            68 ...          other stores, two for each: a process under the name of another one takes nothing away from it

From a peer's place only stores' frames are taken, from the others only operations.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from datastore.base.partitioning import PARTITIONS
from datastore.compiled import inline, jit
from datastore.compiled.libc import EAGAIN, POLLIN, POLLOUT, libc_close, now_ns, poll, pollfd, recv, send
from datastore.compiled.memory import copy, fetch_add, load_acquire
from datastore.replication.applying import apply
from datastore.replication.frames import ACK_WORDS, ACKNOWLEDGES, image_words, peer_frame_words
from datastore.replication.holds import FIRST_FRAME, LAST_FRAME, Holds, forget, has_room, lapse, let_go, make_holds, serve_frame
from datastore.replication.link import COMMITTED_MORE, NEWS_WAIT, REFUSALS_WAIT, Shipping, make_shipping
from datastore.replication.links import Links, all_pause, exchange, make_links, poll_links, shortest_pause_ns
from datastore.replication.shipping import NEWS_AFTER_NS, REFUSED_AGAIN_NS
from datastore.security.secret import ADMINISTRATOR, STORE
from datastore.store.bells import Bells, hear, silent, wake_owners
from datastore.store.layout import (
    BUCKETS,
    CLIENT_ID,
    CLIENT_USED_S,
    CLIENTS,
    CLUSTER,
    CONNECTIONS,
    DIRTY_OFFSET,
    EPOCH,
    IN_PLACE,
    PARTITION_COUNT,
    STORE_ASLEEP,
    U0,
    VALUE_WORDS,
    client_at,
    lease_holds,
    word,
)
from datastore.store.operations import HELLO, OPERATION_VALUE
from datastore.store.protocol import (
    ANSWERS,
    FRAME_HEADER_WORDS,
    FRAME_OPERATIONS,
    LARGEST_FRAME_BYTES,
    NOT_ITS_OWN,
    find_client,
    frame_operations,
    frame_words,
    hello,
    refuse_frame,
    write_frame_header,
)
from datastore.store.records import sweep
from datastore.store.statuses import OK
from datastore.store.table import Table

CLIENT_PLACES, ADMINISTRATOR_PLACES, PLACES_OF_A_PEER = 64, 4, 2
COMMON_PLACES = CLIENT_PLACES + ADMINISTRATOR_PLACES
IDLE_NS = 10_000_000_000
"""A connection that was silent for so long gives way when its place is wanted."""
SWEEP_PASS_S = 4
"""The whole table is swept once in this time, as far as the bounds of a step allow."""
SWEEP_BUCKETS_BUSY, SWEEP_BUCKETS_IDLE = 32, 2048
TURN_NS = 100_000_000
"""How long the compiled loop runs before Python looks at signals and control messages."""

WAKERS = 2
BELL = 2
"""In `polled`, counted from the last peer: two wakers that end `serve` early, and the bell that does not."""

# What a server's `control` holds. DOOR: the descriptor that says that somebody wants in.
DOOR, WAKER, SWEEP_PARTITION, SWEEP_DONE, SWEEP_NS, SEEN_IN_PLACE = range(6)
# What a connection holds. Received: bytes up to this one. Answered, released and sent: of the send buffer; an answer is released
# when what it tells of is committed. Role and number: who has proven to speak; 0 may say nothing. Heard: when it was, last.
DESCRIPTOR, RECEIVED, ANSWERED, RELEASED, SENT, CLIENT, CLOSING, ROLE, NUMBER, HEARD_NS = range(10)
CONNECTION_FIELDS = 16


class ServerState(NamedTuple):
    """Everything the compiled loop works on. Byte and word arrays of a buffer are two views of one memory."""

    words: np.ndarray
    """uint64[n]: the table"""
    control: np.ndarray
    """int64[8]"""
    connections: np.ndarray
    """int64[places, CONNECTION_FIELDS]; DESCRIPTOR -1: none"""
    connected: np.ndarray
    """uint8[client slots]: 1 where a connection serves the client"""
    receive_words: np.ndarray
    receive_bytes: np.ndarray
    """uint8[places * largest frame]"""
    send_words: np.ndarray
    send_bytes: np.ndarray
    polled: np.ndarray
    """int64[places + 2 + n]: door, waker, connections, peers, what else ends `serve` early"""
    scratch: np.ndarray
    """int64[2]"""
    wakers: np.ndarray
    """int64[n]: descriptors whose input ends `serve` early, -1: none"""
    shipping: Shipping
    holds: Holds
    links: Links
    bells: Bells


def new_state(
    words: np.ndarray, door: int, waker: int = -1, peers: int = 0, asynchronous: bool = False, bells: Bells | None = None
) -> ServerState:
    """Return the state of a server on the table `words`. door, waker: descriptors whose input ends `serve` early, or -1.

    peers: how many other stores it ships to; none unless the table replicates. bells: None if nobody else works on the table.
    """
    answer_words = FRAME_HEADER_WORDS + FRAME_OPERATIONS * (OPERATION_VALUE + int(words[VALUE_WORDS]))
    longest_words = max(LARGEST_FRAME_BYTES // 8, image_words(words) if peers else 0)
    places = COMMON_PLACES + PLACES_OF_A_PEER * peers
    receive = np.zeros(places * longest_words, np.uint64)
    connected = np.zeros(max(int(words[CLIENTS]), 1), np.uint8)
    answers = np.zeros(places * 4 * answer_words, np.uint64)
    control = np.zeros(8, np.int64)
    control[DOOR], control[WAKER], control[SWEEP_NS] = door, waker, time.monotonic_ns()
    connections = np.full((places, CONNECTION_FIELDS), -1, np.int64)
    return ServerState(
        words,
        control,
        connections,
        connected,
        receive,
        receive.view(np.uint8),
        answers,
        answers.view(np.uint8),
        np.zeros(places + 2 + peers + WAKERS + 1, np.int64),
        np.zeros(2, np.int64),
        np.full(WAKERS, -1, np.int64),
        make_shipping(words, peers, connected, asynchronous),
        make_holds(places, 4 * FRAME_OPERATIONS, 4 * FRAME_OPERATIONS),
        make_links(words, peers),
        bells or silent(),
    )


@inline
def places(server: ServerState) -> Any:
    """Return how many connections there is room for."""
    return server.connections.shape[0]


def occupy(server: ServerState, n: int, descriptor: int, role: int, number: int = 0) -> None:
    """Give place `n`, which is free, to a connection; the descriptor is the server's from now on. Not while it serves."""
    row = np.zeros(CONNECTION_FIELDS, np.int64)
    row[CLIENT], row[ROLE], row[NUMBER], row[HEARD_NS], row[DESCRIPTOR] = -1, role, number, time.monotonic_ns(), descriptor
    server.connections[n] = row
    server.words[CONNECTIONS] += np.uint64(1)


@jit
def disconnect(server: ServerState, n: int) -> None:
    """Close a connection and free what it holds; the client's completion records stay."""
    client = server.connections[n, CLIENT]
    if client >= 0:
        server.connected[client] = 0
    libc_close(np.int32(server.connections[n, DESCRIPTOR]))
    server.connections[n, DESCRIPTOR] = -1
    server.connections[n, CLIENT] = -1
    forget(server.holds, n)


@jit
def greet(server: ServerState, n: int, now_s: int, at: int, answer_at: int) -> int:
    """Answer a frame that holds a HELLO alone and bind the connection to its client; return the answer's words.

    Its id must be the one it has proven. An older connection of the same client is closed: what it still has in flight comes
    again on this one.
    """
    words = server.words
    requests, answers, operation = server.receive_words, server.send_words, at + FRAME_HEADER_WORDS
    client_id, cluster = requests[at + 2], requests[at + 3]
    client = -1
    if not is_of(server, n, client_id):
        client = NOT_ITS_OWN
    elif cluster == words[CLUSTER]:
        client = find_client(words, client_id, now_s, server.connected)
    status = hello(words, client, cluster, requests, operation, answers, answer_at + FRAME_HEADER_WORDS)
    if status == OK:
        for other in range(places(server)):
            if other != n and server.connections[other, DESCRIPTOR] >= 0 and server.connections[other, CLIENT] == client:
                disconnect(server, other)
        if server.connections[n, CLIENT] >= 0:
            server.connected[server.connections[n, CLIENT]] = 0
        server.connections[n, CLIENT] = client
        server.connected[client] = 1
    answer_words = OPERATION_VALUE + word(words, VALUE_WORDS)
    write_frame_header(server.send_words, answer_at, 1, answer_words, ANSWERS, words[EPOCH], client_id, words[CLUSTER])
    return FRAME_HEADER_WORDS + answer_words


@inline
def is_of(server: ServerState, n: int, client_id: int) -> Any:
    """Tell whether a connection may speak under a client's id: its low half is the number that was proven."""
    return np.int64(client_id & np.uint64(0xFFFFFFFF)) == server.connections[n, NUMBER] or (
        server.connections[n, ROLE] == ADMINISTRATOR and client_id != np.uint64(0)
    )


@jit
def answer_all(server: ServerState, owner: int, n: int, now: int) -> None:
    """Do the whole frames a connection has received, as long as their answers have room, and keep the rest."""
    words, connections = server.words, server.connections
    receive_at = n * (server.receive_words.size // places(server))
    send_size = server.send_words.size // places(server)
    send_at = n * send_size
    end = receive_at + (connections[n, RECEIVED] >> 3)
    answer_words = OPERATION_VALUE + word(words, VALUE_WORDS)
    at = receive_at
    while connections[n, CLOSING] == 0:
        if connections[n, ROLE] == STORE:
            length = peer_frame_words(server.receive_words, at, end, server.receive_words.size // places(server))
        else:
            length = frame_words(server.receive_words, at, end, 0)
        answered = connections[n, ANSWERED] >> 3
        if length == 0:
            break
        if length < 0:
            if send_size - answered < FRAME_HEADER_WORDS + answer_words:
                break
            connections[n, ANSWERED] += refuse_frame(words, server.send_words, send_at + answered) * 8
            connections[n, CLOSING] = 1
            break
        if connections[n, ROLE] == STORE:
            if send_size - answered < FRAME_HEADER_WORDS + ACK_WORDS:
                break
            connections[n, ANSWERED] += follow_frame(server, owner, now, at, length, send_at + answered) * 8
            at += length
            continue
        count = frame_operations(server.receive_words, at)
        if send_size - answered < FRAME_HEADER_WORDS + count * answer_words:
            break
        opcode = server.receive_words[at + FRAME_HEADER_WORDS] & np.uint64(0xFF)
        if count == 1 and opcode == np.uint64(HELLO):
            written = greet(server, n, now // 1_000_000_000, at, send_at + answered)
        else:
            if not has_room(server.holds, n, count):
                break
            client = client_of(server, n, now // 1_000_000_000, at)
            written = serve_frame(
                server.shipping, server.holds, words, owner, client, n, now, server.receive_words, at, length,
                server.send_words, send_at + answered,
            )  # fmt: skip
            if words[DIRTY_OFFSET] != U0 and not lease_holds(words, now_ns(server.scratch)):  # stopped since `now` was read
                lapse(server.send_words, send_at + answered, count, answer_words)
        connections[n, ANSWERED] += written * 8
        at += length
    taken = (at - receive_at) * 8
    if taken > 0:
        rest = connections[n, RECEIVED] - taken
        if rest > 0:
            copy(server.receive_bytes, receive_at * 8, server.receive_bytes, at * 8, rest)
        connections[n, RECEIVED] = rest


@jit
def client_of(server: ServerState, n: int, now_s: int, at: int) -> int:
    """Return the slot of the client whose frame is at `at`, or -1.

    Normally it is the one that said HELLO on this connection; an operation that another store may have done comes under the
    id it had there (see `client.py`).
    """
    words, client = server.words, server.connections[n, CLIENT]
    if client >= 0:
        words[client_at(words, client) + CLIENT_USED_S] = np.uint64(now_s)
        client_id = server.receive_words[at + 2]
        if words[client_at(words, client) + CLIENT_ID] != client_id:
            client = find_client(words, client_id, now_s, server.connected) if is_of(server, n, client_id) else -1
    return client


@jit
def follow_frame(server: ServerState, owner: int, now: int, at: int, length: int, answer_at: int) -> int:
    """Apply a frame of another store and write the acknowledgment; return its words, 0 when it needs none."""
    words = server.words
    written = apply(
        server.shipping, words, owner, now // 1_000_000_000, server.receive_words, at + FRAME_HEADER_WORDS,
        length - FRAME_HEADER_WORDS, server.send_words, answer_at + FRAME_HEADER_WORDS,
    )  # fmt: skip
    if written == 0:
        return 0
    write_frame_header(server.send_words, answer_at, 1, written, ACKNOWLEDGES, words[EPOCH], U0, words[CLUSTER])
    return FRAME_HEADER_WORDS + written


@jit
def release_answers(server: ServerState, n: int) -> None:
    """Let go what a connection may be told by now; acknowledgments and refusals do not wait, once they are first in line."""
    connections, counts = server.connections, server.holds.counts
    if server.words[DIRTY_OFFSET] == U0:
        connections[n, RELEASED] = connections[n, ANSWERED]
        return
    end = let_go(server.holds, server.words, n, server.send_words)
    if counts[n, FIRST_FRAME] == counts[n, LAST_FRAME]:
        connections[n, RELEASED] = connections[n, ANSWERED]
    elif end >= 0:
        connections[n, RELEASED] = (end - n * (server.send_words.size // places(server))) * 8


@jit
def send_answers(server: ServerState, n: int) -> None:
    """Send what a connection has to send, as far as it is released and the peer takes it; a broken one is closed."""
    connections = server.connections
    start = n * (server.send_bytes.size // places(server))
    release_answers(server, n)
    if connections[n, SENT] < connections[n, RELEASED]:
        fd = connections[n, DESCRIPTOR]
        sent = send(fd, server.send_bytes, start + connections[n, SENT], start + connections[n, RELEASED])
        if sent < 0 and sent != -EAGAIN:
            disconnect(server, n)
            return
        connections[n, SENT] += max(sent, 0)
    if connections[n, SENT] == connections[n, ANSWERED]:
        connections[n, SENT], connections[n, RELEASED], connections[n, ANSWERED] = 0, 0, 0
        if connections[n, CLOSING] != 0:
            disconnect(server, n)


@jit
def converse(server: ServerState, owner: int, n: int) -> None:
    """Read, do and answer what a ready connection has.

    The clock is read after the requests: a process that was stopped before must find that its lease is over.
    """
    connections = server.connections
    size = server.receive_bytes.size // places(server)
    start = n * size
    if connections[n, SENT] == connections[n, RELEASED] and connections[n, RECEIVED] < size:
        got = recv(connections[n, DESCRIPTOR], server.receive_bytes, start + connections[n, RECEIVED], start + size)
        if got == 0 or (got < 0 and got != -EAGAIN):
            disconnect(server, n)
            return
        connections[n, RECEIVED] += max(got, 0)
    now = now_ns(server.scratch)
    connections[n, HEARD_NS] = now
    while connections[n, DESCRIPTOR] >= 0:
        before = connections[n, RECEIVED]
        answer_all(server, owner, n, now)
        send_answers(server, n)
        if connections[n, RECEIVED] == before or connections[n, ANSWERED] != 0:
            return


@jit
def replicate(server: ServerState, owner: int, now: int) -> None:
    """Ship what changed, and let go the answers that waited for it."""
    if server.words[DIRTY_OFFSET] == U0:
        return
    server.control[SEEN_IN_PLACE] = np.int64(load_acquire(server.words, IN_PLACE))
    exchange(server.links, server.shipping, server.words, owner, now, server.polled, places(server) + 2)
    if server.shipping.control[COMMITTED_MORE] != 0:
        server.shipping.control[COMMITTED_MORE] = 0
        wake_owners(server.words, server.bells)
    for n in range(places(server)):
        if server.connections[n, DESCRIPTOR] >= 0 and server.connections[n, ANSWERED] > 0:
            send_answers(server, n)
            if server.connections[n, DESCRIPTOR] >= 0 and server.connections[n, RECEIVED] > 0:
                converse(server, owner, n)


@jit
def sweep_step(server: ServerState, owner: int, now: int, most: int) -> None:
    """Sweep as many buckets as are due since the last step, at most `most`; what it is late with is not caught up."""
    words, control = server.words, server.control
    buckets, partitions = word(words, BUCKETS), word(words, PARTITION_COUNT)
    due = (now - control[SWEEP_NS]) // max(SWEEP_PASS_S * 1_000_000_000 // (buckets * partitions), 1)
    if due < SWEEP_BUCKETS_BUSY:
        return
    control[SWEEP_NS] = now
    left = min(due, most)
    while left > 0:
        step = min(left, buckets - control[SWEEP_DONE])
        sweep(words, owner, control[SWEEP_PARTITION], now // 1_000_000_000, step)
        left -= step
        control[SWEEP_DONE] += step
        if control[SWEEP_DONE] >= buckets:
            control[SWEEP_DONE] = 0
            control[SWEEP_PARTITION] = (control[SWEEP_PARTITION] + 1) % partitions


@jit
def wait(server: ServerState, timeout_ns: int) -> int:
    """Sleep until the door, a waker, a connection or a peer is ready, or time is up; return how many are.

    A connection waits for room to send while it has answers left that may go, else for input.
    """
    polled, connections = server.polled, server.connections
    polled[0], polled[1] = pollfd(server.control[DOOR], POLLIN), pollfd(server.control[WAKER], POLLIN)
    for n in range(places(server)):
        events = POLLOUT if connections[n, RELEASED] > connections[n, SENT] else POLLIN
        polled[n + 2] = pollfd(connections[n, DESCRIPTOR], events)
    used = poll_links(server.links, polled, places(server) + 2)
    for n in range(WAKERS):
        polled[used + n] = pollfd(server.wakers[n], POLLIN)
    polled[used + BELL] = pollfd(server.bells.control[0], POLLIN)
    if server.words[DIRTY_OFFSET] == U0:
        return int(poll(polled, used + WAKERS + 1, timeout_ns, server.scratch))
    now = now_ns(server.scratch)
    if not all_pause(server.links, now):  # else whoever rang would wake it for nothing
        fetch_add(server.words, STORE_ASLEEP, 1)
        if np.int64(load_acquire(server.words, IN_PLACE)) != server.control[SEEN_IN_PLACE]:
            timeout_ns = 0
    timeout_ns = min(timeout_ns, shortest_pause_ns(server.links, now))
    if server.shipping.control[NEWS_WAIT] != 0:
        server.shipping.control[NEWS_WAIT] = 0
        timeout_ns = min(timeout_ns, NEWS_AFTER_NS)
    if server.shipping.control[REFUSALS_WAIT] != 0:
        server.shipping.control[REFUSALS_WAIT] = 0
        timeout_ns = min(timeout_ns, REFUSED_AGAIN_NS)
    ready = int(poll(polled, used + WAKERS + 1, timeout_ns, server.scratch))
    server.words[STORE_ASLEEP] = U0
    if polled[used + BELL] >> 48 != 0:
        hear(server.bells)
    return ready


@jit
def serve(server: ServerState, owner: int, until_ns: int) -> int:
    """Serve clients until `until_ns` of CLOCK_MONOTONIC; return 1 earlier when door or waker have input or a peer is lost.

    Else 0. A signal also ends it early, so that Python can handle it. Sleeps in ppoll whenever there is nothing to do. However
    late it is, everybody is served once: where Python is always late for its next turn, nobody would be.
    """
    polled, connections = server.polled, server.connections
    now = now_ns(server.scratch)
    while True:
        ready = wait(server, max(until_ns - now, 0))
        if ready < 0:
            return 0
        now = now_ns(server.scratch)
        for n in range(places(server)):
            if polled[n + 2] >> 48 != 0 and connections[n, DESCRIPTOR] >= 0:
                if connections[n, ANSWERED] > 0:
                    send_answers(server, n)
                if connections[n, DESCRIPTOR] >= 0:
                    converse(server, owner, n)
        replicate(server, owner, now)
        sweep_step(server, owner, now, SWEEP_BUCKETS_BUSY if ready > 0 else SWEEP_BUCKETS_IDLE)
        if polled[0] >> 48 != 0 or polled[1] >> 48 != 0 or must_return(server):
            return 1
        now = now_ns(server.scratch)
        if now >= until_ns:
            return 0


@jit
def must_return(server: ServerState) -> bool:
    """Tell whether a waker has input, or a connection to a peer is lost: Python is to look."""
    last = places(server) + 2 + server.links.control.shape[0]
    for n in range(WAKERS):
        if server.polled[last + n] >> 48 != 0:
            return True
    lost = 0
    for peer in range(server.links.control.shape[0]):
        lost += server.links.control[peer, 0] < -1
    return lost > 0


def warm() -> None:
    """Compile the server: serve nobody for no time."""
    table = Table.private(PARTITIONS * 8, 8)
    serve(new_state(table.words, -1), 0, 0)
