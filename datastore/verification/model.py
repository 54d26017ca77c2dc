"""What may one record answer, if it does one operation at a time?

The model is the store's contract (`datastore.store.operations`) without its mechanism:

    GET      answers the record, or ABSENT
    PUT      writes if the version is the expected one (ANY_VERSION: whatever it is); version + 1, also for an equal value;
             else answers ABSENT, or VERSION_MISMATCH and the record
    INSERT   writes if there is no record; else answers EXISTS and the record
    ADD      adds to a 64-bit field, modulo 2^64; version + 1; an absent record starts at zero; answers the new record
    DELETE   removes if the version is the expected one, answers what was there; else as PUT

A version never goes back for a key, but a record made anew may start at any version above all the key ever had: it starts
above every version that was removed from its *partition*, so other keys have a say. Hence a state holds a set of versions:
one, or all from one on. It becomes one as soon as an answer shows it. Expiry is a deletion by one more client (`expiry.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from datastore.store import operations
from datastore.store.operations import ADD, ANY_VERSION, DELETE, GET, INSERT, PUT
from datastore.store.statuses import ABSENT, EXISTS, NAMES, OK, STALE_SEQUENCE, VERSION_MISMATCH

KINDS = {getattr(operations, name): name.lower() for name in ("GET", "PUT", "INSERT", "ADD", "DELETE")}
MUTATING = frozenset((PUT, INSERT, ADD, DELETE))
OUTCOMES = frozenset((OK, ABSENT, EXISTS, VERSION_MISMATCH))
"""The statuses of an operation that was done. Every other one but STALE_SEQUENCE says that it was not, and never will be."""
UNANSWERED = 255
"""The status of an operation whose answer never came."""

NEVER_NS = 1 << 63
_WORD = (1 << 64) - 1


class Operation(NamedTuple):
    """One operation of a client, and its answer."""

    client: int
    sequence: int
    low: int
    high: int
    """The key."""
    kind: int
    """GET, PUT, INSERT, ADD or DELETE."""
    value: bytes = b""
    """PUT, INSERT: the record, in full length. ADD: the delta, 8 bytes little-endian."""
    expected: int = ANY_VERSION
    """PUT, DELETE: the version asked for. INSERT: the second of CLOCK_MONOTONIC at which it expires, ANY_VERSION: never."""
    offset: int = 0
    """ADD: which byte of the record the field begins at."""
    status: int = UNANSWERED
    version: int = 0
    """The version answered; 0: none was."""
    answer: bytes | None = None
    """The record answered; None: none was."""
    invoked_ns: int = 0
    answered_ns: int = NEVER_NS


class State(NamedTuple):
    """What is known of a record."""

    present: bool
    exact: bool
    """True: the version is `version`. False: it is at least that; of an absent record, the next one's is."""
    version: int
    value: bytes


class Record:
    """The sequential record: a pure function from state and operation to state."""

    def __init__(self, value_bytes: int) -> None:
        """value_bytes: of the table, for records an ADD makes."""
        self.initial = State(False, False, 1, b"")
        self._zero = bytes(value_bytes)

    def step(self, state: State, operation: Operation) -> State | None:
        """Return the state after an operation that answered as recorded, or None when it cannot have.

        UNANSWERED and STALE_SEQUENCE mean that the operation took effect; that it did not is for the caller to consider.
        The very same object comes back when the state is unchanged. One corner is taken for possible that is not: a
        VERSION_MISMATCH recorded without a version rules out one of an unknown version's values, which is not remembered.
        """
        present, exact, version, value = state
        kind, status = operation.kind, operation.status
        if status == ABSENT:
            return state if not present and kind in (GET, PUT, DELETE) else None
        if status == EXISTS:
            return observed(state, operation) if present and kind == INSERT else None
        if status == VERSION_MISMATCH:
            seen = observed(state, operation) if present and kind in (PUT, DELETE) else None
            differs = seen is not None and operation.expected != ANY_VERSION
            return seen if differs and not (seen.exact and seen.version == operation.expected) else None  # type: ignore[union-attr]
        if kind == ADD:
            if present:
                return observed(State(True, exact, version + 1, added(value, operation)), operation)
            return observed(State(True, False, version, added(self._zero, operation)), operation)
        if kind == INSERT:
            return None if present else observed(State(True, False, version, operation.value), operation)
        if not present:
            return None
        if kind == GET:
            return observed(state, operation)
        narrowed = expecting(state, operation.expected)
        if narrowed is None:
            return None
        if kind == PUT:
            return observed(State(True, narrowed.exact, narrowed.version + 1, operation.value), operation)
        removed = observed(narrowed, operation)
        return None if removed is None else State(False, False, removed.version + 1, b"")


def observed(state: State, operation: Operation) -> State | None:
    """Return a present state as an answer shows it, or None when the answer shows another one."""
    present, exact, version, value = state
    if operation.answer is not None and operation.answer != value:
        return None
    seen = operation.version
    if seen == 0 or (exact and seen == version):
        return state
    return None if exact or seen < version else State(present, True, seen, value)


def expecting(state: State, expected: int) -> State | None:
    """Return a present state, knowing that its version is the expected one, or None when it cannot be."""
    if expected == ANY_VERSION or (state.exact and state.version == expected):
        return state
    return None if state.exact or expected < state.version else State(True, True, expected, state.value)


def added(value: bytes, operation: Operation) -> bytes:
    """Return a record with an ADD's delta added to its field."""
    at = operation.offset
    total = int.from_bytes(value[at : at + 8], "little") + int.from_bytes(operation.value[:8], "little") & _WORD
    return value[:at] + total.to_bytes(8, "little") + value[at + 8 :]


def covers(one: State, other: State) -> bool:
    """Tell whether whatever is possible from `other` is possible from `one`."""
    if one.present != other.present or one.value != other.value:
        return False
    return one == other or (not one.exact and one.version <= other.version)


def unanswered(operation: Operation) -> bool:
    """Tell whether an operation may have taken effect at any time since its invocation, or never.

    STALE_SEQUENCE says that the store has forgotten whether it did.
    """
    return operation.status in (UNANSWERED, STALE_SEQUENCE)


def state_before(operation: Operation) -> int | None:
    """Return the exact version a record must have for this operation to answer as it did.

    -1: the record is absent, or its version is not known exactly. None: any.
    """
    status, kind = operation.status, operation.kind
    if status == ABSENT or (status == OK and kind == INSERT):
        return -1
    if status == OK and kind in (PUT, DELETE) and operation.expected != ANY_VERSION:
        return operation.expected
    if operation.version == 0:
        return None
    return operation.version - 1 if status == OK and kind in (PUT, ADD) else operation.version


def describe_value(value: bytes) -> str:
    """Return a value for people: its words in decimal when they are small, zeros at its end left out."""
    words = [int.from_bytes(value[at : at + 8], "little") for at in range(0, len(value), 8)]
    while len(words) > 1 and words[-1] == 0:
        words.pop()
    return "[" + " ".join(str(word) if word < 1 << 40 else f"{word:#x}" for word in words) + "]"


def describe_state(state: State) -> str:
    """Return a state for people."""
    if not state.present:
        return "absent" if state.version == 1 else f"absent (a new record starts at version {state.version} or above)"
    return f"version {state.version}{'' if state.exact else ' or above'}, value {describe_value(state.value)}"


def describe(operation: Operation) -> tuple[str, str]:
    """Return what was asked and what was answered, for people."""
    kind, asked = operation.kind, KINDS.get(operation.kind, f"opcode {operation.kind}")
    if kind in (PUT, INSERT):
        asked += f" {describe_value(operation.value)}"
    if kind == ADD:
        delta = int.from_bytes(operation.value[:8], "little", signed=True)
        asked += f" {delta:+d}" + (f" at byte {operation.offset}" if operation.offset else "")
    if kind in (PUT, DELETE) and operation.expected != ANY_VERSION:
        asked += f" if version {operation.expected}"
    if kind == INSERT and operation.expected != ANY_VERSION:
        asked += f" until second {operation.expected}"
    if operation.status == UNANSWERED:
        return asked, "no answer"
    status = operation.status
    answered = NAMES[status] if status < len(NAMES) else f"status {status}"
    if operation.version:
        answered += f" version {operation.version}"
    if operation.answer is not None and status != ABSENT:
        answered += f" value {describe_value(operation.answer)}"
    return asked, answered
