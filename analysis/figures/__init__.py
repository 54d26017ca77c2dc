"""One file per figure, found by its name. A figure file, `<name>.py`, opens with the question it answers and holds

* `EXPERIMENT`: the name of the experiment whose results it draws;
* `draw(frame, sheet)`: draws the experiment's valid measurements (`results.measurements`) on a `Sheet`;
* if wanted, `answer(frame) -> str`: the question's answer in one sentence computed from the data;
* if wanted, `HEADLINES`: what `compare` shows of the experiment; `WIDTH_IN`: a column's width from `analysis.style`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pandas as pd

from analysis.sheet import Sheet
from analysis.style import TWO_COLUMNS_IN
from datastore.base.errors import NearstateError, import_file

CARRIED_RATIO = 0.99  # a placement carries a load when it delivers this share of it


@dataclass(frozen=True)
class Headline:
    """A metric worth comparing, at the points whose sweep has the values `where`.

    With `carried`, of all loads only the highest that both sides carry: costs per packet compare at equal work only.
    """

    metric: str
    where: dict[str, Any] = field(default_factory=dict)
    carried: bool = False


@dataclass(frozen=True)
class Definition:
    """One figure file, loaded and checked."""

    name: str
    experiment: str
    question: str
    draw: Callable[[pd.DataFrame, Sheet], None]
    answer: Callable[[pd.DataFrame], str] | None
    headlines: tuple[Headline, ...]
    width_in: float


def definitions() -> dict[str, Definition]:
    """Load every figure file; within an experiment the figure of its own name comes first."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    loaded = [_load(name, import_file(f"{__name__}.{name}")) for name in names]
    ordered = sorted(loaded, key=lambda figure: (figure.experiment, figure.name != figure.experiment, figure.name))
    return {figure.name: figure for figure in ordered}


def _load(name: str, module: ModuleType) -> Definition:
    for wanted, kind in (("EXPERIMENT", str), ("draw", Callable)):
        if not isinstance(getattr(module, wanted, None), kind):  # type: ignore[arg-type]
            raise NearstateError(f"figure file analysis/figures/{name}.py has no {wanted}; see analysis/figures/__init__.py")
    question = (module.__doc__ or "").strip().partition("\n")[0]
    return Definition(
        name,
        module.EXPERIMENT,
        question,
        module.draw,
        getattr(module, "answer", None),
        tuple(getattr(module, "HEADLINES", ())),
        getattr(module, "WIDTH_IN", TWO_COLUMNS_IN),
    )


def highest_carried_kpps(frame: pd.DataFrame, placements: list[str]) -> int | float | None:
    """Return the highest offered load at which every one of the placements delivers `CARRIED_RATIO` of it, by median.

    Of random arrivals a step's sample may be less than the load that it is named by: then it is compared with what was sent.
    """
    if "offered_kpps" not in frame or not placements:
        return None
    rows = frame[frame["valid"] & frame["placement"].isin(placements)]

    def medians_of(metric: str) -> pd.DataFrame:
        return rows[rows["metric"] == metric].groupby(["offered_kpps", "placement"])["value"].median().unstack().dropna()

    medians = medians_of("delivered_kpps")
    if set(medians) != set(placements):
        return None
    loads = medians.index.to_series().astype(float)
    sent = medians_of("sent_kpps").reindex_like(medians).apply(lambda column: column.fillna(loads).clip(upper=loads))
    carried = medians.index[medians.ge(CARRIED_RATIO * sent).all(axis=1)]
    return max(carried) if len(carried) else None
