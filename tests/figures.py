"""What a figure says of a run, for the figures' tests."""

from __future__ import annotations

from pathlib import Path

from analysis.figures import definitions
from analysis.results import measurements, read_run


def said(figure: str, run: Path) -> str:
    """Return the answer that a figure draws from a run's folder."""
    answer = definitions()[figure].answer
    assert answer
    return answer(measurements([read_run(run)]))
