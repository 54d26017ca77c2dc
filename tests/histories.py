"""Histories to check: recorded from an imagined store that does one operation at a time, right or with one fault."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

from datastore.store.operations import ADD, ANY_VERSION, DELETE, GET, INSERT, PUT
from datastore.store.statuses import ABSENT, EXISTS, OK, VERSION_MISMATCH
from datastore.verification.model import NEVER_NS, UNANSWERED, Operation

VALUE_BYTES = 16
KINDS = (GET, GET, GET, PUT, PUT, ADD, ADD, ADD, INSERT, DELETE)


def word(number: int) -> bytes:
    """Return a number as 8 bytes."""
    return (number % 2**64).to_bytes(8, "little")


def record(*numbers: int) -> bytes:
    """Return a record that begins with these numbers."""
    return b"".join(map(word, numbers)).ljust(VALUE_BYTES, b"\0")


@dataclass
class Cell:
    """One record of the imagined store: versions, not sets of them, and written apart from the checker's model."""

    version: int = 0
    """0: there is none."""
    value: bytes = b""
    floor: int = 0
    """The highest version it ever had."""

    def copy(self) -> Cell:
        return Cell(self.version, self.value, self.floor)

    def write(self, value: bytes, created_at: int) -> None:
        self.version = self.version + 1 if self.version else created_at
        self.value, self.floor = value, self.version

    def do(self, op: Operation, created_at: int) -> tuple[int, int, bytes | None]:
        """Do an operation; return status, version and record answered. created_at: the version a new record gets."""
        there = self.version > 0
        if op.kind == INSERT and there:
            return EXISTS, self.version, self.value
        if op.kind in (GET, PUT, DELETE) and not there:
            return ABSENT, 0, None
        if op.kind in (PUT, DELETE) and op.expected not in (ANY_VERSION, self.version):
            return VERSION_MISMATCH, self.version, self.value
        if op.kind == DELETE:
            answer = OK, self.version, self.value
            self.version, self.value = 0, b""
            return answer
        if op.kind in (PUT, INSERT):
            self.write(op.value, created_at)
        if op.kind == ADD:
            words = list(memoryview(self.value if there else bytes(VALUE_BYTES)).cast("Q"))
            words[op.offset // 8] = (words[op.offset // 8] + int.from_bytes(op.value, "little")) % 2**64
            self.write(b"".join(map(word, words)), created_at)
        return OK, self.version, self.value


@dataclass
class Recording:
    """Clients at work on an imagined store, one operation each at a time, in virtual time."""

    seed: int
    operations: int
    clients: int = 8
    keys: int = 1
    kinds: tuple[int, ...] = KINDS
    values: int = 1 << 30
    """How many different values are written."""
    longest_ns: int = 1000
    lost: float = 0.0
    """Share of operations whose answer never comes."""
    silent: float = 0.0
    """Share of successful writes that are asked to answer only that."""
    history: list[Operation] = field(default_factory=list)

    def run(self) -> list[Operation]:
        """Return the history."""
        chance = random.Random(self.seed)
        cells = [Cell() for _ in range(self.keys)]
        seen = [[0] * self.keys for _ in range(self.clients)]
        called: dict[int, Operation] = {}
        events = [(chance.randrange(1, self.longest_ns + 1), client, "call", 0) for client in range(self.clients)]
        heapq.heapify(events)
        sequence = 0
        while events:
            now, client, event, at = heapq.heappop(events)
            if event == "call" and sequence < self.operations:
                sequence += 1
                key = chance.randrange(self.keys)
                op = called[client] = self.request(chance, client, sequence, key, seen[client][key], now)
                done = now + chance.randrange(1, self.longest_ns + 1)
                heapq.heappush(events, (done, client, "do", done + chance.randrange(1, self.longest_ns + 1)))
                if chance.random() < self.lost:
                    self.history.append(op)
                    called[client] = op._replace(answered_ns=0)
            elif event == "do":
                op = called.pop(client)
                if op.answered_ns or chance.random() < 0.5:
                    cell = cells[op.low]
                    status, version, answer = cell.do(op, cell.floor + chance.choice((1, 1, 2, 7)))
                    seen[client][op.low] = version
                if op.answered_ns:
                    if status == OK and op.kind != GET and chance.random() < self.silent:
                        version, answer = 0, None
                    self.history.append(op._replace(status=status, version=version, answer=answer, answered_ns=at))
                heapq.heappush(events, (at + chance.randrange(1, self.longest_ns + 1), client, "call", 0))
        return self.history

    def request(self, chance: random.Random, client: int, sequence: int, key: int, seen: int, now: int) -> Operation:
        """Return an operation a client might want."""
        kind = chance.choice(self.kinds)
        value, expected, offset = b"", ANY_VERSION, 0
        if kind in (PUT, INSERT):
            value = record(chance.randrange(self.values))
        if kind == ADD:
            value, offset = word(chance.choice((1, 1, 2, -1))), chance.choice((0, 8))
        if kind in (PUT, DELETE) and seen and chance.random() < 0.7:
            expected = seen
        return Operation(client + 1, sequence, key, 0, kind, value, expected, offset, UNANSWERED, 0, None, now, NEVER_NS)


def broken(history: list[Operation], chance: random.Random) -> list[Operation]:
    """Return a history with one small change that may make it wrong."""
    changed = list(history)
    answered = [n for n, op in enumerate(history) if op.status != UNANSWERED]
    if not answered:
        return changed
    n = chance.choice(answered)
    op = changed[n]
    other = changed[chance.choice(answered)]
    match chance.randrange(6):
        case 0:
            changed[n] = op._replace(version=max(op.version + chance.choice((-1, 1)), 0))
        case 1:
            changed[n] = op._replace(answer=other.answer, version=other.version, status=other.status)
        case 2:
            changed[n] = op._replace(answer=other.answer)
        case 3:
            changed[n] = op._replace(status=chance.choice((OK, ABSENT, EXISTS, VERSION_MISMATCH)))
        case 4:
            later_ns = chance.randrange(1, 3000)
            changed[n] = op._replace(invoked_ns=op.invoked_ns + later_ns, answered_ns=op.answered_ns + later_ns)
        case 5:
            del changed[n]
    return changed


def orderable(history: list[Operation]) -> bool:
    """Tell by trying every order that fits the times whether a history of one key is linearizable."""
    versions = [op.version for op in history] + [op.expected for op in history if op.expected != ANY_VERSION]
    highest = max(versions, default=0) + 1

    def possible(left: list[Operation], cell: Cell) -> bool:
        if all(op.status == UNANSWERED for op in left):
            return True
        first_answer_ns = min(op.answered_ns for op in left)
        for n, op in enumerate(left):
            if op.invoked_ns > first_answer_ns:
                continue
            creates = not cell.version and op.kind in (INSERT, ADD)
            for created_at in range(cell.floor + 1, max(highest, cell.floor + 1) + 1) if creates else (0,):
                after = cell.copy()
                status, version, answer = after.do(op, created_at)
                shown = status == ABSENT or (op.version in (0, version) and (op.answer is None or op.answer == answer))
                fits = op.status == UNANSWERED or (op.status == status and shown)
                if fits and possible(left[:n] + left[n + 1 :], after):
                    return True
        return False

    return possible(list(history), Cell())
