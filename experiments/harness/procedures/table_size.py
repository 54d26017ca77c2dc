"""What a packet's state costs with few flows and with many, in one process without a network: see `workloads/table_probe.py`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from experiments.harness import spec
from experiments.harness.bench import COMMON_SETTINGS, READY_S, Bench
from experiments.harness.procedures.state_access import point

if TYPE_CHECKING:
    from experiments.harness.checks import Planned

SETTINGS = {**COMMON_SETTINGS, "flows": (1_000, 10_000, 100_000, 1_000_000), "fill": 0.7, "packets": 200_000, "passes": 3}


def check(planned: Planned) -> None:
    """Check that it is one function of ours, whose records are in its own process."""
    if planned.peer or len(spec.stages(planned.trial.nf)) > 1 or planned.trial.placement != "local":
        raise planned.refuse(f"procedure='table_size' with placement={planned.trial.placement!r}, nf={planned.trial.nf!r}: it "
                             "runs a function in one process, without a network; use placement='local'")  # fmt: skip
    if not planned.settings["flows"] or min(planned.settings["flows"]) < 1:
        raise planned.refuse(f"flows={planned.settings['flows']!r}: give numbers from 1")


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return one point for each number of flows, with a table filled to the share `fill`."""
    settings = bench.settings
    config = {name: settings[name] for name in ("value_bytes", "packets", "passes")}
    probe = bench.launcher.spawn(
        "table-probe", bench.nf_hosts[0], "experiments.workloads.table_probe:main",
        config | {"nf": bench.trial.nf, "seed": bench.trial.seed})  # fmt: skip
    bench.extra.append(probe)
    bench.wait_ready([probe])
    points = []
    for flows in settings["flows"]:
        probe.send({"flows": flows, "capacity": math.ceil(flows / settings["fill"])})
        answer = probe.receive(READY_S) or {"metrics": {}, "lost": flows}
        points.append(point({"flows": flows}, {"refused": answer["lost"]}, answer["metrics"]))
    return points
