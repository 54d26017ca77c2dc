"""Was everything measured that was asked for? What the terminal says at the end of a run, and its exit status."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.compare import place
from analysis.results import measurements, read_run
from analysis.summary import summarize

SHOWN = 8
"""Points named on the terminal; the report has all."""


@dataclass(frozen=True)
class Outcome:
    """lines: for the terminal. unanswered: experiments without one valid trial. is_answered: whether another one has any; a run
    without ends with exit status 1."""

    lines: tuple[str, ...]
    unanswered: tuple[str, ...]
    is_answered: bool


def outcome(folder: Path) -> Outcome:
    """Return what a run's folder lacks: points without any valid measurement, and hosts that were replaced while alive."""
    run = read_run(folder)
    names = dict.fromkeys([*run.spec.get("experiments", {}), *(trial["experiment"] for trial in run.trials)])
    answered = {trial["experiment"] for trial in run.trials if trial.get("valid", True)}
    counts = [int(trial["fidelity"]["false_failovers"]) for trial in run.trials if "false_failovers" in trial.get("fidelity", {})]
    lines = [*run.notes, *_missing(folder)]
    if any(counts):
        lines.append(
            f"hosts replaced while alive: {sum(counts)}, in {sum(map(bool, counts))} of {len(counts)} coordinated trials"
        )
    return Outcome(tuple(lines), tuple(name for name in names if name not in answered), bool(answered))


def _missing(folder: Path) -> Sequence[str]:
    """Return a line for each of the first points that no trial measured validly, and one for how many more there are."""
    summary = summarize(measurements([read_run(folder)]))
    points = summary.groupby(["experiment", "topology", "placement", "nf", "replicas", "sweep"], sort=False)
    most = points[["trials", "invalid_trials"]].max().reset_index()
    missing = most[most["trials"] == 0].to_dict("records")
    told = [f"no valid trial of {row['experiment']}, {row['placement']}, "
            f"{place(row['topology'], row['nf'], row['replicas'], json.loads(row['sweep']))}: "
            f"{row['invalid_trials']} invalid" for row in missing[:SHOWN]]  # fmt: skip
    return [*told, f"and of {len(missing) - SHOWN} points more: see the report"] if len(missing) > SHOWN else told
