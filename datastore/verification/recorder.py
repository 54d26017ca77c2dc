"""A store's client that records what it asks and is answered.

    with HistoryWriter(folder, 1, 32) as writer, Client([("10.0.0.1", 7700)], 1, 32) as client:
        client.connect()
        RecordedClient(client, writer).add(5, 6, offset=0, delta=1)

An operation that fails (the store is gone or silent) has no answer in the history: it may have been done, at any time from
then on. A client that goes on must not send it again: it starts anew under another client id.
"""

from __future__ import annotations

from datastore.base.errors import NearstateError
from datastore.store.client import NEXT, Answer, Client
from datastore.store.operations import ADD, ANY_VERSION, DELETE, GET, INSERT, PUT
from datastore.store.statuses import OK
from datastore.verification.history import HistoryWriter
from datastore.verification.model import OUTCOMES


class RecordedClient:
    """One operation at a time of a connected client, each recorded. Nobody else may use the client meanwhile."""

    def __init__(self, client: Client, writer: HistoryWriter) -> None:
        """Raises NearstateError when the two are of tables with different values."""
        if client.value_bytes != writer.value_bytes:
            raise NearstateError(f"client of {client.value_bytes}-byte values, history of {writer.value_bytes}: use the same")
        self.client, self.writer = client, writer

    def get(self, low: int, high: int, host: int = 0) -> Answer:
        """See `Client.get`."""
        row = self._call(GET, low, high, host)
        return self._answer(row, self.client.get(low, high, host))

    def put(self, low: int, high: int, value: bytes, version: int = ANY_VERSION, host: int = 0) -> Answer:
        """See `Client.put`."""
        row = self._call(PUT, low, high, host, value, version)
        return self._answer(row, self.client.put(low, high, value, version, host=host))

    def insert(self, low: int, high: int, value: bytes, host: int = 0) -> Answer:
        """See `Client.insert`."""
        row = self._call(INSERT, low, high, host, value)
        return self._answer(row, self.client.insert(low, high, value, host=host))

    def add(self, low: int, high: int, offset: int, delta: int, host: int = 0) -> Answer:
        """See `Client.add`."""
        row = self._call(ADD, low, high, host, (delta % 2**64).to_bytes(8, "little"), offset=offset)
        return self._answer(row, self.client.add(low, high, offset, delta, host=host))

    def delete(self, low: int, high: int, version: int = ANY_VERSION, host: int = 0) -> Answer:
        """See `Client.delete`."""
        row = self._call(DELETE, low, high, host, expected=version)
        return self._answer(row, self.client.delete(low, high, version, host))

    def _call(
        self, kind: int, low: int, high: int, host: int, value: bytes = b"", expected: int = ANY_VERSION, offset: int = 0
    ) -> int:
        if len(value) > self.client.value_bytes:
            raise NearstateError(f"value of {len(value)} bytes: the records have {self.client.value_bytes}")
        sequence = int(self.client.state.control[host, NEXT])
        return self.writer.call(kind, low, high, sequence, value, expected, offset)

    def _answer(self, row: int, answer: Answer) -> Answer:
        shows = answer.status in OUTCOMES and (answer.status == OK or answer.version != 0)
        self.writer.answer(row, answer.status, answer.version, answer.value if shows else None)
        return answer
