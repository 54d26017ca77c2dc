"""What becomes of a recorded file's packets: each one found again at the other side, or lost, and how late."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from datastore.native.errors import NearstateError
from datastore.native.histogram import merge
from experiments.harness import accounting
from experiments.harness.bench import COMMON_SETTINGS, READY_S, Bench
from experiments.workloads.traffic import Replay
from nfs.dataplane.headers import INSIDE, OUTSIDE
from topologies.emulation.processes import RunningProcess

SETTINGS = {**COMMON_SETTINGS, "speed": None}
"""speed: None for the traffic's own; swept, it stands in its place."""
START_S = 0.05


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return one point: the file played once."""
    replay = Replay.of(**bench.experiment.traffic)
    speed = replay.speed if bench.settings["speed"] is None else float(bench.settings["speed"])
    bench.start_state()
    bench.start_functions()
    sides = start_sides(bench)
    bench.extra += sides
    ready = [side.receive(READY_S) or {} for side in sides]
    if not all(answer.get("ready") for answer in ready):
        raise NearstateError(f"replay of {replay.pcap!r} was not prepared after {READY_S:g} s; its log is {sides[0].log}")
    point = play(bench, sides, ready[0], speed)
    point["metrics"] |= bench.memory()
    point["replay"] |= {"pcap": replay.pcap, "skipped": ready[0]["skipped"], "sides": replay.sides}
    return [point]


def start_sides(bench: Bench) -> list[RunningProcess]:
    """Start the inside party's process on the client and the outside party's on the server."""
    hosts = [bench.network.hosts[name] for name in ("client", "server")]
    config = {"interface": "net", "port_kind": bench.settings["port_kind"], "replay": dict(bench.experiment.traffic),
              "client_mac": hosts[INSIDE].interfaces["net"].mac, "server_mac": hosts[OUTSIDE].interfaces["net"].mac}  # fmt: skip
    return [bench.launcher.spawn(f"replay-{host.name}", host, "experiments.workloads.replay:main", config | {"side": side})
            for side, host in enumerate(hosts)]  # fmt: skip


def play(bench: Bench, sides: Sequence[RunningProcess], ready: Mapping[str, Any], speed: float) -> dict[str, Any]:
    """Let both sides play the file once and return the point."""
    seconds = ready["seconds"] / speed if speed else 0.0
    before = bench.counters()
    start_ns = time.monotonic_ns() + int(START_S * 1e9)
    for side in sides:
        side.send({"start_ns": start_ns, "speed": speed})
    answers = [side.receive(2 * seconds + READY_S) or {} for side in sides]
    if not all(answers):
        raise NearstateError(f"a replay of {seconds:g} s did not end; its logs are {sides[0].log} and {sides[1].log}")
    after = bench.counters()
    growth = accounting.since(after, before)
    sent, arrived, histogram = together(answers)
    offered_kpps = ready["frames"] / seconds / 1e3 if seconds else 0.0
    reasons = accounting.doubts(offered_kpps, bench.settings["lateness_limit_us"], sent, after)
    lost = {"outward": answers[OUTSIDE]["lost"], "inward": answers[INSIDE]["lost"]}
    impatient = sum(answer["impatient"] for answer in answers)
    return {"sweep": {"speed": speed}, "metrics": accounting.metrics(sent, arrived, growth) | {"impatient": impatient},
            "histograms": {"latency_ns": histogram} if histogram else {}, "valid": not reasons, "invalid_reasons": reasons,
            "fidelity": accounting.fidelity(sent, growth), "ledger": accounting.path_ledger(sent, arrived, growth),
            "replay": {"frames": ready["frames"], "lost": lost}}  # fmt: skip


def together(answers: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return what both sides sent, what arrived at both, and the histogram of both directions."""
    histogram, latency = merge([answer["histogram"] for answer in answers if answer["histogram"]])
    sent, arrived = (
        {key: worst_or_sum(key, [answer[what][key] for answer in answers]) for key in answers[0][what]}
        for what in ("sent", "arrived")
    )
    return sent, arrived | {"latency": latency}, histogram if latency else ""


def worst_or_sum(key: str, values: Sequence[Any]) -> Any:
    """Return times (and summaries of times) as the larger, counts as the sum; of counts by name, each."""
    if isinstance(values[0], Mapping):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: worst_or_sum(name, [value.get(name, 0) for value in values]) for name in names}
    return max(values) if key.endswith(("_s", "_us")) else sum(values)
