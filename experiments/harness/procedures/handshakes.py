"""Do connections open, and how fast, when answers come back by the same NF host and when they come back by another one?

Both are measured in one trial, one after the other, each with server ports of its own: no connection meets state of the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiments.harness import accounting
from experiments.harness.bench import COMMON_SETTINGS, PATHS, READY_S, Bench, steering_of
from topologies.emulation.processes import RunningProcess

if TYPE_CHECKING:
    from experiments.harness.checks import Planned

SETTINGS = {**COMMON_SETTINGS, "measured_paths": PATHS, "rate_per_s": 500.0, "seconds": 1.0, "timeout_s": 1.0,
            "warmup_seconds": 0.1}  # fmt: skip
FIRST_PORT = 7000


def check(planned: Planned) -> None:
    """Check that each kind of paths that is to be measured is possible."""
    for paths in planned.settings["measured_paths"]:
        for stage in planned.stages:
            steering_of(stage, paths)
    if not planned.settings["measured_paths"]:
        raise planned.refuse("measured_paths=(): nothing would be measured; give 'symmetric' or 'asymmetric'")


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return one point for each kind of paths."""
    bench.start_state()
    bench.start_functions()
    paths = bench.settings["measured_paths"]
    client = start_ends(bench, [FIRST_PORT + number for number in range(len(paths))])
    return [point(bench, client, kind, FIRST_PORT + number) for number, kind in enumerate(paths)]


def start_ends(bench: Bench, ports: list[int]) -> RunningProcess:
    """Start the listener on the server host and the client, which is returned."""
    client, server = (bench.network.hosts[name] for name in ("client", "server"))
    address = str(server.interfaces["net"].ipv4).partition("/")[0]
    targets = "experiments.workloads.handshakes"
    bench.extra += [
        bench.launcher.spawn("listener", server, f"{targets}:listen", {"address": address, "ports": ports}),
        bench.launcher.spawn("connects", client, f"{targets}:connect", {"address": address}),
    ]
    bench.wait_ready(bench.extra)
    return bench.extra[-1]


def point(bench: Bench, client: RunningProcess, paths: str, port: int) -> dict[str, Any]:
    """Steer, warm up and measure; a handshake that fails is a result, an instance whose ledger does not balance is not."""
    settings = bench.settings
    bench.steer(paths)
    connects(client, port, settings | {"seconds": settings["warmup_seconds"], "timeout_s": settings["warmup_seconds"]})
    before = bench.function_statistics()
    answer = connects(client, port, settings)
    after = bench.function_statistics()
    reasons = accounting.imbalances(after)
    if answer["refused"]:
        reasons.append(f"{answer['refused']} connections were refused: the listener is not there, or somebody else resets them")
    metrics = {"attempts": answer["attempts"], "established": answer["established"],
               "success_ratio": answer["established"] / answer["attempts"], **answer["latency"]}  # fmt: skip
    histograms = {"handshake_ns": answer["histogram"]} if answer["established"] else {}
    ledger = {"nf": accounting.instance_ledger(accounting.since(after, before))}
    return {"sweep": {"paths": paths}, "metrics": metrics, "histograms": histograms, "valid": not reasons,
            "invalid_reasons": reasons, "ledger": ledger,
            "fidelity": {"generator_lateness_p99_us": answer["lateness"].get("p99_us")}}  # fmt: skip


def connects(client: RunningProcess, port: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Let the client make its connects and return what came of them."""
    client.send({"port": port} | {name: settings[name] for name in ("rate_per_s", "seconds", "timeout_s")})
    answer = client.receive(settings["seconds"] + settings["timeout_s"] + READY_S)
    return answer or {"attempts": 1, "established": 0, "refused": 0, "latency": {}, "lateness": {}, "histogram": ""}
