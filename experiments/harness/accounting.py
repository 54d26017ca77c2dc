"""Where the packets of one step went and what they cost: counters before and after become one point of a trial.

The path's ledger: what was sent either arrived or has a place in

    nf          causes of all NF processes (their own ledgers balance, or the point is invalid)
    nf_kernel   frames the kernel dropped in front of an NF: no empty frame, receive ring full
    sink_kernel the same in front of the sink
    devices     frames a network device of a host refused to send
    switch      drops by port
    unaccounted the rest
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from nfs.dataplane.ledger import imbalance

SENT_LEAST = 0.99
"""Share of its schedule's rate that the generator must have reached for the load to count as offered."""
LATENESS_LIMIT_US = 500.0
"""How late a generator may be at the 99th percentile; also how late a schedule's last packet may always leave: of a schedule of a
millisecond, a hundredth is less than any sleep takes."""


def since(now: Any, then: Any) -> Any:
    """Return the growth of counters, nested in dictionaries alike; what was not there before started at zero, text stays."""
    if isinstance(now, Mapping):
        return {key: since(value, (then or {}).get(key)) for key, value in now.items()}
    return now if isinstance(now, str) else now - (then or 0)


def total(counters: Any) -> int:
    """Return the sum of all counters in nested dictionaries."""
    return sum(total(value) for value in counters.values()) if isinstance(counters, Mapping) else counters


def without_zeros(counters: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested counters without those that are zero."""
    kept = {key: without_zeros(value) if isinstance(value, Mapping) else value for key, value in counters.items()}
    return {key: value for key, value in kept.items() if value}


def instance_ledger(functions: Mapping[str, Any]) -> dict[str, int]:
    """Return the causes of all NF processes together, from their statistics."""
    nf = dict.fromkeys(("received", "forwarded"), 0)
    for statistics in functions.values():
        for cause, count in statistics["ledger"].items():
            nf[cause] = nf.get(cause, 0) + count
    return nf


def kernel_drops(functions: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Return what the kernel dropped in front of all NF processes by reason, and what it refused to send by host."""
    kernel: dict[str, int] = {}
    devices: dict[str, int] = {}
    for name, statistics in functions.items():
        for counts in statistics["kernel"].values():
            for reason, count in counts.items():
                kernel[reason] = kernel.get(reason, 0) + count
        devices[name] = sum(device["sent"] for device in statistics["devices"].values()) + statistics["refused_by_kernel"]
    return kernel, devices


def path_ledger(sent: Mapping[str, Any], arrived: Mapping[str, Any], growth: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the step's packets went; `growth`: the counters' growth over the step."""
    nf = instance_ledger(growth["functions"])
    kernel, devices = kernel_drops(growth["functions"])
    devices["generator"] = sent["devices"]["sent"]
    dropped = {cause: count for cause, count in nf.items() if cause not in ("received", "forwarded")}
    places = {"nf_kernel": kernel, "sink_kernel": arrived["kernel"], "devices": devices, "switch": growth["switch_drops"]}
    lost = sent["sent"] - arrived["received"]
    unaccounted = lost - total(dropped) - total(places)
    return {"sent": sent["sent"], "received": arrived["received"], "lost": lost, "nf": nf, **without_zeros(places),
            "foreign": arrived["foreign"], "unaccounted": unaccounted}  # fmt: skip


def imbalances(functions: Mapping[str, Any]) -> list[str]:
    """Return a reason for every NF process whose ledger does not balance; `functions`: their statistics."""
    found = []
    for name, statistics in functions.items():
        missing = imbalance(statistics["ledger"])
        if missing or statistics["missing_frames"]:
            found.append(f"ledger of {name} does not balance: {missing} packets, {statistics['missing_frames']} frames")
    return found


def doubts(offered: float, lateness_limit_us: float, sent: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return why a step cannot be believed; empty when it can.

    offered: kpps, 0 for "as fast as the path takes it". sent: `planned` packets were to leave in `scheduled_s`, as drawn; `sent`
    of them left in `elapsed_s`.
    """
    found = imbalances(after["functions"])
    if offered and is_behind(sent, lateness_limit_us):
        left, planned = (count / seconds / 1e3 for count, seconds in
                         ((sent["sent"], sent["elapsed_s"]), (sent["planned"], sent["scheduled_s"])))  # fmt: skip
        found.append(f"generator sent {left:.1f} of {planned:.4g} kpps: the machine or the path took no more")
    lateness_us = sent["lateness"].get("p99_us", 0.0)
    if offered and lateness_limit_us and lateness_us > lateness_limit_us:
        found.append(f"generator was late: p99 {lateness_us:.0f} us, at most {lateness_limit_us:.0f} us")
    return found


def is_behind(sent: Mapping[str, Any], lateness_limit_us: float) -> bool:
    """Tell whether a step's packets left at a lower rate than its own schedule has, which is drawn: not than the nominal one."""
    grace_s = (lateness_limit_us or LATENESS_LIMIT_US) / 1e6
    longest_s = max(sent["scheduled_s"] / SENT_LEAST, sent["scheduled_s"] + grace_s)
    return bool(sent["elapsed_s"] * sent["planned"] > longest_s * sent["sent"])


def metrics(sent: Mapping[str, Any], arrived: Mapping[str, Any], growth: Mapping[str, Any]) -> dict[str, float]:
    """Return a step's rates, losses, latencies and CPU time per packet.

    system_cpu_us counts all that the machine did, also what the kernel did in other processes' time: the only CPU figure
    that a peer inside the kernel has too. It is counted in ticks of 10 ms; the processes' own figures are exact.
    storage_bytes: what hosts sent on the storage network, headers and control traffic included, per packet.
    """
    packets, received = max(1, sent["sent"]), arrived["received"]
    elapsed_s = max(sent["elapsed_s"], arrived["window_s"], 1e-9)
    cpu_s = {"nf_cpu_us": "nf_cpu_s", "store_cpu_us": "store_cpu_s", "switch_cpu_us": "switch_cpu_s", "system_cpu_us": "busy_s"}
    return {
        **arrived["latency"],
        "sent_kpps": packets / sent["elapsed_s"] / 1e3,
        "delivered_kpps": received / elapsed_s / 1e3,
        "lost": sent["sent"] - received,
        "loss_ratio": max(0.0, 1 - received / packets),
        "duplicated": arrived["duplicated"],
        "reordered": arrived["reordered"],
        "flow_reordered": arrived["flow_reordered"],
        **{name: growth[key] * 1e6 / packets for name, key in cpu_s.items() if key in growth},
        **({"storage_bytes": growth["storage_bytes"] / packets} if "storage_bytes" in growth else {}),
    }


def fidelity(sent: Mapping[str, Any], growth: Mapping[str, Any]) -> dict[str, Any]:
    """Return how well the step was done: the generator's lateness, how busy the machine was."""
    return {"generator_lateness_p99_us": sent["lateness"].get("p99_us"), "generator_blocked": sent["blocked"],
            "cpu_saturation": saturation(growth)}  # fmt: skip


def saturation(growth: Mapping[str, Any]) -> float:
    """Return the busy share of the machine's CPUs over a growth of counters."""
    return float(growth["busy_s"] / max(1e-9, growth["now_s"]) / (os.cpu_count() or 1))
