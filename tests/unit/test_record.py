"""Is a finished trial on the disk whatever comes after: a crash in the middle of a line, a full disk, a resumed run?"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from datastore.base.errors import NearstateError
from experiments.harness import record as records
from experiments.harness.record import Record

SPEC = {"profile": "smoke", "experiments": {}}


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record.create(SPEC, {"cpu": "one"}, tmp_path)


def trial(number: int, size: int = 0) -> dict[str, object]:
    return {"trial": f"mine/rack/local/{number}", "experiment": "mine", "topology": "rack", "placement": "local",
            "points": [], "fidelity": {"log": "x" * size}, "valid": True, "seconds": 1.5}  # fmt: skip


def test_a_new_run_has_its_folder_and_is_the_latest(record: Record, tmp_path: Path) -> None:
    assert {path.name for path in record.folder.iterdir()} == {
        "spec.json", "host.json", "trials.jsonl", "logs", "figures",
    }  # fmt: skip
    assert record.spec["run_id"] == record.run_id
    assert Record.open("latest", tmp_path).folder == record.folder
    newer = Record.create({}, {}, tmp_path)
    assert Record.open("latest", tmp_path).run_id == newer.run_id != record.run_id
    assert Record.open(record.run_id, tmp_path).folder == record.folder


@pytest.mark.parametrize("name", ["nothing", "../..", "/etc", "", "."])
def test_unknown_runs_are_refused_with_the_nearest(record: Record, tmp_path: Path, name: str) -> None:
    with pytest.raises(NearstateError, match=f"unknown run '{name}'.*{record.run_id}"):
        Record.open(name, tmp_path)


def test_trials_are_appended_and_read_back(record: Record) -> None:
    for number in range(5):
        record.append(trial(number, 1000))
    assert list(record.trials()) == [trial(number, 1000) for number in range(5)]
    assert set(record.validity()) == {f"mine/rack/local/{number}" for number in range(5)}


def test_a_half_written_line_is_mended_at_every_length(record: Record) -> None:
    record.append(trial(0))
    record.append(trial(1))
    path = record.folder / "trials.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        again = Record.open(record.run_id, record.folder.parent)
        assert set(again.validity()) == {trial(0)["trial"]} | ({trial(1)["trial"]} if cut == len(whole) - 1 else set())
        again.append(trial(2))
        assert [line["trial"] for line in again.trials()][-1] == trial(2)["trial"]
        assert all(json.loads(line) for line in path.read_text().splitlines())
    path.write_bytes(whole[: first // 2])
    record.append(trial(3))
    assert set(record.validity()) == {trial(3)["trial"]}


def test_appending_after_kill_9_at_random_moments_loses_at_most_the_line_in_flight(record: Record) -> None:
    """A child appends as fast as it can and says each number once `append` has returned; then it is killed."""
    for round_ in range(5):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            for number in range(round_ * 10_000, 10**9):
                record.append(trial(number, 5000))
                os.write(writing, number.to_bytes(4, "big"))
        os.close(writing)
        said = os.read(reading, 4)
        for _ in range(round_ * 3):
            said = os.read(reading, 4)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while more := os.read(reading, 4):
            said = more
        os.close(reading)
        finished = set(record.validity())
        last = int.from_bytes(said, "big")
        assert {str(trial(number)["trial"]) for number in range(round_ * 10_000, last + 1)} <= finished
        assert len(finished - {str(trial(number)["trial"]) for number in range(round_ * 10_000, last + 2)}) == len(
            [name for name in finished if int(name.rpartition("/")[2]) < round_ * 10_000]
        )


def test_a_full_disk_gives_one_clear_line_and_loses_nothing(record: Record) -> None:
    """RLIMIT_FSIZE stands in for the disk's end: the line does not fit, then there is room again."""
    record.append(trial(0))
    before = (record.folder / "trials.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
        with pytest.raises(NearstateError, match=r"trial mine/rack/local/1 could not be written to .*--resume") as raised:
            record.append(trial(1, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(raised.value)
    assert (record.folder / "trials.jsonl").read_bytes() == before
    record.append(trial(1, 1000))
    assert len(set(record.validity())) == 2


FULL = """
import subprocess, sys
from pathlib import Path
from datastore.base.errors import NearstateError
from experiments.harness.record import Record
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
record = Record.create({}, {}, folder)
written = 0
try:
    for number in range(1000):
        names = {"trial": f"t{number}", "experiment": "e", "topology": "t", "placement": "p"}
        record.append({**names, "fidelity": {"x": "x" * 3000}})
        written += 1
except NearstateError as error:
    print(error)
assert written > 5 and len(set(record.validity())) == written, (written, set(record.validity()))
try:
    Record.create({}, {"fill": "x" * 100_000}, folder)
except NearstateError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts a small file system in a mount namespace of its own")
def test_a_full_file_system_is_told_for_trials_and_for_new_runs(tmp_path: Path) -> None:
    done = subprocess.run(["unshare", "--mount", "--propagation", "private", sys.executable, "-c", FULL, str(tmp_path)],
                          cwd=records.ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert "could not be written" in first
    assert "No space left on device" in first
    assert "cannot be written: No space left on device; free some space" in second


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NearstateError, match=r"results folder .*/file cannot be written: Not a directory"):
        Record.create({}, {}, tmp_path / "file")


def test_other_files_are_written_whole_or_not_at_all(record: Record) -> None:
    record.write("spec.json", SPEC)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            record.write("spec.json", {"a": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert record.spec == SPEC


def test_the_commit_is_recorded() -> None:
    assert set(records.commit()) == {"commit", "diff"}


def test_changed_and_new_files_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(records, "ROOT", tmp_path)
    git("init")
    (tmp_path / "old.py").write_text("old = 1\n")
    (tmp_path / ".gitignore").write_text("results\n")
    git("add", ".")
    git("commit", "-m", "first")
    assert records.commit()["diff"] is None
    (tmp_path / "results").write_text("not of interest\n")
    (tmp_path / "old.py").write_text("old = 2\n")
    (tmp_path / "new.py").write_text("new = 1\n")
    diff = records.commit()["diff"].splitlines()
    assert [line for line in diff if line[:1] in "+-" and line[:3] not in ("+++", "---")] == ["-old = 1", "+old = 2", "+new = 1"]


def test_before_the_first_run_it_is_said_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(NearstateError, match=r"no run is in .* yet: \./run_all\.sh makes one"):
        Record.open("latest", tmp_path)
