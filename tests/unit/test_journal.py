"""Does the journal name what is left, spare what is not ours, and survive torn lines and repeated cleaning?"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datastore.base.errors import NearstateError
from topologies.emulation import journal
from topologies.emulation.journal import Journal, clean, short_id, start_ticks


@pytest.fixture(autouse=True)
def private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(journal, "folder", lambda: tmp_path)
    return tmp_path


def as_dead(record: Journal) -> None:
    """Rewrite the journal as if its runner had been another process, gone by now."""
    lines = [json.loads(line) for line in record.path.read_text().splitlines()]
    lines[0]["start"] += 1
    record.path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_short_ids_are_short_stable_and_differ() -> None:
    assert short_id("a") == short_id("a")
    assert len({short_id(f"run{n}") for n in range(100)}) > 95
    assert all(len(short_id(f"run{n}")) == 4 for n in range(100))


def test_clean_removes_what_is_left_and_is_idempotent(tmp_path: Path) -> None:
    record = Journal("unit-left")
    kept, left = tmp_path / "kept", tmp_path / "left"
    for path in (kept, left):
        record.file(path)
        path.touch()
    record.forget("file", kept)
    shared = Path(record.shared_memory("nearstate-unit-left"))
    shared.touch()
    as_dead(record)
    with record.path.open("a") as torn:
        torn.write('{"kind": "link", "na')
    assert sorted(clean()) == sorted([f"file {left}", f"file {shared}"])
    assert kept.exists()
    assert not left.exists()
    assert not shared.exists()
    assert clean() == []


def test_a_living_runner_is_spared_and_its_id_refused(tmp_path: Path) -> None:
    record = Journal("unit-alive")
    left = tmp_path / "left"
    record.file(left)
    left.touch()
    assert clean() == []
    assert left.exists()
    with pytest.raises(NearstateError, match="already running"):
        Journal("unit-alive")
    assert record.close() == [f"file {left}"]
    assert not record.path.exists()


def test_settings_are_restored_to_the_first_value(tmp_path: Path) -> None:
    setting = tmp_path / "setting"
    setting.write_text("old\n")
    with Journal("unit-setting") as record:
        for value in ("new", "newer"):
            record.setting(setting, setting.read_text())
            setting.write_text(value)
    assert setting.read_text() == "old\n"


def test_only_processes_with_the_marker_die() -> None:
    record = Journal("unit-processes")
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    ours = subprocess.Popen(sleep, env=record.environment())
    similar = subprocess.Popen(sleep, env={**os.environ, journal.MARKER: "unit-processes-2"})
    plain = subprocess.Popen(sleep)
    try:
        time.sleep(0.1)
        removed = record.close()
        assert [line.split()[1] for line in removed] == [str(ours.pid)]
        assert ours.wait(1) == -9
        assert start_ticks(similar.pid)
        assert start_ticks(plain.pid)
    finally:
        for process in (ours, similar, plain):
            process.kill()
            process.wait()


@pytest.mark.parametrize("run_id", ["", "../etc", "a b", "x" * 101])
def test_a_run_id_is_a_plain_name(run_id: str) -> None:
    with pytest.raises(NearstateError, match="run id"):
        Journal(run_id)


def test_shared_memory_names_are_plain() -> None:
    with Journal("unit-shm") as record, pytest.raises(NearstateError, match="plain file name"):
        record.shared_memory("../etc/passwd")
