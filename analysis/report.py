"""What did the run find, and can it be believed? One self-contained HTML page per run."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from analysis import style
from analysis.answers import digits
from analysis.compare import Comparison, comparisons, place, point, ratio, verdict
from analysis.figures import Definition, definitions
from analysis.metrics import better, unit
from analysis.redraw import draw_figure
from analysis.results import COUNTED, Run, measurements, read_run
from analysis.sheet import PNG_DPI
from analysis.summary import summarize
from analysis.topology import picture

PAIRS = (("centralized", "integrated"), ("redis", "centralized"), ("nftables", "local"))
"""(baseline, other) compared in tables of their own: the question first, then the peers with what does their job."""
PICTURES = 4  # of topologies per experiment: one per shape, not one per trial


def write_report(run: Path) -> Path:
    """Write `report.html` into a results folder and return its path; figures not drawn yet are drawn.

    The page loads nothing: figures are embedded as PNG of 256 colours (a quarter of the size), topologies as SVG.
    """
    read = read_run(Path(run))
    frame = measurements([read])
    page = _template().render(
        run=read,
        profile=read.spec.get("profile", ""),
        facts=_facts(read),
        host=list(_flat(read.host)),
        valid=sum(_valid(trial) for trial in read.trials),
        experiments=[_experiment(read, frame, name) for name in _experiments(read)],
    )
    path = read.path / "report.html"
    path.write_text(page, "utf-8")
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["digits"] = digits
    environment.filters["title"] = lambda name: name.replace("_", " ")
    environment.filters["measure"] = _measure
    environment.filters["label"] = lambda placement: style.look(placement).label
    return environment.get_template("report.html.j2")


HEADINGS = {"false_failovers": "hosts replaced while alive"}


def _measure(name: str) -> str:
    """Return a metric's name as a table's heading: `generator_lateness_p99_us` -> `generator lateness p99 (µs)`."""
    if name in HEADINGS:
        return HEADINGS[name]
    words, _, suffix = name.rpartition("_")
    return (
        f"{words.replace('_', ' ')} ({unit(name).replace('us', 'µs')})" if unit(name) != "count" else f"{words} {suffix}".strip()
    )


def _experiments(run: Run) -> list[str]:
    return list(dict.fromkeys((*run.spec.get("experiments", {}), *(trial["experiment"] for trial in run.trials))))


def _experiment(run: Run, frame: pd.DataFrame, name: str) -> dict[str, Any]:
    """Return what the template shows of one experiment."""
    figures = [figure for figure in definitions().values() if figure.experiment == name]
    rows = frame[frame["experiment"] == name]
    trials = [trial for trial in run.trials if trial["experiment"] == name]
    question = run.spec.get("experiments", {}).get(name, {}).get("question") or next((figure.question for figure in figures), "")
    answers = [figure.answer(rows) for figure in figures if figure.answer and len(rows)]
    pictures = [(figure, *image) for figure in figures if (image := _image(run, frame, figure))]
    return {
        "name": name,
        "question": question,
        "answer": answers[0] if answers else _unanswered(trials, rows),
        "figures": [
            {"name": figure.name, "question": figure.question, "data": data, "width_in": width_in}
            for figure, data, width_in in pictures
        ],
        "tables": [table for pair in PAIRS if (table := _table(rows, *pair))["lines"]],
        "measured": _measured(rows, figures),
        "topologies": _topologies(trials),
        "fidelity": _fidelity(trials),
        "paths": _paths(trials),
        "drops": _drops(trials),
        "invalid": _invalid(trials),
        "trials": len(trials),
        "valid": sum(_valid(trial) for trial in trials),
    }


def _unanswered(trials: Sequence[dict[str, Any]], rows: pd.DataFrame) -> str:
    """Return why there is no sentence that answers the question."""
    if not trials:
        return "No trial of this experiment has ended."
    if not rows["valid"].any():
        return "No trial of this experiment was valid."
    return "No figure of this experiment says its answer; the numbers are below and in summary.csv."


def _image(run: Run, frame: pd.DataFrame, figure: Definition) -> tuple[str, float] | None:
    """Return the figure's PNG in base64 and its width on the page (1.35 times that on paper), None if nothing to draw."""
    path = run.path / "figures" / f"{figure.name}.png"
    if not path.is_file() and not draw_figure(figure, frame, path.parent):
        return None
    reduced = io.BytesIO()
    image = Image.open(path).convert("RGB")
    image.quantize(256).save(reduced, "PNG", optimize=True)
    return base64.b64encode(reduced.getvalue()).decode(), 1.35 * image.width / PNG_DPI


def _table(rows: pd.DataFrame, baseline: str, other: str) -> dict[str, Any]:
    """Return the headline metrics of two placements, a line per point; the first pair's table has a column for all others."""
    compared = comparisons(rows, baseline, other)
    summary = summarize(rows[rows["histogram"].isna()])
    measured = style.order(summary.loc[summary["trials"] > 0, "placement"])
    placements = measured if (baseline, other) == PAIRS[0] else [baseline, other]
    return {
        "baseline": baseline,
        "other": other,
        "placements": placements,
        "lines": [_line(row, summary, placements) for row in compared],
    }


def _line(row: Comparison, summary: pd.DataFrame, placements: Sequence[str]) -> dict[str, Any]:
    sweep = json.dumps(row.sweep, sort_keys=True)
    here = summary[
        (summary["topology"] == row.topology)
        & (summary["sweep"] == sweep)
        & (summary["metric"] == row.metric)
        & (summary["replicas"] == row.replicas)
        & (summary["trials"] > 0)
    ]
    here = here[(here["nf"] == row.nf) | (row.nf == "")].set_index("placement")
    cells = [_cell(here.loc[name]) if name in here.index else None for name in placements]
    return {
        "point": point(row),
        "metric": row.metric,
        "unit": row.unit,
        "better": better(row.metric),
        "cells": cells,
        "ratio": ratio(row),
        "verdict": verdict(row),
        "clear": row.clear,
    }


def _measured(rows: pd.DataFrame, figures: Sequence[Definition]) -> list[dict[str, Any]]:
    """Return the headline metrics as in `summary.csv`, a line per point and placement, compared with another or not."""
    headlines = [headline for figure in figures for headline in figure.headlines if not headline.carried]
    summary = summarize(rows[rows["histogram"].isna() & rows["metric"].isin({headline.metric for headline in headlines})])
    return [
        {**row, "at": place(row["topology"], row["nf"], row["replicas"], json.loads(row["sweep"])), **_cell(pd.Series(row))}
        for headline in headlines
        for row in summary[(summary["metric"] == headline.metric) & (summary["trials"] > 0)].to_dict("records")
        if headline.where.items() <= json.loads(row["sweep"]).items()
    ]


def _cell(measured: pd.Series) -> dict[str, str]:
    interval = "" if math.isnan(measured["low"]) else f"{digits(measured['low'])} to {digits(measured['high'])}"
    return {"median": digits(measured["median"]), "interval": interval}


def _topologies(trials: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return one picture per shape of network, with the placements that ran on it."""
    shapes: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        if trial.get("network"):
            shapes.setdefault(json.dumps(trial["network"], sort_keys=True), []).append(trial)
    shown = []
    for shape, alike in list(shapes.items())[:PICTURES]:
        network = json.loads(shape)
        labels = [style.look(name).label for name in style.order(trial["placement"] for trial in alike)]
        mechanism = network.get("delay_mechanism", "unknown")
        delay = "no link delay" if mechanism == "none" else f"link delay by {mechanism}"
        means = f"datapath {network.get('datapath', 'unknown')}, {delay}"
        caption = f"{network.get('name', '').replace('_', ' ')} with state {' / '.join(labels)}; {means}"
        shown.append({"caption": caption, "svg": picture(network)})
    return shown


def _fidelity(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a line per placement: how many trials, and median and worst of everything the trials say of their fidelity.

    Hosts replaced while alive are counted: the sum, and of how many trials.
    """
    measures = sorted({name for trial in trials for name, value in _flat(trial.get("fidelity", {})) if _number(value)})
    lines = []
    for placement in style.order(trial["placement"] for trial in trials):
        here = [trial for trial in trials if trial["placement"] == placement]
        said = [pair for trial in here for pair in _flat(trial.get("fidelity", {})) if _number(pair[1])]
        values = {name: [value for key, value in said if key == name] for name in measures}
        lines.append(
            {
                "placement": placement,
                "trials": len(here),
                "valid": sum(map(_valid, here)),
                "cells": [_total(values[name]) if name in COUNTED else _spread(values[name]) for name in measures],
            }
        )
    return {"measures": measures, "lines": lines}


def _paths(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line per calibrated path: the round trip asked for and those measured."""
    paths: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        for path in trial.get("calibration", {}).get("paths", []):
            paths.setdefault(f"{trial['topology'].replace('_', ' ')}: {path['path']}", []).append(path)
    return [
        {
            "path": name,
            "spec_us": digits(measured[0].get("spec_us", 0)),
            "measured": len(measured),
            "cells": [_spread([path[key] for path in measured if _number(path.get(key))]) for key in ("rtt_us", "excess_us")],
            "lost": sum(path.get("lost", 0) for path in measured),
            "sent": sum(path.get("sent", 0) for path in measured),
        }
        for name, measured in sorted(paths.items())
    ]


def _drops(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return every non-zero count of the trials' ledgers, summed, a line per cause and a column per placement."""
    placements = style.order(trial["placement"] for trial in trials)
    counts: dict[str, Counter[str]] = {}
    for trial in trials:
        for cause, count in _flat(trial.get("ledger", {})):
            if _number(count) and count:
                counts.setdefault(cause, Counter())[trial["placement"]] += count
    lines = [(cause, [f"{by[name]:,}" for name in placements]) for cause, by in counts.items()]
    return {"placements": placements, "lines": lines}


def _invalid(trials: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return (what, why) for each invalid trial, and for each invalid point of a valid one."""
    found = []
    for trial in trials:
        if not trial.get("valid", True):
            found.append((trial["trial"], "; ".join(trial.get("invalid_reasons", [])) or "no reason recorded"))
            continue
        for measured in trial.get("points", []):
            if not measured.get("valid", True):
                swept = ", ".join(f"{name} {value}" for name, value in measured.get("sweep", {}).items())
                found.append((f"{trial['trial']} at {swept}", "; ".join(measured.get("invalid_reasons", []))))
    return found


def _facts(run: Run) -> list[tuple[str, Any]]:
    """Return what the run says of itself; of uncommitted changes only how many lines they are."""
    facts = [(name, value) for name, value in run.spec.items() if name not in ("experiments", "diff", "run_id")]
    diff = str(run.spec.get("diff") or "").splitlines()
    changed = sum(line[:1] in ("+", "-") and line[:3] not in ("+++", "---") for line in diff)
    began = sorted(trial["started"] for trial in run.trials if trial.get("started"))
    shown = [(name, value) for fact in facts for name, value in _flat(dict([fact]))]
    if "diff" in run.spec:
        shown.append(("uncommitted changes", f"{changed} lines (in spec.json)" if changed else "none"))
    return shown + ([("first trial", began[0]), ("last trial", began[-1])] if began else [])


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested dictionaries; lists as text."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, ", ".join(map(str, value)) if isinstance(value, list) else value


def _spread(values: Iterable[float]) -> str:
    """Return the median and, where it differs, the worst (highest) value."""
    ordered = sorted(values)
    if not ordered:
        return ""
    middle, worst = digits(median(ordered)), digits(ordered[-1])
    return middle if middle == worst else f"{middle} (worst {worst})"


def _total(counts: Sequence[float]) -> str:
    """Return the sum of counts and of how many trials it is; empty without any."""
    return f"{sum(counts):g} in {len(counts)} trial{'' if len(counts) == 1 else 's'}" if counts else ""


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _valid(trial: dict[str, Any]) -> bool:
    return bool(trial.get("valid", True))
