"""Delivered against offered load, and the highest load without loss by binary search (RFC 2544, section 26.1).

RFC 2544 wants no loss at all in a trial of a minute; here a step lasts a fraction of a second and several processes share
two cores, so a rate is held to fail only when it loses packets in `tries` steps running.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from experiments.harness.bench import COMMON_SETTINGS, Bench

if TYPE_CHECKING:
    from experiments.harness.checks import Planned

SETTINGS = {**COMMON_SETTINGS, "ladder_kpps": (20, 40, 80, 120, 160), "seconds": 0.5, "search_low_kpps": 2.0,
            "search_high_kpps": 400.0, "search_steps": 6, "search_seconds": 0.4, "tries": 2, "saturate": False,
            "flows": 0, "lateness_limit_us": 0.0}  # fmt: skip


def check(planned: Planned) -> None:
    """Check that the search has room, and that every load of the ladder is one."""
    planned.need_order("search_low_kpps", "search_high_kpps")
    if any(offered <= 0 for offered in planned.settings["ladder_kpps"]):
        raise planned.refuse(f"ladder_kpps={planned.settings['ladder_kpps']!r}: each load must be above 0")


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return a point for each load of the ladder, one for the search, and one for "as fast as the path takes it".

    search_steps 0: no search. flows: in place of the traffic's, 0: the traffic's.
    """
    bench.start()
    bench.warm_up()
    settings = bench.settings
    points = []
    if settings["saturate"]:
        points.append(bench.step(0.0, settings["seconds"]))
    for offered in settings["ladder_kpps"]:
        points.append(bench.step(float(offered), settings["seconds"]))
        if points[-1]["metrics"]["delivered_kpps"] < 0.4 * offered:
            break
    if settings["search_steps"]:
        points.append(search(bench))
    points[-1]["metrics"] |= bench.memory()
    for point in points:
        point["histograms"] = {}
    return points


def search(bench: Bench) -> dict[str, Any]:
    """Return the point of the highest load without loss. Its resolution is the last step's width."""
    settings = bench.settings
    low, high, best = highest(
        lambda offered: lossless_step(bench, offered),
        settings["search_low_kpps"],
        settings["search_high_kpps"],
        settings["search_steps"],
    )
    found = best or {"metrics": {}, "fidelity": {}, "ledger": {}}
    metrics = {"lossless_kpps": low, "resolution_kpps": high - low}
    metrics |= {name: value for name, value in found["metrics"].items() if name.endswith("_cpu_us") or name == "p99_us"}
    return {"sweep": {"search": "rfc2544"}, "metrics": metrics, "histograms": {}, "valid": True, "invalid_reasons": [],
            "fidelity": found["fidelity"], "ledger": found["ledger"]}  # fmt: skip


def highest(
    attempt: Callable[[float], dict[str, Any] | None], lowest: float, most: float, steps: int
) -> tuple[float, float, dict[str, Any] | None]:
    """Search the highest load at which `attempt` succeeds; return it, the lowest at which it failed, and its point.

    The first load is a quarter of `most`; as long as none succeeded, the next is a quarter of the last, at least `lowest`.
    """
    low, high, candidate, best = 0.0, most, most / 4, None
    for _ in range(steps):
        point = attempt(candidate)
        if point is not None:
            low, best = candidate, point
        else:
            high = candidate
        candidate = (low + high) / 2 if low else max(lowest, high / 4)
    return low, high, best


def lossless_step(bench: Bench, offered: float) -> dict[str, Any] | None:
    """Return the first of a few steps at this load that lost nothing, or None."""
    for _ in range(bench.settings["tries"]):
        point = bench.step(offered, bench.settings["search_seconds"])
        if point["valid"] and point["metrics"]["lost"] == 0:
            return point
        if point["metrics"]["loss_ratio"] > 0.05 or not point["valid"]:
            return None
    return None
