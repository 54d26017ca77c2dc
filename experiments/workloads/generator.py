"""The open-loop generator: sends each packet at its intended time, or late and says how late; nothing slows its clock.

Every packet carries, in its payload: a 16-bit step number and its 48-bit sequence number, its intended send time, and its
flow's slot. The sink measures latency from the *intended* time, so a stalled system cannot hide behind its own stall.
"""

from __future__ import annotations

import ctypes as C
import time
from typing import Any, NamedTuple

import numpy as np

from datastore.compiled import inline, jit
from datastore.compiled.histogram import make_counts, record_ns, summary_us
from datastore.compiled.libc import doze, now_ns, sched_yield
from datastore.compiled.memory import copy, put_network16, put_network32, store16, store64
from experiments.workloads.traffic import (
    CHOICES,
    CLIENT_NETWORK,
    PORTS_PER_SERVER_PORT,
    Tables,
    Traffic,
    make_tables,
    packets_in,
    scheduled_s,
    template,
)
from nfs.dataplane.frames import Frames, give_frame, make_frames, take_frame
from nfs.dataplane.ledger import device_drops
from nfs.dataplane.opening import open_port
from nfs.dataplane.port import BURST, TX_REFUSED, OpenPort, Port, closed_port, reclaim, tx_flush, tx_push, unsent

STAMP_AT = 42
STAMP_BYTES = 18
# words of Source.control
STEP, SENT, BLOCKED, CURSOR, NEXT_FLOW, CLIENT_PORTS = range(6)
PR_SET_TIMERSLACK = 29
DENSE_GAP_NS, NAP_NS = 20_000.0, 20_000
"""Above 50 kpps the generator naps for 20 us between bursts instead of watching the clock: its core is needed by what is
measured. That costs latency, which is why latencies are compared at loads below."""
LATEST = 1.5
"""A step ends after this many times its length, whether or not all its packets have gone."""
SLEEP_MARGIN_NS = 60_000
"""A sleep ends up to this late on a busy virtual machine (measured); closer sends are waited for awake."""


class Source(NamedTuple):
    """State of one generator: the workload's tables, the flow number of each slot, the frame template, counters."""

    tables: Tables
    flows: np.ndarray
    template: np.ndarray
    control: np.ndarray
    lateness: np.ndarray
    scratch: np.ndarray
    pollfds: np.ndarray


def make_source(traffic: Traffic, source_mac: str, next_hop_mac: str, server: str) -> Source:
    """Return a generator's state at the start of the workload."""
    control = np.zeros(8, np.int64)
    control[NEXT_FLOW], control[CLIENT_PORTS] = traffic.flows, traffic.client_ports
    return Source(make_tables(traffic), np.arange(traffic.flows, dtype=np.int64), template(source_mac, next_hop_mac, server),
                  control, make_counts(), np.zeros(8, np.int64), np.zeros(2, np.int64))  # fmt: skip


@inline
def flow_ends(flow: int, client_ports: int = PORTS_PER_SERVER_PORT) -> Any:
    """Return client address, client port and server port of flow number `flow`, as `traffic.flow_tuple` does."""
    client = np.int64(CLIENT_NETWORK) + (np.int64(np.uint64(flow) * np.uint64(2_654_435_761) >> np.uint64(24)) & 0xFF)
    return client, 1024 + 2 * (flow % client_ports), 2000 + flow // client_ports % 60_000


@jit
def write_frame(source: Source, memory: np.ndarray, at: int, length: int, slot: int, sequence: int, intended_ns: int) -> None:
    """Write the packet of flow slot `slot` at byte `at`: headers, IP checksum (RFC 1071), stamp; the rest stays as it is."""
    client, client_port, server_port = flow_ends(source.flows[slot], source.control[CLIENT_PORTS])
    copy(memory, at, source.template, 0, STAMP_AT)
    total = length - 14
    put_network16(memory, at + 16, total)
    put_network32(memory, at + 26, client)
    put_network16(memory, at + 34, client_port)
    put_network16(memory, at + 36, server_port)
    put_network16(memory, at + 38, total - 20)
    check = np.int64(0)
    for i in range(10):
        check += (np.int64(memory[at + 14 + 2 * i]) << 8) + np.int64(memory[at + 15 + 2 * i])
    check = (check & 0xFFFF) + (check >> 16)
    check = (check & 0xFFFF) + (check >> 16)
    put_network16(memory, at + 24, ~check & 0xFFFF)
    store64(memory, at + STAMP_AT, np.uint64(source.control[STEP]) << np.uint64(48) | np.uint64(sequence))
    store64(memory, at + STAMP_AT + 8, np.uint64(intended_ns))
    store16(memory, at + STAMP_AT + 16, slot & 0xFFFF)


@jit
def generate(source: Source, port: Port, frames: Frames, start_ns: int, first_intended: float, total: int, gap_ns: float,
             until_ns: int) -> float:  # fmt: skip
    """Send packets until `total` have gone or the clock passes `until_ns`; returns the next intended time, in ns.

    The first one is intended for `first_intended` ns after `start_ns`; the mean gap is `gap_ns`.
    """
    control, tables = source.control, source.tables
    intended = first_intended
    now = now_ns(source.scratch)
    while control[SENT] < total and now < until_ns:
        reclaim(port, frames)
        now = now_ns(source.scratch)
        burst = 0
        while burst < BURST and control[SENT] < total and start_ns + intended <= now:
            frame = take_frame(frames)
            if frame < 0:
                control[BLOCKED] += 1
                break
            at = control[CURSOR] & (CHOICES - 1)
            slot = tables.slots[at]
            if tables.new[at]:
                source.flows[slot] = control[NEXT_FLOW]
                control[NEXT_FLOW] += 1
            due = start_ns + np.int64(intended)
            write_frame(source, frames.memory, frame, tables.lengths[at], slot, control[SENT], due)
            if not tx_push(port, frames, frame, tables.lengths[at]):
                give_frame(frames, frame)
                control[BLOCKED] += 1
                break
            record_ns(source.lateness, now - due)
            intended += gap_ns * tables.gaps[at]
            control[CURSOR] += 1
            control[SENT] += 1
            burst += 1
        tx_flush(port, frames)
        if burst == 0:
            rest = start_ns + np.int64(intended) - now
            if gap_ns < DENSE_GAP_NS:
                doze(source.pollfds, NAP_NS, source.scratch)
            elif rest > SLEEP_MARGIN_NS:
                doze(source.pollfds, min(rest - SLEEP_MARGIN_NS, 10_000_000), source.scratch)
            else:
                sched_yield()
    return intended


def main(config: dict[str, Any], control: Any) -> None:
    """Process target: {"interface", "next_hop_mac", "source_mac", "server", "traffic": {...}, "port_kind"}.

    Answers {"step": n, "offered_kpps": x, "seconds": s} with what was sent and how late; ends at {"stop": true}.
    """
    C.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)  # sleeps end when they should
    frames = make_frames(8192)
    opened = open_port(config["interface"], frames, config.get("port_kind", "auto"))
    source = make_source(Traffic.of(**config["traffic"]), config["source_mac"], config["next_hop_mac"], config["server"])
    control.send({"ready": True, "port_kind": opened.kind})
    while (message := control.receive(None)) is not None and not message.get("stop"):
        control.send(_run_step(source, opened, frames, message["step"], message["offered_kpps"], message["seconds"]))


def _run_step(source: Source, opened: OpenPort, frames: Frames, step: int, offered_kpps: float, seconds: float) -> dict[str, Any]:
    """Send one step; a load of 0 kpps means as fast as the path takes it: every packet is intended for when it leaves."""
    port, control = opened.port, source.control
    control[STEP], control[SENT], control[BLOCKED] = step, 0, 0
    source.lateness[:] = 0
    refused, drops = int(port.control[TX_REFUSED]), sent_drops()
    start_ns = time.monotonic_ns() + 1_000_000
    if offered_kpps:
        planned = packets_in(offered_kpps, seconds)
        schedule_s = scheduled_s(source.tables, int(control[CURSOR]), planned, offered_kpps)
        until_ns = start_ns + int(max(seconds, schedule_s) * LATEST * 1e9)
        generate(source, port, frames, start_ns, 0.0, planned, 1e6 / offered_kpps, until_ns)
    else:
        planned, schedule_s, end_ns = 0, 0.0, start_ns + int(seconds * 1e9)
        while (now := time.monotonic_ns()) < end_ns:
            generate(source, port, frames, now, 0.0, int(control[SENT]) + 4096, 0.0, end_ns)
    elapsed_s = (time.monotonic_ns() - start_ns) / 1e9
    _empty_ring(port, frames)
    devices = {"sent": sent_drops() - drops + int(port.control[TX_REFUSED]) - refused}
    return {"step": step, "sent": int(control[SENT]), "planned": planned, "scheduled_s": schedule_s,
            "start_ns": start_ns, "elapsed_s": elapsed_s, "devices": devices, "blocked": int(control[BLOCKED]),
            "lateness": summary_us(source.lateness)}  # fmt: skip


def _empty_ring(port: Port, frames: Frames) -> None:
    """Let the kernel take what is still queued, for at most a tenth of a second, so that "sent" is what has left."""
    deadline = time.monotonic() + 0.1
    while unsent(port) and time.monotonic() < deadline:
        reclaim(port, frames)
        time.sleep(0.0005)


def sent_drops() -> int:
    """Return the frames that this network namespace's devices refused to send."""
    return sum(device["sent"] for device in device_drops().values())


def warm() -> None:
    """Compile the generator."""
    source = make_source(Traffic(flows=1), "02:00:00:00:00:01", "02:00:00:00:00:02", "10.128.0.1")
    generate(source, closed_port(), make_frames(1), 0, 0.0, 0, 1.0, 0)
