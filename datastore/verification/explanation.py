"""Why can a history not be put in order? The shortest window that shows it, for a person to read."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from datastore.verification.model import NEVER_NS, Operation, State, describe, describe_state
from datastore.verification.search import Search, gives_version

MINIMIZED_OPERATIONS = 300
"""Longer windows are shown without trying which of their operations matter."""
SHOWN_OPERATIONS = 40
SHOWN_STATES = 8
VISITED_CONFIGURATIONS = 2000


def explain(start: Search, noticed: int) -> tuple[list[Operation], list[str]]:
    """Return the operations that contradict each other, in the order of their calls, and lines that tell it.

    start: a search that has not begun, wide enough to drop nothing. noticed: the operation at whose answer
    the search failed: it looks ahead, so a later answer may be the impossible one.

    The window begins with the call of the first operation whose answer is impossible, given all that was answered until then,
    and ends with its answer. Of the operations under way in between, those are left out without whose answers it still is.
    """
    operations = start.operations
    failed = first_impossible(start, noticed)
    search = heard_until(start, failed)
    called, answered = search.events.index(failed), search.events.index(~failed)
    search.run(called)
    within = [event for event in search.events[called:answered] if event >= 0 and event != failed]
    others = sorted({*search.slots, *within} - search.ignored)
    needed = essential(search, others, answered) if len(others) <= MINIMIZED_OPERATIONS else others
    window = [operations[index] for index in sorted([*needed, failed])]
    before = {state for state, _, _ in search.frontier}
    search.ignore(search.ignored | {failed})
    possible = states_until(search, answered)
    return window, lines(operations, operations[failed], window, before, possible, len(others) - len(needed))


def first_impossible(start: Search, noticed: int) -> int:
    """Return the operation whose answer makes what is known until then impossible, by bisection of the answers."""
    answers = [~event for event in start.events if event < 0]
    answers = answers[answers.index(noticed) :]

    def impossible(number: int) -> bool:
        search = heard_until(start, answers[number])
        return search.run() is not None and search.checkpoint is None

    step = 1
    while step < len(answers) and not impossible(step - 1):
        step *= 2
    known = range(step // 2, min(step - 1, len(answers) - 1) + 1)  # the last of these is impossible, or the whole history's last
    return answers[known[bisect.bisect_left(known[:-1], True, key=impossible)]]


def heard_until(start: Search, last: int) -> Search:
    """Return a search that knows what was called and answered until the answer of operation `last`, and no more."""
    operations = start.operations
    until_ns = operations[last].answered_ns
    called = operations[: bisect.bisect_right(operations, until_ns, key=lambda operation: operation.invoked_ns)]
    search = Search(called, start.record, start.width, start.lenient)
    heard = search.events[: search.events.index(~last) + 1]
    later = {~event for event in search.events[len(heard) :] if event < 0}
    search.ignore(frozenset(later))
    return search


def essential(search: Search, others: Sequence[int], answered: int) -> list[int]:
    """Return those of the others without whose answers the failure goes away."""
    ignored = search.ignored
    for index in others:
        attempt = search.fork()
        attempt.ignore(ignored | {index})
        if attempt.run(answered + 1) is not None and attempt.checkpoint is None:
            ignored |= {index}
    return [index for index in others if index not in ignored]


def states_until(search: Search, answered: int) -> set[State]:
    """Return the states the record can have had from here to an answer."""
    found: set[State] = set()
    while True:
        while search.position < answered and search.events[search.position] >= 0:
            search.run(search.position + 1)
        seen, stack = set(search.frontier), list(search.frontier)
        while stack and len(seen) < VISITED_CONFIGURATIONS:
            configuration = stack.pop()
            for following in (*search.successors(configuration), *search.open_successors(*configuration)):
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
        found.update(state for state, _, _ in seen)
        if search.position >= answered or search.run(search.position + 1) is not None:
            return found


def lines(
    operations: Sequence[Operation], failed: Operation, window: Sequence[Operation], before: set[State], possible: set[State],
    left_out: int,
) -> list[str]:  # fmt: skip
    """Return the report on one key."""
    asked, answered = describe(failed)
    start_ns = operations[0].invoked_ns
    told = [
        f"key {failed.high:016x}{failed.low:016x}: not linearizable: operation {failed.sequence} of client {failed.client}, "
        f"{asked}, cannot have been answered {answered}",
        "  when it was called, the record was:",
        *state_lines(before, operations, start_ns),
        "  from then until its answer, it can have been:",
        *state_lines(possible, operations, start_ns),
        f"  the operations that show it (times in µs since the key's first call; {left_out} others at that time do not matter):",
        f"  {'called':>14} {'answered':>14} {'client':>8} {'operation':>9}",
    ]
    shown = [*window[: SHOWN_OPERATIONS // 2], *window[-SHOWN_OPERATIONS // 2 :]] if len(window) > SHOWN_OPERATIONS else window
    for number, operation in enumerate(shown):
        if len(window) > SHOWN_OPERATIONS and number == SHOWN_OPERATIONS // 2:
            told.append(f"  {'...':>14} {len(window) - SHOWN_OPERATIONS} more")
        mark = "  <-- impossible" if operation == failed else ""
        told.append(operation_line(operation, start_ns) + mark)
    return told


def operation_line(operation: Operation, start_ns: int) -> str:
    """Return one operation as a line."""
    called_us, answered_us = times_us(operation, start_ns)
    asked, answered = describe(operation)
    return f"  {called_us:>14} {answered_us:>14} {operation.client:>8} {operation.sequence:>9}  {asked} -> {answered}"


def times_us(operation: Operation, start_ns: int) -> tuple[str, str]:
    """Return when an operation was called and answered, in µs since the start."""
    never = operation.answered_ns == NEVER_NS
    answered_us = "never" if never else f"{(operation.answered_ns - start_ns) / 1000:.3f}"
    return f"{(operation.invoked_ns - start_ns) / 1000:.3f}", answered_us


def state_lines(states: set[State], operations: Sequence[Operation], start_ns: int) -> list[str]:
    """Return states as lines, each with the operation that made it, if an answer tells that."""
    told = []
    ordered = sorted(states, key=lambda state: (state.version, state))
    for state in ordered[-SHOWN_STATES:]:
        makers = [op for op in operations if state.exact and gives_version(op) and op.version == state.version]
        told.append(f"    {describe_state(state)}")
        if makers:
            called_us, answered_us = times_us(makers[0], start_ns)
            asked, _ = describe(makers[0])
            told[-1] += f", made by {asked} of client {makers[0].client}, {called_us} to {answered_us}"
    return ([f"    (and {len(ordered) - SHOWN_STATES} older ones)"] if len(ordered) > SHOWN_STATES else []) + told
