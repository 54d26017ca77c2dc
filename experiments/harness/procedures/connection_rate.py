"""How many TCP connections a second open: the highest rate at which all do, by search, and the rate when saturated.

After RFC 9693, section 4.5: an initiator opens connections never seen before through the device under test to a responder,
and a rate holds when every one of them has opened. Where the RFC sends one frame in one direction a connection is a TCP handshake
here, three segments: SYN, SYN ACK, ACK. The kernel's table is emptied before each step (section 4.4), ours keeps what it has and
is made large enough. As in `throughput`, steps are short, so a rate fails only when it does in `tries` steps running.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiments.harness import accounting
from experiments.harness.bench import COMMON_SETTINGS, READY_S, Bench
from experiments.harness.procedures.throughput import highest
from experiments.workloads.traffic import packets_in
from topologies.emulation.processes import RunningProcess

if TYPE_CHECKING:
    from experiments.harness.checks import Planned

SETTINGS = {**COMMON_SETTINGS, "capacity": 1 << 20, "warmup_kops": 20.0, "warmup_seconds": 0.5, "ladder_kops": (50, 100, 200),
            "seconds": 0.4, "search_low_kops": 2.0, "search_high_kops": 320.0, "search_steps": 6, "search_seconds": 0.3,
            "tries": 2, "window": 512, "lateness_limit_us": 0.0}  # fmt: skip
MOST_KOPS = 1000.0
"""More than any path here opens: bounds the responder's bit map when saturated."""


def check(planned: Planned) -> None:
    """Check that the search has room, and that every load of the ladder is one."""
    planned.need_order("search_low_kops", "search_high_kops")
    if any(offered <= 0 for offered in planned.settings["ladder_kops"]):
        raise planned.refuse(f"ladder_kops={planned.settings['ladder_kops']!r}: each load must be above 0")


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return a point for "as fast as a window of connections lets", one for each load of the ladder, one for the search."""
    bench.start_state()
    bench.start_functions()
    ends = Ends(bench)
    settings = bench.settings
    ends.step(settings["warmup_kops"], settings["warmup_seconds"])
    points = [ends.step(0.0, settings["seconds"])]
    for offered in settings["ladder_kops"]:
        points.append(ends.step(float(offered), settings["seconds"]))
    points.append(search(bench, ends))
    points[-1]["metrics"] |= bench.memory()
    return points


def search(bench: Bench, ends: Ends) -> dict[str, Any]:
    """Return the point of the highest rate at which every connection opened."""
    settings = bench.settings

    def attempt(offered: float) -> dict[str, Any] | None:
        for _ in range(settings["tries"]):
            point = ends.step(offered, settings["search_seconds"])
            if point["valid"] and point["metrics"]["failed"] == 0:
                return point
            if point["metrics"]["failed_ratio"] > 0.05 or not point["valid"]:
                return None
        return None

    low, high, best = highest(attempt, settings["search_low_kops"], settings["search_high_kops"], settings["search_steps"])
    found = best or {"metrics": {}, "fidelity": {}, "ledger": {}}
    metrics = {"lossless_kops": low, "resolution_kops": high - low}
    metrics |= {name: found["metrics"][name] for name in ("p50_us", "p99_us") if name in found["metrics"]}
    return {"sweep": {"search": "rfc9693"}, "metrics": metrics, "histograms": {}, "valid": True, "invalid_reasons": [],
            "fidelity": found["fidelity"], "ledger": found["ledger"]}  # fmt: skip


class Ends:
    """The initiator on the client host and the responder on the server host."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        client, server = (bench.network.hosts[name] for name in ("client", "server"))
        kind = {"interface": "net", "port_kind": bench.settings["port_kind"]}
        target = "experiments.workloads.connections"
        self.responder = bench.launcher.spawn("responder", server, f"{target}:responder_main", kind)
        self.initiator = bench.launcher.spawn(
            "initiator", client, f"{target}:initiator_main",
            kind | {"source_mac": client.interfaces["net"].mac, "window": bench.settings["window"],
                    "next_hop_mac": bench.peer.next_hop_mac if bench.peer else server.interfaces["net"].mac,
                    "server": str(server.interfaces["net"].ipv4).partition("/")[0]})  # fmt: skip
        bench.extra += [self.initiator, self.responder]
        bench.wait_ready(bench.extra)
        self.first = 0

    def step(self, offered_kops: float, seconds: float) -> dict[str, Any]:
        """Open connections at a rate (0: saturate) and return the point."""
        if self.bench.peer:
            self.bench.peer.forget()
        before = self.bench.counters()
        _ask(self.responder, {"first": self.first, "connections": 2 * packets_in(offered_kops or MOST_KOPS, seconds)})
        opened = _ask(self.initiator, {"offered_kops": offered_kops, "seconds": seconds})
        answered = _ask(self.responder, {"collect": True})
        self.first = opened["first"] + opened["sent"]
        after = self.bench.counters()
        growth = accounting.since(after, before)
        reasons = accounting.doubts(offered_kops, self.bench.settings["lateness_limit_us"], opened, after)
        return {"sweep": {"offered_kops": offered_kops} if offered_kops else {"load": "saturated"},
                "metrics": metrics(opened, answered, growth), "histograms": {}, "valid": not reasons, "invalid_reasons": reasons,
                "fidelity": accounting.fidelity(opened, growth), "ledger": ledger(opened, answered, growth)}  # fmt: skip


def _ask(process: RunningProcess, message: dict[str, Any]) -> dict[str, Any]:
    process.send(message)
    return process.receive(message.get("seconds", 0.0) * 2 + READY_S) or {}


def metrics(opened: dict[str, Any], answered: dict[str, Any], growth: dict[str, Any]) -> dict[str, float]:
    """Return rates, failures, the handshake's time at the initiator, and CPU time a connection."""
    attempts, completed = max(1, opened["sent"]), answered["completed"]
    elapsed_s = max(opened["elapsed_s"], (answered["last_ns"] - opened["start_ns"]) / 1e9)
    cpu = {"nf_per_connection_us": "nf_cpu_s", "system_per_connection_us": "busy_s"}
    return {**opened["latency"], "sent_kops": attempts / opened["elapsed_s"] / 1e3, "opened_kops": completed / elapsed_s / 1e3,
            "failed": attempts - completed, "failed_ratio": 1 - completed / attempts,
            **{name: growth[key] * 1e6 / attempts for name, key in cpu.items() if key in growth}}  # fmt: skip


def ledger(opened: dict[str, Any], answered: dict[str, Any], growth: dict[str, Any]) -> dict[str, Any]:
    """Return how far the step's connections came, and what was dropped where."""
    return {"sent": opened["sent"], "syns": answered["syns"], "established": opened["established"],
            "completed": answered["completed"], "repeated": answered["repeated"], "foreign": answered["foreign"],
            "nf": accounting.instance_ledger(growth["functions"]), "responder_kernel": answered["kernel"],
            "devices": opened["devices"]}  # fmt: skip
