"""Where results go: one folder a run, one line a trial, written as soon as the trial has ended.

results/<run id>/  spec.json host.json trials.jsonl logs/ figures/      results/latest -> the newest run
"""

from __future__ import annotations

import datetime
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.folder import read_spec, read_trials
from datastore.base import ROOT
from datastore.base.errors import NearstateError, unknown

RESULTS = ROOT / "results"
MOST_NEW_FILES = 50
"""Files that git does not know yet, recorded with a run."""
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


class Record:
    """A run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def run_id(self) -> str:
        return self.folder.name

    @property
    def spec(self) -> dict[str, Any]:
        """What was asked for: profile, experiments, seed, commit. Raises NearstateError when spec.json does not say."""
        return read_spec(self.folder / "spec.json")

    @classmethod
    def create(cls, spec: dict[str, Any], host: dict[str, Any], results: Path = RESULTS) -> Record:
        """Make a new run's folder and point `latest` at it. Raises NearstateError when it cannot be written."""
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        run_id = f"{stamp}-{''.join(random.choices(ALPHABET, k=4))}"
        folder = results / run_id
        try:
            for name in ("logs", "figures"):
                (folder / name).mkdir(parents=True)
            record = cls(folder)
            record.write("spec.json", spec | {"run_id": run_id})
            record.write("host.json", host)
            (folder / "trials.jsonl").touch()
            point_latest(folder)
        except OSError as error:
            raise NearstateError(f"results folder {results} cannot be written: {error.strerror}; free some space or mend its "
                                 "permissions") from error  # fmt: skip
        return record

    @classmethod
    def open(cls, run: str, results: Path = RESULTS) -> Record:
        """Return the run of that id, or of `latest`. Raises NearstateError for unknown ones, naming the nearest."""
        folder = (results / run).resolve()
        if folder.parent != results.resolve() or not (folder / "spec.json").is_file():
            known = [path.parent.name for path in results.glob("*/trials.jsonl")]
            raise (
                unknown("run", run, known)
                if known
                else NearstateError(f"unknown run {str(run)!r}: no run is in {results} yet: ./run_all.sh makes one")
            )
        return cls(folder)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        target = self.folder / name
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        partial.replace(target)

    def append(self, trial: dict[str, Any]) -> None:
        """Add a finished trial; it is on the disk when this returns. Raises NearstateError when the disk is full."""
        line = (json.dumps(trial, sort_keys=True) + "\n").encode()
        path = self.folder / "trials.jsonl"
        self._mend(path)
        before = path.stat().st_size
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, before)
            raise NearstateError(f"trial {trial['trial']} could not be written to {path}: {error.strerror}; what ended before is "
                                 f"safe: mend it and go on with --resume {self.run_id}") from error  # fmt: skip
        finally:
            os.close(descriptor)

    @staticmethod
    def _mend(path: Path) -> None:
        """Cut off a last line that a crash left half written."""
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)

    def trials(self) -> Iterator[dict[str, Any]]:
        """Yield the finished trials; a line that is none is left out. Raises NearstateError without a trials.jsonl."""
        yield from (trial for _, trial in read_trials(self.folder / "trials.jsonl")[0])

    @property
    def notes(self) -> list[str]:
        """What in trials.jsonl is no trial, a line each."""
        return read_trials(self.folder / "trials.jsonl")[1]

    def validity(self) -> dict[str, bool]:
        """Return for each finished trial whether it can be believed: a resumed run skips them."""
        return {trial["trial"]: bool(trial.get("valid", True)) for trial in self.trials()}


def point_latest(folder: Path) -> None:
    """Let `results/latest` point at a run's folder."""
    link = folder.parent / "latest"
    partial = folder.parent / f".latest-{os.getpid()}"
    partial.symlink_to(folder.name)
    partial.replace(link)


def commit() -> dict[str, Any]:
    """Return the commit the code is at, and the difference of the tree to it, new files too (None: clean, or no git)."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode in (0, 1) else ""  # 1: --no-index found a difference

    new = git("ls-files", "--others", "--exclude-standard").splitlines()[:MOST_NEW_FILES]
    changes = [git("diff", "HEAD"), *(git("diff", "--no-index", "--", "/dev/null", path) for path in new)]
    return {"commit": git("rev-parse", "HEAD") or "unknown", "diff": "\n".join(filter(None, changes))[:100_000] or None}
