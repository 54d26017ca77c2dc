"""A client with one operation at a time: what it asked and what it was answered is the history that the checker judges."""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.coordination.heartbeats import MILLISECOND_NS
from datastore.coordination.maps import ClusterMap
from datastore.store.operations import ADD, ANY_VERSION, DELETE, GET, INSERT, OPERATION_VALUE, PUT, operation_word
from datastore.store.partitions import PARTITION_BITS
from datastore.store.protocol import FRAME_HEADER_WORDS, write_frame_header
from datastore.store.statuses import ABSENT, EXISTS, NAMES, OK, STALE_SEQUENCE, VERSION_MISMATCH
from datastore.verification.hosts import ANSWER_WORDS, CLUSTER, COORDINATOR
from datastore.verification.imagined import Actor
from datastore.verification.model import Operation

OUTCOMES = (OK, ABSENT, EXISTS, VERSION_MISMATCH, STALE_SEQUENCE)


class ClientHost(Actor):
    """A client with one operation at a time, on a few keys, which it asks again until it is answered or gives up.

    Every other client mostly reads, and follows an old map as long as that works: who answers from old state is found out so.
    """

    def __init__(self, world: Any, number: int) -> None:
        super().__init__(world, f"client{number}")
        self.number, self.sequence, self.map = number, 0, ClusterMap(0, ())
        self.pending: Operation | None = None
        self.versions: dict[tuple[int, int], int] = {}
        self.next()

    def next(self) -> None:
        self.pending = None
        if self.world.ending:
            return
        self.later(self.world.random.randrange(1, 2 * MILLISECOND_NS), self.invoke)

    def invoke(self) -> None:
        rng = self.world.random
        self.sequence += 1
        key: tuple[int, int] = self.world.some_key()
        kind = rng.choices((GET, PUT, INSERT, ADD, DELETE), (40, 3, 2, 4, 1) if self.number % 2 else (5, 3, 2, 4, 1))[0]
        known = ANY_VERSION if rng.random() < 0.5 else self.versions.get(key, 1)
        expected = known if kind in (PUT, DELETE) else ANY_VERSION
        value = rng.randrange(1, 1 << 16).to_bytes(8, "little") + (bytes(8) if kind in (PUT, INSERT) else b"")
        self.pending = Operation(self.number, self.sequence, *key, kind, value if kind in (PUT, INSERT, ADD) else b"", expected,
                                 invoked_ns=self.world.now)  # fmt: skip
        self.ask()

    def ask(self) -> None:
        """Send the operation to whom the map names, and look again after a while."""
        operation = self.pending
        if operation is None:
            return
        rng = self.world.random
        group = self.map.groups[operation.low & int(PARTITION_BITS)] if self.map.groups else None
        if group and group.members:
            reads_anywhere = operation.kind == GET and rng.random() < 0.6
            target = rng.choice(group.members) if reads_anywhere else group.members[0]
            self.world.send(self.name, target, "request", self.frame(operation))
        if not group or rng.random() < 0.02:
            self.world.send(self.name, COORDINATOR, "map?", None)
        self.later(rng.randrange(20, 60) * MILLISECOND_NS, lambda: self.look_again(operation))

    def look_again(self, operation: Operation) -> None:
        if self.pending is not operation:
            return
        if self.world.now - operation.invoked_ns > self.world.patience_ns:
            self.world.record(operation)  # its answer never came
            self.next()
            return
        self.world.send(self.name, COORDINATOR, "map?", None)
        self.ask()

    def frame(self, operation: Operation) -> np.ndarray:
        words = np.zeros(ANSWER_WORDS, np.uint64)
        write_frame_header(words, 0, 1, ANSWER_WORDS - FRAME_HEADER_WORDS, 0, self.map.epoch, np.uint64(self.number + 1),
                           np.uint64(CLUSTER))  # fmt: skip
        at = FRAME_HEADER_WORDS
        words[at] = operation_word(operation.kind, 0, len(operation.value), operation.offset)
        words[at + 1], words[at + 2], words[at + 3] = operation.sequence, operation.low, operation.high
        words[at + 4] = (operation.expected << 20) & 0xFFFFFFFFFFFFFFFF if operation.kind in (PUT, DELETE) else 0
        given = np.frombuffer(operation.value, np.uint64)
        words[at + OPERATION_VALUE : at + OPERATION_VALUE + given.size] = given
        return words

    def deliver(self, source: str, kind: str, body: Any) -> None:
        if kind == "map":
            if body.epoch > self.map.epoch:
                self.map = body
            return
        operation, at = self.pending, FRAME_HEADER_WORDS
        if operation is None or int(body[at + 1]) != operation.sequence:
            return
        status = int(body[at]) >> 8 & 0xFF
        if status not in OUTCOMES:
            self.world.note(f"{self.name} is refused by {source}: {NAMES[status]}")
            return  # `look_again` comes
        version = int(body[at + 4]) >> 20
        shows = status in (OK, EXISTS, VERSION_MISMATCH)
        answer = body[at + OPERATION_VALUE :].tobytes() if shows else None
        self.versions[operation.low, operation.high] = version
        self.world.record(operation._replace(status=status, version=version if shows else 0, answer=answer,
                                             answered_ns=self.world.now))  # fmt: skip
        self.next()
