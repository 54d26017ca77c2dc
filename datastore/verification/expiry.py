"""What does the clock do to a record that was inserted with an expiry (a port's lease)?

It is taken for one more client: for each lease that somebody saw, it deletes exactly that version, at some time after the second
at which it expires. So the model needs no time, and whoever is given a lease before the other one is over, or loses it early, is
found as any violation. That an expired record is *still* seen is none: a store looks at its clock once for many operations.

An insert without an answer whose value nobody ever saw did nothing that matters: it is left out, and its expiry with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from datastore.base.errors import NearstateError
from datastore.store.operations import ADD, ANY_VERSION, DELETE, INSERT, PUT
from datastore.store.statuses import OK
from datastore.verification.model import NEVER_NS, Operation, unanswered

CLOCK = 0
"""The client that expiry is: no client has this id."""
NS = 1_000_000_000


def is_lease(operation: Operation) -> bool:
    """Tell whether an operation inserts a record that expires."""
    return operation.kind == INSERT and operation.expected != ANY_VERSION


def with_expiry(operations: Sequence[Operation]) -> list[Operation]:
    """Return the operations of one key, with what the clock did to its leases.

    Raises NearstateError where leases share a key with PUT or ADD, which change the version that expires.
    """
    expires_s = {operation.value: operation.expected for operation in operations if is_lease(operation)}
    if not expires_s:
        return list(operations)
    if any(operation.kind in (PUT, ADD) for operation in operations):
        raise NearstateError(f"key {operations[0].high:016x}{operations[0].low:016x} has inserts that expire, and puts or adds: "
                             "record leases on keys that are only inserted, read and deleted")  # fmt: skip
    shown = [op for op in operations if op.answer is not None and op.version and not unanswered(op)]
    versions = {operation.version: operation.answer for operation in shown if operation.answer in expires_s}
    seen = set(versions.values())
    gone_ns = _gone_by(shown)
    deleted = {operation.version for operation in shown if operation.kind == DELETE and operation.status == OK}
    asked = {operation.expected for operation in operations if operation.kind == DELETE and unanswered(operation)}
    clock = [
        _end(operations[0], version, expires_s[value] * NS, NEVER_NS if asked & {version, ANY_VERSION} else gone_ns[version])
        for version, value in versions.items()
        if value is not None and version not in deleted
    ]
    return [op for op in operations if not (is_lease(op) and unanswered(op) and op.value not in seen)] + clock


def _gone_by(shown: Sequence[Operation]) -> dict[int, int]:
    """Return, by version, when somebody was answered with a later one: it was gone by then. NEVER_NS: nobody was."""
    first_ns: dict[int, int] = {}
    for operation in shown:
        first_ns[operation.version] = min(first_ns.get(operation.version, NEVER_NS), operation.answered_ns)
    gone, earliest_ns = {}, NEVER_NS
    for version in sorted(first_ns, reverse=True):
        gone[version] = earliest_ns
        earliest_ns = min(earliest_ns, first_ns[version])
    return gone


def _end(one: Operation, version: int, expires_ns: int, gone_ns: int) -> Operation:
    """Return the deletion of an expired version: done between two times, or perhaps never if the later one is not known.

    Gone before it expired, it was not the clock: what did it is for the checker to say.
    """
    done = expires_ns < gone_ns < NEVER_NS
    asked = Operation(CLOCK, version, one.low, one.high, DELETE, expected=version, invoked_ns=expires_ns)
    return asked._replace(status=OK, version=version, answered_ns=gone_ns) if done else asked
