"""The sink: what arrived, how late, how often, in which order.

Latency runs from the intended send time in the packet to its arrival here, on one clock. Reordering is counted as
RFC 4737 defines it (a sequence number smaller than one already seen), over all packets and within each flow.
"""

from __future__ import annotations

import ctypes as C
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from datastore.compiled import jit
from datastore.compiled.histogram import encode, make_counts, record_ns, summary_us
from datastore.compiled.libc import POLLIN, doze, now_ns, poll, pollfd
from datastore.compiled.memory import load16, load64, network16, network32
from experiments.workloads import timeline
from experiments.workloads.generator import DENSE_GAP_NS, PR_SET_TIMERSLACK, STAMP_AT, STAMP_BYTES
from nfs.dataplane.frames import Frames, give_frame, make_frames
from nfs.dataplane.opening import open_port
from nfs.dataplane.port import BURST, FD, Port, closed_port, refill, rx_burst

# words of Sink.control
STEP, RECEIVED, DUPLICATED, REORDERED, FLOW_REORDERED, FOREIGN, HIGHEST, FIRST_NS, LAST_NS, BYTES, OUT_OF_RANGE = range(11)

NAP_NS = 100_000
"""How long the sink sleeps, at loads above 50 kpps, when it has taken all there was: to be woken by each burst costs what
is measured 5 to 8 us, a sleep of its own 15. Never before the ring is empty: 64 packets a nap would be a ceiling."""
SLICE_NS = 20_000_000
"""How long the compiled loop runs before Python looks at messages."""


class Sink(NamedTuple):
    """State of one sink. seen: uint64 bit map of sequence numbers; last: int64[65536], highest sequence number by flow slot;
    line: what happened when, if wanted."""

    control: np.ndarray
    seen: np.ndarray
    last: np.ndarray
    latency: np.ndarray
    addresses: np.ndarray
    lengths: np.ndarray
    scratch: np.ndarray
    pollfds: np.ndarray
    line: timeline.TimeLine


def make_sink(packets: int, step: int, time_line: Mapping[str, Any] | None = None) -> Sink:
    """Return a sink that expects up to `packets` packets of step number `step`, with a time line from now on if wanted
    (`timeline.make_time_line`)."""
    control = np.zeros(16, np.int64)
    control[STEP], control[HIGHEST] = step, -1
    return Sink(control, np.zeros(packets // 64 + 1, np.uint64), np.full(1 << 16, -1, np.int64), make_counts(),
                np.zeros(BURST, np.int64), np.zeros(BURST, np.int64), np.zeros(8, np.int64), np.zeros(2, np.int64),
                timeline.make_time_line(time_line, time.monotonic_ns()))  # fmt: skip


@jit
def take(sink: Sink, memory: np.ndarray, at: int, length: int, now: int) -> None:
    """Count the packet of `length` bytes at byte `at`, if it is one of the generator's of this step."""
    control = sink.control
    if length < STAMP_AT + STAMP_BYTES:
        control[FOREIGN] += 1
        return
    word = load64(memory, at + STAMP_AT)
    if np.int64(word >> np.uint64(48)) != control[STEP] or memory[at + 23] != 17:
        control[FOREIGN] += 1
        return
    sequence = np.int64(word & np.uint64(0xFFFFFFFFFFFF))
    if sequence >= sink.seen.size * 64:
        control[OUT_OF_RANGE] += 1
        return
    bit = np.uint64(1) << np.uint64(sequence & 63)
    if sink.seen[sequence >> 6] & bit:
        control[DUPLICATED] += 1
        return
    sink.seen[sequence >> 6] |= bit
    control[RECEIVED] += 1
    control[BYTES] += length
    if sequence < control[HIGHEST]:
        control[REORDERED] += 1
    else:
        control[HIGHEST] = sequence
    slot = np.int64(load16(memory, at + STAMP_AT + 16))
    if sequence < sink.last[slot]:
        control[FLOW_REORDERED] += 1
    else:
        sink.last[slot] = sequence
    latency_ns = now - np.int64(load64(memory, at + STAMP_AT + 8))
    record_ns(sink.latency, latency_ns)
    if sink.line.control[timeline.BIN_NS]:
        source = np.int64(network32(memory, at + 26)) << 16 | np.int64(network16(memory, at + 34))
        timeline.note(sink.line, slot, source, latency_ns, now)


@jit
def collect(sink: Sink, port: Port, frames: Frames, until_ns: int) -> None:
    """Take packets until the clock passes `until_ns`."""
    now = began = now_ns(sink.scratch)
    before = sink.control[RECEIVED]
    while now < until_ns:
        refill(port, frames)
        count = rx_burst(port, frames, sink.addresses, sink.lengths, BURST)
        now = now_ns(sink.scratch)
        if count == 0:
            sink.pollfds[0] = pollfd(port.control[FD], POLLIN)
            poll(sink.pollfds, 1, max(0, until_ns - now), sink.scratch)
            continue
        if sink.control[FIRST_NS] == 0:
            sink.control[FIRST_NS] = now
        sink.control[LAST_NS] = now
        for i in range(count):
            take(sink, frames.memory, sink.addresses[i], sink.lengths[i], now)
            give_frame(frames, sink.addresses[i])
        if count < BURST and now - began < (sink.control[RECEIVED] - before) * DENSE_GAP_NS:
            doze(sink.pollfds, NAP_NS, sink.scratch)


def main(config: dict[str, Any], control: Any) -> None:
    """Process target: {"interface", "port_kind"}. {"step": n, "packets": p} starts counting, {"collect": n} answers; with
    {"time_line": {...}} in the step, {"tell": n} answers with what happened when."""
    frames = make_frames(16384)
    opened = open_port(config["interface"], frames, config.get("port_kind", "auto"))
    C.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    sink, drops = make_sink(1, 0), opened.statistics()
    refill(opened.port, frames)
    control.send({"ready": True, "port_kind": opened.kind})
    while True:
        message = control.receive(0)
        if message is None:
            collect(sink, opened.port, frames, time.monotonic_ns() + SLICE_NS)
        elif message.get("stop"):
            return
        elif "collect" in message:
            now = opened.statistics()
            control.send(_counts(sink) | {"kernel": {reason: now[reason] - drops[reason] for reason in now}})
        elif "tell" in message:
            control.send(timeline.report(sink.line))
        else:
            sink = make_sink(int(message["packets"]), int(message["step"]), message.get("time_line"))
            drops = opened.statistics()
            control.send({"step": message["step"]})


def _counts(sink: Sink) -> dict[str, Any]:
    control = sink.control
    window_s = (int(control[LAST_NS]) - int(control[FIRST_NS])) / 1e9
    return {"step": int(control[STEP]), "received": int(control[RECEIVED]), "duplicated": int(control[DUPLICATED]),
            "reordered": int(control[REORDERED]), "flow_reordered": int(control[FLOW_REORDERED]),
            "foreign": int(control[FOREIGN]), "out_of_range": int(control[OUT_OF_RANGE]), "bytes": int(control[BYTES]),
            "window_s": window_s, "latency": summary_us(sink.latency), "histogram": encode(sink.latency)}  # fmt: skip


def warm() -> None:
    """Compile the sink."""
    collect(make_sink(1, 0), closed_port(), make_frames(1), 0)
