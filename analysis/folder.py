"""What lies in a results folder? The one reader of spec.json, host.json and trials.jsonl, for reports and for resumed runs alike.

A line of trials.jsonl that is no whole trial is left out, and a note says so: what a killed run was writing, what a disk or an
editor made of a line. A file that is needed and cannot be read is told in one line with its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datastore.base.errors import NearstateError

NAMES = ("trial", "experiment", "topology", "placement")
"""What every trial says of itself, as text."""
KINDS: Mapping[str, type | tuple[type, ...]] = {
    "nf": str, "replicas": int, "repeat": int, "valid": bool, "started": str, "points": list, "invalid_reasons": list,
    "sweep": dict, "fidelity": dict, "calibration": dict, "ledger": dict, "network": dict}  # fmt: skip
POINT_KINDS: Mapping[str, type] = {"sweep": dict, "metrics": dict, "histograms": dict, "time_lines": dict, "valid": bool,
                                   "invalid_reasons": list, "fidelity": dict, "ledger": dict}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One results folder as read; `notes` says, a line each, what could not be read."""

    path: Path
    spec: dict[str, Any]
    host: dict[str, Any]
    trials: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.spec.get("run_id") or self.path.resolve().name)


def read_run(path: Path) -> Run:
    """Read a results folder for a report. Of trials measured twice the last one counts.

    Raises NearstateError for a folder without trials.jsonl, and for one in which no line of it is a trial.
    """
    path = Path(path)
    if not (path / "trials.jsonl").is_file():
        raise NearstateError(f"{path} is no run: it holds no trials.jsonl; a run is a folder of results/, such as results/latest")
    lines, notes = read_trials(path / "trials.jsonl")
    trials = _measured_once(lines, notes)
    if notes and not trials:
        raise NearstateError(f"{path / 'trials.jsonl'} holds no trial that can be read: {notes[0]}")
    found = {}
    for name in ("spec.json", "host.json"):
        try:
            found[name] = read_object(path / name)
        except NearstateError as error:
            notes.append(str(error))
    spec = found.get("spec.json", {})
    if not _all_mappings(spec.get("experiments", {})):
        notes.append(f"{path / 'spec.json'}: its experiments are no mappings: left out")
        del spec["experiments"]
    return Run(path, spec, found.get("host.json", {}), tuple(trials), tuple(notes))


def read_spec(path: Path) -> dict[str, Any]:
    """Read the spec.json of a run that is to go on. Raises NearstateError unless it says profile and experiments."""
    spec = read_object(path)
    if not isinstance(spec.get("profile"), str) or not isinstance(spec.get("experiments"), dict):
        raise NearstateError(f"{path} does not say profile and experiments: a run without them cannot be resumed")
    return spec


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises NearstateError naming the file and what is wrong with it."""
    try:
        content = json.loads(path.read_bytes().decode())
    except OSError as error:
        raise NearstateError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(": line 1 column 1")[0] if path.stat().st_size else "it is empty"
        raise NearstateError(f"{path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise NearstateError(f"{path} is no JSON object but {str(content)[:40]!r}")
    return content


def read_trials(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    """Return (line number, trial) of every whole trial, and a note for each line that is none.

    Raises NearstateError when the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise NearstateError(f"{path} cannot be read: {error.strerror}") from None
    trials: list[tuple[int, dict[str, Any]]] = []
    notes: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        trial = _parsed(line)
        if is_trial(trial):
            trials.append((number, trial))
        else:
            notes.append(f"{path.name} line {number} is no whole trial (a run killed while writing?): left out")
    return trials, notes


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


def is_trial(content: Any) -> bool:
    """Tell whether parsed JSON is a trial: it has its names, and whatever else it has is of its kind (docs/results.md)."""
    return (
        isinstance(content, dict)
        and all(isinstance(content.get(name), str) for name in NAMES)
        and _of_kinds(content, KINDS)
        and all(isinstance(point, dict) and _of_kinds(point, POINT_KINDS) for point in content.get("points", []))
    )


def _of_kinds(content: Mapping[str, Any], kinds: Mapping[str, Any]) -> bool:
    return all(isinstance(content[name], kind) for name, kind in kinds.items() if name in content)


def _all_mappings(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(value, dict) for value in content.values())


def _measured_once(lines: Sequence[tuple[int, dict[str, Any]]], notes: list[str]) -> list[dict[str, Any]]:
    """Return the trials; every invalid attempt counts, a trial measured twice once, or it would weigh double in the median."""
    trials: dict[tuple[str, bool, int], dict[str, Any]] = {}
    for number, trial in lines:
        valid = bool(trial.get("valid", True))
        key = ("".join(trial[name] for name in NAMES), valid, 0 if valid else number)
        if key in trials:
            notes.append(f"trials.jsonl line {number} measures {trial['trial']} again: the earlier line is left out")
        trials[key] = trial
    return list(trials.values())
