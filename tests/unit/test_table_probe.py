"""Does the probe of the table's size send every flow through the engine's own path, and does its floor touch all it says?"""

from __future__ import annotations

import numpy as np

from experiments.workloads import table_probe
from experiments.workloads.table_probe import CHUNK, LINE_WORDS, Bed


def counters(bed: Bed) -> dict[str, int]:
    """Return the packets counted by flow."""
    return {str(record.key): int(np.frombuffer(record.value, np.uint64)[0]) for record in bed.table.records()}


def test_every_packet_of_every_flow_is_counted_in_its_record() -> None:
    bed = Bed("traffic_counter", 640, 1024, 32)
    order = np.random.default_rng(1).permutation(640).astype(np.int64)
    for _ in range(3):
        assert bed.packet_ns(order) > 0
    bed.packet_ns(order[:128])
    found = counters(bed)
    assert len(found) == 640
    assert sorted(found.values()) == [3] * 512 + [4] * 128
    assert bed.lost == 0
    bed.table.verify()
    bed.close()


def test_a_table_too_small_is_told_as_lost_packets() -> None:
    bed = Bed("traffic_counter", 6400, 256, 32)
    bed.packet_ns(np.arange(6400, dtype=np.int64))
    assert bed.lost == 6400 - len(counters(bed)) > 0
    bed.close()


def test_what_is_measured_has_all_metrics_and_no_loss() -> None:
    answer = table_probe.measure("firewall", flows=300, capacity=1000, value_bytes=32, packets=600, passes=1, seed=1)
    assert answer["lost"] == 0
    metrics = answer["metrics"]
    assert metrics["state_ns"] == metrics["packet_ns"] - metrics["passthrough_ns"]
    assert all(metrics[name] > 0 for name in ("first_packet_ns", "dependent_access_ns", "independent_access_ns", "table_mbytes"))


def test_the_chase_and_the_gathering_read_the_lines_they_say() -> None:
    count = CHUNK + 1
    lines, scratch, times = np.zeros(count * LINE_WORDS, np.uint64), np.zeros(8, np.int64), np.zeros(1, np.int64)
    cycle = np.random.default_rng(2).permutation(count)
    lines[cycle * LINE_WORDS] = np.roll(cycle, -1).astype(np.uint64)
    at = int(np.flatnonzero(cycle == 0)[0])
    assert table_probe.chase(lines, 0, times, scratch) == cycle[at - 1], "one step short of the whole cycle"
    order = np.arange(CHUNK)
    table_probe.gather(lines, order, times, scratch)
    assert scratch[2] == sum(int(lines[line * LINE_WORDS]) for line in order)
    assert times[0] > 0
