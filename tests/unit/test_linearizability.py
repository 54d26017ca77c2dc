"""The linearizability checker: against brute force, on the classic errors, at length; and the files it reads."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore import __main__ as command_line
from datastore.base.errors import NearstateError
from datastore.store.operations import ADD, ANY_VERSION, DELETE, GET, INSERT, PUT
from datastore.store.statuses import ABSENT, BUSY, EXISTS, NOT_PRIMARY, OK, STALE_SEQUENCE, VERSION_MISMATCH
from datastore.verification.history import HEADER, HistoryWriter, read_history, row_type
from datastore.verification.linearizability import LINEARIZABLE, UNDECIDED, VIOLATION, check, check_history
from datastore.verification.model import NEVER_NS, UNANSWERED, Operation, Record, State
from tests.histories import VALUE_BYTES, Recording, broken, orderable, record, word

_sequences = itertools.count(1)
LONG = os.environ.get("NEARSTATE_LONG") == "1"


def op(kind: int, called: int, answered: int = NEVER_NS, status: int = OK, version: int = 0, shown: int | None = None,
       value: int = 0, expected: int = ANY_VERSION, client: int = 1) -> Operation:  # fmt: skip
    """Return an operation on one key; value: written, or added. Without `answered`, its answer never came."""
    written = record(value) if kind in (PUT, INSERT) else word(value)
    seen = None if shown is None else record(shown)
    status = UNANSWERED if answered == NEVER_NS else status
    return Operation(client, next(_sequences), 7, 7, kind, written, expected, 0, status, version, seen, called, answered)


def put(called, answered, version, value, **more):
    return op(PUT, called, answered, version=version, value=value, shown=value, **more)


def insert(called, answered, version, value, **more):
    return op(INSERT, called, answered, version=version, value=value, shown=value, **more)


def add(called, answered, version, shown, value=1, **more):
    return op(ADD, called, answered, version=version, shown=shown, value=value, **more)


def get(called, answered, version, shown, **more):
    return op(GET, called, answered, version=version, shown=shown, **more)


def missing(called, answered, kind=GET, **more):
    return op(kind, called, answered, status=ABSENT, **more)


def verdict(*history: Operation) -> str:
    """Return the checker's verdict, having asked brute force too."""
    found = check(history, VALUE_BYTES).verdict
    forgotten = [each._replace(status=UNANSWERED, answered_ns=NEVER_NS) if each.status == STALE_SEQUENCE else each
                 for each in history if each.status not in (BUSY, NOT_PRIMARY)]  # fmt: skip
    assert (found == LINEARIZABLE) == orderable(forgotten)
    return found


# ---- against brute force ----------------------------------------------------------------------------------------------


def small(seed: int) -> list[Operation]:
    """Return a small history with much going on at once; most of them have one change that may make it wrong."""
    chance = random.Random(seed)
    history = Recording(
        seed, chance.randrange(3, 9), clients=chance.randrange(2, 5), values=chance.choice((1, 2, 3)), longest_ns=100,
        lost=chance.choice((0, 0, 0.2, 0.4)), silent=chance.choice((0, 0, 0.3)),
    ).run()  # fmt: skip
    return broken(history, chance) if chance.random() < 0.7 else history


def test_brute_force_agrees_on_small_histories():
    counts: Counter[bool] = Counter()
    for seed in range(1_000_000 if LONG else 10_000):
        history = small(seed)
        right = orderable(history)
        result = check(history, VALUE_BYTES)
        assert result.verdict == (LINEARIZABLE if right else VIOLATION), f"seed {seed}: brute force says {right}"
        counts[right] += 1
    assert min(counts[True], counts[False]) > sum(counts.values()) / 5


def test_narrow_passes_are_repeated_wider_until_they_agree_with_brute_force():
    widened = 0
    for seed in range(2_000):
        history = small(seed)
        result = check(history, VALUE_BYTES, max_width=1)
        if result.verdict == UNDECIDED:
            widened += 1
            assert "different pasts" in result.explanation[0]
        else:
            assert (result.verdict == LINEARIZABLE) == orderable(history), f"seed {seed}"
    assert widened < 100


@given(seed=st.integers(0, 2**32), later_ns=st.integers(0, 50))
def test_answers_that_come_later_never_make_a_history_wrong(seed, later_ns):
    history = Recording(seed, 30, clients=4, values=2, lost=0.1, longest_ns=20).run()
    assert check(history, VALUE_BYTES).verdict == LINEARIZABLE
    slower = [each if each.status == UNANSWERED else each._replace(answered_ns=each.answered_ns + later_ns) for each in history]
    assert check(slower, VALUE_BYTES).verdict == LINEARIZABLE


# ---- classic examples -------------------------------------------------------------------------------------------------


def test_concurrent_reads_may_see_either_value_and_later_ones_only_the_new():
    start = [insert(0, 1, 1, 5), put(10, 100, 2, 6)]
    assert verdict(*start, get(20, 30, 2, 6), get(40, 50, 2, 6)) == LINEARIZABLE
    assert verdict(*start, get(20, 45, 2, 6), get(40, 50, 1, 5)) == LINEARIZABLE
    assert verdict(*start, get(20, 30, 2, 6), get(40, 50, 1, 5)) == VIOLATION


def test_stale_read():
    assert verdict(insert(0, 1, 1, 5), put(10, 20, 2, 6), get(21, 30, 1, 5)) == VIOLATION
    assert verdict(insert(0, 1, 1, 5), put(10, 20, 2, 6), get(20, 30, 1, 5)) == LINEARIZABLE, "at the same instant is not after"


def test_lost_update():
    both = [put(10, 20, 2, 6, expected=1), put(11, 21, 2, 7, expected=1, client=2)]
    assert verdict(insert(0, 1, 1, 5), *both) == VIOLATION
    refused = op(PUT, 11, 21, VERSION_MISMATCH, version=2, shown=6, value=7, expected=1, client=2)
    assert verdict(insert(0, 1, 1, 5), both[0], refused) == LINEARIZABLE


def test_two_inserts_of_one_key():
    assert verdict(insert(0, 10, 1, 5), insert(1, 11, 2, 6, client=2)) == VIOLATION
    assert verdict(insert(0, 10, 1, 5), op(INSERT, 1, 11, EXISTS, 1, 5, value=6, client=2)) == LINEARIZABLE


def lease(called, answered, version, value, until_s, **more):
    """Return an insert that expires. Times are seconds here and in `leased`."""
    return insert(called, answered, version, value, **more)._replace(expected=until_s)


def leased(*history: Operation) -> str:
    """Return the verdict on operations whose times are given in seconds."""
    times = [each._replace(invoked_ns=int(each.invoked_ns * 1e9),
                           answered_ns=NEVER_NS if each.answered_ns == NEVER_NS else int(each.answered_ns * 1e9))
             for each in history]  # fmt: skip
    return check(times, VALUE_BYTES).verdict


def test_a_lease_is_one_clients_until_it_expires_or_is_given_back():
    first = lease(1, 2, 1, 5, until_s=10)
    assert leased(first, lease(11, 12, 2, 6, until_s=20, client=2)) == LINEARIZABLE
    assert leased(first, lease(9.5, 10.5, 2, 6, until_s=20, client=2)) == LINEARIZABLE, "in its last instant"
    assert leased(first, lease(8, 9, 2, 6, until_s=20, client=2)) == VIOLATION
    assert leased(first, missing(8, 9)) == VIOLATION, "gone before it expired"
    assert leased(first, missing(11, 12), get(13, 14, 1, 5)) == VIOLATION, "back again"
    back = op(DELETE, 3, 4, version=1, shown=5, expected=1)
    assert leased(first, back, lease(8, 9, 2, 6, until_s=20, client=2)) == LINEARIZABLE
    perhaps = op(DELETE, 3, expected=1)
    assert leased(first, perhaps, lease(8, 9, 2, 6, until_s=20, client=2)) == LINEARIZABLE
    assert leased(first, perhaps, lease(2.5, 2.9, 2, 6, until_s=20, client=2)) == VIOLATION


def test_a_lease_without_an_answer_expires_too():
    unheard = lease(1, NEVER_NS, 0, 5, until_s=10)._replace(answer=None)
    assert leased(unheard, get(2, 3, 1, 5), lease(11, 12, 2, 6, until_s=20, client=2)) == LINEARIZABLE
    assert leased(unheard, get(2, 3, 1, 5), lease(8, 9, 2, 6, until_s=20, client=2)) == VIOLATION
    assert leased(unheard, lease(8, 9, 2, 6, until_s=20, client=2)) == LINEARIZABLE, "nobody saw it"
    assert leased(unheard, get(2, 3, 1, 5), missing(4, 5)) == VIOLATION


def test_leases_do_not_share_a_key_with_puts():
    with pytest.raises(NearstateError, match="record leases on keys that are only inserted"):
        leased(lease(1, 2, 1, 5, until_s=10), put(3, 4, 2, 6))


def test_an_add_applied_twice():
    assert verdict(add(0, 10, 1, 1), add(20, 30, 3, 3)) == VIOLATION
    assert verdict(add(0, 10, 1, 1), add(20, 30, 2, 3)) == VIOLATION
    assert verdict(add(0, 10, 1, 1), op(ADD, 12, value=1, client=2), add(20, 30, 3, 3)) == LINEARIZABLE
    assert verdict(add(0, 10, 1, 1), op(ADD, 12, value=1, client=2), add(20, 30, 4, 4)) == VIOLATION


def test_a_value_is_read_before_it_is_committed_and_then_lost():
    unknown = op(PUT, 10, value=6, client=2)
    history = [insert(0, 1, 1, 5), unknown, get(20, 30, 2, 6), get(40, 50, 1, 5)]
    assert verdict(*history) == VIOLATION
    assert verdict(*history[:3]) == LINEARIZABLE


def test_an_open_operation_takes_effect_late_or_never_but_once_and_not_before_its_call():
    unknown = op(ADD, 10, value=1, client=2)
    start = insert(0, 1, 1, 5)
    assert verdict(start, unknown, get(1000, 1010, 2, 6)) == LINEARIZABLE
    assert verdict(start, unknown, get(1000, 1010, 1, 5)) == LINEARIZABLE
    assert verdict(start, unknown, get(1000, 1010, 1, 5), get(1020, 1030, 2, 6)) == LINEARIZABLE
    assert verdict(start, unknown, get(1000, 1010, 3, 7)) == VIOLATION
    assert verdict(start, unknown, get(5, 9, 2, 6)) == VIOLATION
    assert verdict(start, unknown._replace(status=STALE_SEQUENCE, answered_ns=20), get(1000, 1010, 2, 6)) == LINEARIZABLE


def test_a_refused_operation_was_not_done():
    refused = op(ADD, 10, 20, NOT_PRIMARY, value=1)
    assert verdict(insert(0, 1, 1, 5), refused, get(30, 40, 1, 5)) == LINEARIZABLE
    assert verdict(insert(0, 1, 1, 5), refused, get(30, 40, 2, 6)) == VIOLATION
    assert check([refused], VALUE_BYTES).refused == 1


def test_versions_go_on_after_a_removal_and_never_back():
    removed = [insert(0, 1, 1, 5), op(DELETE, 10, 20, version=1, shown=5), missing(30, 40)]
    assert verdict(*removed, insert(50, 60, 2, 6)) == LINEARIZABLE
    assert verdict(*removed, insert(50, 60, 9, 6)) == LINEARIZABLE, "others of its partition were removed at higher versions"
    assert verdict(*removed, insert(50, 60, 1, 6)) == VIOLATION
    assert verdict(*removed, get(50, 60, 1, 5)) == VIOLATION
    assert verdict(*removed, missing(50, 60, kind=PUT, value=3), missing(70, 80, kind=DELETE)) == LINEARIZABLE


def test_an_add_that_answers_only_its_status_happened_in_its_time():
    quiet = op(ADD, 10, 20, value=1)
    assert verdict(insert(0, 1, 1, 5), quiet, get(30, 40, 2, 6)) == LINEARIZABLE
    assert verdict(insert(0, 1, 1, 5), quiet, get(30, 40, 1, 5)) == VIOLATION


def test_a_field_wraps_and_its_neighbour_stays():
    step = Record(VALUE_BYTES).step
    state = State(True, True, 4, word(2**64 - 1) + word(3))
    wrapped = step(state, Operation(1, 1, 7, 7, ADD, word(2), status=OK, version=5, answer=word(1) + word(3)))
    assert wrapped == State(True, True, 5, word(1) + word(3))
    assert step(state, Operation(1, 1, 7, 7, ADD, word(2), offset=8, status=OK, answer=word(2**64 - 1) + word(5))) is not None
    assert step(state, Operation(1, 1, 7, 7, ADD, word(2), status=OK, version=6)) is None


def test_keys_are_checked_apart():
    right, wrong = insert(0, 1, 1, 5), get(2, 3, 4, 5)
    result = check([right, wrong._replace(low=8)], VALUE_BYTES)
    assert {key.low: key.verdict for key in result.keys} == {7: LINEARIZABLE, 8: VIOLATION}
    assert result.verdict == VIOLATION


def test_impossible_histories_are_refused_by_name():
    with pytest.raises(NearstateError, match="was answered 5 ns before it was called"):
        check([get(10, 5, 1, 1)], VALUE_BYTES)
    with pytest.raises(NearstateError, match="unknown kind 99"):
        check([op(99, 0, 1)], VALUE_BYTES)


# ---- long histories ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operations", "keys", "lost", "silent"), [(200_000, 4, 0, 0), (20_000, 1, 0.003, 0.01)])
def test_a_long_history_of_hot_keys(operations, keys, lost, silent):
    history = Recording(5, operations * 5 if LONG else operations, keys=keys, lost=lost, silent=silent).run()
    result = check(history, VALUE_BYTES)
    assert result.verdict == LINEARIZABLE, result.explanation
    assert result.operations > len(history) * 0.99
    print(f"{result.operations:,} operations in {result.seconds:.1f} s")


def test_one_wrong_answer_in_a_long_history_is_found_and_told():
    history = Recording(6, 20_000, keys=2, lost=0.001).run()
    reads = [n for n, each in enumerate(history) if each.kind == GET and each.status == OK]
    wrong = reads[len(reads) // 2]
    stale = next(each for each in history if each.low == history[wrong].low and each.status == OK and each.kind == GET)
    history[wrong] = history[wrong]._replace(version=stale.version, answer=stale.answer)
    result = check(history, VALUE_BYTES)
    assert result.verdict == VIOLATION
    (key,) = (key for key in result.keys if key.verdict == VIOLATION)
    assert history[wrong] in key.window
    assert len(key.window) <= 3
    text = "\n".join(key.explanation)
    assert f"operation {history[wrong].sequence} of client {history[wrong].client}, get, cannot have been answered" in text
    assert "<-- impossible" in text
    assert "made by" in text


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_many_operations_without_an_answer_hide_no_error(seed):
    history = Recording(seed, 3000, lost=0.01).run()
    assert check(history, VALUE_BYTES).verdict == LINEARIZABLE
    reads = [n for n, each in enumerate(history) if each.kind == GET and each.status == OK]
    history[reads[-20]] = history[reads[-20]]._replace(answer=history[reads[-40]].answer)
    assert check(history, VALUE_BYTES).verdict == VIOLATION


def test_the_window_of_a_violation_holds_what_matters_and_still_fails():
    bystanders = [get(12, 40, 2, 6, client=n) for n in range(10, 20)]
    first, second = put(10, 20, 2, 6, expected=1), put(11, 21, 2, 7, expected=1, client=2)
    result = check([insert(0, 1, 1, 5), first, second, *bystanders], VALUE_BYTES)
    (key,) = result.keys
    assert set(key.window) <= {first, second, *bystanders}
    assert len(key.window) <= 2
    assert "version 1, value [5], made by insert [5] of client 1, 0.000 to 0.001" in "\n".join(key.explanation)


# ---- files ------------------------------------------------------------------------------------------------------------


def written(folder: Path, history: list[Operation]) -> None:
    """Record a history as its clients would have."""
    writers: dict[int, HistoryWriter] = {}
    for each in sorted(history, key=lambda each: each.invoked_ns):
        if each.client not in writers:
            writers[each.client] = HistoryWriter(folder, each.client, VALUE_BYTES)
        writer = writers[each.client]
        row = writer.call(each.kind, each.low, each.high, each.sequence, each.value, each.expected, each.offset, each.invoked_ns)
        if each.status != UNANSWERED:
            writer.answer(row, each.status, each.version, each.answer, each.answered_ns)
    for writer in writers.values():
        writer.close()


def by_name(history: list[Operation]) -> list[Operation]:
    return sorted(each._replace(value=each.value.ljust(VALUE_BYTES, b"\0")) for each in history)


def test_what_is_recorded_is_read_again(tmp_path):
    history = Recording(3, 40_000, keys=3, lost=0.001, silent=0.1).run()
    written(tmp_path, history)
    read = read_history(tmp_path)
    assert len(read) == len(history)
    assert by_name([each for key in read.operations_by_key() for each in key]) == by_name(history)
    assert [file.torn for file in read.files] == [""] * 8
    assert sum(file.unanswered for file in read.files) == sum(each.status == UNANSWERED for each in history)
    assert check_history(read).verdict == LINEARIZABLE


def test_a_killed_client_loses_no_call(tmp_path):
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        writer = HistoryWriter(tmp_path, 4, VALUE_BYTES)
        for n in range(1, 10**9):
            writer.answer(writer.call(ADD, 1, 1, n, word(1)), OK, n, record(n))
            os.write(theirs, b".")
    os.close(theirs)
    deadline = time.monotonic() + 20
    count = 0
    while count < 3000 and time.monotonic() < deadline:
        count += len(os.read(ours, 4096))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while more := os.read(ours, 4096):
        count += len(more)
    os.close(ours)
    read = read_history(tmp_path)
    assert count <= len(read) <= count + 1
    assert read.files[0].unanswered <= 1
    assert check_history(read).verdict == LINEARIZABLE


def test_torn_ends_are_tolerated_and_said(tmp_path):
    written(tmp_path, [insert(1, 5, 1, 5), get(10, 20, 1, 5)])
    (path,) = tmp_path.iterdir()
    whole, row_bytes = path.read_bytes(), row_type(VALUE_BYTES).itemsize
    path.write_bytes(whole[:-5])
    read = read_history(tmp_path)
    assert (len(read), read.files[0].torn) == (1, f"{row_bytes - 5} bytes of a row cut off")
    path.write_bytes(whole[:-row_bytes] + bytes(8) + whole[-row_bytes + 8 :] + bytes(row_bytes * 3))
    read = read_history(tmp_path)
    assert (len(read), read.files[0].torn) == (1, "1 row dropped that was half written, so never sent")
    path.write_bytes(bytes(HEADER.size))
    assert "killed before" in read_history(tmp_path).files[0].torn


def test_what_is_no_history_is_refused_in_one_line(tmp_path, capsys):
    folder = tmp_path / "h"
    for content, message in [
        (None, "no history in"), (b"x" * 100, "is no history of this version"), (b"x", "is no history of this version"),
    ]:  # fmt: skip
        if content is not None:
            folder.mkdir(exist_ok=True)
            (folder / "1-1-1.history").write_bytes(content)
        assert command_line.main(["check", str(folder)]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1
    with pytest.raises(NearstateError, match="multiple of 8"):
        HistoryWriter(tmp_path, 1, 12)


def test_check_command(tmp_path, capsys):
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    start = [insert(1, 2, 1, 5), op(PUT, 2, value=9, client=3), op(ADD, 3, 4, BUSY, value=1)]
    written(right, start)
    written(wrong, [*start, get(10, 20, 7, 5, client=2)])
    assert command_line.main(["check", str(right)]) == 0
    out = capsys.readouterr().out
    assert "linearizable: 2 operations on 1 key" in out
    assert "1 refused" in out
    assert command_line.main(["check", str(wrong)]) == 1
    captured = capsys.readouterr()
    assert "cannot have been answered ok version 7 value [5]" in captured.out
    assert "<-- impossible" in captured.out
    assert captured.err.startswith("datastore: ")
    assert captured.err.count("\n") == 1
    assert command_line.main(["check", str(wrong), "--json"]) == 1
    assert '"verdict": "violation"' in capsys.readouterr().out
