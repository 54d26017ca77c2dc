"""Is a coordinator's state there after a crash at any moment, and is a file that holds none told?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from datastore.base.errors import NearstateError
from datastore.coordination.state_file import SLOT_BYTES, FileState


def document(number: int, filler: int = 0) -> dict[str, Any]:
    return {"map": number, "filler": "x" * filler}


def test_what_was_saved_last_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "state"
    state = FileState(path)
    assert state.load() is None
    for number in range(5):
        state.save(document(number))
        assert FileState(path).load() == document(number)
    state.close()
    again = FileState(path)
    assert again.load() == document(4)
    again.save(document(5))
    assert FileState(path).load() == document(5)
    again.close()


def test_a_crash_while_writing_leaves_what_was_there_before(tmp_path: Path) -> None:
    """The slot of a later save holds any part of it, and of what was there before."""
    path = tmp_path / "state"
    state = FileState(path)
    for number in range(3):
        state.save(document(number, 100 * number))
    before = path.read_bytes()
    state.save(document(3, 1000))
    after = path.read_bytes()
    changed = [at for at in range(len(before)) if before[at] != after[at]]
    for torn in (changed[0], *changed[1:-1:97], changed[-1]):
        path.write_bytes(after[:torn] + before[torn:])
        assert FileState(path).load() == document(2, 200)
        path.write_bytes(before[:torn] + after[torn:])
        assert FileState(path).load() in (document(2, 200), document(3, 1000))
    state.close()


def test_a_state_that_grows_gets_a_larger_file(tmp_path: Path) -> None:
    state = FileState(tmp_path / "state")
    for number, filler in enumerate((0, SLOT_BYTES, 10, 5 * SLOT_BYTES, 10, 10)):
        state.save(document(number, filler))
        assert FileState(tmp_path / "state").load() == document(number, filler)
    size = (tmp_path / "state").stat().st_size
    state.save(document(9, 5 * SLOT_BYTES))
    assert (tmp_path / "state").stat().st_size == size
    state.close()


@pytest.mark.parametrize("content", [b"", b"\0" * 2 * SLOT_BYTES, b"{}", b"1 2 00000000\n{}" + b"\0" * SLOT_BYTES])
def test_a_file_without_a_state_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(NearstateError, match="state cannot be read: neither of its two slots is whole; restore it from a copy"):
        FileState(tmp_path / "state").load()


def test_what_cannot_be_saved_is_told_and_what_was_stays(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    state = FileState(folder / "state")
    state.save(document(1))
    (folder / "state").rename(tmp_path / "state")
    folder.rmdir()
    with pytest.raises(NearstateError, match=r"cannot be saved in .*No such file or directory; make room there"):
        state.save(document(2, 2 * SLOT_BYTES))
    assert FileState(tmp_path / "state").load() == document(1)
    state.close()


def test_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = FileState(tmp_path / "state")
    state.save(document(1))
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: whole(file, data[:20], at))
    with pytest.raises(NearstateError, match="only a part could be written; make room there"):
        state.save(document(2))
    monkeypatch.undo()
    assert FileState(tmp_path / "state").load() == document(1)
    state.save(document(3))
    assert FileState(tmp_path / "state").load() == document(3)
    state.close()
