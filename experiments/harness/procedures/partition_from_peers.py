"""A host is cut off from the others: who goes on serving, who refuses, and does anything diverge?

      load |----------|storage network of one host cut--------------------|mended----------|
                      |<- until its flows are served elsewhere ->|

The packets still reach the host, only its store's peers and the coordinator do not. What it answered without them would be lost,
or be a second truth: so it must stop when its lease is over, and a survivor must not begin before. After the cut is mended the
host is a backup again. Then the copies are compared record by record.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from datastore.base.errors import NearstateError, unknown
from experiments.harness.bench import COMMON_SETTINGS, Bench, sleep_until

if TYPE_CHECKING:
    from experiments.harness.checks import Planned

SETTINGS = {**COMMON_SETTINGS, "victim": "", "offered_kpps": 10.0, "cut_at_s": 0.6, "mended_at_s": 1.8, "seconds": 3.0,
            "bin_us": 1000.0, "shown_ms": (300.0, 2200.0), "lateness_limit_us": 0.0}  # fmt: skip
HEALED_S = 15.0


def check(planned: Planned) -> None:
    """Check that there is a host to cut off, and that it is cut off and mended within the load."""
    planned.need_moves()
    planned.need_order("cut_at_s", "mended_at_s", "seconds")
    victim = planned.settings["victim"]
    if victim and victim not in planned.plan.graph.hosts():
        raise unknown("victim among the hosts", victim, planned.plan.graph.hosts())
    if "storage" not in planned.plan.interfaces(victim or next(iter(planned.stores), planned.nf_hosts[0])):
        raise planned.refuse(f"victim={victim!r}: it has no cable `storage` that could be cut")


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return one point: how long the cut-off host's flows got nothing, what was lost, and how many records differ in the end.

    victim: the host; "": the first one with a store. Its flows are those whose state it has, or, for a host that keeps all
    state, all.
    """
    settings = bench.settings
    bench.start()
    bench.warm_up()
    victim = settings["victim"] or next(iter(bench.stores), bench.nf_hosts[0].name)
    if "storage" not in bench.network.hosts[victim].interfaces:
        raise NearstateError(f"host {victim!r} has no interface on a storage network: nothing to cut")
    concerned = served_by(bench, victim)
    if not concerned:  # a busy machine: it was not heard for a lease, and replaced
        raise NearstateError(f"before any cut: {victim} serves nothing; its place was taken while the trial began")
    load = {"bin_us": settings["bin_us"], "watch": concerned}
    began_ns = bench.offer(settings["offered_kpps"], settings["seconds"], load)
    until_ns = began_ns + int(settings["seconds"] * 1e9)
    sleep_until(began_ns + int(settings["cut_at_s"] * 1e9))
    cut_ns = time.monotonic_ns()
    bench.cut(victim, "storage")
    sleep_until(began_ns + int(settings["mended_at_s"] * 1e9))
    bench.network.mend(victim, "storage")
    point = bench.finish()
    line = bench.time_line()
    begin, end, ended = line.outage(until_ns)
    healed_s = bench.wait_full(HEALED_S) if bench.coordinator else 0.0
    point["sweep"] = {}
    point["metrics"] |= {
        "outage_ms": (end - begin) / 1e6 if end > cut_ns else 0.0, "recovered_ratio": float(ended), "healed_s": healed_s,
        "served_elsewhere_ratio": elsewhere(bench, victim, concerned), "records_differ": float(differing(bench)),
        "packets_lost": point["metrics"]["lost"]}  # fmt: skip
    before_ms, after_ms = settings["shown_ms"]
    point["time_lines"] = {"delivered": line.encode(cut_ns, -before_ms, after_ms)}
    return [point]


def served_by(bench: Bench, host: str) -> list[int]:
    """Return the partitions whose packets need `host`: its store's, or those steered to it."""
    primaries = [group["members"][:1] for group in bench.status()["map"]["groups"]] if bench.coordinator else []
    return [p for p, first in enumerate(primaries) if first == [host]] or \
        [p for p, name in enumerate(bench.network.steering()) if name == host]  # fmt: skip


def elsewhere(bench: Bench, host: str, partitions: list[int]) -> float:
    """Return the share of partitions that another host has now."""
    if not bench.coordinator:
        return 0.0
    groups = bench.status()["map"]["groups"]
    return sum(groups[p]["members"][:1] != [host] for p in partitions) / max(1, len(partitions))


def differing(bench: Bench) -> int:
    """Return how many records are not the same on every host that should have them; the load is over."""
    if bench.trial.replicas < 2:
        return 0
    groups = bench.status()["map"]["groups"]
    copies: dict[tuple[int, int], set[tuple[str, int, bytes]]] = {}
    for host in bench.stores:
        for record in bench.records(host):
            if host in groups[record.low & 0xFFFF]["members"]:
                copies.setdefault((record.low, record.high), set()).add((host, record.version, record.value))
    return sum(len({seen[1:] for seen in found}) > 1 or len(found) < len(groups[low & 0xFFFF]["members"])
               for (low, _), found in copies.items())  # fmt: skip
