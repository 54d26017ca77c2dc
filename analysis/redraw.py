"""Draws the figures of a run from its results alone: `python -m experiments figures`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.figures import Definition, definitions
from analysis.results import measurements, read_run
from analysis.sheet import Sheet, paper
from datastore.base.errors import NearstateError, unknown


def draw_figures(run: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Write `figures/<name>.pdf`, `.png` and `.csv` into a results folder and return their paths, figure by figure.

    `names` are of figures or of experiments (all figures of one). Without names every figure is drawn that the run has
    valid measurements for; a named figure that it has none for is refused, an experiment when none of its figures is drawn.
    """
    run = Path(run)
    wanted = select(names)
    frame = measurements([read_run(run)])
    written = {figure.name: draw_figure(figure, frame, run / "figures") for figure in wanted}
    drawn = [figure for figure in wanted if written[figure.name]]
    told = {*(figure.name for figure in drawn), *(figure.experiment for figure in drawn)}
    absent = [figure for figure in wanted if {figure.name, figure.experiment}.intersection(names or ()) - told]
    if absent:
        raise NearstateError(
            f"figure {absent[0].name!r} cannot be drawn: {run} holds no valid measurement for it; "
            f"run experiment {absent[0].experiment!r} first"
        )
    return [path for paths in written.values() for path in paths]


def select(names: Sequence[str] | None) -> list[Definition]:
    """Return the figures so named, all without names; an unknown name is refused with the nearest valid ones."""
    figures = definitions()
    chosen: dict[str, Definition] = {} if names else figures
    for name in names or ():
        matching = {figure.name: figure for figure in figures.values() if name in (figure.name, figure.experiment)}
        if not matching:
            raise unknown("figure", name, {*figures, *(figure.experiment for figure in figures.values())})
        chosen.update(matching)
    return list(chosen.values())


def draw_figure(figure: Definition, frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw one figure from the valid measurements of its experiment; nothing to draw, nothing written."""
    rows = frame[(frame["experiment"] == figure.experiment) & frame["valid"]].dropna(axis="columns", how="all")
    rows = rows.reindex(columns=[*rows.columns, *{"value", "histogram", "nf"}.difference(rows.columns)])
    if rows.empty:
        return []
    with paper():
        sheet = Sheet(figure.width_in)
        figure.draw(rows, sheet)
        return sheet.save(folder / figure.name) if sheet.points else []
