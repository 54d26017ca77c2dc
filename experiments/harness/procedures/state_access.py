"""What one access to the state takes from an NF host: alone, while packets are processed beside it, and pipelined."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from datastore.base.errors import unknown
from experiments.harness.bench import COMMON_SETTINGS, READY_S, STORE_PORT, Bench
from experiments.peers import redis as redis_peer
from topologies.emulation.processes import RunningProcess

if TYPE_CHECKING:
    from experiments.harness.checks import Planned

FORWARDS = False
"""Not only trials with a path of packets."""
OPERATIONS = ("read", "write", "read_modify_write")
PROBE_CLIENT = 1000
SETTINGS = {**COMMON_SETTINGS, "operations": OPERATIONS, "count_here": 200_000,
            "count_there": 3000, "gap_us": 0.0, "keys": 10_000, "background_kpps": 10.0, "background_seconds": 0.6,
            "loaded_share": 0.5, "pipeline": 64, "frames": 4, "pipeline_count": 1_280_000}  # fmt: skip


def check(planned: Planned) -> None:
    """Check that there is state to be reached, by operations there are; packets beside it are not needed."""
    if planned.peer and planned.peer is not redis_peer:
        raise planned.refuse(f"procedure='state_access' with placement={planned.trial.placement!r}: this peer has no store")
    if not planned.peer and not planned.stores:
        raise planned.refuse(
            f"procedure='state_access' with placement={planned.trial.placement!r}: there is no store to be reached"
        )
    for name in planned.settings["operations"]:
        if name not in OPERATIONS:
            raise unknown("operation", name, OPERATIONS)
    if not planned.settings["keys"]:
        raise planned.refuse("keys=0: there is no record to be reached")


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return one point for each operation, alone and loaded, and the pipelined ones where the store is remote.

    The load is packets through the trial's NF, which keeps its own records in the same store.
    """
    bench.start_state()
    probe = start_probe(bench)
    here = bench.nf_hosts[0].name in bench.stores
    count = bench.settings["count_here" if here else "count_there"]
    operations = [name for name in bench.settings["operations"] if not (bench.is_peer and name == "read_modify_write")]
    points = [access_point(bench, probe, operation, "alone", count) for operation in operations]
    if not here:
        points += [pipeline_point(bench, probe, depth) for depth in (1, bench.settings["pipeline"])]
    if bench.trial.nf and not bench.is_peer:
        bench.start_functions()
        bench.start_workload()
        bench.warm_up()
        loaded_count = max(500, int(count * bench.settings["loaded_share"]))
        points += [loaded_point(bench, probe, operation, loaded_count) for operation in operations]
    points[-1]["metrics"] |= bench.memory()
    return points


def start_probe(bench: Bench) -> RunningProcess:
    """Start the probe on nf1 and wait until its records exist."""
    settings = bench.settings
    host = bench.nf_hosts[0]
    if bench.is_peer:
        config = {"address": bench.peer.address, "port": redis_peer.PORT, "keys": settings["keys"]}
        probe = bench.launcher.spawn("probe", host, "experiments.workloads.redis_probe:main", config)
    else:
        stores = [{"host": name, "address": bench.storage_address(name), "port": STORE_PORT} for name in bench.stores]
        table = bench.table_name(host.name) if host.name in bench.stores else None
        config = {"host": host.name, "map": bench.map_of(bench.stages[0]), "table": table, "stores": stores,
                  "cluster": bench.cluster_id, "client_id": PROBE_CLIENT, "value_bytes": settings["value_bytes"],
                  "keys": settings["keys"], "seed": bench.trial.seed}  # fmt: skip
        probe = bench.launcher.spawn("probe", host, "experiments.workloads.state_probe:main", config,
                                     key=bench.client_key(host.name, PROBE_CLIENT))  # fmt: skip
    bench.extra.append(probe)
    bench.wait_ready([probe])
    return probe


def ask(probe: RunningProcess, message: dict[str, Any]) -> dict[str, Any]:
    """Let the probe measure something."""
    probe.send(message)
    return probe.receive(READY_S) or {"refused": -1, "latency": {}, "histogram": "", "operations_kops": 0.0}


def point(sweep: dict[str, Any], answer: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """Return a point of the trial from a probe's answer."""
    reasons = [f"{answer['refused']} accesses were refused"] if answer["refused"] else []
    histograms = {"latency_ns": answer["histogram"]} if answer.get("histogram") else {}
    return {"sweep": sweep, "metrics": metrics, "histograms": histograms, "valid": not reasons, "invalid_reasons": reasons,
            "fidelity": {}, "ledger": {}}  # fmt: skip


def access_point(bench: Bench, probe: RunningProcess, operation: str, load: str, count: int) -> dict[str, Any]:
    """Time one operation, one at a time."""
    answer = ask(probe, {"operation": operation, "count": count, "gap_us": bench.settings["gap_us"]})
    metrics = answer["latency"] | {"operations_kops": answer["operations_kops"]}
    return point({"operation": operation, "load": load}, answer, metrics)


def loaded_point(bench: Bench, probe: RunningProcess, operation: str, count: int) -> dict[str, Any]:
    """Time one operation while the NFs process packets and keep their own state in the same store."""
    offered = bench.settings["background_kpps"]
    load: list[dict[str, Any]] = []
    background = threading.Thread(target=lambda: load.append(bench.step(offered, bench.settings["background_seconds"])))
    background.start()
    measured = access_point(bench, probe, operation, "loaded", count)
    background.join()
    measured["fidelity"], measured["ledger"] = load[0]["fidelity"], load[0]["ledger"]
    measured["metrics"]["background_kpps"] = load[0]["metrics"]["delivered_kpps"]
    return measured


def pipeline_point(bench: Bench, probe: RunningProcess, depth: int) -> dict[str, Any]:
    """Get records `depth` a frame, a few frames under way: operations per second; at depth 1 one at a time, with its latency."""
    if depth == 1:
        answer = ask(probe, {"operation": "read", "count": bench.settings["count_there"], "gap_us": 0.0})
        return point(
            {"operation": "get", "pipeline": 1}, answer, answer["latency"] | {"operations_kops": answer["operations_kops"]}
        )
    answer = ask(probe, {"pipeline": depth, "frames": bench.settings["frames"], "count": bench.settings["pipeline_count"]})
    return point({"operation": "get", "pipeline": depth}, answer, {"operations_kops": answer["operations_kops"]})
