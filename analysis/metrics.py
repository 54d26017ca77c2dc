"""What is each metric's unit, and which way is it better? The one table of all that procedures measure.

A procedure's new metric gets an entry here; a test finds the one that has none. A metric of a procedure of your own needs none:
its unit is the end of its name, and it is ranked where that end says which way (rates up; times, sizes and CPU down).
"""

from __future__ import annotations

from dataclasses import dataclass

UNITS = {
    "ns": "ns",
    "us": "us",
    "ms": "ms",
    "s": "s",
    "kpps": "kpps",
    "mpps": "Mpps",
    "kops": "kops",
    "gbps": "Gbit/s",
    "mbps": "Mbit/s",
    "bytes": "B",
    "mbytes": "MB",
    "ratio": "ratio",
    "percent": "%",
    "cores": "cores",
}
"""By the end of a name; a name without one of these is a count."""
HIGHER, LOWER, NEITHER = "higher", "lower", ""
"""NEITHER: what describes a measurement, as the load that was sent does, and makes no placement better."""
BY_UNIT = {"kpps": HIGHER, "Mpps": HIGHER, "kops": HIGHER, "Gbit/s": HIGHER, "Mbit/s": HIGHER,
           "ns": LOWER, "us": LOWER, "ms": LOWER, "s": LOWER, "B": LOWER, "MB": LOWER, "cores": LOWER}  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """unit: as in UNITS. better: HIGHER, LOWER or NEITHER."""

    unit: str
    better: str


_NAMES = {
    HIGHER: """
        delivered_kpps lossless_kpps lossless_kops opened_kops operations_kops requests_kops goodput_mbps
        goodput_before_kpps goodput_alone_kpps goodput_during_kpps goodput_after_kpps
        established success_ratio recovered_ratio""",
    LOWER: """
        p50_us p99_us p999_us mean_us max_us jitter_us
        lost loss_ratio duplicated reordered flow_reordered impatient retransmitted failed failed_ratio
        nf_cpu_us store_cpu_us switch_cpu_us system_cpu_us nf_per_connection_us system_per_connection_us store_cores
        nf_rss_mbytes store_rss_mbytes table_mbytes table_payload_ratio storage_bytes
        packet_ns passthrough_ns state_ns first_packet_ns dependent_access_ns independent_access_ns
        outage_ms silence_ms detection_ms steered_ms restored_ms recovery_ms healed_s rejoin_ms refill_ms
        out_ms in_ms out_highest_ms in_highest_ms packets_lost packets_delayed foreground_cost_ratio
        connections_broken broken_ratio records_lost records_differ updates_lost false_failovers""",
    NEITHER: """
        sent_kpps sent_kops background_kpps resolution_kpps resolution_kops storage_mbps
        attempts packets connections flows flows_moved records sources served_elsewhere_ratio""",
}


def _unit_by_name(name: str) -> str:
    return UNITS.get(name.rpartition("_")[2], "count") if "_" in name else "count"


METRICS = {name: Metric(_unit_by_name(name), better) for better, names in _NAMES.items() for name in names.split()}


def unit(name: str) -> str:
    """Return a metric's unit."""
    return METRICS[name].unit if name in METRICS else _unit_by_name(name)


def better(name: str) -> str:
    """Return which way a metric is better: HIGHER, LOWER or NEITHER; one that is in no table by its unit, a count or a ratio
    neither."""
    return METRICS[name].better if name in METRICS else BY_UNIT.get(_unit_by_name(name), NEITHER)
