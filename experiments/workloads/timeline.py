"""What happened when, within one step: arrivals and latencies by the millisecond, the longest silence, flows that broke.

The sink keeps it, if a step asks for it. Some packets are *watched*: those of partitions that something is about to happen to.
Latencies and the silence of all together are theirs alone; a host's death would vanish in the traffic of the others.

    bin          0      1      2      3     ...     91     92
    received    20     20     13     10             10     22      all packets
    watched     10     10      3      0              0     12      those of the dead host's flows
                              |<--- longest silence ---->|

A flow is a slot of the generator (`traffic.py`); its source is the address and port the sink sees, which a NAT that kept its
state does not change. So that holds without new flows in place of old ones, and for up to 65,536 flows.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from datastore.base.errors import NearstateError
from datastore.base.partitioning import PARTITIONS
from datastore.compiled import inline, jit
from datastore.compiled.memory import leading_zeros

SLOTS = 1 << 16
MOST_BINS = 20_000
"""20 s of milliseconds: 13 MB of counters."""
PER_OCTAVE_BITS = 3
LOWEST_BITS, OCTAVES = 10, 20
BUCKETS = OCTAVES << PER_OCTAVE_BITS
"""Of a bin's latencies: 8 an octave, from 1 us to 1 s, so a quantile is at most an eighth too high."""

# words of TimeLine.control
BIN_NS, ORIGIN_NS, LAST_NS, GAP_NS, GAP_END_NS = range(5)
# columns of TimeLine.bins
RECEIVED, WATCHED, HIGHEST = range(3)
# columns of TimeLine.flows
SOURCE, FIRST, LAST, GAP, GAP_END, CHANGES, PACKETS = range(7)


class TimeLine(NamedTuple):
    """control: int64[8], BIN_NS 0 is off. bins: int64[n, 3]. latencies: int32[n, BUCKETS], of the watched. watched: uint8 by
    partition. flows: int64 by slot: source as seen (address << 16 | port), first and last arrival, longest gap and its end
    (CLOCK_MONOTONIC), changes of the source, packets."""

    control: np.ndarray
    bins: np.ndarray
    latencies: np.ndarray
    watched: np.ndarray
    flows: np.ndarray


def off() -> TimeLine:
    """Return a time line that is not kept."""
    return TimeLine(np.zeros(8, np.int64), np.zeros((1, 3), np.int64), np.zeros((1, 1), np.int32), np.zeros(1, np.uint8),
                    np.zeros((1, 7), np.int64))  # fmt: skip


def make_time_line(wanted: Mapping[str, Any] | None, origin_ns: int) -> TimeLine:
    """Return an empty time line from `origin_ns` on, for what a step asks for (None: nothing).

    wanted: {"bin_us": width, "seconds": length, "watch": partitions (absent: all)}. Raises NearstateError for more than
    MOST_BINS bins, and for a partition that does not exist.
    """
    if not wanted:
        return off()
    bin_ns = int(wanted["bin_us"] * 1000)
    bins = int(wanted["seconds"] * 1e9) // max(bin_ns, 1) + 1
    if bin_ns < 1 or bins > MOST_BINS:
        raise NearstateError(f"time line of {wanted['seconds']:g} s in bins of {wanted['bin_us']:g} us: at most {MOST_BINS} bins")
    line = TimeLine(np.zeros(8, np.int64), np.zeros((bins, 3), np.int64), np.zeros((bins, BUCKETS), np.int32),
                    np.zeros(PARTITIONS, np.uint8), np.zeros((SLOTS, 7), np.int64))  # fmt: skip
    for partition in wanted.get("watch", range(PARTITIONS)):
        if not 0 <= partition < PARTITIONS:
            raise NearstateError(f"time line: partition {partition} is not one of 0 to {PARTITIONS - 1}")
        line.watched[partition] = 1
    line.control[BIN_NS], line.control[ORIGIN_NS] = bin_ns, origin_ns
    return line


@inline
def bucket(latency_ns: int) -> Any:
    """Return the number of a latency's bucket; below 1 us is the first, above 1 s the last."""
    value = np.uint64(max(np.int64(latency_ns), np.int64(1) << LOWEST_BITS))
    octave = np.int64(63) - np.int64(leading_zeros(value))
    part = np.int64(value >> np.uint64(octave - PER_OCTAVE_BITS)) & ((1 << PER_OCTAVE_BITS) - 1)
    return min((octave - LOWEST_BITS) << PER_OCTAVE_BITS | part, BUCKETS - 1)


@jit
def note(line: TimeLine, slot: int, source: int, latency_ns: int, now: int) -> None:
    """Note the arrival of a packet of flow `slot`, from `source`, at time `now`. What is after the last bin is counted there."""
    control, flow = line.control, line.flows[slot]
    at = min(max((now - control[ORIGIN_NS]) // control[BIN_NS], 0), line.bins.shape[0] - 1)
    line.bins[at, RECEIVED] += 1
    if flow[FIRST] == 0:
        flow[FIRST], flow[SOURCE] = now, source
    else:
        if source != flow[SOURCE]:
            flow[SOURCE] = source
            flow[CHANGES] += 1
        if now - flow[LAST] > flow[GAP]:
            flow[GAP], flow[GAP_END] = now - flow[LAST], now
    flow[LAST] = now
    flow[PACKETS] += 1
    if not line.watched[slot & (PARTITIONS - 1)]:
        return
    if control[LAST_NS] and now - control[LAST_NS] > control[GAP_NS]:
        control[GAP_NS], control[GAP_END_NS] = now - control[LAST_NS], now
    control[LAST_NS] = now
    line.bins[at, WATCHED] += 1
    line.bins[at, HIGHEST] = max(line.bins[at, HIGHEST], latency_ns)
    line.latencies[at, bucket(latency_ns)] += 1


def quantiles_us(latencies: np.ndarray, fraction: float) -> np.ndarray:
    """Return a quantile of each bin's latencies, the upper end of its bucket, float64[n] in us; 0 for an empty bin."""
    counted = np.cumsum(latencies, axis=1)
    rank = np.ceil(fraction * counted[:, -1] - 1e-9)
    at = (counted < rank[:, None]).sum(axis=1).clip(max=BUCKETS - 1)
    octave, part = at >> PER_OCTAVE_BITS, at & ((1 << PER_OCTAVE_BITS) - 1)
    upper = ((1 << PER_OCTAVE_BITS) + part + 1) << (octave + LOWEST_BITS - PER_OCTAVE_BITS)
    return np.where(counted[:, -1] > 0, upper / 1000.0, 0.0)


def report(line: TimeLine) -> dict[str, Any]:
    """Return a time line as a message; `Told.of` reads it."""
    seen = np.flatnonzero(line.flows[:, FIRST])
    p50, p99 = (quantiles_us(line.latencies, fraction) for fraction in (0.5, 0.99))
    numbers = {"bins": line.bins, "p50": (p50 * 1000).astype(np.int64), "p99": (p99 * 1000).astype(np.int64), "slots": seen,
               "flows": line.flows[seen], "watched": line.watched.astype(np.int64)}  # fmt: skip
    return {"control": line.control.tolist(), **{name: _packed(array) for name, array in numbers.items()}}


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array, np.int64).tobytes(), 1)).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.int64)


def packed(start_ms: float, bin_ms: float, columns: Mapping[str, list[Any]]) -> str:
    """Return columns, an element a bin, as a point's "time_lines" has them (docs/results.md)."""
    content = {"start_ms": start_ms, "bin_ms": bin_ms, **columns}
    return base64.b64encode(zlib.compress(json.dumps(content).encode())).decode()


AFTERMATH_NS = 300_000_000
"""Within this time of a loss a silence is of its making."""
HICCUP_NS = 50_000_000
"""A later one is, too, if it is as long as this."""


@dataclass(frozen=True)
class Told:
    """A time line as the sink told it. bin_ns, origin_ns and all times in ns of CLOCK_MONOTONIC; arrays int64, by bin: received,
    watched, highest_ns, p50_ns, p99_ns; by flow seen: slots, flows (columns as in `TimeLine`). silence: the longest gap of all
    watched packets together, (begin, end). last_ns: the last of them."""

    bin_ns: int
    origin_ns: int
    silence: tuple[int, int]
    last_ns: int
    received: np.ndarray
    watched: np.ndarray
    highest_ns: np.ndarray
    p50_ns: np.ndarray
    p99_ns: np.ndarray
    slots: np.ndarray
    flows: np.ndarray
    partitions: np.ndarray

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Told:
        """Return what a message of `report` says."""
        control, bins = message["control"], _unpacked(message["bins"]).reshape(-1, 3)
        silence = (control[GAP_END_NS] - control[GAP_NS], control[GAP_END_NS])
        flows = _unpacked(message["flows"]).reshape(-1, 7)
        return cls(control[BIN_NS], control[ORIGIN_NS], silence, control[LAST_NS],
                   bins[:, RECEIVED], bins[:, WATCHED], bins[:, HIGHEST], _unpacked(message["p50"]), _unpacked(message["p99"]),
                   _unpacked(message["slots"]), flows, np.flatnonzero(_unpacked(message["watched"])))  # fmt: skip

    def flows_watched(self) -> np.ndarray:
        """Return the rows of the watched flows."""
        rows: np.ndarray = self.flows[np.isin(self.slots & (PARTITIONS - 1), self.partitions)]
        return rows

    def outage(self, until_ns: int) -> tuple[int, int, bool]:
        """Return begin and end of the longest time in which nothing watched arrived, and whether an arrival ended it: at the end
        of the load, `until_ns`, it counts as not ended."""
        begin, end = self.silence
        if until_ns - self.last_ns > end - begin:
            return self.last_ns, until_ns, False
        return begin, end, True

    def outage_after(self, lost_ns: int, until_ns: int) -> tuple[int, int, bool]:
        """Return the outage that a loss at `lost_ns` made, as `outage` does.

        A loss may silence packets for less than a process of the box waits for a core now and then. So where the longest silence
        is before the loss, or is short and begins long after it, the longest one within AFTERMATH_NS is meant, to a bin.
        """
        begin, end, ended = self.outage(until_ns)
        is_hiccup = begin - lost_ns > AFTERMATH_NS and end - begin < HICCUP_NS
        if not ended or not (end <= lost_ns or is_hiccup):
            return begin, end, ended
        first, last = self.bin_of(lost_ns), self.bin_of(min(lost_ns + AFTERMATH_NS, until_ns))
        arrived = np.flatnonzero(np.concatenate(([1], self.watched[first:last], [1]))) - 1  # in bins from the loss on
        longest = int(np.diff(arrived).argmax())
        begin, end = int(arrived[longest]) + 1, int(arrived[longest + 1])
        return lost_ns + begin * self.bin_ns, lost_ns + end * self.bin_ns, True

    def broken(self, lost_ns: int, until_ns: int) -> tuple[int, int]:
        """Return how many watched flows were seen before `lost_ns`, and how many of these broke: came from another source later,
        or were not seen again after the outage. A flow must send about 20 packets after it for that to be no chance."""
        _, end, _ = self.outage_after(lost_ns, until_ns)
        known = self.flows_watched()
        known = known[known[:, FIRST] < lost_ns]
        gone = known[:, LAST] < max(end, lost_ns)
        return len(known), int((gone | (known[:, CHANGES] > 0)).sum())

    def restored_ns(self, lost_ns: int, until_ns: int, share: float = 0.9, window: int = 10) -> int | None:
        """Return when watched packets came again at `share` of their rate before `lost_ns`, over `window` bins; None: never."""
        first, last = self.bin_of(lost_ns), self.bin_of(until_ns)
        at_rest = self.watched[: max(first, 0)]
        rate = at_rest[np.flatnonzero(at_rest)[0] :].mean() if at_rest.any() else np.inf
        sums = np.convolve(self.watched[first:last], np.ones(window), "valid")
        back = np.flatnonzero(sums >= share * rate * window)
        return int(self.origin_ns + (first + back[0]) * self.bin_ns) if len(back) else None

    def bin_of(self, when_ns: int) -> int:
        """Return the number of the bin that a time is in; negative before the first."""
        return (when_ns - self.origin_ns) // self.bin_ns

    def rate_kpps(self, begin_ns: int, end_ns: int) -> float:
        """Return what arrived between two times, watched or not, in kpps; 0 outside the bins."""
        first, last = self.bin_of(begin_ns), self.bin_of(end_ns)
        bins = self.received[max(first, 0) : max(last, first + 1)]
        return float(bins.mean() / (self.bin_ns / 1e6)) if len(bins) else 0.0

    def highest_within_ns(self, begin_ns: int, end_ns: int) -> int:
        """Return the highest latency, in ns, of watched packets that arrived in the bins from one time to another; 0 for none."""
        first, last = self.bin_of(begin_ns), self.bin_of(end_ns)
        return int(self.highest_ns[max(first, 0) : last + 1].max(initial=0))

    def encode(self, zero_ns: int, from_ms: float, to_ms: float) -> str:
        """Return the bins between two times as a point's "time_lines" has them (docs/results.md); times count from `zero_ns`."""
        starts_ms = (self.origin_ns - zero_ns + np.arange(len(self.received)) * self.bin_ns) / 1e6
        shown = (starts_ms >= from_ms) & (starts_ms < to_ms)
        latencies = {f"{name}_us": getattr(self, f"{name}_ns") // 1000 for name in ("p50", "p99", "highest")}
        columns = {"received": self.received, "watched": self.watched, **latencies}
        start_ms = float(starts_ms[shown][0]) if shown.any() else 0.0
        return packed(start_ms, self.bin_ns / 1e6, {name: column[shown].tolist() for name, column in columns.items()})


def warm() -> None:
    """Compile the noting of an arrival."""
    note(make_time_line({"bin_us": 1000, "seconds": 0}, 1), 0, 0, 0, 1)
