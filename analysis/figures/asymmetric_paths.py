"""Which placements still open connections when answers come back by another instance, and what does it cost them?"""

from __future__ import annotations

import pandas as pd

from analysis import style
from analysis.answers import listing, microseconds, missing
from analysis.figures import Headline
from analysis.sheet import Sheet, by_placement
from analysis.summary import typical

EXPERIMENT = "asymmetric_paths"
HEADLINES = tuple(Headline(metric, {"paths": "asymmetric"}) for metric in ("success_ratio", "p50_us", "p99_us"))
PATHS = ("symmetric", "asymmetric")


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Left: share of handshakes that succeed, median of repeats, 95 % interval. Right: CDF of those that do; log axis."""
    success = frame[frame["metric"] == "success_ratio"]
    if success.empty:
        return
    times = frame[frame["metric"] == "handshake_ns"]
    (panels,) = sheet.panels(1, 1 + len(PATHS), 2.1)
    placements = style.order(success["placement"])
    step = 0.8 / len(placements)
    for group, paths in enumerate(PATHS):
        for place, (placement, rows) in enumerate(by_placement(success[success["paths"] == paths])):
            position = group + (place - (len(placements) - 1) / 2) * step
            sheet.bar(panels[0], position, rows, placement, "success", paths, 0.92 * step)
            if rows["value"].median() == 0:
                panels[0].text(position, 0.02, "0", ha="center")
            established = times[(times["paths"] == paths) & (times["placement"] == placement)]
            sheet.cdf(panels[1 + group], established["histogram"], placement, paths)
        panels[1 + group].set_title(f"handshake time, {paths} paths")
    sheet.cdf_axes(panels[None, 1:], "handshakes", "time to establish")
    ends = [axes.get_xlim() for axes in panels[1:]]
    for axes in panels[1:]:
        axes.set_xlim(min(low for low, _ in ends), max(high for _, high in ends))
    panels[0].set_xticks(range(len(PATHS)), PATHS)
    panels[0].grid(axis="x", visible=False)
    panels[0].set(ylim=(0, 1.02), ylabel="handshakes that succeed", title="success")
    sheet.legend(placements)


def answer(frame: pd.DataFrame) -> str:
    """Say who opens connections over asymmetric paths and at what median, and who does not."""
    shares = {
        name: typical(frame, "success_ratio", paths="asymmetric", placement=name) for name in style.order(frame["placement"])
    }
    known = {name: share for name, share in shares.items() if share is not None}
    if not known:
        return missing("handshakes over asymmetric paths")
    open_all = [name for name, share in known.items() if share > 0.99]
    said = []
    for name in open_all:
        medians = [typical(frame, "p50_us", paths=paths, placement=name) for paths in PATHS]
        if None not in medians:
            said.append(f"{style.look(name).label} {' to '.join(microseconds(us) for us in medians if us is not None)}")
    failing = [f"{style.look(name).label} opens {share:.0%}" for name, share in known.items() if share <= 0.99]
    sentence = (
        f"With answers by another instance, {listing(failing)} of its connections" if failing else "All placements open all"
    )
    return f"{sentence}; median handshake, symmetric to asymmetric: {listing(said)}." if said else f"{sentence}."
