"""The slow side of network functions: what they do about ten times a second, in Python, beside the packet loop.

A thread of its own, so that a store that is slow to answer never holds a packet. It reads records of the shared state and
changes the functions' settings in place; a setting is one word or less, so the packet loop sees the old one or the new one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import numpy as np

from datastore.base.errors import NearstateError
from datastore.store import operations
from datastore.store.client import Client
from datastore.store.operations import OPERATION_VALUE
from datastore.store.partitions import PARTITION_BITS
from datastore.store.statuses import OK
from datastore.store.table import Table
from nfs.dataplane.engine import EPOCH, HERE
from nfs.dataplane.steps import Chain

PERIOD_S = 0.1
log = logging.getLogger(__name__)


class Reader:
    """Reads records wherever they are: `reader(key_high, key_low)` gives the value's words, zeros when there is none.

    Raises NearstateError while the store that has the record does not answer.
    """

    def __init__(self, table: Table, client: Client, primary: np.ndarray, control: np.ndarray) -> None:
        """primary, control: the packet loop's, which change with the map."""
        self._table, self._client, self._primary, self._control = table, client, primary, control
        self._owner = table.register_owner()
        self._connected: set[int] = set()

    def __call__(self, key_high: int, key_low: int) -> np.ndarray:
        host = int(self._primary[int(key_low) & int(PARTITION_BITS)])
        value_words = self._client.value_bytes // 8
        if host == HERE:
            answer = np.zeros(OPERATION_VALUE + value_words, np.uint64)
            epoch, now_s = int(self._control[EPOCH]), time.monotonic_ns() // 1_000_000_000
            status = operations.get(self._table.words, self._owner, epoch, now_s,
                                    np.uint64(key_low), np.uint64(key_high), answer, 0)  # fmt: skip
            return answer[OPERATION_VALUE:] if status == OK else np.zeros(value_words, np.uint64)
        if host not in self._connected:
            self._client.connect(host)
            self._connected.add(host)
        try:
            found = self._client.get(int(key_low), int(key_high), host)
        except (NearstateError, OSError):
            self._connected.discard(host)
            raise
        return np.frombuffer(found.value, np.uint64).copy()


class Housekeeper:
    """Calls the `housekeep` of every function of a chain that has one, until closed."""

    def __init__(self, chain: Chain, make_reader: Callable[[], Reader]) -> None:
        self._chain, self._make_reader = chain, make_reader
        self._closed = threading.Event()
        self._busy = [number for number, function in enumerate(chain.functions) if function.housekeep]
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)
        if self._busy:
            self._thread.start()

    def _run(self) -> None:
        reader: Reader | None = None
        while not self._closed.wait(PERIOD_S):
            try:
                reader = reader or self._make_reader()
                for number in self._busy:
                    housekeep = self._chain.functions[number].housekeep
                    assert housekeep
                    housekeep(self._chain.env_of(number), reader, time.monotonic())
            except (NearstateError, OSError) as error:  # the store is down: what was known last holds
                log.warning("housekeeping: %s", error)
                self._closed.wait(1.0)

    def close(self) -> None:
        """Stop; what is under way ends within the client's time-out."""
        self._closed.set()
        if self._busy:
            self._thread.join(timeout=5.0)
