"""How does a process reach records on other hosts?

A client keeps, per store host, a window of operations that are not answered yet. They are built in place as they go onto the
wire, framed and sent together by `flush`, and overwritten by their answers:

    request ...  request        queue operations                            sequence numbers, in order
    flush                       frame and send what is queued               never waits
    receive                     read answers into the window                never waits
    next_answer                 hand out answers in the order of requests   until -1

A window slot belongs to its operation until the `next_answer` after the one that handed it out. After a lost connection
`Client.reconnect` sends everything unanswered again, under the same sequence numbers: the store does nothing twice.

Where stores replicate, another one may take over in between. An operation is known there by its sequence number and its *stream*,
the client's id at the store that was asked first: `request_again` asks the other store under these, and whichever of the two did
it, it is done once.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import Any, NamedTuple

import numpy as np

from datastore.base.errors import NearstateError
from datastore.compiled import inline, jit
from datastore.compiled.libc import EAGAIN, ECONNRESET, recv, send
from datastore.compiled.memory import copy
from datastore.security.challenge import Distrust, prove
from datastore.security.secret import STORE, Credential
from datastore.store.layout import EXPIRY_BITS, EXPIRY_MASK
from datastore.store.operations import (
    ADD,
    ANY_VERSION,
    DELETE,
    GET,
    HELLO,
    INSERT,
    KEY_HIGH,
    KEY_LOW,
    OPERATION_STAMP,
    OPERATION_VALUE,
    PING,
    PUT,
    SEQUENCE,
    operation_word,
)
from datastore.store.protocol import (
    ANSWERS,
    FRAME_HEADER_WORDS,
    FRAME_OPERATIONS,
    LARGEST_FRAME_BYTES,
    PROTOCOL_MAGIC,
    frame_epoch,
    frame_operations,
    frame_words,
    write_frame_header,
)
from datastore.store.statuses import NOT_PRIMARY, OK, status_message

EPROTO = 71
DEFAULT_WINDOW = 1024

# What a row of `control` holds. Sequence numbers: the next to give, the first not framed, the first not answered, the first
# not released. Bytes: received, framed and sent of the buffers.
DESCRIPTOR, NEXT, FRAMED, ANSWERED, RELEASED, HANDED, RECEIVED, TO_SEND, SENT, STORE_EPOCH = range(10)
CONTROL_FIELDS = 16


class ClientState(NamedTuple):
    """Everything the compiled functions work on; one row, or one stretch of a flat array, per host."""

    control: np.ndarray
    """int64[hosts, CONTROL_FIELDS]"""
    limits: np.ndarray
    """int64[4]: window, operation words, send buffer words, receive buffer words"""
    identity: np.ndarray
    """uint64[3]: client id, cluster id, epoch of the partition map"""
    window: np.ndarray
    """uint64[hosts * window * operation words]"""
    tags: np.ndarray
    """int64[hosts * window]: what the caller wants to know again when the answer comes"""
    streams: np.ndarray
    """uint64[hosts * window]: under which client id the operation was asked first"""
    deltas: np.ndarray
    """uint64[hosts * window]: first value word as it was asked; the answer overwrites the operation"""
    send_words: np.ndarray
    send_bytes: np.ndarray
    receive_words: np.ndarray
    receive_bytes: np.ndarray


WINDOW, OPERATION_WORDS, SEND_WORDS, RECEIVE_WORDS = range(4)
CLIENT, CLUSTER, EPOCH = range(3)


def new_state(hosts: int, client_id: int, value_bytes: int, cluster: int, epoch: int, window: int) -> ClientState:
    """Return the state of a client without connections."""
    operation_words = OPERATION_VALUE + value_bytes // 8
    buffer_words = 2 * (FRAME_HEADER_WORDS + FRAME_OPERATIONS * operation_words)
    control = np.zeros((hosts, CONTROL_FIELDS), np.int64)
    control[:, DESCRIPTOR] = -1
    for field in (NEXT, FRAMED, ANSWERED, RELEASED):
        control[:, field] = 1
    sending, receiving = np.zeros(hosts * buffer_words, np.uint64), np.zeros(hosts * buffer_words, np.uint64)
    return ClientState(
        control,
        np.array([window, operation_words, buffer_words, buffer_words], np.int64),
        np.array([client_id, cluster, epoch], np.uint64),
        np.zeros(hosts * window * operation_words, np.uint64),
        np.zeros(hosts * window, np.int64),
        np.zeros(hosts * window, np.uint64),
        np.zeros(hosts * window, np.uint64),
        sending,
        sending.view(np.uint8),
        receiving,
        receiving.view(np.uint8),
    )


@inline
def slot_at(client: ClientState, host: int, slot: int) -> Any:
    """Return the index in `client.window` of the operation in a window slot."""
    return (host * client.limits[WINDOW] + slot) * client.limits[OPERATION_WORDS]


@inline
def room(client: ClientState, host: int) -> Any:
    """Return how many operations can be queued before an answer must be taken."""
    return client.limits[WINDOW] - (client.control[host, NEXT] - client.control[host, RELEASED])


@inline
def stream_of(client: ClientState, host: int) -> Any:
    """Return the id, as uint64, under which this client is known for what it asks `host` first."""
    return client.identity[CLIENT] + (np.uint64(host) << np.uint64(32))


@inline
def unanswered(client: ClientState, host: int) -> Any:
    """Return how many operations wait for their answers."""
    return client.control[host, NEXT] - client.control[host, ANSWERED]


@jit
def request(
    client: ClientState, host: int, opcode: int, key_low: int, key_high: int, stamp: int, values: np.ndarray, value_at: int,
    tag: int, extra: int = 0,
) -> int:  # fmt: skip
    """Queue an operation; return its sequence number, or -1 when the window is full.

    key_low, key_high, stamp: uint64. values: uint64[n], the value's words from `value_at` on; ADD takes one, the delta, for
    the field at byte `extra`; GET, DELETE and PING none. tag: any number, `answer_tag` returns it.
    """
    if room(client, host) <= 0:
        return -1
    stream = stream_of(client, host)
    return queue(client, host, opcode, key_low, key_high, stamp, values, value_at, tag, extra, client.control[host, NEXT], stream)


@jit
def request_again(
    client: ClientState, host: int, opcode: int, key_low: int, key_high: int, stamp: int, values: np.ndarray, tag: int,
    extra: int, sequence: int, stream: int,
) -> int:  # fmt: skip
    """`request` of another store what one did not answer for good; sequence, stream: as they were, `answer_sequence` tells."""
    if room(client, host) <= 0:
        return -1
    return queue(client, host, opcode, key_low, key_high, stamp, values, 0, tag, extra, sequence, stream)


@jit
def queue(
    client: ClientState, host: int, opcode: int, key_low: int, key_high: int, stamp: int, values: np.ndarray, value_at: int,
    tag: int, extra: int, sequence: int, stream: int,
) -> int:  # fmt: skip
    """Write an operation into the next window slot; there is room."""
    slot = client.control[host, NEXT] % client.limits[WINDOW]
    at = slot_at(client, host, slot)
    value_words = client.limits[OPERATION_WORDS] - OPERATION_VALUE
    given = value_words if opcode in (PUT, INSERT) else 1 if opcode == ADD else 0
    client.window[at] = operation_word(opcode, 0, given * 8, extra)
    client.window[at + SEQUENCE] = np.uint64(sequence)
    client.window[at + KEY_LOW], client.window[at + KEY_HIGH] = np.uint64(key_low), np.uint64(key_high)
    client.window[at + OPERATION_STAMP] = np.uint64(stamp)
    for n in range(value_words):
        client.window[at + OPERATION_VALUE + n] = values[value_at + n] if n < given else np.uint64(0)
    client.tags[host * client.limits[WINDOW] + slot] = tag
    client.streams[host * client.limits[WINDOW] + slot] = np.uint64(stream)
    client.deltas[host * client.limits[WINDOW] + slot] = client.window[at + OPERATION_VALUE] if value_words > 0 else np.uint64(0)
    client.control[host, NEXT] += 1
    return sequence


@inline
def given_words(client: ClientState, at: int) -> Any:
    """Return how many value words the operation at `client.window[at]` brings along."""
    return np.int64(client.window[at] >> np.uint64(16) & np.uint64(0xFFFF)) >> 3


@jit
def of_one_stream(client: ClientState, host: int, count: int) -> int:
    """Return how many of the next `count` operations to be framed have the first one's stream."""
    window, first = client.limits[WINDOW], client.control[host, FRAMED]
    for n in range(1, count):
        if client.streams[host * window + (first + n) % window] != client.streams[host * window + first % window]:
            return n
    return count


@jit
def frame_queued(client: ClientState, host: int) -> None:
    """Append what is queued to the send buffer, as one frame, as far as there is room.

    On the wire all operations of a frame are as long as the longest: a frame of GETs carries no values. They are of one stream.
    """
    control, limits, window = client.control, client.limits, client.limits[WINDOW]
    start = control[host, TO_SEND] >> 3
    space = (limits[SEND_WORDS] - start - FRAME_HEADER_WORDS) // limits[OPERATION_WORDS]
    count = of_one_stream(client, host, min(control[host, NEXT] - control[host, FRAMED], FRAME_OPERATIONS, space))
    if count <= 0:
        return
    longest = 0
    for sequence in range(control[host, FRAMED], control[host, FRAMED] + count):
        longest = max(longest, given_words(client, slot_at(client, host, sequence % window)))
    operation_words = OPERATION_VALUE + longest
    at = host * limits[SEND_WORDS] + start
    identity = client.identity
    epoch, stream = np.int64(identity[EPOCH]), client.streams[host * window + control[host, FRAMED] % window]
    write_frame_header(client.send_words, at, count, operation_words, 0, epoch, stream, identity[CLUSTER])
    at += FRAME_HEADER_WORDS
    for sequence in range(control[host, FRAMED], control[host, FRAMED] + count):
        copy(client.send_words, at, client.window, slot_at(client, host, sequence % window), operation_words)
        at += operation_words
    control[host, FRAMED] += count
    control[host, TO_SEND] += (FRAME_HEADER_WORDS + count * operation_words) * 8


@jit
def flush(client: ClientState, host: int) -> int:
    """Frame and send what is queued, without waiting; return 0, or minus the error number when the connection is lost.

    What the socket does not take now goes out with the next flush.
    """
    control = client.control
    start = host * client.limits[SEND_WORDS] * 8
    while True:
        if control[host, SENT] == control[host, TO_SEND]:
            control[host, SENT], control[host, TO_SEND] = 0, 0
            frame_queued(client, host)
            if control[host, TO_SEND] == 0:
                return 0
        sent = send(control[host, DESCRIPTOR], client.send_bytes, start + control[host, SENT], start + control[host, TO_SEND])
        if sent < 0:
            return 0 if sent == -EAGAIN else sent
        control[host, SENT] += sent


@jit
def take_frame(client: ClientState, host: int, at: int, length: int) -> bool:
    """Copy a frame's answers over their operations; return False when they are not the answers that are due."""
    control, limits = client.control, client.limits
    operation_words, buffer = limits[OPERATION_WORDS], client.receive_words
    count = frame_operations(buffer, at)
    if length != FRAME_HEADER_WORDS + count * operation_words or count > control[host, FRAMED] - control[host, ANSWERED]:
        return False
    control[host, STORE_EPOCH] = frame_epoch(buffer, at)
    at += FRAME_HEADER_WORDS
    for _ in range(count):
        position = control[host, ANSWERED]
        target = slot_at(client, host, position % limits[WINDOW])
        if buffer[at + SEQUENCE] != client.window[target + SEQUENCE]:
            return False
        client.window[target] = buffer[at]
        for n in range(OPERATION_STAMP, operation_words):
            client.window[target + n] = buffer[at + n]
        control[host, ANSWERED] = position + 1
        at += operation_words
    return True


@jit
def give_up(client: ClientState, host: int, status: int) -> None:
    """Have everything unanswered of a host that cannot be reached read as answered with `status`."""
    control = client.control
    for position in range(control[host, ANSWERED], control[host, NEXT]):
        at = slot_at(client, host, position % client.limits[WINDOW])
        client.window[at] = client.window[at] & ~np.uint64(0xFF00) | np.uint64(status) << np.uint64(8)
    control[host, ANSWERED] = control[host, FRAMED] = control[host, NEXT]
    for field in (RECEIVED, TO_SEND, SENT):
        control[host, field] = 0


@jit
def receive(client: ClientState, host: int) -> int:
    """Read the answers that are there, without waiting; return how many can be taken.

    Minus the error number when the connection is lost (ECONNRESET also when the store closed it, EPROTO when it answered
    something else than asked): then reconnect.
    """
    control = client.control
    size = client.limits[RECEIVE_WORDS]
    start = host * size
    got = recv(control[host, DESCRIPTOR], client.receive_bytes, start * 8 + control[host, RECEIVED], (start + size) * 8)
    if got == 0:
        return -ECONNRESET
    if got < 0:
        return control[host, ANSWERED] - control[host, RELEASED] - control[host, HANDED] if got == -EAGAIN else got
    control[host, RECEIVED] += got
    at, end = start, start + (control[host, RECEIVED] >> 3)
    while at < end:
        length = frame_words(client.receive_words, at, end, ANSWERS)
        if length == 0:
            break
        if length < 0 or not take_frame(client, host, at, length):
            return -EPROTO
        at += length
    rest = control[host, RECEIVED] - (at - start) * 8
    if at > start and rest > 0:
        copy(client.receive_bytes, start * 8, client.receive_bytes, at * 8, rest)
    control[host, RECEIVED] = rest
    return control[host, ANSWERED] - control[host, RELEASED] - control[host, HANDED]


@jit
def next_answer(client: ClientState, host: int) -> int:
    """Release the answer handed out last; return the window slot of the next one, or -1 when there is none."""
    control = client.control
    control[host, RELEASED] += control[host, HANDED]
    control[host, HANDED] = 0
    if control[host, RELEASED] >= control[host, ANSWERED]:
        return -1
    control[host, HANDED] = 1
    return control[host, RELEASED] % client.limits[WINDOW]


@inline
def answer_tag(client: ClientState, host: int, slot: int) -> Any:
    """Return the tag the request was given."""
    return client.tags[host * client.limits[WINDOW] + slot]


@inline
def answer_sequence(client: ClientState, host: int, slot: int) -> Any:
    """Return the sequence number (int64) of the operation in a window slot."""
    return np.int64(client.window[slot_at(client, host, slot) + SEQUENCE])


@inline
def answer_stream(client: ClientState, host: int, slot: int) -> Any:
    """Return the stream (uint64) of the operation in a window slot."""
    return client.streams[host * client.limits[WINDOW] + slot]


@inline
def answer_status(client: ClientState, host: int, slot: int) -> Any:
    """Return the status (int64) of the answer in a window slot."""
    return np.int64(client.window[slot_at(client, host, slot)] >> np.uint64(8) & np.uint64(0xFF))


@inline
def answer_stamp(client: ClientState, host: int, slot: int) -> Any:
    """Return the record's stamp (uint64): version << 20 | expiry."""
    return client.window[slot_at(client, host, slot) + OPERATION_STAMP]


@inline
def answer_value_at(client: ClientState, host: int, slot: int) -> Any:
    """Return the index in `client.window` where the answer's value begins."""
    return slot_at(client, host, slot) + OPERATION_VALUE


@jit
def send_again(client: ClientState, host: int) -> None:
    """Forget what is half sent and half received: everything unanswered is framed anew by the next flush."""
    control = client.control
    control[host, FRAMED] = control[host, ANSWERED]
    for field in (RECEIVED, TO_SEND, SENT):
        control[host, field] = 0


@jit
def skip_to(client: ClientState, host: int, sequence: int) -> None:
    """Let numbering begin at `sequence`; only while nothing is under way."""
    for field in (NEXT, FRAMED, ANSWERED, RELEASED):
        client.control[host, field] = sequence
    client.control[host, HANDED] = 0


class StoreClosed(NearstateError):
    """The store closed the connection, or it broke."""


class Answer(NamedTuple):
    """What the store said. status: see `statuses`. value: bytes of the record after the operation (all zero without one)."""

    status: int
    version: int
    expiry: int
    value: bytes


class Client:
    """Connections of one process to the stores at `addresses`: `state` for compiled code, blocking calls for tools."""

    def __init__(
        self, addresses: list[tuple[str, int]], client_id: int, value_bytes: int, cluster: int = 0, epoch: int = 1,
        window: int = DEFAULT_WINDOW, timeout_s: float = 5.0, credential: Credential | None = None,
    ) -> None:  # fmt: skip
        """client_id: 1 to 2^32 - 1, of this process alone. window: at most the stores'. timeout_s: for every blocking step.
        credential: of this client id; without one nothing can be connected."""
        self.addresses, self.value_bytes, self.timeout_s, self._credential = addresses, value_bytes, timeout_s, credential
        self.state = new_state(len(addresses), client_id, value_bytes, cluster, epoch, window)
        self._sockets: list[socket.socket | None] = [None] * len(addresses)

    def connect(self, host: int = 0) -> None:
        """Connect to a store and say HELLO; raises NearstateError when it cannot be reached or refuses."""
        self.disconnect(host)
        self.take_connection(host, *self.dial(host))

    def dial(self, host: int) -> tuple[socket.socket, int]:
        """Make a connection for `take_connection`; may run in another thread. Raises NearstateError as `connect`."""
        address, port = self.addresses[host]
        if self._credential is None:
            raise NearstateError(f"client without a credential cannot connect to {address}:{port}: give it one of the secret's")
        try:
            connection = socket.create_connection((address, port), self.timeout_s)
        except OSError as error:
            raise StoreClosed(
                f"no store answers at {address}:{port} ({error.strerror or error}): is its process running there?"
            ) from None
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._prove(connection, f"store at {address}:{port}")
            highest = self._greet(connection, f"store at {address}:{port}", host)
        except BaseException:
            connection.close()
            raise
        connection.setblocking(False)
        return connection, highest

    def _prove(self, connection: socket.socket, store: str) -> None:
        """Answer the store's challenge. Raises NearstateError when it proves nothing, StoreClosed when it is lost."""
        assert self._credential
        try:
            prove(connection, self._credential, STORE, timeout_s=self.timeout_s)
        except Distrust as error:
            raise NearstateError(f"{store}: {error}") from None
        except OSError as error:
            raise StoreClosed(f"{store} did not answer the challenge: {error}") from None

    def take_connection(self, host: int, connection: socket.socket, highest: int) -> None:
        """Use a connection that `dial` made from now on. highest: the sequence number that the store told."""
        self.disconnect(host)
        self._sockets[host] = connection
        self.state.control[host, DESCRIPTOR] = connection.fileno()
        send_again(self.state, host)
        if unanswered(self.state, host) == 0 and highest >= self.state.control[host, NEXT]:
            skip_to(self.state, host, highest + 1)

    def _greet(self, connection: socket.socket, store: str, host: int) -> int:
        """Exchange HELLO; return the highest sequence number the store has completed for this client."""
        client, cluster, epoch = self.state.identity
        client += np.uint64(host) << np.uint64(32)
        frame = np.zeros(FRAME_HEADER_WORDS + OPERATION_VALUE, np.uint64)
        write_frame_header_now(frame, 0, 1, OPERATION_VALUE, 0, int(epoch), client, cluster)
        frame[FRAME_HEADER_WORDS] = HELLO | self.value_bytes << 32
        frame[FRAME_HEADER_WORDS + OPERATION_STAMP] = self.state.limits[WINDOW]
        connection.sendall(frame.tobytes())
        try:
            header = np.frombuffer(_receive_exactly(connection, FRAME_HEADER_WORDS * 8), np.uint64)
            frame_bytes = int(header[0]) >> 32
            shortest = (FRAME_HEADER_WORDS + OPERATION_VALUE) * 8
            if int(header[0]) & 0xFFFFFFFF != PROTOCOL_MAGIC or not shortest <= frame_bytes <= LARGEST_FRAME_BYTES:
                raise NearstateError(f"{store} does not speak this protocol: is it another program?")
            body = np.frombuffer(_receive_exactly(connection, frame_bytes - FRAME_HEADER_WORDS * 8), np.uint64)
        except OSError as error:
            raise StoreClosed(f"{store} did not answer HELLO: {error}") from None
        status, value_bytes = int(body[0]) >> 8 & 0xFF, int(body[0]) >> 16 & 0xFFFF
        if status != OK:
            raise NearstateError(f"{store} refuses this client (cluster {int(cluster)}): {status_message(status)}")
        if value_bytes != self.value_bytes:
            raise NearstateError(
                f"{store} keeps values of {value_bytes} bytes, this client {self.value_bytes}: use the same record on both sides"
            )
        return int(body[KEY_LOW])

    def reconnect(self, host: int = 0, attempts: int = 20, pause_s: float = 0.01) -> None:
        """Connect anew, with growing pauses up to half a second; everything unanswered goes out with the next `flush`."""
        for attempt in range(attempts):
            try:
                self.connect(host)
                return
            except StoreClosed:
                if attempt + 1 == attempts:
                    raise
            time.sleep(min(pause_s * 2**attempt, 0.5))

    def disconnect(self, host: int = 0) -> None:
        """Close the connection to a store; unanswered operations stay in the window."""
        connection, self._sockets[host] = self._sockets[host], None
        if connection is not None:
            connection.close()
        self.state.control[host, DESCRIPTOR] = -1

    def close(self) -> None:
        """Close all connections."""
        for host in range(len(self._sockets)):
            self.disconnect(host)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- one operation at a time, for tools and tests -----------------------------------------------------------------

    def get(self, low: int, high: int, host: int = 0) -> Answer:
        """Return the record of a key."""
        return self.call(GET, low, high, host=host)

    def put(self, low: int, high: int, value: bytes, version: int = ANY_VERSION, expiry: int = 0, host: int = 0) -> Answer:
        """Write a record if its version still is `version`. expiry: second of CLOCK_MONOTONIC modulo 2^20; 0: never."""
        return self.call(PUT, low, high, version << EXPIRY_BITS | expiry, value, host=host)

    def insert(self, low: int, high: int, value: bytes, expiry: int = 0, host: int = 0) -> Answer:
        """Write a record if there is none."""
        return self.call(INSERT, low, high, expiry, value, host=host)

    def add(self, low: int, high: int, offset: int, delta: int, expiry: int = 0, host: int = 0) -> Answer:
        """Add `delta` to the 64-bit field at byte `offset` of a record, made if there is none."""
        return self.call(ADD, low, high, expiry, (delta & 2**64 - 1).to_bytes(8, "little"), offset, host)

    def delete(self, low: int, high: int, version: int = ANY_VERSION, host: int = 0) -> Answer:
        """Remove a record if its version still is `version`; answers what it was."""
        return self.call(DELETE, low, high, version << EXPIRY_BITS, host=host)

    def ping(self, host: int = 0) -> Answer:
        """Ask the store whether it is there."""
        return self.call(PING, 0, 0, host=host)

    def call(self, opcode: int, low: int, high: int, stamp: int = 0, value: bytes = b"", extra: int = 0, host: int = 0) -> Answer:
        """Do one operation and wait for its answer; raises NearstateError when the store is gone or silent."""
        if len(value) > self.value_bytes:
            raise NearstateError(f"value of {len(value)} bytes: the records have {self.value_bytes}")
        values = np.frombuffer(value.ljust(max(self.value_bytes, 8), b"\0"), np.uint64).copy()
        state = self.state
        request(state, host, opcode, np.uint64(low), np.uint64(high), np.uint64(stamp), values, 0, 0, extra)
        self.exchange(host)
        slot = -1
        while (following := next_answer(state, host)) >= 0:
            slot = following
            at = int(answer_at_now(state, host, slot))
            answer = state.window[at : at + OPERATION_VALUE + self.value_bytes // 8].copy()
        if slot < 0:
            raise NearstateError("no answer to take: answers were taken by somebody else")
        stamp = int(answer[OPERATION_STAMP])
        mask = int(EXPIRY_MASK)
        status = int(answer[0]) >> 8 & 0xFF
        return Answer(status, stamp >> EXPIRY_BITS, stamp & mask, answer[OPERATION_VALUE:].tobytes())

    def exchange(self, host: int = 0) -> None:
        """Send everything queued and wait until all of it is answered (the answers are left to take)."""
        deadline = time.monotonic() + self.timeout_s
        address = "{}:{}".format(*self.addresses[host])
        while True:
            error = flush(self.state, host)
            if error >= 0:
                error = receive(self.state, host)
            if error < 0:
                raise StoreClosed(f"connection to the store at {address} is lost: error {-error}; reconnect")
            if unanswered_now(self.state, host) == 0:
                return
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise NearstateError(f"the store at {address} did not answer within {self.timeout_s:g} s")
            descriptor = int(self.state.control[host, DESCRIPTOR])
            with contextlib.suppress(InterruptedError):
                select.select([descriptor], [descriptor] if self._blocked(host) else [], [], left_s)

    def _blocked(self, host: int) -> bool:
        return bool(self.state.control[host, TO_SEND] > self.state.control[host, SENT])


@jit
def write_frame_header_now(
    buffer: np.ndarray, at: int, operations: int, operation_words: int, flags: int, epoch: int, client: int, cluster: int
) -> None:
    """`write_frame_header`, to be called from Python."""
    write_frame_header(buffer, at, operations, operation_words, flags, epoch, client, cluster)


@jit
def answer_at_now(client: ClientState, host: int, slot: int) -> int:
    """`slot_at`, to be called from Python."""
    return int(slot_at(client, host, slot))


@jit
def unanswered_now(client: ClientState, host: int) -> int:
    """`unanswered`, to be called from Python."""
    return int(unanswered(client, host))


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionResetError("it closed the connection")
        received += part
    return received


def warm() -> None:
    """Load what Python calls of connections that are made, lost and given up."""
    state = Client([("127.0.0.1", 1)], 1, 8).state
    client, cluster, epoch = state.identity
    write_frame_header_now(np.zeros(FRAME_HEADER_WORDS, np.uint64), 0, 1, OPERATION_VALUE, 0, int(epoch), client, cluster)
    send_again(state, 0)
    skip_to(state, 0, 1 + unanswered(state, 0))
    give_up(state, 0, NOT_PRIMARY)
