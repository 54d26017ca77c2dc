"""How many TCP connections open per second? The two ends, in the terms of RFC 9693: an initiator and a responder.

    initiator                          device under test                          responder
    SYN  number n of the connection  ------------------------------------------>
                                     <------------------------------------------  SYN ACK
    ACK                              ------------------------------------------>  n has opened

Every connection has a 4-tuple never used before. Its number is its first sequence number, so the answer names it. SYNs leave
at their intended times, whatever became of those before (open loop); or, to saturate, as soon as fewer than a window of
connections is opening. What is not answered in time has failed: nothing is sent twice. Both ends answer in the frame that
came, turned around; checksums are complete (RFC 1071), since connection tracking verifies them.
"""

from __future__ import annotations

import ctypes as C
import ipaddress
import os
import struct
import time
from typing import Any, NamedTuple

import numpy as np

from datastore.compiled import inline, jit
from datastore.compiled.histogram import make_counts, record_ns, summary_us
from datastore.compiled.libc import POLLIN, doze, now_ns, poll, pollfd
from datastore.compiled.memory import copy, network16, network32, put_network16, put_network32
from experiments.workloads.generator import (
    DENSE_GAP_NS,
    LATEST,
    NAP_NS,
    PR_SET_TIMERSLACK,
    SLEEP_MARGIN_NS,
    flow_ends,
    sent_drops,
)
from experiments.workloads.sink import SLICE_NS
from experiments.workloads.traffic import packets_in
from nfs.dataplane.frames import Frames, give_frame, make_frames, take_frame
from nfs.dataplane.headers import ACK, RST, SYN, TCP
from nfs.dataplane.opening import open_port
from nfs.dataplane.port import BURST, FD, TX_REFUSED, Port, closed_port, reclaim, refill, rx_burst, tx_flush, tx_push
from topologies.emulation import system

FRAME_BYTES = 60
SEGMENT_BYTES = 54
"""Ethernet, IPv4 and TCP headers without options."""
TIMEOUT_NS = 50_000_000
OPENING = 1 << 20
"""Connections that may be opening at a time."""
# words of Initiator.control
(OPENED, ESTABLISHED, FAILED, BLOCKED, NEXT, OLDEST, WINDOW, UNEXPECTED) = range(8)
# words of Responder.control
(FIRST, SYNS, COMPLETED, REPEATED, FOREIGN, UNANSWERED, LAST_NS) = range(7)


class Initiator(NamedTuple):
    """State of the opening end. started: int64[OPENING], intended start by connection number, 0: not opening."""

    control: np.ndarray
    template: np.ndarray
    started: np.ndarray
    latency: np.ndarray
    lateness: np.ndarray
    addresses: np.ndarray
    lengths: np.ndarray
    scratch: np.ndarray
    pollfds: np.ndarray


class Responder(NamedTuple):
    """State of the answering end. seen: uint64 bit map of the connections that have opened, from number `control[FIRST]` on."""

    control: np.ndarray
    seen: np.ndarray
    addresses: np.ndarray
    lengths: np.ndarray
    scratch: np.ndarray
    pollfds: np.ndarray


def make_initiator(source_mac: str, next_hop_mac: str, server: str) -> Initiator:
    """Return the opening end before its first connection."""
    return Initiator(np.zeros(8, np.int64), syn_template(source_mac, next_hop_mac, server), np.zeros(OPENING, np.int64),
                     make_counts(), make_counts(), np.zeros(BURST, np.int64), np.zeros(BURST, np.int64),
                     np.zeros(8, np.int64), np.zeros(2, np.int64))  # fmt: skip


def make_responder(first: int, connections: int) -> Responder:
    """Return an answering end that expects up to `connections` connections, numbered from `first`."""
    control = np.zeros(8, np.int64)
    control[FIRST] = first
    return Responder(control, np.zeros(connections // 64 + 1, np.uint64), np.zeros(BURST, np.int64), np.zeros(BURST, np.int64),
                     np.zeros(8, np.int64), np.zeros(2, np.int64))  # fmt: skip


def syn_template(source_mac: str, next_hop_mac: str, server: str) -> np.ndarray:
    """Return a SYN's 60 bytes, uint8, with everything that varies zero; its IP checksum lacks the client's address."""
    ethernet = bytes.fromhex(next_hop_mac.replace(":", "") + source_mac.replace(":", "")) + b"\x08\x00"
    ip = struct.pack(">BBHHHBBHI4s", 0x45, 0, 40, 0, 0x4000, 64, TCP, 0, 0, ipaddress.IPv4Address(server).packed)
    total = sum(struct.unpack(">10H", ip))
    tcp = struct.pack(">HHIIBBHHH", 0, 0, 0, 0, 0x50, SYN, 0xFFFF, 0, 0)
    frame = ethernet + ip[:10] + struct.pack(">H", (total & 0xFFFF) + (total >> 16)) + ip[12:] + tcp
    return np.frombuffer(frame.ljust(FRAME_BYTES, b"\0"), np.uint8).copy()


@inline
def folded(total: int) -> Any:
    """Return the one's complement sum of 16-bit words, folded and complemented (RFC 1071)."""
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@jit
def seal_segment(memory: np.ndarray, at: int) -> None:
    """Write the TCP checksum of the 20-byte segment in the frame at byte `at`."""
    put_network16(memory, at + 50, 0)
    total = np.int64(TCP + 20)
    for i in range(14):  # both addresses, then the segment
        total += np.int64(network16(memory, at + 26 + 2 * i))
    put_network16(memory, at + 50, folded(total))


@jit
def write_syn(initiator: Initiator, memory: np.ndarray, at: int, number: int) -> None:
    """Write the SYN of connection `number` at byte `at`."""
    client, client_port, server_port = flow_ends(number)
    copy(memory, at, initiator.template, 0, FRAME_BYTES)
    put_network32(memory, at + 26, client)
    put_network16(memory, at + 24, folded(np.int64(network16(memory, at + 24)) + (client >> 16) + (client & 0xFFFF)))
    put_network16(memory, at + 34, client_port)
    put_network16(memory, at + 36, server_port)
    put_network32(memory, at + 38, number & 0xFFFFFFFF)
    seal_segment(memory, at)


@jit
def turn_around(memory: np.ndarray, at: int, sequence: int, acknowledgment: int, flags: int) -> None:
    """Make the segment at byte `at` its answer: ends swapped, numbers and flags set. The IP checksum stays right."""
    for i in range(6):
        byte = memory[at + i]
        memory[at + i] = memory[at + 6 + i]
        memory[at + 6 + i] = byte
    address, port = network32(memory, at + 26), network16(memory, at + 34)
    put_network32(memory, at + 26, network32(memory, at + 30))
    put_network32(memory, at + 30, address)
    put_network16(memory, at + 34, network16(memory, at + 36))
    put_network16(memory, at + 36, port)
    put_network32(memory, at + 38, sequence & 0xFFFFFFFF)
    put_network32(memory, at + 42, acknowledgment & 0xFFFFFFFF)
    memory[at + 46] = 0x50
    memory[at + 47] = flags
    seal_segment(memory, at)


@inline
def flags_of(memory: np.ndarray, at: int, length: int) -> Any:
    """Return the flags of a TCP segment over IPv4 without options, -1 for any other frame."""
    if length < SEGMENT_BYTES or network16(memory, at + 12) != 0x0800 or memory[at + 14] != 0x45 or memory[at + 23] != TCP:
        return np.int64(-1)
    return np.int64(memory[at + 47]) & (SYN | ACK | RST)


@jit
def take_answers(initiator: Initiator, port: Port, frames: Frames) -> int:
    """Acknowledge every SYN ACK of an opening connection; returns how many frames there were."""
    control, memory = initiator.control, frames.memory
    count = rx_burst(port, frames, initiator.addresses, initiator.lengths, BURST)
    now = now_ns(initiator.scratch)
    for i in range(count):
        at = initiator.addresses[i]
        number = np.int64(-1)
        if flags_of(memory, at, initiator.lengths[i]) == SYN | ACK:
            behind = (control[NEXT] - np.int64(network32(memory, at + 42)) + 1) & 0xFFFFFFFF
            number = control[NEXT] - behind if 0 < behind <= OPENING else number
        if number < 0 or initiator.started[number & (OPENING - 1)] == 0:
            control[UNEXPECTED] += 1
            give_frame(frames, at)
            continue
        record_ns(initiator.latency, now - initiator.started[number & (OPENING - 1)])
        initiator.started[number & (OPENING - 1)] = 0
        control[ESTABLISHED] += 1
        turn_around(memory, at, number + 1, np.int64(network32(memory, at + 38)) + 1, ACK)
        if not tx_push(port, frames, at, FRAME_BYTES):
            control[BLOCKED] += 1
            give_frame(frames, at)
    return count


@jit
def give_up(initiator: Initiator, now: int) -> None:
    """Count the connections that were not answered in time as failed."""
    control = initiator.control
    while control[OLDEST] < control[NEXT]:
        at = control[OLDEST] & (OPENING - 1)
        if initiator.started[at] != 0:
            if now - initiator.started[at] < TIMEOUT_NS:
                return
            initiator.started[at] = 0
            control[FAILED] += 1
        control[OLDEST] += 1


@inline
def opening(initiator: Initiator) -> Any:
    """Return how many connections are opening."""
    control = initiator.control
    return control[OPENED] - control[ESTABLISHED] - control[FAILED]


@jit
def open_burst(initiator: Initiator, port: Port, frames: Frames, start_ns: int, intended: float, total: int, gap_ns: float,
               now: int) -> int:  # fmt: skip
    """Send the SYNs that are due, one burst at most; returns how many. `intended`: of the first one, ns after `start_ns`."""
    control = initiator.control
    burst = 0
    while burst < BURST and control[OPENED] < total and opening(initiator) < control[WINDOW]:
        due = start_ns + np.int64(intended + burst * gap_ns) if gap_ns > 0 else now
        if due > now:
            break
        frame = take_frame(frames)
        if frame < 0:
            control[BLOCKED] += 1
            break
        write_syn(initiator, frames.memory, frame, control[NEXT])
        if not tx_push(port, frames, frame, FRAME_BYTES):
            control[BLOCKED] += 1
            give_frame(frames, frame)
            break
        record_ns(initiator.lateness, now - due)
        initiator.started[control[NEXT] & (OPENING - 1)] = due
        control[NEXT] += 1
        control[OPENED] += 1
        burst += 1
    return burst


@jit
def initiate(initiator: Initiator, port: Port, frames: Frames, start_ns: int, total: int, gap_ns: float, until_ns: int) -> int:
    """Open connections until `total` are or the clock passes `until_ns`, and wait for the last one's end; returns the time.

    gap_ns: between intended starts; 0: as fast as the window of `control[WINDOW]` lets them.
    """
    control = initiator.control
    intended = 0.0
    now = ended = now_ns(initiator.scratch)
    while True:
        reclaim(port, frames)
        refill(port, frames)
        work = take_answers(initiator, port, frames)
        now = now_ns(initiator.scratch)
        give_up(initiator, now)
        opens = control[OPENED] < total and now < until_ns
        if opens:
            burst = open_burst(initiator, port, frames, start_ns, intended, total, gap_ns, now)
            intended += burst * gap_ns
            work += burst
            ended = now
        elif opening(initiator) == 0:
            tx_flush(port, frames)
            return ended
        tx_flush(port, frames)
        if work == 0:
            rest = start_ns + np.int64(intended) - now if opens and gap_ns > 0 else np.int64(NAP_NS)
            if gap_ns < DENSE_GAP_NS:
                doze(initiator.pollfds, NAP_NS, initiator.scratch)
            elif rest > SLEEP_MARGIN_NS:
                initiator.pollfds[0] = pollfd(port.control[FD], POLLIN)
                poll(initiator.pollfds, 1, min(rest - SLEEP_MARGIN_NS, 10_000_000), initiator.scratch)


@jit
def respond(responder: Responder, port: Port, frames: Frames, until_ns: int) -> None:
    """Answer every SYN and note every connection that has opened, until the clock passes `until_ns`."""
    control = responder.control
    now = began = now_ns(responder.scratch)
    before = control[SYNS]
    while now < until_ns:
        reclaim(port, frames)
        refill(port, frames)
        count = rx_burst(port, frames, responder.addresses, responder.lengths, BURST)
        now = now_ns(responder.scratch)
        for i in range(count):
            answer(responder, port, frames, responder.addresses[i], responder.lengths[i], now)
        tx_flush(port, frames)
        if count == 0:
            responder.pollfds[0] = pollfd(port.control[FD], POLLIN)
            poll(responder.pollfds, 1, max(0, min(until_ns - now, 10_000_000)), responder.scratch)
        elif count < BURST and now - began < (control[SYNS] - before) * DENSE_GAP_NS:
            doze(responder.pollfds, NAP_NS, responder.scratch)


@jit
def answer(responder: Responder, port: Port, frames: Frames, at: int, length: int, now: int) -> None:
    """Answer the SYN at byte `at`, or note which connection the ACK there has opened."""
    control, memory = responder.control, frames.memory
    flags = flags_of(memory, at, length)
    if flags == SYN:
        control[SYNS] += 1
        number = np.int64(network32(memory, at + 38))
        turn_around(memory, at, ~number, number + 1, SYN | ACK)
        if tx_push(port, frames, at, FRAME_BYTES):
            return
        control[UNANSWERED] += 1
    elif flags == ACK:
        number = (np.int64(network32(memory, at + 38)) - 1 - control[FIRST]) & 0xFFFFFFFF
        if number >= responder.seen.size * 64:
            control[FOREIGN] += 1
        elif responder.seen[number >> 6] >> np.uint64(number & 63) & np.uint64(1):
            control[REPEATED] += 1
        else:
            responder.seen[number >> 6] |= np.uint64(1) << np.uint64(number & 63)
            control[COMPLETED] += 1
            control[LAST_NS] = now
    else:
        control[FOREIGN] += 1
    give_frame(frames, at)


def initiator_main(config: dict[str, Any], control: Any) -> None:
    """Process target: {"interface", "port_kind", "source_mac", "next_hop_mac", "server", "window"}.

    Answers {"offered_kops", "seconds"} with what was opened; a load of 0 is "as fast as a window of connections lets".
    """
    C.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)  # sleeps end when they should
    frames = make_frames(16384)
    opened = open_port(config["interface"], frames, config.get("port_kind", "auto"))
    initiator = make_initiator(config["source_mac"], config["next_hop_mac"], config["server"])
    refill(opened.port, frames)
    control.send({"ready": True, "port_kind": opened.kind})
    while (message := control.receive(None)) is not None and not message.get("stop"):
        control.send(_open_step(initiator, opened.port, frames, message["offered_kops"], message["seconds"], config["window"]))


def _open_step(
    initiator: Initiator, port: Port, frames: Frames, offered_kops: float, seconds: float, window: int
) -> dict[str, Any]:
    control = initiator.control
    first = int(control[NEXT])
    control[:NEXT], control[UNEXPECTED] = 0, 0
    initiator.latency[:], initiator.lateness[:] = 0, 0
    refused, drops = int(port.control[TX_REFUSED]), sent_drops()
    start_ns = time.monotonic_ns() + 1_000_000
    if offered_kops:
        control[WINDOW] = OPENING
        until_ns, planned = start_ns + int(seconds * LATEST * 1e9), packets_in(offered_kops, seconds)
        ended_ns = initiate(initiator, port, frames, start_ns, planned, 1e6 / offered_kops, until_ns)
    else:
        control[WINDOW], planned = window, 0
        ended_ns = initiate(initiator, port, frames, start_ns, 1 << 40, 0.0, start_ns + int(seconds * 1e9))
    return {"first": first, "sent": int(control[OPENED]), "established": int(control[ESTABLISHED]),
            "failed": int(control[FAILED]), "unexpected": int(control[UNEXPECTED]), "blocked": int(control[BLOCKED]),
            "elapsed_s": (int(ended_ns) - start_ns) / 1e9, "start_ns": start_ns, "planned": planned,
            "scheduled_s": planned / offered_kops / 1e3 if planned else 0.0,
            "devices": {"sent": sent_drops() - drops + int(port.control[TX_REFUSED]) - refused},
            "latency": summary_us(initiator.latency), "lateness": summary_us(initiator.lateness)}  # fmt: skip


def silence(interface: str) -> None:
    """Take an interface's addresses: by AF_PACKET the kernel sees every SYN too, and would answer its own with a RST."""
    system.run(["ip", "address", "flush", "dev", interface], dict(os.environ))


def responder_main(config: dict[str, Any], control: Any) -> None:
    """Process target: {"interface", "port_kind"}. {"first": n, "connections": c} starts counting, {"collect": true} answers."""
    frames = make_frames(16384)
    opened = open_port(config["interface"], frames, config.get("port_kind", "auto"))
    if opened.kind == "afpacket":
        silence(config["interface"])
    C.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    responder, drops = make_responder(0, 1), opened.statistics()
    refill(opened.port, frames)
    control.send({"ready": True, "port_kind": opened.kind})
    while True:
        message = control.receive(0)
        if message is None:
            respond(responder, opened.port, frames, time.monotonic_ns() + SLICE_NS)
        elif message.get("stop"):
            return
        elif "collect" in message:
            now, counts = opened.statistics(), responder.control
            control.send({"syns": int(counts[SYNS]), "completed": int(counts[COMPLETED]), "repeated": int(counts[REPEATED]),
                          "foreign": int(counts[FOREIGN]), "unanswered": int(counts[UNANSWERED]), "last_ns": int(counts[LAST_NS]),
                          "kernel": {reason: now[reason] - drops[reason] for reason in now}})  # fmt: skip
        else:
            responder, drops = make_responder(int(message["first"]), int(message["connections"])), opened.statistics()
            control.send({"first": message["first"]})


def warm() -> None:
    """Compile both ends."""
    frames = make_frames(1)
    initiator = make_initiator("02:00:00:00:00:01", "02:00:00:00:00:02", "10.128.0.1")
    write_syn(initiator, frames.memory, 0, 0)
    initiate(initiator, closed_port(), frames, 0, 0, 1.0, 0)
    respond(make_responder(0, 1), closed_port(), frames, 0)
