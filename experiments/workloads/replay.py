"""A capture file as the workload: its packets leave where their party is, at their recorded times, and are found again.

Two of these processes run, one in the client's place and one in the server's. Each prepares the same frames from the same file
(`capture.py`), sends its own party's and counts the other's:

    client: sends 1, 3, 4 ... of the inside party -> NF -> server: finds 1, 3, 4 ...
    client: finds 2, 5 ...                        <- NF <- server: sends 2, 5 ... of the outside party

Arrivals carry no stamp. They are matched by a fingerprint of what network functions leave alone: length, identification and
fragment of the IP header, its protocol, TCP's sequence numbers, flags and window, ICMP's type, and the payload; not addresses,
ports, ICMP identifiers, time to live and checksums. Packets alike in all of it are matched in the order they were sent, so
each loss is counted, and of such packets the last ones are held to be the lost ones.

With a speed, packets leave at their times whatever happened before (open loop), and latency runs from the intended time. At
speed 0 there are no times: each packet leaves as soon as the one it answers (the last of its flow from the other side) has
arrived, or has been waited for `patience_ms`; half as long after each wait of its flow that was in vain.

Where a function translates, answers are aimed at what came out (`translations.py`). Then the first answer of a flow waits for
what it answers at any speed, at most until that is late by `patience_ms`.
"""

from __future__ import annotations

import ctypes as C
import time
from typing import Any, NamedTuple

import numpy as np

from datastore.compiled import jit
from datastore.compiled.histogram import encode, make_counts, record_ns, summary_us
from datastore.compiled.libc import POLLIN, now_ns, poll, pollfd, sched_yield
from datastore.compiled.memory import copy, load64, network16, network32
from experiments.workloads.capture import Prepared, Timing, prepare
from experiments.workloads.generator import PR_SET_TIMERSLACK, SLEEP_MARGIN_NS, sent_drops
from experiments.workloads.traffic import Replay
from experiments.workloads.translations import (
    GIVEN_UP,
    LOOK,
    Translations,
    agrees,
    aim,
    learn,
    make_translations,
    must_wait,
    read_ends,
)
from nfs.dataplane.frames import Frames, give_frame, make_frames, take_frame
from nfs.dataplane.headers import ICMP, TCP, UDP
from nfs.dataplane.opening import open_port
from nfs.dataplane.port import BURST, FD, TX_REFUSED, OpenPort, Port, closed_port, reclaim, refill, rx_burst, tx_flush, tx_push

# words of Player.control
SENT, BLOCKED, RECEIVED, DUPLICATED, REORDERED, FLOW_REORDERED, FOREIGN, HIGHEST, FIRST_NS, LAST_NS = range(10)
WAITING_SINCE, IMPATIENT, SENT_LAST_NS, SIDE = range(10, 14)
SLICE_NS = 20_000_000
WAKE_NS = 1_000_000
"""How long a side sleeps that waits for a packet, which wakes it, or for the end of its patience."""
LINGER_NS = 500_000_000
"""The end: both sides have sent everything, and nothing has arrived for so long."""
LATEST, LATEST_S = 1.5, 10.0
"""A replay with times ends after so many times its length and so long behind it, whether or not everything has left."""
MOST_LOST = 1000
"""Lost packets told by their number in the file."""
NOTHING, FOREIGN_FRAME, AGAIN = -1, -1, -2


class Player(NamedTuple):
    """State of one side. memory, at, length, time_ns, flow, after: `capture.Prepared`; own: int64, the frames it sends.

    prints, heads: hash table from fingerprint (uint64, 0: free) to the first expected frame with it that has not arrived,
    following: int64 per frame, the next one with the same fingerprint. arrived_ns: int64 per frame, 0 for not yet. last:
    int64 per flow, the highest frame that has arrived. vain: int64 per flow, how often it was waited for in vain since.
    """

    memory: np.ndarray
    at: np.ndarray
    length: np.ndarray
    time_ns: np.ndarray
    flow: np.ndarray
    after: np.ndarray
    own: np.ndarray
    prints: np.ndarray
    heads: np.ndarray
    following: np.ndarray
    arrived_ns: np.ndarray
    last: np.ndarray
    vain: np.ndarray
    control: np.ndarray
    latency: np.ndarray
    lateness: np.ndarray
    addresses: np.ndarray
    lengths: np.ndarray
    scratch: np.ndarray
    pollfds: np.ndarray
    translations: Translations


def make_player(prepared: Prepared, side: int, translates: bool = False) -> Player:
    """Return the state of the side INSIDE or OUTSIDE before its first packet. translates: a function may change addresses."""
    frames, flows = len(prepared.at), int(prepared.flow.max()) + 1
    slots = 1 << max(4, (2 * frames - 1).bit_length())
    player = Player(
        prepared.memory, prepared.at, prepared.length, prepared.time_ns, prepared.flow, prepared.after,
        np.flatnonzero(prepared.side == side), np.zeros(slots, np.uint64), np.full(slots, NOTHING), np.full(frames, NOTHING),
        np.zeros(frames, np.int64), np.full(flows, NOTHING), np.zeros(flows, np.int64), np.zeros(16, np.int64),
        make_counts(), make_counts(), np.zeros(BURST, np.int64), np.zeros(BURST, np.int64), np.zeros(8, np.int64),
        np.zeros(2, np.int64), make_translations(prepared.aim, flows, translates),
    )  # fmt: skip
    player.control[HIGHEST], player.control[SIDE] = -1, side
    expect(player, np.flatnonzero(prepared.side != side))
    return player


@jit
def mix(value: int, word: int) -> int:
    """Return a 64-bit hash continued by a word: multiplication by 2^64 over the golden ratio, high bits folded in."""
    mixed = (np.uint64(value) ^ np.uint64(word)) * np.uint64(0x9E3779B97F4A7C15)
    return mixed ^ (mixed >> np.uint64(29))


@jit
def fingerprint(memory: np.ndarray, at: int, length: int) -> int:
    """Return what is the same about a frame before and after a network function, in 64 bits; 0 when it is no whole IPv4."""
    ip = at + 14
    if length >= 18 and network16(memory, at + 12) == 0x8100:
        ip += 4
    end = at + length
    if ip + 20 > end or network16(memory, ip - 2) != 0x0800:
        return np.uint64(0)
    body = ip + np.int64(memory[ip] & 15) * 4
    total = np.int64(network16(memory, ip + 2))
    if body < ip + 20 or ip + total < body or ip + total > end:
        return np.uint64(0)
    end = ip + total
    protocol = np.int64(memory[ip + 9])
    found = mix(np.uint64(1), np.uint64(total << 40 | np.int64(network32(memory, ip + 4)) << 8 | protocol))
    if network16(memory, ip + 6) & 0x1FFF == 0:
        if protocol == TCP and end - body >= 20:
            found = mix(found, load64(memory, body + 4))
            found = mix(found, np.uint64(network32(memory, body + 12)))
            body += 20
        elif protocol == UDP and end - body >= 8:
            body += 8
        elif protocol == ICMP and end - body >= 8:
            found = mix(found, np.uint64(network16(memory, body)))
            kind = memory[body]
            if (kind == 3 or kind == 4 or kind == 5 or kind == 11 or kind == 12) and end - body >= 28:
                found = mix(found, np.uint64(network32(memory, body + 12)))  # identification of the packet quoted
                body = end  # and no more: the quoted addresses and ports are translated too
            else:
                found = mix(found, np.uint64(network16(memory, body + 6)))
                body += 8
    while end - body >= 8:
        found = mix(found, load64(memory, body))
        body += 8
    while body < end:
        found = mix(found, np.uint64(memory[body]))
        body += 1
    return found | np.uint64(1)


@jit
def slot_of(player: Player, found: int) -> int:
    """Return where in the hash table a fingerprint is or would be."""
    mask = player.prints.size - 1
    slot = np.int64(np.uint64(found) >> np.uint64(20)) & mask
    while player.prints[slot] != np.uint64(0) and player.prints[slot] != found:
        slot = (slot + 1) & mask
    return slot


@jit
def expect(player: Player, expected: np.ndarray) -> None:
    """Put frames (int64, numbers rising) into the table of what is to arrive."""
    for i in range(expected.size - 1, -1, -1):  # the last one first, so that chains run in the order of sending
        number = expected[i]
        found = fingerprint(player.memory, player.at[number], player.length[number])
        slot = slot_of(player, found)
        player.prints[slot] = found
        player.following[number] = player.heads[slot]
        player.heads[slot] = number


@jit
def match(player: Player, memory: np.ndarray, at: int, length: int) -> int:
    """Return the number of the frame that has arrived; FOREIGN_FRAME for one of somebody else, AGAIN for a second copy."""
    found = fingerprint(memory, at, length)
    if found == np.uint64(0):
        return FOREIGN_FRAME
    slot = slot_of(player, found)
    if player.prints[slot] == np.uint64(0):
        return FOREIGN_FRAME
    first = player.heads[slot]
    if first == NOTHING:
        return AGAIN
    before = NOTHING
    if player.following[first] != NOTHING and player.translations.active[0]:
        before = before_agreeing(player, first)
    if before == NOTHING:
        player.heads[slot] = player.following[first]
        return first
    number = player.following[before]
    player.following[before] = player.following[number]
    return number


@jit
def before_agreeing(player: Player, first: int) -> int:
    """Return the frame in front of the first one that agrees with what has arrived, of a chain of frames alike that begins with
    `first`; NOTHING where that one agrees itself, or none of the first LOOK does."""
    before, number = np.int64(NOTHING), np.int64(first)
    for _ in range(LOOK):
        if number == NOTHING:
            break
        at, length = player.at[number], player.length[number]
        if agrees(player.translations, number, player.memory, at, length, 1 - player.control[SIDE]):
            return before
        before, number = number, player.following[number]
    return np.int64(NOTHING)


@jit
def take(player: Player, memory: np.ndarray, at: int, length: int, now: int, start_ns: int, speed: float) -> None:
    """Count an arrival."""
    control, translations = player.control, player.translations
    told = False
    if translations.active[0]:
        told = read_ends(translations, memory, at, length, 1 - control[SIDE], translations.arrived)
    number = match(player, memory, at, length)
    if number < 0:
        control[FOREIGN if number == FOREIGN_FRAME else DUPLICATED] += 1
        return
    player.arrived_ns[number] = now
    control[RECEIVED] += 1
    if control[FIRST_NS] == 0:
        control[FIRST_NS] = now
    control[LAST_NS] = now
    if number < control[HIGHEST]:
        control[REORDERED] += 1
    else:
        control[HIGHEST] = number
    if told:
        learn(translations, number)
    flow = player.flow[number]
    player.vain[flow] = 0
    if number < player.last[flow]:
        control[FLOW_REORDERED] += 1
    else:
        player.last[flow] = number
    if speed > 0.0:
        record_ns(player.latency, now - due_ns(player, number, start_ns, speed))


@jit
def due_ns(player: Player, number: int, start_ns: int, speed: float) -> int:
    """Return when a frame is to leave."""
    return start_ns + np.int64(player.time_ns[number] / speed)


@jit
def is_early(player: Player, number: int, start_ns: int, speed: float, patience_ns: int, now: int) -> bool:
    """Tell whether a frame must still wait: for its time, or at speed 0 for the frame it answers."""
    control, before = player.control, player.after[number]
    if speed > 0.0:
        if due_ns(player, number, start_ns, speed) > now:
            return True
        if not must_wait(player.translations, number, before):
            return False
        if now < due_ns(player, before, start_ns, speed) + patience_ns:
            return True
        player.translations.state[player.translations.aim[number]] = GIVEN_UP
        control[IMPATIENT] += 1
        return False
    if now < start_ns:
        return True
    if before == NOTHING or player.arrived_ns[before] > 0:
        control[WAITING_SINCE] = 0
        return False
    if control[WAITING_SINCE] == 0:
        control[WAITING_SINCE] = now
    flow = player.flow[number]
    if now - control[WAITING_SINCE] < patience_ns >> min(player.vain[flow], 62):
        return True
    player.vain[flow] += 1
    control[WAITING_SINCE] = 0
    control[IMPATIENT] += 1
    return False


@jit
def send(player: Player, port: Port, frames: Frames, start_ns: int, speed: float, patience_ns: int, now: int) -> int:
    """Send up to a burst of what may leave; returns how many have left."""
    control = player.control
    burst = 0
    while burst < BURST and control[SENT] < player.own.size:
        number = player.own[control[SENT]]
        if is_early(player, number, start_ns, speed, patience_ns, now):
            break
        frame = take_frame(frames)
        if frame < 0:
            control[BLOCKED] += 1
            break
        length = player.length[number]
        copy(frames.memory, frame, player.memory, player.at[number], length)
        if player.translations.active[0]:
            aim(player.translations, number, frames.memory, frame, length, control[SIDE])
        if not tx_push(port, frames, frame, length):
            give_frame(frames, frame)
            control[BLOCKED] += 1
            break
        if speed > 0.0:
            record_ns(player.lateness, now - due_ns(player, number, start_ns, speed))
        control[SENT] += 1
        control[SENT_LAST_NS] = now
        burst += 1
    tx_flush(port, frames)
    return burst


@jit
def play(player: Player, port: Port, frames: Frames, start_ns: int, speed: float, patience_ns: int, until_ns: int) -> None:
    """Send what is due and count what arrives until the clock passes `until_ns`."""
    control = player.control
    now = now_ns(player.scratch)
    while now < until_ns:
        reclaim(port, frames)
        refill(port, frames)
        count = rx_burst(port, frames, player.addresses, player.lengths, BURST)
        now = now_ns(player.scratch)
        for i in range(count):
            take(player, frames.memory, player.addresses[i], player.lengths[i], now, start_ns, speed)
            give_frame(frames, player.addresses[i])
        blocked = control[BLOCKED]
        if send(player, port, frames, start_ns, speed, patience_ns, now) > 0 or count > 0:
            continue
        rest = until_ns - now
        if control[SENT] < player.own.size:
            if speed > 0.0:
                due = due_ns(player, player.own[control[SENT]], start_ns, speed)
                rest = min(rest, due - now - SLEEP_MARGIN_NS if due > now else WAKE_NS)
            else:
                rest = min(rest, patience_ns)
        if rest <= 0 or control[BLOCKED] != blocked:
            sched_yield()
            continue
        player.pollfds[0] = pollfd(port.control[FD], POLLIN)
        poll(player.pollfds, 1, rest, player.scratch)


class Side:
    """One side of a replay.

    config: interface, port_kind, side (INSIDE or OUTSIDE), replay ({...}), client_mac, server_mac, translates (whether a function
    may change addresses), virtual (see `capture.prepare`). control: the channel to the procedure.
    """

    def __init__(self, config: dict[str, Any], control: Any) -> None:
        C.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)  # sleeps end when they should
        self.replay, self.side, self.control = Replay.of(**config["replay"]), config["side"], control
        self.translates = config["translates"]
        self.prepared = prepare(self.replay, config["client_mac"], config["server_mac"], config["virtual"])
        self.expected = np.flatnonzero(self.prepared.side != self.side)
        self.frames = make_frames(16384)
        self.opened: OpenPort = open_port(config["interface"], self.frames, config.get("port_kind", "auto"))
        refill(self.opened.port, self.frames)

    def step(self, start_ns: int, speed: float) -> dict[str, Any]:
        """Play the file once and return what was sent and what arrived, each as the generator and the sink tell it."""
        player, port = make_player(self.prepared, self.side, self.translates), self.opened.port
        drops, refused, kernel = sent_drops(), int(port.control[TX_REFUSED]), self.opened.statistics()
        patience_ns = int(self.replay.patience_ms * 1e6)
        latest_ns = start_ns + int(longest_s(self.replay, self.prepared, speed) * 1e9)
        has_sent, both_ns = False, 0
        while not (both_ns and self._is_over(player, both_ns)):
            play(player, port, self.frames, start_ns, speed, patience_ns, time.monotonic_ns() + SLICE_NS)
            if not has_sent and (player.control[SENT] == player.own.size or time.monotonic_ns() > latest_ns):
                has_sent = True
                self.control.send({"has_sent": True})
            if not both_ns and self.control.receive(0) is not None:
                both_ns = time.monotonic_ns()
        now, control = self.opened.statistics(), player.control
        ended_ns = max(int(control[SENT_LAST_NS]), start_ns + 1)
        lost = self.expected[player.arrived_ns[self.expected] == 0]
        sent = {"sent": int(control[SENT]), "planned": len(player.own), "elapsed_s": (ended_ns - start_ns) / 1e9,
                "blocked": int(control[BLOCKED]),
                "devices": {"sent": sent_drops() - drops + int(port.control[TX_REFUSED]) - refused},
                "lateness": summary_us(player.lateness)}  # fmt: skip
        arrived = {"received": int(control[RECEIVED]), "duplicated": int(control[DUPLICATED]),
                   "reordered": int(control[REORDERED]), "flow_reordered": int(control[FLOW_REORDERED]),
                   "foreign": int(control[FOREIGN]), "kernel": {reason: now[reason] - kernel[reason] for reason in now},
                   "window_s": (int(control[LAST_NS]) - int(control[FIRST_NS])) / 1e9,
                   "latency": summary_us(player.latency) if speed else {}}  # fmt: skip
        return {"sent": sent, "arrived": arrived, "histogram": encode(player.latency) if speed else "",
                "impatient": int(control[IMPATIENT]), "lost": self.prepared.number[lost][:MOST_LOST].tolist()}  # fmt: skip

    def _is_over(self, player: Player, both_ns: int) -> bool:
        """Tell whether all has arrived, or nothing more will. both_ns: since when both sides have sent everything."""
        control = player.control
        active_ns = max(both_ns, int(control[LAST_NS]))
        return bool(control[RECEIVED] == self.expected.size or time.monotonic_ns() > active_ns + LINGER_NS)


def longest_s(replay: Replay, prepared: Prepared, speed: float) -> float:
    """Return after how many seconds a side ends its sending, whether or not everything has left."""
    return LATEST * prepared.timing.seconds / speed + LATEST_S if speed else replay.longest_s


def main(config: dict[str, Any], control: Any) -> None:
    """Process target, see `Side`.

    {"start_ns": t, "speed": s} plays the file once. It is answered by {"has_sent": true} and, when any message has said that the
    other side has sent everything too, by what was counted. {"stop": true} ends the process.
    """
    side = Side(config, control)
    timing = side.prepared.timing
    control.send({"ready": True, "port_kind": side.opened.kind, "frames": len(side.prepared.at), "seconds": timing.seconds,
                  "longest_s": longest_s(side.replay, side.prepared, side.replay.speed), "times_back": timing.back,
                  "skipped": side.prepared.skipped})  # fmt: skip
    while (message := control.receive(None)) is not None and not message.get("stop"):
        control.send(side.step(int(message["start_ns"]), float(message["speed"])))


def warm() -> None:
    """Compile both directions, on nothing."""
    nothing, timing = np.zeros(0, np.int64), Timing(0.0, 0.0, 0, 0, 0, 0.0, 0, 0)
    empty = Prepared(
        np.zeros(0, np.uint8), nothing, nothing, nothing, nothing, np.zeros(1, np.int64), nothing, nothing, nothing, {}, timing
    )
    play(make_player(empty, 0), closed_port(), make_frames(1), 0, 1.0, 0, 0)
