"""The wire: every status, exactly once, and whatever bytes arrive."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.compiled import jit
from datastore.store import statuses
from datastore.store.layout import CLIENT_USED_S, CLUSTER, EPOCH, STATUS_COUNTS
from datastore.store.operations import ADD, ANY_VERSION, DELETE, GET, HELLO, INSERT, OPERATION_VALUE, PING, PUT
from datastore.store.protocol import (
    ANSWERS,
    FRAME_HEADER_WORDS,
    FRAME_OPERATIONS,
    LARGEST_FRAME_BYTES,
    LARGEST_OPERATION_BYTES,
    PROTOCOL_MAGIC,
    UNUSED_CLIENT_S,
    answer_frame,
    client_at,
    find_client,
    frame_words,
    hello,
    refuse_frame,
)
from datastore.store.statuses import (
    ABSENT,
    BAD_FRAME,
    BAD_OPERATION,
    EXISTS,
    NOT_PRIMARY,
    OK,
    OVERSIZED,
    STALE_EPOCH,
    STALE_SEQUENCE,
    TABLE_FULL,
    TOO_MANY_CLIENTS,
    UNKNOWN_PARTITION,
    VERSION_MISMATCH,
    WRONG_CLUSTER,
)
from datastore.store.table import Table

pytestmark = pytest.mark.bounds
NOW_S, CLIENT, OUR_CLUSTER, VALUE_WORDS = 1000, 77, 5, 2
WORDS = OPERATION_VALUE + VALUE_WORDS
_numbers = itertools.count()


class Wire:
    """A table, and frames that go straight into the compiled functions of the server."""

    def __init__(self, table: Table) -> None:
        self.table, self.words, self.owner = table, table.words, table.register_owner()
        self.connected = np.zeros(4, np.uint8)
        self.client = int(find_client(self.words, np.uint64(CLIENT), NOW_S, self.connected))

    def frame(self, *operations: list[int], words: int = WORDS, epoch: int = 1, client: int = CLIENT, cluster: int = OUR_CLUSTER):
        """Return the words of a frame of operations [opcode, value bytes, extra, sequence, low, high, stamp, values...]."""
        size = (FRAME_HEADER_WORDS + len(operations) * words) * 8
        frame = [PROTOCOL_MAGIC | size << 32, len(operations) | epoch << 32, client, cluster]
        for opcode, value_bytes, extra, *rest in operations:
            frame += [opcode | value_bytes << 16 | extra << 32, *rest, *[0] * (words - 1 - len(rest))]
        return np.array(frame, np.uint64)

    def ask(self, *operations: list[int], **options: int) -> list[tuple[int, int, list[int]]]:
        """Return (status, version, value words) of each operation's answer."""
        request = self.frame(*operations, **options)
        return self.answers(request)

    def answers(self, request: np.ndarray) -> list[tuple[int, int, list[int]]]:
        length = frame_words(request, 0, len(request), 0)
        assert length == len(request)
        answer = np.full(FRAME_HEADER_WORDS + 256 * WORDS, 0xDEAD, np.uint64)
        written = answer_frame(self.words, self.owner, self.client, NOW_S, request, 0, length, answer, 0)
        assert frame_words(answer, 0, written, ANSWERS) == written
        assert (answer[written:] == 0xDEAD).all()
        found = answer[FRAME_HEADER_WORDS:written].reshape(-1, WORDS)
        return [(int(a[0]) >> 8 & 0xFF, int(a[4]) >> 20, a[OPERATION_VALUE:].tolist()) for a in found]

    def count(self, status: int) -> int:
        return int(self.words[STATUS_COUNTS + status])


@pytest.fixture
def wire() -> Iterator[Wire]:
    table = Table.create(
        f"nearstate-test-{os.getpid()}-wire{next(_numbers)}", 28, VALUE_WORDS * 8, 2, cluster=OUR_CLUSTER, clients=4, window=8
    )
    for partition in range(2):
        table.set_role(partition, True, 1)
    yield Wire(table)
    table.close()
    table.unlink()


def put(sequence: int, low: int, version: int, *values: int) -> list[int]:
    return [PUT, len(values) * 8, 0, sequence, low, 9, version << 20, *values]


def insert(sequence: int, low: int, *values: int) -> list[int]:
    return [INSERT, len(values) * 8, 0, sequence, low, 9, 0, *values]


def add(sequence: int, low: int, delta: int, offset: int = 0) -> list[int]:
    return [ADD, 8, offset, sequence, low, 9, 0, delta]


def test_operations_of_one_frame_are_done_in_order(wire):
    assert wire.ask(
        [GET, 0, 0, 1, 0, 9, 0], insert(2, 0, 11, 12), insert(3, 0, 1), put(4, 0, 1, 13, 14), put(5, 0, 1, 0), add(6, 0, 2, 8),
        [DELETE, 0, 0, 7, 0, 9, 3 << 20], [GET, 0, 0, 8, 0, 9, 0], [PING, 0, 0, 9, 0, 0, 0],
    ) == [
        (ABSENT, 0, [0, 0]), (OK, 1, [11, 12]), (EXISTS, 1, [11, 12]), (OK, 2, [13, 14]), (VERSION_MISMATCH, 2, [13, 14]),
        (OK, 3, [13, 16]), (OK, 3, [13, 16]), (ABSENT, 0, [0, 0]), (OK, 0, [0, 0]),
    ]  # fmt: skip
    wire.table.verify()


def test_a_frame_of_reads_needs_no_room_for_values(wire):
    wire.ask(insert(1, 0, 5))
    assert wire.ask([GET, 0, 0, 2, 0, 9, 0], [GET, 0, 0, 3, 1, 9, 0], words=OPERATION_VALUE) == [
        (OK, 1, [5, 0]),
        (ABSENT, 0, [0, 0]),
    ]


def test_every_status_is_answered_counted_and_harms_nothing(wire):
    for low in range(14):
        wire.ask(insert(low + 1, low * 65536, 1))
    cases = [
        (UNKNOWN_PARTITION, [GET, 0, 0, 20, 99, 9, 0], {}),
        (ABSENT, [GET, 0, 0, 20, 1, 1, 0], {}),
        (ABSENT, put(20, 1, ANY_VERSION, 1), {}),
        (VERSION_MISMATCH, put(21, 0, 7, 1), {}),
        (EXISTS, insert(22, 0, 1), {}),
        (TABLE_FULL, insert(23, 14 * 65536, 1), {}),
        (OVERSIZED, [PUT, 24, 0, 24, 0, 9, 0, 1, 2, 3], {"words": WORDS + 1}),
        (UNKNOWN_PARTITION, [GET, 0, 0, 25, 2, 9, 0], {}),
        (UNKNOWN_PARTITION, insert(25, 65535, 1), {}),
        (STALE_EPOCH, insert(26, 1, 1), {"epoch": 0}),
        (STALE_EPOCH, [GET, 0, 0, 27, 0, 9, 0], {"epoch": 0}),
        (BAD_OPERATION, [0, 0, 0, 28, 0, 9, 0], {}),
        (BAD_OPERATION, [8, 0, 0, 28, 0, 9, 0], {}),
        (BAD_OPERATION, [HELLO, 0, 0, 28, 0, 9, 0], {}),
        (BAD_OPERATION, add(29, 0, 1, offset=4), {}),
        (BAD_OPERATION, add(30, 0, 1, offset=16), {}),
        (BAD_OPERATION, [PUT, 12, 0, 31, 0, 9, 0], {}),
        (BAD_OPERATION, [PUT, 32, 0, 31, 0, 9, 0], {}),
        (BAD_OPERATION, put(0, 0, 1, 1), {}),
        (BAD_OPERATION, put(31, 0, 1, 1), {"client": CLIENT + 1}),
        (STALE_SEQUENCE, put(14 - 8, 0, 1, 1), {}),
        (WRONG_CLUSTER, put(32, 0, 1, 1), {"cluster": 6}),
    ]
    for status, operation, options in cases:
        before = wire.count(status)
        assert wire.ask(operation, **options)[0][0] == status, (statuses.NAMES[status], operation)
        assert wire.count(status) == before + 1
        assert wire.ask([GET, 0, 0, 40, 0, 9, 0]) == [(OK, 1, [1, 0])]
    wire.table.set_role(1, False, 1)
    for operation in (insert(41, 1, 1), [GET, 0, 0, 42, 1, 9, 0]):
        assert wire.ask(operation)[0][0] == NOT_PRIMARY
    wire.table.verify()
    assert wire.table.count() == 14


def test_every_status_has_a_name_and_a_line():
    lines = {statuses.status_message(status) for status in range(statuses.STATUSES)}
    assert len(lines) == statuses.STATUSES == len(statuses.NAMES)
    assert all("\n" not in line and len(line) > 6 for line in lines)
    assert statuses.status_message(99) == "unknown status 99"


def test_a_repeated_operation_is_answered_from_its_completion_record(wire):
    frames = [insert(1, 0, 5), add(2, 0, 10), put(3, 0, 2, 50), put(4, 0, 1, 9), insert(5, 0, 1), add(6, 0, 1),
              [DELETE, 0, 0, 7, 0, 9, ANY_VERSION << 20]]  # fmt: skip
    first = [wire.ask(operation)[0] for operation in frames]
    assert [status for status, *_ in first] == [OK, OK, OK, VERSION_MISMATCH, EXISTS, OK, OK]
    assert [wire.ask(operation)[0] for operation in frames] == first
    assert wire.ask(*frames) == first
    assert wire.table.statistics()["counters"]["answered_again"] == 14
    assert wire.table.count() == 0


def test_sequence_numbers_behind_the_window_are_stale_and_reads_are_not_recorded(wire):
    for sequence in range(1, 20):
        assert wire.ask(add(sequence, 0, 1))[0][0] == OK
        assert wire.ask([GET, 0, 0, sequence + 100, 0, 9, 0])[0] == (OK, sequence, [sequence, 0])
    assert [wire.ask(add(sequence, 0, 1))[0][0] for sequence in (10, 11, 12)] == [STALE_SEQUENCE, STALE_SEQUENCE, OK]
    assert wire.ask([GET, 0, 0, 1, 0, 9, 0])[0] == (OK, 19, [19, 0])


def greet(wire: Wire, client_id: int, value_bytes: int = 16, window: int = 8, now_s: int = NOW_S) -> tuple[int, int, int]:
    """Return (status, value bytes, highest sequence number) of a HELLO."""
    request = wire.frame([HELLO, 0, value_bytes, 0, 0, 0, window], client=client_id)
    answer = np.zeros(WORDS, np.uint64)
    slot = int(find_client(wire.words, np.uint64(client_id), now_s, wire.connected))
    hello(wire.words, slot, request[3], request, FRAME_HEADER_WORDS, answer, 0)
    return int(answer[0]) >> 8 & 0xFF, int(answer[0]) >> 16 & 0xFFFF, int(answer[2])


def test_hello_tells_sizes_and_the_highest_completed_sequence(wire):
    assert greet(wire, CLIENT) == (OK, 16, 0)
    for sequence in (3, 9, 10):
        wire.ask(add(sequence, 0, 1))
    assert greet(wire, CLIENT) == (OK, 16, 10)
    assert greet(wire, 5, value_bytes=24)[:2] == (OVERSIZED, 16)
    assert greet(wire, 5, window=9)[0] == BAD_OPERATION
    assert greet(wire, 5, window=0)[0] == BAD_OPERATION


def test_client_slots_run_out_and_return_when_long_unused(wire):
    wire.connected[wire.client] = 1
    assert [greet(wire, n)[0] for n in (1, 2, 3, 4)] == [OK, OK, OK, TOO_MANY_CLIENTS]
    assert greet(wire, 2)[0] == OK
    later = NOW_S + UNUSED_CLIENT_S + 1
    wire.words[client_at_now(wire.words, 1) + CLIENT_USED_S] = later - 1
    assert greet(wire, 4, now_s=later)[0] == OK  # takes client 2's or 3's slot, the connected and the recent one stay
    assert int(find_client(wire.words, np.uint64(CLIENT), later, wire.connected)) == wire.client
    assert wire.words[client_at_now(wire.words, 1)] == 1


@jit
def client_at_now(words, client):
    return client_at(words, client)


def test_a_frame_waits_until_all_of_it_is_there(wire):
    frame = wire.frame(insert(1, 0, 5), insert(2, 1, 5))
    for end in range(len(frame)):
        assert frame_words(frame, 0, end, 0) == 0
    assert frame_words(frame, 0, len(frame), 0) == len(frame)
    assert frame_words(frame, 0, len(frame), ANSWERS) == -1


@pytest.mark.parametrize(
    ("word", "content"),
    [
        (0, 0), (0, PROTOCOL_MAGIC + 1 | 104 << 32), (0, PROTOCOL_MAGIC | 100 << 32), (0, PROTOCOL_MAGIC | 24 << 32),
        (0, PROTOCOL_MAGIC | LARGEST_FRAME_BYTES + 8 << 32), (0, PROTOCOL_MAGIC | 64 << 32), (0, PROTOCOL_MAGIC | 32 << 32),
        (1, 0), (1, 3), (1, FRAME_OPERATIONS + 1), (1, 1 | ANSWERS << 16), (1, 1 | 0x8000 << 16),
    ],
)  # fmt: skip
def test_what_is_no_frame_is_recognised(wire, word, content):
    frame = np.concatenate([wire.frame(insert(1, 0, 5)), np.zeros(100_000, np.uint64)])
    frame[word] = content
    assert frame_words(frame, 0, len(frame), 0) == -1
    answer = np.zeros(FRAME_HEADER_WORDS + WORDS, np.uint64)
    assert refuse_frame(wire.words, answer, 0) == len(answer)
    assert int(answer[FRAME_HEADER_WORDS]) >> 8 & 0xFF == BAD_FRAME
    assert wire.count(BAD_FRAME) == 1


def test_fuzzed_frames_neither_escape_nor_harm(wire):
    """10,000 frames of valid outline and random operations, as many mutated and cut: no access outside, table whole.

    The request buffer ends where the frame does, so with bounds checks on a read behind it raises.
    """
    rng = np.random.default_rng(11)
    answer = np.zeros(FRAME_HEADER_WORDS + FRAME_OPERATIONS * WORDS, np.uint64)
    served = refused = 0
    for turn in range(20_000):
        count, words = int(rng.integers(1, 6)), int(rng.integers(OPERATION_VALUE, WORDS + 2))
        body = rng.integers(0, 2**64 - 1, count * words, np.uint64, endpoint=True)
        head = body.reshape(count, words)
        head[:, 0] &= np.uint64(0x0000001F_00180007)  # opcodes 0 to 7, value bytes 0 to 24, extra 0 to 31
        head[:, 1] %= np.uint64(64)
        head[:, 2] %= np.uint64(4)
        head[:, 3] %= np.uint64(8)
        size = (FRAME_HEADER_WORDS + count * words) * 8
        frame = np.concatenate([np.array([PROTOCOL_MAGIC | size << 32, count | 1 << 32, CLIENT, OUR_CLUSTER], np.uint64), body])
        if turn % 2:
            mutated = frame.view(np.uint8)
            for _ in range(int(rng.integers(1, 4))):
                mutated[rng.integers(0, min(len(mutated), 48))] = rng.integers(0, 256)
            frame = frame[: int(rng.integers(0, len(frame) + 1))].copy()
        length = frame_words(frame, 0, len(frame), 0)
        assert -1 <= length <= len(frame)
        if length <= 0:
            refused += 1
            continue
        written = answer_frame(wire.words, wire.owner, wire.client, NOW_S, frame, 0, length, answer, 0)
        assert frame_words(answer, 0, written, ANSWERS) == written
        served += 1
    assert served > 9000
    assert refused > 1000
    assert wire.words[CLUSTER] == OUR_CLUSTER
    assert wire.words[EPOCH] == 1
    wire.table.verify()
    assert wire.table.count() > 0


@given(st.lists(st.integers(0, 2**64 - 1), max_size=40))
def test_random_words_are_no_frame(content):
    buffer = np.array(content, np.uint64)
    length = frame_words(buffer, 0, len(buffer), 0)
    assert length == (-1 if content and content[0] & 0xFFFFFFFF != PROTOCOL_MAGIC else length)
    assert length <= len(buffer)


def test_the_largest_operation_holds_the_largest_value():
    assert LARGEST_OPERATION_BYTES == 40 + 1024
