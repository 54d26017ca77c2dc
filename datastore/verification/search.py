"""In which order can the operations of one key have happened?

The search of J. Wing and C. Gong (Testing and verifying concurrent objects, JPDC 1993) as improved by G. Lowe (Testing for
linearizability, CCPE 2017): just-in-time linearization, with configurations remembered.

    time ->     |---- put 5 ----|                       a configuration: state of the record, and which of the
                    |------- get -> 5 -------|          operations under way have happened already
                 |------ add +1 -------- (no answer)
                                ^
                    at each answer, every configuration in which that operation has not happened yet is replaced by all
                    that follow from it by letting operations under way happen, this one last; none left: a violation

Only what is under way is remembered, so a history is checked in one pass and, with few operations at once, in linear time.
What keeps configurations few:

* An operation that leaves the state as it is happens as soon as it can: nothing is lost by that.
* Versions are never given twice: one that an answer names is not available to any other operation.
* Operations without an answer are under way to the end. Equal ones are interchangeable, so they happen in the order of their
  calls; one whose expected version is gone is forgotten; a configuration that used more of them for the same is dropped.
* A pass keeps at most `width` configurations, and remembers where it first dropped some (`checkpoint`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence

from datastore.store.operations import ADD, ANY_VERSION, DELETE, GET, INSERT, PUT
from datastore.store.statuses import OK
from datastore.verification.model import MUTATING, NEVER_NS, UNANSWERED, Operation, Record, State, covers, state_before

VISITS_PER_WIDTH = 64
"""Configurations looked at for one answer before it counts as too many."""
FAR = 1 << 62
"""Above every version."""

Configuration = tuple[State, int, int]
"""State; bits of the operations under way that have happened; bits of the unanswered operations that have."""


class Search:
    """One pass over the operations of a key, which are ordered by their calls. A copy goes on by itself."""

    def __init__(self, operations: Sequence[Operation], record: Record, width: int, lenient: bool = False) -> None:
        """lenient: unanswered operations may happen more than once. What is impossible even so is found impossible quickly,
        since it does not matter which of them happened.
        """
        self.operations, self.record, self.width, self.lenient = operations, record, width, lenient
        self.step = record.step
        self.before = [state_before(operation) for operation in operations]
        self.events = events_of(operations)
        self.position = 0
        """The next event."""
        self.next_read, self.next_write = remaining(operations)
        self.owned = owned_versions(operations)
        self.last_seen = {op.answer: index for index, op in enumerate(operations) if op.answer is not None}
        """Of each record answered: the last operation that was."""
        self.frontier: set[Configuration] = {(record.initial, 0, 0)}
        self.invoked = 0
        """Operations called so far."""
        self.slots: dict[int, int] = {}
        """Of each operation under way that was answered later: its bit."""
        self.free: list[int] = []
        self.under_way: dict[int, Operation] = {}
        """Those operations by their bits."""
        self.waiting: dict[int | None, list[int]] = {}
        """The bits by `state_before`."""
        self.open: dict[tuple, list[tuple[int, Operation]]] = {}
        """Unanswered operations with their bits, by what they do; equal ones in the order of their calls."""
        self.opened = 0
        self.ignored: frozenset[int] = frozenset()
        """See `ignore`."""
        self.widest = 1
        self.checkpoint: Search | None = None
        """Where the first configurations were dropped for their number; None: none were."""

    def fork(self) -> Search:
        """Return an independent copy."""
        other = copy.copy(self)
        other.frontier, other.slots, other.free = set(self.frontier), dict(self.slots), list(self.free)
        other.under_way = dict(self.under_way)
        other.waiting = {key: list(bits) for key, bits in self.waiting.items()}
        other.open = {key: list(members) for key, members in self.open.items()}
        return other

    def run(self, until: int | None = None) -> int | None:
        """Go on to the end, or up to event `until`; return the operation whose answer is impossible, or None."""
        events = self.events
        end = len(events) if until is None else until
        while self.position < end:
            event = events[self.position]
            if event >= 0:
                self.invoke(event)
            elif ~event in self.slots and not self.complete(~event):
                return ~event
            self.position += 1
        return None

    def invoke(self, index: int) -> None:
        """An operation is called."""
        operation = self.operations[index]
        self.invoked = index + 1
        if index in self.ignored:
            if mutated(operation):
                self.add_open(without_answer(operation))
            return
        if operation.answered_ns == NEVER_NS:
            self.add_open(operation)
            return
        bit = self.free.pop() if self.free else 1 << len(self.slots)
        self.slots[index] = bit
        self.under_way[bit] = operation
        self.waiting.setdefault(self.before[index], []).append(bit)
        if operation.kind == GET or operation.status != OK:
            step = self.step
            self.frontier = {
                (state, done | bit, used) if step(state, operation) is state else (state, done, used)
                for state, done, used in self.frontier
            }

    def add_open(self, operation: Operation) -> int:
        """An operation is called that is never answered; return its bit."""
        expected = operation.expected if operation.kind in (PUT, DELETE) else ANY_VERSION
        bit = 1 << self.opened
        self.open.setdefault((operation.kind, operation.value, expected, operation.offset), []).append((bit, operation))
        self.opened += 1
        return bit

    def ignore(self, indices: frozenset[int]) -> None:
        """Go on as if these operations had no answer: what fails still does so without them.

        indices: operations under way, or not called yet.
        """
        self.ignored = indices
        heard = [without_answer(op) if index in indices else op for index, op in enumerate(self.operations)]
        self.next_read, self.next_write = remaining(heard)
        self.owned = owned_versions(heard)
        for index in indices & self.slots.keys():
            operation, bit = self.operations[index], self.slots[index]
            open_bit = self.add_open(without_answer(operation)) if mutated(operation) else 0
            self.frontier = {(state, done & ~bit, used | open_bit if done & bit else used) for state, done, used in self.frontier}
            self.retire(index)

    def complete(self, index: int) -> bool:
        """An operation is answered: it has happened by now. Returns False when it cannot have."""
        bit = self.slots[index]
        found: set[Configuration] = set()
        whole = True
        for configuration in self.frontier:
            if configuration[1] & bit:
                found.add((configuration[0], configuration[1] ^ bit, configuration[2]))
            else:
                whole &= self.expand(configuration, bit, found)
        if len(found) > 1:
            found = undominated(found) if self.opened else found
        if (not whole or len(found) > self.width) and self.checkpoint is None:
            self.checkpoint = self.fork()
        if len(found) > self.width:
            found = self.likeliest(found)
        if not found:
            return False
        self.widest = max(self.widest, len(found))
        self.frontier = found
        self.retire(index)
        if self.open and index % 16 == 0:
            self.forget()
        return True

    def likeliest(self, found: set[Configuration]) -> set[Configuration]:
        """Return `width` configurations: those that used fewest operations whose values are seen later, or at all; late ones."""
        needed = 0
        for (kind, value, _, _), members in self.open.items():
            if kind in (PUT, INSERT) and self.last_seen.get(value, -1) >= self.invoked:
                needed |= sum(bit for bit, _ in members)
        ordered = sorted(
            found, key=lambda each: ((each[2] & needed).bit_count(), each[2].bit_count(), -each[2], each[0], each[1])
        )
        return set(ordered[: self.width])

    def retire(self, index: int) -> None:
        """An operation is under way no more."""
        bit, before = self.slots.pop(index), self.before[index]
        del self.under_way[bit]
        self.waiting[before].remove(bit)
        if not self.waiting[before]:
            del self.waiting[before]
        self.free.append(bit)

    def expand(self, start: Configuration, bit: int, found: set[Configuration]) -> bool:
        """Add to `found` what follows from `start` by letting operations happen, the one of `bit` last.

        Returns False when that was broken off: there were too many. Unanswered operations come in only when all that happens
        without more of them has been seen, and often need not at all (`nothing_gained`).
        """
        left, latest = self.width * VISITS_PER_WIDTH, self.under_way[bit].version or FAR
        seen, level = {start}, [start]

        def new(following: Configuration) -> bool:
            """Note a configuration; return whether to go on from it."""
            if following in seen or self.is_dead(following):
                return False
            seen.add(following)
            if following[1] & bit:
                found.add((following[0], following[1] ^ bit, following[2]))
                return False
            return following[0].version <= latest

        while level:
            for configuration in level:  # which grows meanwhile
                level.extend(filter(new, self.successors(configuration)))
                if len(seen) > left:
                    return False
            if not self.open or (start in level and self.nothing_gained(seen, bit)):
                return True
            level, reached = [], level
            for configuration in reached:
                level.extend(filter(new, self.open_successors(*configuration)))
                if len(seen) > left:
                    return False
        return True

    def is_dead(self, configuration: Configuration) -> bool:
        """Tell whether an operation under way needs a version that is gone."""
        state, done, _ = configuration
        oldest = state.version if state.present else state.version - 1
        for version, bits in self.waiting.items():
            if version is not None and 0 <= version < oldest:
                for bit in bits:
                    if not done & bit:
                        return True
        return False

    def nothing_gained(self, seen: set[Configuration], bit: int) -> bool:
        """Tell whether using unanswered operations to get to the answer of `bit` leads nowhere better.

        So it is when the answer shows the whole state, so that it is the same on every way, and which other operations have
        happened follows from their versions.
        """
        operation = self.under_way[bit]
        if operation.version == 0 or (operation.answer is None and operation.kind not in (PUT, INSERT)):
            return False
        doubtful = sum(self.waiting.get(None, ())) | sum(self.waiting.get(-1, ()))
        return any(done & bit and not doubtful & ~done for _, done, _ in seen)

    def successors(self, configuration: Configuration) -> Iterator[Configuration]:
        """Let each operation under way happen that can."""
        state, done, used = configuration
        exact, version = state.exact, state.version
        step, under_way = self.step, self.under_way
        if exact:
            bits: Iterable[int] = self.waiting.get(version, ())
            if None in self.waiting:
                bits = [*bits, *self.waiting[None]]
        else:
            bits = under_way
        for bit in bits:
            if done & bit:
                continue
            operation = under_way[bit]
            after = step(state, operation)
            if after is None:
                continue
            if operation.version == 0 and after is not state:
                after = self.unowned(state, after)
                if after is None:
                    continue
            yield after, self.settled(after, done | bit), used

    def settled(self, state: State, done: int) -> int:
        """Let happen what leaves the state as it is."""
        bits: Iterable[int] = self.waiting.get(state.version, ()) if state.exact else self.under_way
        for bit in bits:
            if not done & bit:
                operation = self.under_way[bit]
                if (operation.kind == GET or operation.status != OK) and self.step(state, operation) is state:
                    done |= bit
        return done

    def open_successors(self, state: State, done: int, used: int) -> Iterator[Configuration]:
        """Let each unanswered operation happen that can, as long as what is answered later remains possible."""
        for effect, members in self.open.items():
            if not self.leaves_room(state, effect[0]):
                continue
            for bit, operation in members:
                if not used & bit:
                    after = self.step(state, operation)
                    after = None if after is None else self.unowned(state, after)
                    if after is not None:
                        yield after, self.settled(after, done), used if self.lenient else used | bit
                    break

    def unowned(self, before: State, after: State) -> State | None:
        """Return the state after an operation that answered no version, or None: it cannot be given one that an answer names."""
        version = after.version
        if not after.present or version not in self.owned:
            return after
        if after.exact:
            return after if version == before.version else None
        while version in self.owned:
            version += 1
        return after._replace(version=version)

    def leaves_room(self, state: State, kind: int) -> bool:
        """Tell whether the versions answered to operations not called yet are still to come after an operation of `kind`."""
        present, _, version, _ = state
        if present:
            after, following = version + 1, version + (1 if kind == DELETE else 2)
        else:
            after, following = version, version + 1
        return self.next_read[self.invoked] >= after and self.next_write[self.invoked] >= following

    def forget(self) -> None:
        """Drop the unanswered operations that every configuration has used, or that expect a version gone by."""
        everywhere, lowest = -1, FAR
        for state, _, used in self.frontier:
            everywhere &= used
            lowest = min(lowest, state.version)
        for effect in list(self.open):
            kept = [] if effect[2] < lowest else [member for member in self.open[effect] if not member[0] & everywhere]
            everywhere |= sum(member[0] for member in self.open[effect]) if not kept else 0
            if kept:
                self.open[effect] = kept
            else:
                del self.open[effect]
        if everywhere:
            self.frontier = {(state, done, used & ~everywhere) for state, done, used in self.frontier}


def mutated(operation: Operation) -> bool:
    """Tell whether an answered operation changed the record."""
    return operation.kind in MUTATING and operation.status == OK


def without_answer(operation: Operation) -> Operation:
    """Return an operation as if its answer had never come."""
    return operation._replace(status=UNANSWERED, version=0, answer=None, answered_ns=NEVER_NS)


def owned_versions(operations: Sequence[Operation]) -> set[int]:
    """Return the versions that answers say were given by their operations."""
    return {operation.version for operation in operations if gives_version(operation)}


def gives_version(operation: Operation) -> bool:
    return operation.version != 0 and operation.status == OK and operation.kind in (PUT, INSERT, ADD)


def events_of(operations: Sequence[Operation]) -> list[int]:
    """Return calls (the operation's index) and answers (its complement) by time; at the same time, calls come first."""
    events = [(operation.invoked_ns, 0, index) for index, operation in enumerate(operations)]
    events += [(op.answered_ns, 1, ~index) for index, op in enumerate(operations) if op.answered_ns != NEVER_NS]
    events.sort()
    return [event for _, _, event in events]


def remaining(operations: Sequence[Operation]) -> tuple[list[int], list[int]]:
    """Return, by how many operations were called, the lowest version later ones show, and the lowest they give."""
    reads, writes = [FAR] * (len(operations) + 1), [FAR] * (len(operations) + 1)
    for index in range(len(operations) - 1, -1, -1):
        operation = operations[index]
        reads[index], writes[index] = reads[index + 1], writes[index + 1]
        if operation.version:
            if gives_version(operation):
                writes[index] = min(writes[index], operation.version)
            else:
                reads[index] = min(reads[index], operation.version)
    return reads, writes


def undominated(found: set[Configuration]) -> set[Configuration]:
    """Drop the configurations from which nothing is possible that is not from another: same state, fewer open ones used."""
    groups: dict[tuple, list[Configuration]] = {}
    for configuration in found:
        state, done, _ = configuration
        groups.setdefault((state.present, state.value, done), []).append(configuration)
    if len(groups) == len(found):
        return found
    kept: set[Configuration] = set()
    for group in groups.values():
        group.sort(key=lambda each: (each[2].bit_count(), each[0].exact, each[0].version, each[2]))
        best: list[Configuration] = []
        for each in group:
            if not any(other[2] & ~each[2] == 0 and covers(other[0], each[0]) for other in best):
                best.append(each)
        kept.update(best)
    return kept
