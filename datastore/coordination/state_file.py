"""A coordinator's state in a file, for one coordinator.

The file has two slots, written in turn: a crash in the middle of a write leaves the other one, which is what was saved before. A
save changes neither the file's size nor its place, so it waits for its own bytes only. (A new file for each save waited for the
file system's journal, too: 1 to 15 ms of a move, beside other processes that write.)

A slot: "number bytes crc32", a line, and the state as JSON; the checksum is of the number, too. The higher number is newer.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datastore.base.errors import NearstateError

SLOT_BYTES = 1 << 16
"""256 partitions without two alike take 30 kB."""
_LINE_BYTES = 64


class FileState:
    """Loads and saves. There is one coordinator, and it leads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._number, self._slot_bytes = 0, SLOT_BYTES

    def campaign(self, give_up: Callable[[], bool]) -> bool:
        """Lead at once."""
        return True

    def leads(self) -> bool:
        """Tell that there is no other."""
        return True

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last, or None when nothing was. Raises NearstateError when it cannot be read."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreadable(error.strerror) from None
        half = len(content) // 2
        slots = [slot for slot in map(_read_slot, (content[:half], content[half:])) if slot]
        if not slots:
            raise self._unreadable("neither of its two slots is whole")
        self._number, text = max(slots)
        try:
            document: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise self._unreadable(str(error)) from None
        return document

    def save(self, document: dict[str, Any]) -> None:
        """Save, so that no crash can undo it. Raises NearstateError when that is impossible; what was saved before stays."""
        text = json.dumps(document).encode()
        number = self._number + 1
        slot = f"{number} {len(text)} {_checksum(number, text):08x}\n".encode() + text
        try:
            if self._file is None or len(slot) > self._slot_bytes:
                self._make(slot, number)
            elif os.pwrite(self._file, slot, number % 2 * self._slot_bytes) == len(slot):
                os.fdatasync(self._file)
            else:
                raise OSError(0, "only a part could be written")
        except OSError as error:
            raise NearstateError(
                f"coordinator's state cannot be saved in {self.path}: {error.strerror}; make room there"
            ) from None
        self._number = number

    def _make(self, slot: bytes, number: int) -> None:
        """Put a file with room for this slot, and twice as much in the future, in place of what is there."""
        slot_bytes = max(SLOT_BYTES, 1 << (2 * len(slot) - 1).bit_length())
        beside = self.path.with_suffix(".new")
        content = bytearray(2 * slot_bytes)
        at = number % 2 * slot_bytes
        content[at : at + len(slot)] = slot
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.close()  # of what is replaced: nothing may be saved there any more, whatever fails from here on
        beside.replace(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._file, self._slot_bytes = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC), slot_bytes

    def _unreadable(self, why: str | None) -> NearstateError:
        return NearstateError(f"coordinator's state in {self.path} cannot be read: {why}; restore it from a copy")


def _read_slot(slot: bytes) -> tuple[int, bytes] | None:
    """Return a slot's number and text; None when it is empty or was not written whole."""
    line = slot[:_LINE_BYTES].partition(b"\n")[0]
    try:
        number, length = map(int, line.split()[:2])
        text = slot[len(line) + 1 :][:length]
        return (number, text) if int(line.split()[2], 16) == _checksum(number, text) else None
    except (ValueError, IndexError):
        return None


def _checksum(number: int, text: bytes) -> int:
    return zlib.crc32(text, number & 0xFFFFFFFF)
