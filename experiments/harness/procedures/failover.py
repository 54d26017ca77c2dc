"""The loss of an NF host under load: for how long is nothing delivered, what is lost, what breaks?

One host of the steering is lost at once, with its processes and all it remembers (`Bench.lose_host`), in the middle of a load; or
only its NF process, its store process, or the link by which packets reach it.

      load |-------------------|lost.....noticed.....first packet.....90 % of the rate----------|
                               |<-------- outage --->|
                               |<- detection ->|<---> recovery
                               |<-------------- restored ------------>|

Who notices. A coordinator does so by its leases, gives the host's partitions to a survivor and has the switch follow; here one
only watches. Where none runs (state local, on a store host without replicas, in a peer) the procedure stands in for the
detector, with the same timing: a lease and the coordinator's margin after the last heartbeat before the loss, whose age is
drawn from the seed; two heartbeats for a link; at once where the kernel tells of a process' end. Then the peer's `take_over`,
then the switch is told. So no placement is faster for a better detector.

Synthetic flows are UDP, which every NAT takes up again: one that lost its state breaks those that it gives another port than
they had. Ports are kept where they are free, so the workload's clients share few of them (`client_ports`).

A kill ends a trial's network, so repeats are trials.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from datastore.base.errors import NearstateError
from datastore.coordination.heartbeats import Timing
from datastore.coordination.switchover import LINK_HEARTBEATS
from datastore.store.inspection import Record
from datastore.store.partitions import FlowKey
from experiments.harness.bench import COMMON_SETTINGS, Bench, sleep_until
from experiments.workloads import timeline

if TYPE_CHECKING:
    from experiments.harness.checks import Planned

SETTINGS = {**COMMON_SETTINGS, "victim": "nf1", "lost": "host", "offered_kpps": 20.0, "lost_at_s": 0.6, "seconds": 2.0,
            "bin_us": 1000.0, "shown_ms": (200.0, 800.0), "lateness_limit_us": 0.0}  # fmt: skip
PATIENCE_S = 1.0
"""How long a coordinator's decision is waited for: ten times what it should take."""
ASKED_EVERY_S = 0.004


def check(planned: Planned) -> None:
    """Check that what is to be lost is there, and that it is lost within the load."""
    given = planned.settings
    planned.need_moves(victim=given["victim"])
    planned.need_order("lost_at_s", "seconds")
    lost, victim = given["lost"], given["victim"]
    there = {"function": not planned.peer, "store": victim in planned.stores}
    if not there.get(lost, True):
        raise planned.refuse(f"lost={lost!r} of {victim} with placement={planned.trial.placement!r}: there is no {lost} "
                             "process that could be lost")  # fmt: skip


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return one point: outage and its parts, what was lost and what broke, and the time line around the loss.

    lost: what of the victim, "host", "function", "store" or "link". lost_at_s: when within the load of `seconds`. shown_ms: of
    the time line, how much before and after the loss is kept. The flows are few enough that each sends some 20 packets after the
    outage, or one may seem broken that is only slow.
    """
    settings = bench.settings
    victim, survivor = ends(bench)
    bench.start()
    bench.warm_up()
    steered = bench.network.steering()
    if bench.coordinator and bench.status()["steering"] != steered:
        raise NearstateError("before any loss: the coordinator believes in another steering than the switch has; its log is "
                             f"{bench.coordinator.log}")  # fmt: skip
    carried = [partition for partition, host in enumerate(steered) if host == victim]
    if not carried:  # a busy machine: it was not heard for a lease, and replaced
        raise NearstateError(f"before any loss: {victim} carries nothing; its place was taken while the trial began")
    known, counted = records_of(bench, carried), counts_of(bench, carried)
    began_ns = bench.offer(settings["offered_kpps"], settings["seconds"], {"bin_us": settings["bin_us"], "watch": carried})
    until_ns = began_ns + int(settings["seconds"] * 1e9)
    sleep_until(began_ns + int(settings["lost_at_s"] * 1e9))
    lost_ns = bench.lose(settings["lost"], victim)
    watch = _watched if bench.coordinator else _stand_in
    noticed_ns, steered_ns = watch(bench, victim, survivor, carried, lost_ns)
    point = bench.finish()
    line = bench.time_line()
    begin, end, ended = line.outage_after(lost_ns, until_ns)
    flows, broken = line.broken(lost_ns, until_ns)
    noticed_ns = min(noticed_ns, end)
    restored_ns = max(line.restored_ns(lost_ns, until_ns) or until_ns, end)
    point["sweep"] = {}
    point["metrics"] |= {
        "outage_ms": (end - lost_ns) / 1e6, "recovered_ratio": float(ended), "silence_ms": (end - begin) / 1e6,
        "detection_ms": (noticed_ns - lost_ns) / 1e6, "steered_ms": (steered_ns - lost_ns) / 1e6,
        "restored_ms": (restored_ns - lost_ns) / 1e6, "recovery_ms": (end - noticed_ns) / 1e6,
        "packets_lost": point["metrics"]["lost"], "flows": flows,
        "connections_broken": broken, "broken_ratio": broken / max(1, flows)}  # fmt: skip
    if not bench.is_peer:
        point["metrics"]["records_lost"] = len(known - records_of(bench, carried))
    if counted is not None:
        point["metrics"]["updates_lost"] = updates_lost(line.flows_watched(), counted, counts_of(bench, carried) or {})
    before_ms, after_ms = settings["shown_ms"]
    point["time_lines"] = {"delivered": line.encode(lost_ns, -before_ms, after_ms)}
    return [point]


def records_of(bench: Bench, partitions: list[int]) -> set[tuple[int, ...]]:
    """Return the keys of partitions' records that can be had: of the stores that rule them, or of the NF processes themselves."""
    if not bench.stores:
        kept = bench.function_statistics()
        return {(number, *name.encode()) for name, counts in kept.items() for number in range(counts["records"])}
    return {(record.low, record.high) for record in ruled(bench, partitions)}


def ruled(bench: Bench, partitions: list[int]) -> Iterator[Record]:
    """Yield the records of partitions, each of the store that rules it."""
    wanted, mapped = set(partitions), bench.map_of(bench.stages[0])
    rulers = [group["members"][:1] for group in bench.status()["map"]["groups"]] if bench.coordinator else \
        [group[:1] for group in mapped["replicas"]] if mapped else []  # fmt: skip
    for host in [host for host, store in bench.stores.items() if store.poll() is None]:
        for record in bench.records(host):
            if record.low & 0xFFFF in wanted and rulers[record.low & 0xFFFF] == [host]:
                yield record


def counts_of(bench: Bench, partitions: list[int]) -> dict[int, int] | None:
    """Return the packets that each client endpoint's records count (address << 16 | port), where the NF counts in a store."""
    if bench.trial.nf != "traffic_counter" or not bench.stores:
        return None
    counts: dict[int, int] = {}
    for record in ruled(bench, partitions):
        key = FlowKey.of_words(record.low, record.high)
        source = int(key.client) << 16 | key.client_port
        counts[source] = counts.get(source, 0) + int.from_bytes(record.value[:8], "little")
    return counts


def updates_lost(flows: np.ndarray, before: dict[int, int], after: dict[int, int]) -> int:
    """Return how many delivered packets, by flow, no record counts any more: state that left and was lost nevertheless.

    A packet that was counted and not delivered makes up for another one of its flow; there are hardly any.
    """
    return sum(max(0, int(flow[timeline.PACKETS]) - after.get(source, 0) + before.get(source, 0))
               for flow in flows for source in [int(flow[timeline.SOURCE])])  # fmt: skip


def ends(bench: Bench) -> tuple[str, str]:
    """Return the host that is lost and the one that takes its place. Raises NearstateError where there is none."""
    hosts, victim = [host.name for host in bench.nf_hosts], bench.settings["victim"]
    if victim not in hosts or len(hosts) < 2:
        raise NearstateError(f"failover of {victim!r} among {', '.join(hosts) or 'no NF hosts'}: "
                             "it must be one of at least 2")  # fmt: skip
    return victim, hosts[(hosts.index(victim) + 1) % len(hosts)]


def detection_ns(seed: int, timing: Timing | None = None, lost: str = "host") -> int:
    """Return how long after a loss a coordinator knows of it.

    Of a host when its lease is over, which began with the last heartbeat, up to one interval ago; of a link when it is down for
    long enough; of a process at once, since the kernel tells of its end.
    """
    if lost in ("function", "store"):
        return 0
    timing = timing or Timing()
    if lost == "link":
        return LINK_HEARTBEATS * timing.heartbeat_ns
    age_ns = random.Random(seed).uniform(0, timing.heartbeat_ns)
    return timing.lease_ns + timing.margin_ns - int(age_ns)


def _stand_in(bench: Bench, victim: str, survivor: str, carried: list[int], lost_ns: int) -> tuple[int, int]:
    """Notice the loss as a coordinator would, and act; returns when it was noticed, and when the switch had confirmed."""
    timing = Timing.of(bench.settings["lease_ms"] or None)
    sleep_until(lost_ns + detection_ns(bench.trial.seed, timing, bench.settings["lost"]))
    noticed_ns = time.monotonic_ns()
    if take_over := getattr(bench.peer, "take_over", None):
        take_over(victim, survivor)
    bench.network.steer(carried, survivor)
    return noticed_ns, time.monotonic_ns()


def _watched(bench: Bench, victim: str, survivor: str, carried: list[int], lost_ns: int) -> tuple[int, int]:
    """Watch a coordinator notice, and have the switch follow; returns when it gave the victim up, and when it steered away.

    The first it tells by its clock, which is that of all processes here; the second is known to a few milliseconds: it is asked
    seldom enough not to be kept from its work, and busy with the failover it may answer late. A loss that packets show to be
    mended was noticed by then.
    """
    noticed_ns, now_ns, deadline = 0, lost_ns, lost_ns + int(PATIENCE_S * 1e9)
    while now_ns < deadline:
        status, now_ns = bench.status(), time.monotonic_ns()
        told_ns = [each["at_ns"] for each in status["failovers"] if each["host"] == victim and each["at_ns"] >= lost_ns]
        noticed_ns = noticed_ns or min(told_ns, default=0)
        if all(status["steering"][partition] != victim for partition in carried):
            return noticed_ns or now_ns, now_ns
        time.sleep(ASKED_EVERY_S)
    return noticed_ns or now_ns, now_ns
