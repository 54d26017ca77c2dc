"""How does a client record what it asked and was answered, so that its death at any instant loses nothing that matters?

One file per client process, `<client>-<pid>-<number>.history`: a header, then rows of one operation each, which are appended
in the order of the calls. The file is mapped, so a row is some stores to memory (call and answer: measured 2.2 µs from Python)
and belongs to the kernel at once: `kill -9` loses none.
All words are 64 bits, little-endian.

    header   magic | value bytes | client | pid | 4 words of zero
    row      0  time of the call, ns of CLOCK_MONOTONIC     written last of the call's words; 0: no call
             1  time of the answer                          written last of the answer's words; 0: no answer (yet)
             2  kind (8 bits) | status (8) | answer holds a record (1) | 15 of zero | offset (32)
             3  client
             4  sequence number
             5  key low
             6  key high
             7  version expected; of INSERT, the second of CLOCK_MONOTONIC at which it expires; ANY_VERSION: none
             8  version answered, 0: none
             9.. value asked for: a record; of ADD, the delta
             .. record answered

A call is written *before* the operation is sent, an answer after it arrived; then the real instant lies between the two times.
Behind the last row the file is zero (it grows in steps). A row whose call was not completed was never sent: it is dropped.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datastore.base.errors import NearstateError
from datastore.store.operations import ANY_VERSION
from datastore.store.table import LARGEST_VALUE_BYTES
from datastore.verification.model import NEVER_NS, UNANSWERED, Operation

MAGIC = 0x3179_726F_7473_6968
"""'history1'"""
HEADER = struct.Struct("<QQQQ32x")
CALL = struct.Struct("<B7xQQQQQ")
"""Words 2 to 7 of a row; the offset is written apart."""
TIME = struct.Struct("<Q")
GROWTH_ROWS = 1 << 14
SUFFIX = ".history"

_numbers = itertools.count()


def row_type(value_bytes: int) -> np.dtype:
    """Return the type of a file's rows."""
    return np.dtype(
        [
            ("invoked_ns", "<u8"), ("answered_ns", "<u8"), ("kind", "u1"), ("status", "u1"), ("flags", "<u2"), ("offset", "<u4"),
            ("client", "<u8"), ("sequence", "<u8"), ("low", "<u8"), ("high", "<u8"), ("expected", "<u8"), ("version", "<u8"),
            ("value", "u1", (value_bytes,)), ("answer", "u1", (value_bytes,)),
        ]
    )  # fmt: skip


class HistoryWriter:
    """The history of one client process. Not to be shared between threads, nor used on both sides of a fork."""

    def __init__(self, folder: Path, client: int, value_bytes: int) -> None:
        """folder: is made if need be. client: its id. value_bytes: of the store's table.

        Raises NearstateError when the file cannot be made or grow.
        """
        if not 0 < value_bytes <= LARGEST_VALUE_BYTES or value_bytes % 8:
            raise NearstateError(f"values of {value_bytes} bytes: must be a multiple of 8 up to {LARGEST_VALUE_BYTES}")
        self.client, self.value_bytes = client, value_bytes
        self.rows = 0
        self.path = folder / f"{client}-{os.getpid()}-{next(_numbers)}{SUFFIX}"
        self._row_bytes = row_type(value_bytes).itemsize
        self._room = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            os.posix_fallocate(self._file, 0, HEADER.size)
        except OSError as error:
            raise NearstateError(f"cannot record a history to {self.path}: {error.strerror}") from None
        self._map = mmap.mmap(self._file, HEADER.size)
        HEADER.pack_into(self._map, 0, MAGIC, value_bytes, client, os.getpid())

    def call(
        self, kind: int, low: int, high: int, sequence: int, value: bytes = b"", expected: int = ANY_VERSION, offset: int = 0,
        invoked_ns: int = 0,
    ) -> int:  # fmt: skip
        """Record that an operation is about to be sent; return its row. invoked_ns: 0 for now."""
        row = self.rows
        if row == self._room:
            self._grow()
        at, written = HEADER.size + row * self._row_bytes, self._map
        CALL.pack_into(written, at + 16, kind, self.client, sequence, low, high, expected)
        if offset:
            struct.pack_into("<I", written, at + 20, offset)
        written[at + 72 : at + 72 + len(value)] = value
        TIME.pack_into(written, at, invoked_ns or time.monotonic_ns())
        self.rows = row + 1
        return row

    def answer(self, row: int, status: int, version: int = 0, record: bytes | None = None, answered_ns: int = 0) -> None:
        """Record the answer to the operation of a row.

        status: of the store; one that says "not done" only if no earlier attempt can have done it, else leave the row without
        an answer. version: 0 if none was answered. record: None if none was. answered_ns: 0 for now.
        """
        answered_ns = answered_ns or time.monotonic_ns()
        at, written = HEADER.size + row * self._row_bytes, self._map
        written[at + 17] = status
        TIME.pack_into(written, at + 64, version)
        if record is not None:
            written[at + 18] = 1
            start = at + 72 + self.value_bytes
            written[start : start + len(record)] = record
        TIME.pack_into(written, at + 8, answered_ns)

    def _grow(self) -> None:
        size = HEADER.size + (self._room + GROWTH_ROWS) * self._row_bytes
        try:
            os.posix_fallocate(self._file, 0, size)  # a full disk is said here, not by SIGBUS at a store
        except OSError as error:
            raise NearstateError(f"history {self.path} cannot grow to {size} bytes: {error.strerror}") from None
        self._map.resize(size)
        self._room += GROWTH_ROWS

    def close(self) -> None:
        """End the recording; operations without an answer stay so."""
        self._map.close()
        os.ftruncate(self._file, HEADER.size + self.rows * self._row_bytes)
        os.close(self._file)

    def __enter__(self) -> HistoryWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class HistoryFile:
    """One client process' part of a history."""

    path: Path
    client: int
    pid: int
    operations: int
    unanswered: int
    torn: str
    """What is odd about the file's end, for people; empty when it was closed in order or just left."""


@dataclass(frozen=True)
class History:
    """The operations of all clients. rows: array of `row_type`, in no order."""

    rows: np.ndarray
    value_bytes: int
    files: Sequence[HistoryFile]

    def __len__(self) -> int:
        return len(self.rows)

    def operations_by_key(self) -> Iterator[list[Operation]]:
        """Return the operations of each key, in the order of their calls, one key at a time: a long history stays small."""
        rows = self.rows
        order = np.lexsort((rows["invoked_ns"], rows["high"], rows["low"]))
        keys = rows[["low", "high"]][order]
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(rows) else np.zeros(0, np.int64)
        for start, end in zip(starts, [*starts[1:], len(rows)]):
            yield list(operations_of(rows[order[start:end]], self.value_bytes))


def operations_of(rows: np.ndarray, value_bytes: int) -> Iterator[Operation]:
    """Return rows as operations."""
    open_ones = rows["answered_ns"] == 0
    status = np.where(open_ones, UNANSWERED, rows["status"]).tolist()
    answered = np.where(open_ones, NEVER_NS, rows["answered_ns"]).tolist()
    names = ("client", "sequence", "low", "high", "kind", "expected", "offset", "version", "invoked_ns", "flags")
    columns = [rows[name].tolist() for name in names]
    values, answers = rows["value"].tobytes(), rows["answer"].tobytes()
    for n, (client, sequence, low, high, kind, expected, offset, version, invoked_ns, flags) in enumerate(zip(*columns)):
        at = n * value_bytes
        open_one = status[n] == UNANSWERED
        record = answers[at : at + value_bytes] if flags & 1 and not open_one else None
        yield Operation(
            client, sequence, low, high, kind, values[at : at + value_bytes], expected, offset, status[n],
            0 if open_one else version, record, invoked_ns, answered[n],
        )  # fmt: skip


def read_history(folder: Path) -> History:
    """Return the merged history of all clients that recorded to a folder.

    Raises NearstateError when there is none, a file is none of ours, or the files are of different tables.
    """
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    if not paths:
        raise NearstateError(f"no history in {folder}: it should hold files *{SUFFIX}, written by HistoryWriter")
    parts = [read_file(path) for path in paths]
    used = [(rows, file) for rows, file in parts if len(rows)]
    for rows, file in used:
        if rows.dtype != used[0][0].dtype:
            raise NearstateError(
                f"{used[0][1].path} and {file.path} hold values of different sizes: histories of one table belong into one folder"
            )
    rows = np.concatenate([rows for rows, _ in used or parts[:1]])
    return History(rows, rows.dtype["value"].shape[0], [file for _, file in parts])


def read_file(path: Path) -> tuple[np.ndarray, HistoryFile]:
    """Return the rows of one file and what is to be said about it. Raises NearstateError when it is no history."""
    content = path.read_bytes()
    magic, value_bytes, client, pid = HEADER.unpack_from(content) if len(content) >= HEADER.size else (0, 0, 0, 0)
    if not any(content):
        return np.zeros(0, row_type(8)), HistoryFile(path, 0, 0, 0, 0, "empty: killed before its first operation")
    if magic != MAGIC or not 0 < value_bytes <= LARGEST_VALUE_BYTES or value_bytes % 8:
        raise NearstateError(f"{path} is no history of this version: its header is not HistoryWriter's")
    kind = row_type(value_bytes)
    rest = (len(content) - HEADER.size) % kind.itemsize
    rows = np.frombuffer(content, kind, offset=HEADER.size, count=(len(content) - HEADER.size) // kind.itemsize)
    called = rows["invoked_ns"] != 0
    torn = [f"{rest} bytes of a row cut off"] if rest else []
    used = int(np.argmin(called)) if not called.all() else len(rows)
    if called[used:].any():
        raise NearstateError(f"{path} is damaged: row {used} has no call, later ones have")
    if used < len(rows) and rows[used].tobytes().strip(b"\0"):
        torn.append("1 row dropped that was half written, so never sent")
    rows = rows[:used]
    unanswered = int((rows["answered_ns"] == 0).sum())
    return rows, HistoryFile(path, client, pid, used, unanswered, "; ".join(torn))
