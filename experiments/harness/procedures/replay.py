"""What becomes of a recorded file's packets: each one found again at the other side, or lost, and how late."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from ipaddress import IPv4Address
from typing import Any

from datastore.base.errors import NearstateError
from datastore.compiled.histogram import merge
from experiments.harness import accounting, spec
from experiments.harness.bench import COMMON_SETTINGS, READY_S, Bench
from experiments.workloads import capture
from experiments.workloads.traffic import Replay
from nfs.dataplane import NetworkFunction, declaration
from nfs.dataplane.headers import INSIDE, OUTSIDE
from topologies.emulation.processes import RunningProcess

SETTINGS = {**COMMON_SETTINGS, "speed": None, "delivered_least_ratio": 0.1}
"""speed: None for the traffic's own; swept, it stands in its place. delivered_least_ratio: the share of each party's packets that
must arrive, or the trial is invalid: where a function drops all, file and function seldom fit. 0: any number will do."""
START_S = 0.05
PREPARATION_US = 300.0
"""Longest for a packet of the file; 52 us of processor time were measured, and both sides prepare at once."""
VIRTUAL = "virtual_address"
"""The setting by which a function that balances load is known."""


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return one point: the file played once."""
    replay = capture.at_speed(bench.experiment.traffic, bench.settings["speed"])
    speed = float(replay.speed)
    bench.start_state()
    bench.start_functions()
    sides = start_sides(bench, replay)
    bench.extra += sides
    patience_s = READY_S + capture.check(replay).frames * PREPARATION_US / 1e6
    ready = [side.receive(patience_s) or {} for side in sides]
    if not all(answer.get("ready") for answer in ready):
        raise NearstateError(f"replay of {replay.pcap!r} was not prepared after {patience_s:g} s; its log is {sides[0].log}")
    point = play(bench, sides, ready[0], speed)
    point["metrics"] |= bench.memory()
    point["replay"] |= {"pcap": replay.pcap, "skipped": ready[0]["skipped"], "sides": replay.sides,
                        "times_back": ready[0]["times_back"]}  # fmt: skip
    return [point]


def start_sides(bench: Bench, replay: Replay) -> list[RunningProcess]:
    """Start the inside party's process on the client and the outside party's on the server."""
    hosts = [bench.network.hosts[name] for name in ("client", "server")]
    functions = [declaration.load(name) for stage in spec.stages(bench.trial.nf) for name in stage if name]
    config = {"interface": "net", "port_kind": bench.settings["port_kind"], "replay": asdict(replay),
              "translates": any(function.rewrites for function in functions),
              "virtual": virtual_address(functions, bench.settings["functions"]),
              "client_mac": hosts[INSIDE].interfaces["net"].mac, "server_mac": hosts[OUTSIDE].interfaces["net"].mac}  # fmt: skip
    return [bench.launcher.spawn(f"replay-{host.name}", host, "experiments.workloads.replay:main", config | {"side": side})
            for side, host in enumerate(hosts)]  # fmt: skip


def play(bench: Bench, sides: Sequence[RunningProcess], ready: Mapping[str, Any], speed: float) -> dict[str, Any]:
    """Let both sides play the file once and return the point."""
    seconds, longest_s = ready["seconds"] / speed if speed else 0.0, ready["longest_s"]
    before = bench.counters()
    start_ns = time.monotonic_ns() + int(START_S * 1e9)
    for side in sides:
        side.send({"start_ns": start_ns, "speed": speed})
    answers = answers_of(sides, longest_s)
    after = bench.counters()
    growth = accounting.since(after, before)
    sent, arrived, histogram = together(answers)
    sent["scheduled_s"] = seconds
    offered_kpps = ready["frames"] / seconds / 1e3 if seconds else 0.0
    reasons = accounting.doubts(offered_kpps, bench.settings["lateness_limit_us"], sent, after)
    if sent["sent"] < sent["planned"]:
        reasons.append(f"{sent['sent']:,} of {sent['planned']:,} packets had left after {longest_s:g} s")
    reasons += undelivered(answers, bench.settings["delivered_least_ratio"], accounting.instance_ledger(growth["functions"]))
    lost = {"outward": answers[OUTSIDE]["lost"], "inward": answers[INSIDE]["lost"]}
    impatient = sum(answer["impatient"] for answer in answers)
    return {"sweep": {"speed": speed}, "metrics": accounting.metrics(sent, arrived, growth) | {"impatient": impatient},
            "histograms": {"latency_ns": histogram} if histogram else {}, "valid": not reasons, "invalid_reasons": reasons,
            "fidelity": accounting.fidelity(sent, growth), "ledger": accounting.path_ledger(sent, arrived, growth),
            "replay": {"frames": ready["frames"], "lost": lost}}  # fmt: skip


def answers_of(sides: Sequence[RunningProcess], longest_s: float) -> list[dict[str, Any]]:
    """Return what each side counted: when both have sent everything, each is told so, and waits for what is under way.

    Raises NearstateError when a side has not ended its sending in time, or has ended itself.
    """
    for timeout_s in (longest_s + READY_S, READY_S):
        answers = [side.receive(timeout_s) or {} for side in sides]
        if not all(answers):
            raise NearstateError(
                f"a replay did not end after {timeout_s:g} s; its logs are {' and '.join(str(side.log) for side in sides)}"
            )
        for side in sides if "has_sent" in answers[0] else ():
            side.send({"both_have_sent": True})
    return answers


def undelivered(answers: Sequence[Mapping[str, Any]], least_ratio: float, nf: Mapping[str, int]) -> list[str]:
    """Return a reason for each party of whose packets fewer than `least_ratio` arrived. nf: the NF processes' ledger."""
    dropped = ", ".join(f"{cause} {count:,}" for cause, count in nf.items() if count and cause not in ("received", "forwarded"))
    found = []
    for party, own, other in (("inside", INSIDE, OUTSIDE), ("outside", OUTSIDE, INSIDE)):
        sent, arrived = answers[own]["sent"]["sent"], answers[other]["arrived"]["received"]
        if arrived < least_ratio * sent:
            found.append(f"of {sent:,} packets from {party} {arrived:,} arrived (NF processes dropped: {dropped or 'none'}): "
                         "does the file fit the function? Setting delivered_least_ratio=0 measures it all the same")  # fmt: skip
    return found


def virtual_address(functions: Sequence[NetworkFunction], given: Mapping[str, Mapping[str, Any]]) -> int | None:
    """Return the virtual address of a load balancer among the functions. given: their settings by function and name."""
    for function in functions:
        if VIRTUAL in function.settings:
            return int(IPv4Address(given.get(function.name, {}).get(VIRTUAL, function.settings[VIRTUAL][1])))
    return None


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
