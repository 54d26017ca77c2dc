"""Where does the CPU time of a packet go: network function, store, switch or the rest of the machine?"""

from __future__ import annotations

import pandas as pd
from matplotlib.patches import Patch

from analysis import style
from analysis.figures import highest_carried_kpps
from analysis.sheet import Sheet, by_placement, title

EXPERIMENT = "throughput"


def draw(frame: pd.DataFrame, sheet: Sheet) -> None:
    """Panels: network functions across, topologies down. Stacked medians at the highest load all of a panel carry."""
    costs = _with_rest(frame)
    carried = {
        topology: {nf: load for nf in style.order_nfs(costs["nf"]) if (load := _load_carried(frame, costs, topology, nf))}
        for topology in style.order_topologies(costs["topology"])
    }
    shown = {topology: loads for topology, loads in carried.items() if loads}
    if not shown:
        return
    panels = sheet.ragged([len(loads) for loads in shown.values()], 0.6 + 1.75 * len(shown), sharey="row")
    for row, (topology, loads) in zip(panels, shown.items()):
        for axes, (nf, load) in zip(row, loads.items()):
            rows = costs[(costs["topology"] == topology) & (costs["nf"] == nf) & (costs["offered_kpps"] == load)]
            for position, (placement, group) in enumerate(by_placement(rows)):
                parts = {metric: part for metric in style.COMPONENTS if len(part := group[group["metric"] == metric])}
                sheet.stack(axes, position, parts, placement, f"{topology}, {nf}, {load:g} kpps")
            labels = [style.look(placement).label for placement, _ in by_placement(rows)]
            axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right", rotation_mode="anchor")
            axes.set_title(f"{title(nf)}, {title(topology)}, {load:g} kpps")
            axes.grid(axis="x", visible=False)
        row[0].set_ylabel("CPU per packet (µs)")
    drawn = [style.COMPONENTS[metric] for metric in style.COMPONENTS if metric in {mark["mark"] for mark in sheet.points}]
    handles = [Patch(facecolor=colour, hatch=hatch, edgecolor="black", linewidth=0.4) for _, colour, hatch in drawn]
    sheet.legend_of(handles, [label for label, *_ in drawn])


def _with_rest(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the costs by process, with what is left of `system_cpu_us` at each point as `other_cpu_us`.

    A peer inside the kernel has no process of its own, so all its cost is there. The machine's total is counted in ticks
    of 10 ms, the processes' exactly: a rest below zero is such a tick.
    """
    costs = frame[frame["metric"].isin(style.COMPONENTS)]
    whole = frame[frame["metric"] == "system_cpu_us"]
    named = costs.groupby(["trial", "sweep"])["value"].sum()
    spent = named.reindex(pd.MultiIndex.from_frame(whole[["trial", "sweep"]]), fill_value=0.0).to_numpy()
    return pd.concat([costs, whole.assign(metric="other_cpu_us", value=(whole["value"] - spent).clip(lower=0))])


def _load_carried(frame: pd.DataFrame, costs: pd.DataFrame, topology: str, nf: str) -> int | float | None:
    here, charged = ((rows["topology"] == topology) & (rows["nf"] == nf) for rows in (frame, costs))
    return highest_carried_kpps(frame[here], style.order(costs.loc[charged, "placement"]))
