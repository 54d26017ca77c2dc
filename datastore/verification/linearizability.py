"""Is a recorded history linearizable: can every operation have happened at one instant between its call and its answer?

Linearizability is local (M. Herlihy, J. Wing: Linearizability, TOPLAS 1990), so every key is checked alone, by `search`.

A pass keeps only so many configurations, and goes on with those that used fewest unanswered operations. When it fails, and some
had been dropped, a lenient pass asks whether it must fail even if unanswered operations may happen repeatedly; if not, the first
one is repeated wider from there. So both verdicts are proofs; beyond `max_width` there is none: undecided.

Measured: 1,000,000 operations of 8 clients on 8 keys, 211 without an answer, in 16 to 34 s (one busy core).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from datastore.base.errors import NearstateError
from datastore.store.statuses import ABSENT
from datastore.verification.expiry import with_expiry
from datastore.verification.explanation import explain
from datastore.verification.history import History
from datastore.verification.model import KINDS, MUTATING, OUTCOMES, Operation, Record, describe, unanswered
from datastore.verification.search import Search, without_answer

LINEARIZABLE, VIOLATION, UNDECIDED = "linearizable", "violation", "undecided"
FIRST_WIDTH, MAX_WIDTH = 8, 1 << 11
"""Configurations a pass keeps: in the first pass, and in the last."""


@dataclass
class KeyResult:
    """The verdict on one key. explanation: lines for people, of a violation or an undecided key."""

    low: int
    high: int
    verdict: str
    operations: int
    unanswered: int
    widest: int
    """Most configurations kept at once."""
    explanation: list[str] = field(default_factory=list)
    window: list[Operation] = field(default_factory=list)
    """A violation: the operations that cannot be put in order, starting from the states the explanation names."""


@dataclass
class Result:
    """The verdict on a history: the worst of its keys'."""

    keys: list[KeyResult]
    refused: int
    """Operations left out since their answer says that they were not done."""
    seconds: float

    @property
    def operations(self) -> int:
        return sum(key.operations for key in self.keys)

    @property
    def verdict(self) -> str:
        found = {key.verdict for key in self.keys}
        return VIOLATION if VIOLATION in found else UNDECIDED if UNDECIDED in found else LINEARIZABLE

    @property
    def explanation(self) -> list[str]:
        """The lines about every key that is not linearizable, violations first."""
        wrong = sorted((key for key in self.keys if key.verdict != LINEARIZABLE), key=lambda key: key.verdict == UNDECIDED)
        return [line for key in wrong for line in key.explanation]


def check(operations: Iterable[Operation], value_bytes: int, max_width: int = MAX_WIDTH) -> Result:
    """Check operations held in memory. value_bytes: of the table they went to. The records are absent at the beginning.

    Raises NearstateError for an operation answered before it was called, or of an unknown kind.
    """
    keys: dict[tuple[int, int], list[Operation]] = {}
    for operation in operations:
        keys.setdefault((operation.low, operation.high), []).append(operation)
    return check_keys(keys.values(), value_bytes, max_width)


def check_history(history: History, max_width: int = MAX_WIDTH, progress: Callable[[int], object] | None = None) -> Result:
    """Check recorded operations. progress: is told after each key how many operations it had."""
    return check_keys(history.operations_by_key(), history.value_bytes, max_width, progress)


def check_keys(
    keys: Iterable[list[Operation]], value_bytes: int, max_width: int = MAX_WIDTH, progress: Callable[[int], object] | None = None
) -> Result:
    """Check operations that are sorted into keys already."""
    started, refused, results = time.perf_counter(), 0, []
    for recorded in keys:
        operations = list(relevant(with_expiry(recorded)))
        refused += sum(not unanswered(operation) and operation.status not in OUTCOMES for operation in recorded)
        if operations:
            results.append(check_key(operations, value_bytes, max_width))
        if progress is not None:
            progress(len(recorded))
    return Result(results, refused, time.perf_counter() - started)


def relevant(operations: Iterable[Operation]) -> Iterator[Operation]:
    """Leave out what says nothing: refused operations, and gets without an answer. Unanswered ones last to the end."""
    for operation in operations:
        if operation.kind not in KINDS:
            raise NearstateError(f"{whose(operation)} is of unknown kind {operation.kind}: known are {KINDS}")
        if unanswered(operation):
            if operation.kind in MUTATING:
                yield without_answer(operation)
        elif operation.answered_ns < operation.invoked_ns:
            early_ns = operation.invoked_ns - operation.answered_ns
            raise NearstateError(f"{whose(operation)} was answered {early_ns} ns before it was called: record with one clock")
        elif operation.status == ABSENT:
            yield operation._replace(version=0, answer=None)
        elif operation.status in OUTCOMES:
            yield operation


def whose(operation: Operation) -> str:
    """Name an operation in messages."""
    return f"operation {operation.sequence} of client {operation.client}"


def check_key(operations: Sequence[Operation], value_bytes: int, max_width: int = MAX_WIDTH) -> KeyResult:
    """Check the operations of one key, all of them relevant."""
    ordered = sorted(operations, key=lambda operation: operation.invoked_ns)
    record = Record(value_bytes)
    search = Search(ordered, record, min(FIRST_WIDTH, max_width))
    failed, widest = search.run(), search.widest
    lenient = Search(ordered, record, max_width, lenient=True)
    if failed is not None and search.checkpoint is not None:
        failed_too = lenient.run()
        if failed_too is not None and lenient.checkpoint is None:
            search, failed = lenient, failed_too
    while failed is not None and search.checkpoint is not None and search.width < max_width:
        wider = min(search.width * 8, max_width)
        search = search.checkpoint
        search.width = wider
        failed, widest = search.run(), max(widest, search.widest)
    verdict = LINEARIZABLE if failed is None else VIOLATION if search.checkpoint is None else UNDECIDED
    open_ones = sum(map(unanswered, ordered))
    result = KeyResult(ordered[0].low, ordered[0].high, verdict, len(ordered), open_ones, widest)
    if verdict == VIOLATION:
        result.window, result.explanation = explain(Search(ordered, record, search.width, search.lenient), failed or 0)
    elif verdict == UNDECIDED:
        asked, answered = describe(ordered[failed or 0])
        result.explanation = [
            f"key {result.high:016x}{result.low:016x}: undecided at operation {failed} of {len(ordered):,} "
            f"({whose(ordered[failed or 0])}: {asked} -> {answered}): {open_ones} operations without an answer allow more than "
            f"{search.width:,} different pasts; check with a larger width, or record fewer clients killed per key"
        ]
    return result
