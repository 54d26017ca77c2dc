"""The table: against a dictionary, from several processes at once, and killed at any instruction."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.base.errors import NearstateError
from datastore.compiled import jit
from datastore.store import layout, locking, records, statuses
from datastore.store.layout import REMOVE, STAMP, UNDO, VALUE
from datastore.store.operations import ADD, ANY_VERSION, DELETE, GET, OPERATION_VALUE, PUT, execute, operation_word
from datastore.store.operations import INSERT as INSERT_IF_ABSENT
from datastore.store.records import abort_record, commit_record, is_new, open_record, sweep
from datastore.store.statuses import ABSENT, EXISTS, OK, TABLE_FULL, VERSION_MISMATCH
from datastore.store.table import Table

pytestmark = pytest.mark.bounds
NOW_S = 5000
HIGH = np.uint64(0x0A000001_0A000002)
_numbers = itertools.count()


@pytest.fixture
def make_table() -> Iterator[Callable[..., Table]]:
    """Make tables in shared memory, primary of all their partitions; they are gone afterwards."""
    made: list[Table] = []

    def make(capacity: int = 1024, value_bytes: int = 32, partitions: int = 4, **options: int) -> Table:
        name = f"nearstate-test-{os.getpid()}-{next(_numbers)}"
        made.append(Table.create(name, capacity, value_bytes, partitions, **options))
        for partition in range(partitions):
            made[-1].set_role(partition, True, options.get("epoch", 1))
        return made[-1]

    yield make
    for each in made:
        each.close()
        each.unlink()


def key(number: int, partitions: int = 4) -> np.uint64:
    return np.uint64(number << 32 | number % partitions)


def opened(table: Table, owner: int, low: int, now_s: int = NOW_S, epoch: int = 1) -> int:
    return int(open_record(table.words, owner, np.uint64(low), HIGH, epoch, now_s))


def write(table: Table, owner: int, low: int, values: list[int], expires_s: int = 0, now_s: int = NOW_S) -> int:
    """Write a record in place; return what commit_record says."""
    slot = opened(table, owner, low, now_s)
    assert slot > 0, statuses.status_message(-slot)
    table.words[slot + VALUE : slot + VALUE + len(values)] = values
    return int(commit_record(table.words, owner, slot, expires_s))


class Operator:
    """A remote client's operations, straight on the table."""

    def __init__(self, table: Table) -> None:
        self.table, self.owner, self.sequence = table, table.register_owner(), 0

    def __call__(self, opcode: int, low: int, stamp: int = 0, values: tuple[int, ...] = (), extra: int = 0, now_s: int = NOW_S):
        """Return (status, version, value words)."""
        self.sequence += 1
        words = OPERATION_VALUE + self.table.value_bytes // 8
        request, answer = np.zeros(words, np.uint64), np.zeros(words, np.uint64)
        request[0] = operation_word_now(opcode, len(values) * 8, extra)
        request[1:5] = self.sequence, low, HIGH, stamp
        request[OPERATION_VALUE : OPERATION_VALUE + len(values)] = values
        execute(self.table.words, self.owner, 0, 1, now_s, request, 0, words, answer, 0)
        return int(answer[0]) >> 8 & 0xFF, int(answer[4]) >> 20, tuple(map(int, answer[OPERATION_VALUE:]))


@jit
def operation_word_now(opcode: int, value_bytes: int, extra: int):
    return operation_word(opcode, 0, value_bytes, extra)


# ---- one process --------------------------------------------------------------------------------------------------------


def test_a_new_record_reads_zero_and_is_kept_only_when_changed(make_table):
    table = make_table()
    owner = table.register_owner()
    slot = opened(table, owner, key(1))
    assert is_new_now(table.words, slot)
    assert not table.words[slot + VALUE : slot + VALUE + 4].any()
    assert commit_record(table.words, owner, slot, 0) == 0
    assert table.count() == 0
    assert write(table, owner, key(1), [7]) == 1
    slot = opened(table, owner, key(1))
    assert not is_new_now(table.words, slot)
    assert table.words[slot + VALUE] == 7
    assert commit_record(table.words, owner, slot, 0) == 0
    assert [(r.version, r.expires_in_s) for r in table.records()] == [(1, None)]
    table.verify()


@jit
def is_new_now(words, slot):
    return is_new(words, slot)


def test_abort_puts_the_record_back(make_table):
    table = make_table()
    owner = table.register_owner()
    write(table, owner, key(1), [1, 2, 3, 4])
    for low in (key(1), key(2)):
        slot = opened(table, owner, low)
        table.words[slot + VALUE : slot + VALUE + 4] = 9
        abort_record(table.words, owner, slot)
    assert [np.frombuffer(r.value, np.uint64).tolist() for r in table.records()] == [[1, 2, 3, 4]]
    table.verify()


def test_an_unchanged_record_takes_a_new_expiry_but_keeps_its_version(make_table):
    table = make_table()
    owner = table.register_owner()
    write(table, owner, key(1), [1], expires_s=NOW_S + 10)
    slot = opened(table, owner, key(1))
    assert commit_record(table.words, owner, slot, NOW_S + 99) == 0
    slot = opened(table, owner, key(1), NOW_S + 50)
    assert table.words[slot + VALUE] == 1
    assert table.words[slot + STAMP] >> 20 == 1
    abort_record(table.words, owner, slot)


@pytest.mark.parametrize("now_s", [NOW_S, (1 << 20) - 3, (1 << 20) * 7 - 1, 1])
def test_an_expired_record_is_new_and_its_version_goes_on(make_table, now_s):
    table = make_table()
    owner = table.register_owner()
    write(table, owner, key(1), [5], expires_s=now_s + 4, now_s=now_s)
    for later in (0, 3):
        slot = opened(table, owner, key(1), now_s + later)
        assert table.words[slot + VALUE] == 5
        abort_record(table.words, owner, slot)
    slot = opened(table, owner, key(1), now_s + 5)
    assert is_new_now(table.words, slot)
    assert table.words[slot + VALUE] == 0
    assert commit_record(table.words, owner, slot, 0) == 0  # unchanged: it stays expired
    assert write(table, owner, key(1), [6], now_s=now_s + 5) == 1
    assert [r.version for r in table.records()] == [2]
    table.verify()


def test_versions_do_not_go_back_over_delete_or_sweep(make_table):
    table = make_table(partitions=1)
    operate = Operator(table)
    for round_number in range(5):
        status, version, _ = operate(INSERT_IF_ABSENT, key(1, 1), 0, (1,))
        assert (status, version) == (OK, 2 * round_number + 1)
        assert operate(PUT, key(1, 1), version << 20 | NOW_S + 1, (2,))[:2] == (OK, version + 1)
        if round_number % 2:
            assert operate(DELETE, key(1, 1), (version + 1) << 20)[0] == OK
        else:
            assert sweep(table.words, operate.owner, 0, NOW_S + 2, 1000) == 1
        assert table.count() == 0
    table.verify()


def test_a_full_partition_says_so_and_the_others_go_on(make_table):
    table = make_table(capacity=28, partitions=2)
    owner = table.register_owner()
    for number in range(14):
        write(table, owner, key(2 * number, 2), [number + 1])
    assert opened(table, owner, key(100, 2)) == -TABLE_FULL
    assert write(table, owner, key(101, 2), [1]) == 1
    assert write(table, owner, key(2, 2), [77]) == 1
    assert table.statistics()["statuses"]["table_full"] == 1
    table.verify()


def test_a_full_partition_gives_room_from_expired_records_at_once(make_table):
    table = make_table(capacity=14, partitions=1)
    owner = table.register_owner()
    for number in range(14):
        write(table, owner, key(number, 1), [1], expires_s=NOW_S + 1)
    assert opened(table, owner, key(50, 1)) == -TABLE_FULL
    assert write(table, owner, key(50, 1), [1], now_s=NOW_S + 3) == 1
    assert table.count() == 1
    table.verify()


def test_who_may_not_work_on_a_partition_is_told_why(make_table):
    table = make_table(epoch=3)
    owner = table.register_owner()
    table.set_role(1, False, 3)
    cases = {key(5): (2, statuses.STALE_EPOCH), key(4): (0, statuses.STALE_EPOCH), key(1): (3, statuses.NOT_PRIMARY),
             np.uint64(1 << 32 | 4): (3, statuses.UNKNOWN_PARTITION)}  # fmt: skip
    for low, (epoch, status) in cases.items():
        assert opened(table, owner, low, epoch=epoch) == -status
    slot = opened(table, owner, key(4), epoch=3)
    assert opened(table, owner, key(8), epoch=3) == -statuses.ALREADY_OPEN
    abort_record(table.words, owner, slot)
    assert table.statistics()["statuses"]["stale_epoch"] == 2
    table.verify()


steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "get", "put", "insert", "add", "delete", "later", "sweep"]),
        st.integers(0, 39),
        st.integers(1, 2**64 - 1),
        st.sampled_from([0, 0, 2, 30]),
    ),
    max_size=200,
)


@settings(max_examples=60)
@given(steps, st.sampled_from([8, 16, 32, 64]), st.sampled_from([1, 3]))
def test_the_table_behaves_like_a_dictionary(steps, value_bytes, partitions):
    with_clients = Table.create(f"nearstate-test-{os.getpid()}-model", 30, value_bytes, partitions, clients=1)
    try:
        for partition in range(partitions):
            with_clients.set_role(partition, True, 1)
        _compare(with_clients, steps, partitions)
        with_clients.verify()
    finally:
        with_clients.close()
        with_clients.unlink()


def _compare(table: Table, steps: list[tuple[str, int, int, int]], partitions: int) -> None:
    """Do every step on the table and on a dictionary {key: (version, expiry second or 0, value words)}."""
    operate, model, now_s = Operator(table), {}, NOW_S
    highest: dict[int, int] = {}
    zeros = (0,) * (table.value_bytes // 8)

    def full(low: int) -> bool:
        base = table_base(table, low & 0xFFFF)
        return int(table.words[base + layout.COUNT]) == int(table.words[layout.BUCKETS]) * layout.SLOTS

    def check_write(low: int, status: int, version: int, expiry_s: int, value: tuple[int, ...], already: bool) -> None:
        if status == TABLE_FULL:
            assert not already
            assert full(low)
            return
        assert status == OK
        assert version > highest.get(low, 0)
        highest[low] = version
        model[low] = (version, expiry_s, value)

    for name, number, content, life_s in steps:
        low = int(key(number, partitions))
        known = model.get(low)
        if known and known[1] and now_s >= known[1]:
            known = None
        expiry_s = now_s + life_s if life_s else 0
        value = (content, *zeros[1:])
        if name == "later":
            now_s += life_s
        elif name == "sweep":
            sweep(table.words, operate.owner, number % partitions, now_s, 3)
        elif name == "get":
            expected = (OK, known[0], known[2]) if known else (ABSENT, 0, zeros)
            assert operate(GET, low, now_s=now_s) == expected
        elif name == "write":
            slot = opened(table, operate.owner, low, now_s)
            if slot < 0:
                check_write(low, -slot, 0, 0, value, known is not None)
                continue
            assert tuple(map(int, table.words[slot + VALUE : slot + VALUE + len(zeros)])) == (known[2] if known else zeros)
            table.words[slot + VALUE] = content
            written = commit_record(table.words, operate.owner, slot, expiry_s)
            value = (content, *(known or (0, 0, zeros))[2][1:])
            if known and value == known[2]:
                assert not written
                model[low] = (known[0], expiry_s or known[1], value)
            else:
                expiry_s = expiry_s or (known[1] if known else 0)
                check_write(low, OK, int(table.words[slot + STAMP]) >> 20, expiry_s, value, known is not None)
        elif name == "put":
            wanted = known[0] if known and content % 3 else content % 1000 if content % 2 else ANY_VERSION
            status, version, answer = operate(PUT, low, wanted << 20 | expiry_s, value, now_s=now_s)
            if known and wanted in (known[0], ANY_VERSION):
                check_write(low, status, version, expiry_s, value, True)
            elif known:
                assert (status, version, answer) == (VERSION_MISMATCH, known[0], known[2])
            else:
                assert status in (ABSENT, TABLE_FULL)
        elif name == "insert":
            status, version, answer = operate(INSERT_IF_ABSENT, low, expiry_s, value, now_s=now_s)
            if known:
                assert (status, version, answer) == (EXISTS, known[0], known[2])
            else:
                check_write(low, status, version, expiry_s, value, False)
        elif name == "add":
            status, version, answer = operate(ADD, low, expiry_s, (content,), now_s=now_s)
            before = known[2] if known else zeros
            value = ((before[0] + content) % 2**64, *before[1:])
            check_write(low, status, version, expiry_s or (known[1] if known else 0), value, known is not None)
            assert status != OK or answer == value
        elif name == "delete":
            status, _, answer = operate(DELETE, low, ANY_VERSION << 20, now_s=now_s)
            assert status in ((OK,) if known else (ABSENT, TABLE_FULL))
            assert not known or answer == known[2]
            model.pop(low, None)
    for low, (version, expiry_s, value) in model.items():
        if not expiry_s or now_s < expiry_s:
            assert operate(GET, low, now_s=now_s) == (OK, version, value)


def table_base(made: Table, partition: int) -> int:
    return int(made.words[layout.FIRST]) + partition * int(made.words[layout.STRIDE])


def test_long_probing_paths_are_counted_in_and_out(make_table):
    table = make_table(capacity=7 * 60, partitions=1)
    owner, operate = table.register_owner(), Operator(table)
    rng = random.Random(5)
    present: set[int] = set()
    for turn in range(6000):
        number = rng.randrange(600)
        if number in present and (turn % 3 or len(present) > 400):
            assert operate(DELETE, key(number, 1), ANY_VERSION << 20)[0] == OK
            present.remove(number)
        elif len(present) < 420:
            write(table, owner, key(number, 1), [turn + 1])
            present.add(number)
    assert {r.low >> 32 for r in table.records()} == present
    table.verify()


@pytest.mark.parametrize("value_bytes", [8, 16, 24, 32, 64])
def test_memory_is_at_most_half_more_than_the_payload_at_70_percent(value_bytes):
    table = Table.private(200_000, value_bytes)
    payload = 0.7 * table.partitions * int(table.words[layout.BUCKETS]) * layout.SLOTS * (24 + value_bytes)
    assert table.statistics()["table_bytes"] / payload <= 1.5
    table.close()


# ---- names and mistakes -------------------------------------------------------------------------------------------------


def test_mistakes_with_tables_get_one_clear_line(make_table, tmp_path):
    table = make_table()
    for attempt, message in [
        (lambda: Table.create(table.name, 10, 8), "exists already"),
        (lambda: Table.attach("nearstate-no-such"), "no table 'nearstate-no-such'"),
        (lambda: Table.attach("../etc/passwd"), "table name"),
        (lambda: Table.private(10, 12), "multiple of 8"),
        (lambda: Table.private(10, 4096), "8 to 1024"),
        (lambda: Table.private(0, 8), "capacity"),
        (lambda: Table.private(10**12, 64), "MB of shared memory"),
        (lambda: list(table.records(4)), "partition 4"),
    ]:
        with pytest.raises(NearstateError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    strange = Path("/dev/shm") / f"nearstate-test-{os.getpid()}-strange"
    try:
        for content in (b"", b"x" * 10_000):
            strange.write_bytes(content)
            with pytest.raises(NearstateError, match="no table of layout"):
                Table.attach(strange.name)
    finally:
        strange.unlink()


def test_owner_numbers_run_out_and_come_back():
    table = Table.private(100, 8)
    for _ in range(locking.OWNERS - 1):
        table.register_owner()
    with pytest.raises(NearstateError, match="63 owners already"):
        table.register_owner()
    table.close()


def test_verify_finds_what_is_wrong(make_table):
    table = make_table(partitions=1)
    owner = table.register_owner()
    write(table, owner, key(1, 1), [1])
    base = table_base(table, 0)
    for at, message in [(base + layout.LOCK, "lock"), (base + UNDO, "undo"), (base + layout.COUNT, "count")]:
        table.words[at] += 1
        with pytest.raises(NearstateError, match=message):
            table.verify()
        table.words[at] -= 1
    bucket = next(b for b in range(int(table.words[layout.BUCKETS])) if table.words[bucket_at(table, b)])
    for change, message in [(0xFF << 48, "tag|found|count"), (1 << 56, "overflow")]:
        table.words[bucket_at(table, bucket)] ^= np.uint64(change)
        with pytest.raises(NearstateError, match=message):
            table.verify()
        table.words[bucket_at(table, bucket)] ^= np.uint64(change)
    table.verify()


def bucket_at(made: Table, bucket: int) -> int:
    words = made.words
    return table_base(made, 0) + int(words[layout.BUCKETS_OFFSET]) + bucket * int(words[layout.BUCKET_WORDS])


# ---- several processes, and killed ones ---------------------------------------------------------------------------------


def fork(body: Callable[[], object]) -> int:
    """Run `body` in a child that dies with this process; return its pid. An exception in it ends it with code 1."""
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    try:
        body()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def join(pid: int) -> int:
    """Wait for a child; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@jit
def count_up(words, owner, rounds, keys, partitions):
    """Increment word 0 of records 0..keys-1 in turn; return how many opens failed."""
    failed = 0
    for n in range(rounds):
        number = n % keys
        low = np.uint64(number << 32 | number % partitions)
        slot = open_record(words, owner, low, HIGH, 1, NOW_S)
        if slot < 0:
            failed += 1
            continue
        words[slot + VALUE] += np.uint64(1)
        commit_record(words, owner, slot, 0)
    return failed


def test_counters_of_two_processes_add_up_exactly(make_table):
    table = make_table()
    rounds, keys = 200_000, 10
    count_up(table.words, table.register_owner(), 0, keys, 4)  # compiled before the forks

    def body():
        assert count_up(table.words, table.register_owner(), rounds, keys, 4) == 0

    children = [fork(body) for _ in range(2)]
    assert [join(pid) for pid in children] == [0, 0]
    values = [int.from_bytes(r.value[:8], "little") for r in table.records()]
    assert values == [2 * rounds // keys] * keys
    assert sum(r.version for r in table.records()) == 2 * rounds
    table.verify()


KEYS, PARTS = 48, 3


@jit
def work_forever(words, owner, seed):
    """Write, add, expire and sweep records whose four value words all follow from one counter, until killed."""
    state = np.uint64(seed)
    while True:
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        number = np.int64(state >> np.uint64(40)) % KEYS
        low = np.uint64(number << 32 | number % PARTS)
        slot = open_record(words, owner, low, HIGH, 1, NOW_S)
        if slot < 0:
            return -slot
        counter = words[slot + VALUE] + (state >> np.uint64(33))
        words[slot + VALUE] = counter
        words[slot + VALUE + 1] = counter * np.uint64(3)
        words[slot + VALUE + 2] = counter ^ np.uint64(0x5555)
        words[slot + VALUE + 3] = ~counter
        kind = np.int64(state >> np.uint64(60))
        if kind == 0:
            abort_record(words, owner, slot)
        else:
            commit_record(words, owner, slot, NOW_S - 1 if kind < 4 else NOW_S + 100)
        if kind == 1:
            sweep(words, owner, number % PARTS, NOW_S, 100)


@jit
def torn(words, owner, rounds):
    """Read all records `rounds` times; return how many were torn, or minus a status."""
    found = 0
    for n in range(rounds * KEYS):
        number = n % KEYS
        slot = open_record(words, owner, np.uint64(number << 32 | number % PARTS), HIGH, 1, NOW_S)
        if slot < 0:
            return slot
        a, b, c, d = words[slot + VALUE], words[slot + VALUE + 1], words[slot + VALUE + 2], words[slot + VALUE + 3]
        whole = b == a * np.uint64(3) and c == a ^ np.uint64(0x5555) and d == ~a
        if not whole and a | b | c | d != np.uint64(0):
            found += 1
        abort_record(words, owner, slot)
    return found


def test_a_hundred_kills_leave_no_torn_record_and_no_stuck_lock(make_table):
    table = make_table(capacity=70, partitions=PARTS)
    mine = table.register_owner()
    assert torn(table.words, mine, 1) == 0
    compile_work()

    def read_on():
        owner, parent = table.register_owner(), os.getppid()
        while os.getppid() == parent:
            assert torn(table.words, owner, 20) == 0

    def write_on(seed):
        work_forever(table.words, table.register_owner(), seed)

    reader = fork(read_on)
    rng = random.Random(1)
    try:
        for kill in range(1200):
            counters = table.statistics()["counters"]
            if kill >= 120 and counters["lock_takeovers"] >= 20 and counters["rollbacks"] >= 10:
                break  # enough of them hit: how many of 120 do is chance
            writer = fork(partial(write_on, kill * 7919 + 1))
            time.sleep(0.003 + rng.random() * 0.006)
            os.kill(writer, signal.SIGKILL)
            if kill % 2:  # the dead one stays a zombie meanwhile
                assert torn(table.words, mine, 2) == 0
            assert join(writer) == -signal.SIGKILL
            assert torn(table.words, mine, 2) == 0
        assert os.waitpid(reader, os.WNOHANG) == (0, 0), "the reader found a torn record or a stuck lock"
    finally:
        os.kill(reader, signal.SIGKILL)
        join(reader)
    assert torn(table.words, mine, 1) == 0
    locking.recover(table.words, mine)
    table.verify()
    counters = table.statistics()["counters"]
    assert counters["lock_takeovers"] >= 20, "the kills did not hit owners of a lock: the test proved nothing"
    assert counters["rollbacks"] >= 10


def compile_work() -> None:
    """Compile `work_forever` before it is forked and killed: on a table it may not work on, it returns."""
    foreign = Table.private(1, 32, 1, epoch=2)
    refused = (statuses.STALE_EPOCH, statuses.UNKNOWN_PARTITION)
    assert work_forever(foreign.words, foreign.register_owner(), 1) in refused
    foreign.close()


def half_done(made: Table, owner: int, stage: str) -> None:
    """Do a part of a change, an insertion, a renewal or a removal, and leave it there."""
    words, base = made.words, table_base(made, 0)
    change, _, how_far = stage.partition(" ")
    low = {"change": 1, "insert": 9, "renew": 2, "remove": 1}[change]
    slot = opened(made, owner, key(low, 1))
    assert slot > 0
    if change == "remove":
        place = int(words[base + UNDO]) & ~0xFF
        begin_now(words, base, place | REMOVE)
        if how_far == "tag":
            layout.set_tag(words, place, np.uint64(0))
        elif how_far == "all":
            records.take_out(words, base, place)
        return
    words[slot + VALUE] = 99
    if how_far == "values":
        return
    if change == "insert" and how_far == "tag":
        layout.set_tag(words, int(words[base + UNDO]), np.uint64(0x80))
    elif how_far == "overflow":
        layout.recount(words, base)
        words[base + layout.COUNT] += 1
    elif how_far == "all":
        seal_now(words, base, slot)


@jit
def begin_now(words, base, undo):
    records.begin(words, base, undo)


@jit
def seal_now(words, base, slot):
    records.seal(words, base, slot, np.uint64(0))


@pytest.mark.parametrize(
    "stage",
    ["change opened", "change values", "change all", "renew opened", "renew all", "insert opened", "insert values",
     "insert tag", "insert overflow", "insert all", "remove begun", "remove tag", "remove all"],
)  # fmt: skip
def test_what_a_dead_owner_left_half_done_is_taken_back(make_table, stage):
    made = make_table(capacity=21, partitions=1)
    survivor = made.register_owner()
    for number in range(1, 9):
        write(made, survivor, key(number, 1), [number], expires_s=NOW_S - 5 if number == 2 else 0, now_s=NOW_S - 10)
    before = sorted((r.low, r.version, r.value) for r in made.records())

    def body():
        half_done(made, made.register_owner(), stage)
        os.kill(os.getpid(), signal.SIGKILL)

    assert join(fork(body)) == -signal.SIGKILL
    slot = opened(made, survivor, key(3, 1))
    assert slot > 0
    abort_record(made.words, survivor, slot)
    assert sorted((r.low, r.version, r.value) for r in made.records()) == before
    assert made.statistics()["counters"]["rollbacks"] == 1
    made.verify()


def test_a_new_bearer_of_a_dead_owners_number_puts_its_partitions_right(make_table):
    made = make_table(partitions=1)

    def body():
        half_done(made, made.register_owner(), "insert all")
        os.kill(os.getpid(), signal.SIGKILL)

    assert join(fork(body)) == -signal.SIGKILL
    made.register_owner()
    made.verify()
    assert made.count() == 0


def test_records_are_read_whole_while_others_write(make_table):
    made = make_table(capacity=70, partitions=PARTS)
    compile_work()
    writer = fork(lambda: work_forever(made.words, made.register_owner(), 3))
    try:
        end, seen = time.monotonic() + 0.5, 0
        while time.monotonic() < end:
            for record in made.records():
                a, b, c, d = np.frombuffer(record.value, np.uint64)
                assert (b, c, d) == (a * np.uint64(3), a ^ np.uint64(0x5555), ~a)
                seen += 1
        assert seen > 100
    finally:
        os.kill(writer, signal.SIGKILL)
        join(writer)


def test_two_store_processes_cannot_serve_one_table(make_table):
    made = make_table()
    made.claim_server()
    with pytest.raises(NearstateError, match="served already"):
        Table.attach(made.name).claim_server()
