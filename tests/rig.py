"""The packet loop on rings of memory: frames in, frames out, no network and no root; the whole engine runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datastore.base.partitioning import PARTITIONS
from datastore.store.client import Client
from datastore.store.table import Table
from nfs.dataplane import NetworkFunction
from nfs.dataplane.engine import HERE, make_engine
from nfs.dataplane.frames import free_frames, make_frames
from nfs.dataplane.headers import INSIDE, OUTSIDE
from nfs.dataplane.ledger import imbalance, to_counts
from nfs.dataplane.loop import run, waiting
from nfs.dataplane.steps import make_chain
from nfs.verification.rings import arrive, departed, memory_port

VALUE_BYTES = 64


class Rig:
    """One engine with a private table and no stores, or with the `client` and `primary` given.

    `rig(frame)` takes one frame through from inside, `rig.outside(frame)` from outside; both return what left, as a list of
    (side it left by, bytes).
    """

    def __init__(
        self, functions: Sequence[NetworkFunction], settings: Mapping[str, Any] | None = None, client: Client | None = None,
        primary: np.ndarray | None = None, table: Table | None = None,
    ) -> None:  # fmt: skip
        """table: in place of a private one; then partitions may change hosts."""
        self.frames = make_frames(512)
        self.ports = (memory_port(), memory_port())
        self.table = table or Table.private(4096, VALUE_BYTES)
        self.chain = make_chain(functions, settings or {}, VALUE_BYTES)
        self.client = client or Client([], 1, VALUE_BYTES, 1, 1)
        hosts = len(self.client.addresses)
        self.primary = primary = np.full(PARTITIONS, HERE) if primary is None else primary
        owner = self.table.register_owner()
        self.engine = make_engine(self.chain, self.frames, primary, owner, 1, VALUE_BYTES // 8, hosts, replicates=bool(table))

    def __call__(self, frame: bytes, side: int = INSIDE) -> list[tuple[int, bytes]]:
        return self.burst([frame], side)

    def outside(self, frame: bytes) -> list[tuple[int, bytes]]:
        return self(frame, OUTSIDE)

    def burst(
        self, burst: Sequence[bytes], side: int = INSIDE, settle_ns: int = 2_000_000, turns: int = 100
    ) -> list[tuple[int, bytes]]:
        """Let frames arrive together and return what left until nothing waits any more, or for so many turns."""
        port = self.ports[side]
        for frame in burst:
            assert arrive(port, self.frames, frame)
        left: list[tuple[int, bytes]] = []
        for _ in range(turns):
            run(self.engine, *self.ports, self.frames, self.table.words, self.client.state, settle_ns)
            left += self._collect()
            if waiting(self.engine) == 0:
                break
        assert imbalance(self.counts()) == 0
        assert int(free_frames(self.frames)) + waiting(self.engine) == self.frames.stack.size
        return left

    def _collect(self) -> list[tuple[int, bytes]]:
        return [(side, frame) for side, port in enumerate(self.ports) for frame in departed(port, self.frames)]

    def counts(self) -> dict[str, int]:
        """Return the ledger, with what waits."""
        self.engine.ledger[-1] = waiting(self.engine)
        return to_counts(self.engine.ledger)

    def records(self) -> dict[tuple[int, int], np.ndarray]:
        """Return the words of every record in the private table, by key."""
        return {(record.high, record.low): np.frombuffer(record.value, np.uint64) for record in self.table.records()}
