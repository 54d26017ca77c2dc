"""A client of a whole cluster, for tools and tests: one operation at a time, asked again until somebody answers for good.

It follows the coordinator's map. An operation keeps its sequence number wherever it is asked: done once, it is answered so for
ever (`store/operations.py`). Network functions have a faster client (`store/client.py`).
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from types import TracebackType
from typing import Any

import numpy as np

from datastore.base.errors import NearstateError
from datastore.coordination.maps import ClusterMap
from datastore.coordination.messages import LONGEST_TOLD
from datastore.security import strict
from datastore.security.challenge import Distrust, prove
from datastore.security.secret import COORDINATOR, STORE, Credential
from datastore.store.client import Answer
from datastore.store.layout import EXPIRY_BITS
from datastore.store.operations import ANY_VERSION, DELETE, GET, HELLO, OPERATION_VALUE, PUT, SEQUENCE, operation_word
from datastore.store.partitions import PARTITION_BITS
from datastore.store.protocol import FRAME_HEADER_WORDS, write_frame_header
from datastore.store.statuses import ABSENT, EXISTS, OK, STALE_SEQUENCE, VERSION_MISMATCH

OUTCOMES = (OK, ABSENT, EXISTS, VERSION_MISMATCH, STALE_SEQUENCE)
TRY_S = 0.1
"""How long one store may take to answer before the map is looked at again."""
PROVE_S = 0.5
"""How long a challenge may take: it is answered between two turns of whoever listens."""
PAUSE_S = 0.002


def ask(
    address: tuple[str, int], message: dict[str, Any], credential: Credential, timeout_s: float = 2.0
) -> dict[str, Any]:  # fmt: skip
    """Send a coordinator one message and return its answer. Raises NearstateError when it does not answer, or none that is one.

    credential: an administrator's; a client's for {"map": epoch} alone.
    """
    try:
        with socket.create_connection(address, timeout_s) as connection:
            prove(connection, credential, COORDINATOR, timeout_s=max(timeout_s, PROVE_S))
            connection.sendall(json.dumps(message).encode() + b"\n")
            data = b""
            while not data.endswith(b"\n"):
                more = connection.recv(1 << 16)
                if not more:
                    raise ConnectionResetError("it closed the connection")
                data += more
                if len(data) > LONGEST_TOLD:
                    raise ConnectionAbortedError(f"its answer is longer than {LONGEST_TOLD} bytes")
        return strict.message(data)
    except Distrust as error:
        raise NearstateError(f"coordinator at {address[0]}:{address[1]}: {error}") from None
    except ValueError as error:
        raise NearstateError(f"coordinator at {address[0]}:{address[1]} answers no message: {error}") from None
    except OSError as error:
        raise NearstateError(f"no coordinator answers at {address[0]}:{address[1]} ({error}): is it running?") from None


class RoutedClient:
    """One client; not for several threads at once."""

    def __init__(
        self, stores: dict[str, tuple[str, int]], coordinator: tuple[str, int], credential: Credential, value_bytes: int,
        cluster: int,
    ) -> None:  # fmt: skip
        """credential: a client's, whose number is its id: not 0, of this client alone, and never used before."""
        client_id, self._credential = credential.number, credential
        self.stores, self.coordinator, self.client_id, self.cluster = stores, coordinator, client_id, cluster
        self.value_words = value_bytes // 8
        self.next_sequence = 1
        self.map = ClusterMap(0, ())
        self._connections: dict[str, socket.socket] = {}

    def do(
        self,
        kind: int,
        low: int,
        high: int,
        value: bytes = b"",
        expected: int = ANY_VERSION,
        offset: int = 0,
        timeout_s: float = 10.0,
        expires_s: int = 0,
    ) -> Answer | None:
        """Do an operation (see `store/operations.py`); None: nobody answered in time, and it may have been done or not.

        expires_s: of INSERT and ADD, the second of CLOCK_MONOTONIC at which the record expires; 0: never.
        """
        sequence, self.next_sequence = self.next_sequence, self.next_sequence + 1
        given = np.zeros(self.value_words, np.uint64)
        given[: len(value) // 8] = np.frombuffer(value, np.uint64)
        stamp = expected << EXPIRY_BITS if kind in (PUT, DELETE) else expires_s % (1 << EXPIRY_BITS)
        operation = np.zeros(OPERATION_VALUE + self.value_words, np.uint64)
        operation[0] = operation_word(kind, 0, len(value), offset)
        operation[SEQUENCE], operation[2], operation[3], operation[4] = sequence, low, high, stamp & 0xFFFFFFFFFFFFFFFF
        operation[OPERATION_VALUE:] = given
        deadline, tries = time.monotonic() + timeout_s, 0
        while time.monotonic() < deadline:
            answer = self._try(low & int(PARTITION_BITS), kind, operation, sequence + tries)
            if answer is not None:
                return answer
            tries += 1
            self._look_at_map()
            time.sleep(PAUSE_S)
        return None

    def _look_at_map(self) -> None:
        with contextlib.suppress(NearstateError):
            newest = ask(self.coordinator, {"map": self.map.epoch}, self._credential, TRY_S).get("map")
            if newest:
                self.map = ClusterMap.from_json(newest)

    def _try(self, partition: int, kind: int, operation: np.ndarray, turn: int) -> Answer | None:
        """Ask whom the map names, for reads the one whose turn it is; None: no answer, or none that says what became of it."""
        members = self.map.groups[partition].members if self.map.groups else ()
        if not members:
            return None
        host = members[turn % len(members)] if kind == GET else members[0]  # any clean replica may be read
        try:
            answer = self._exchange(host, operation)
        except OSError:
            self._disconnect(host)
            return None
        status = int(answer[0]) >> 8 & 0xFF
        if status not in OUTCOMES:
            return None
        stamp = int(answer[4])
        return Answer(status, stamp >> EXPIRY_BITS, stamp & (1 << EXPIRY_BITS) - 1, answer[OPERATION_VALUE:].tobytes())

    def _exchange(self, host: str, operation: np.ndarray) -> np.ndarray:
        if host not in self._connections:
            connection = socket.create_connection(self.stores[host], TRY_S)
            self._connections[host] = connection
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            prove(connection, self._credential, STORE, host, PROVE_S)
            greeting = np.zeros_like(operation)
            greeting[0], greeting[SEQUENCE], greeting[4] = operation_word(HELLO, 0, 0, self.value_words * 8), 0, 64
            if int(self._send(connection, greeting)[0]) >> 8 & 0xFF != OK:
                raise ConnectionRefusedError("the store does not want this client")
        return self._send(self._connections[host], operation)

    def _send(self, connection: socket.socket, operation: np.ndarray) -> np.ndarray:
        frame = np.zeros(FRAME_HEADER_WORDS + operation.size, np.uint64)
        write_frame_header(frame, 0, 1, operation.size, 0, self.map.epoch, np.uint64(self.client_id), np.uint64(self.cluster))
        frame[FRAME_HEADER_WORDS:] = operation
        connection.sendall(frame.tobytes())
        data = b""
        while len(data) < frame.nbytes:
            more = connection.recv(frame.nbytes - len(data))
            if not more:
                raise ConnectionResetError("closed")
            data += more
        answer = np.frombuffer(data, np.uint64)[FRAME_HEADER_WORDS:]
        if answer[SEQUENCE] != operation[SEQUENCE]:
            raise ConnectionAbortedError("the answer is to something else")
        return answer

    def _disconnect(self, host: str) -> None:
        connection = self._connections.pop(host, None)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Close every connection."""
        for host in list(self._connections):
            self._disconnect(host)

    def __enter__(self) -> RoutedClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
