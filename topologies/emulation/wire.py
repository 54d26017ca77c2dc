"""Where the kernel has no netem: how does a cable get a delay?

A process in the middle of the cable, with an AF_XDP port on either side over one area of frames. A frame stays where the
kernel put it, uncopied, until its time has come, and leaves on the other side:

    host end ==veth== a3 [port] --held until arrival + delay--> [port] b3 ==veth== other end

One thread for each cable, compiled and without the interpreter, asleep when nothing is on its way. A frame's arrival is when
this process sees it, and crossing costs more than the hold: 5 us on a quiet path, 25 us where two wires, a userspace switch and
the sender share two processors, 90 us where the processors are lent out. The network measures that once and has every hold
shortened by it (the trim, recorded); whether
the delay then is what was asked for is decided by the calibration before each trial. The wire keeps the order; it holds HELD
frames each way and drops, and counts, what exceeds them.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any, NamedTuple

import numpy as np

from datastore.compiled import jit
from datastore.compiled.libc import POLLIN, now_ns, poll, pollfd, sched_yield
from datastore.compiled.memory import load_acquire
from nfs.dataplane.frames import Frames, give_frame, make_frames
from nfs.dataplane.opening import open_ports
from nfs.dataplane.port import BURST, FD, OpenPort, Port, closed_port, reclaim, refill, rx_burst, tx_flush, tx_push

FRAMES = 16_384
HELD = 4096
"""Frames on their way in one direction: a million a second held for 4 ms."""
SPIN_NS, MOST_SPIN_NS = 60_000, 400_000
"""Stay awake this long after and before work: sleeping and waking costs about as much, and would be added to the delay. Before
work it is longer where waking is seen to take longer: on a virtual machine whose processors are lent out, 90 us."""
FORGET_SHIFT = 6
"""What was seen of a late waking counts 1/64 less at each later one."""
IDLE_NS = 50_000_000
HEAD, TAIL, DROPPED, PASSED, DELAY_NS = range(5)
PR_SET_TIMERSLACK = 29


class Held(NamedTuple):
    """Frames on their way in one direction, a ring: where they lie, their lengths, when they are due; int64[HELD] each.

    control: HEAD and TAIL count frames for ever, DROPPED for want of room, PASSED; DELAY_NS is how long a frame is held.
    """

    addresses: np.ndarray
    lengths: np.ndarray
    due_ns: np.ndarray
    control: np.ndarray


class Scratch(NamedTuple):
    """Working arrays of one thread."""

    addresses: np.ndarray
    lengths: np.ndarray
    pollfds: np.ndarray
    time: np.ndarray


def held() -> Held:
    """Return an empty ring."""
    return Held(np.zeros(HELD, np.int64), np.zeros(HELD, np.int64), np.zeros(HELD, np.int64), np.zeros(5, np.int64))


def scratch() -> Scratch:
    """Return the working arrays of one thread."""
    return Scratch(np.zeros(BURST, np.int64), np.zeros(BURST, np.int64), np.zeros(2, np.int64), np.zeros(2, np.int64))


@jit
def hold(port: Port, frames: Frames, ring: Held, work: Scratch) -> int:
    """Take what arrived at a port into a ring. Returns how many frames arrived."""
    count = rx_burst(port, frames, work.addresses, work.lengths, BURST)
    due_ns = (
        now_ns(work.time) + ring.control[DELAY_NS]
    )  # read after the frames: were it before, a pause in between would shorten the delay
    for i in range(count):
        if ring.control[TAIL] - ring.control[HEAD] >= HELD:
            give_frame(frames, work.addresses[i])
            ring.control[DROPPED] += 1
            continue
        slot = ring.control[TAIL] & (HELD - 1)
        ring.addresses[slot], ring.lengths[slot], ring.due_ns[slot] = work.addresses[i], work.lengths[i], due_ns
        ring.control[TAIL] += 1
    return count


@jit
def release(ring: Held, port: Port, frames: Frames, now: int) -> int:
    """Send the frames that are due out of a port; returns how many."""
    count = 0
    while ring.control[HEAD] < ring.control[TAIL]:
        slot = ring.control[HEAD] & (HELD - 1)
        if ring.due_ns[slot] > now or not tx_push(port, frames, ring.addresses[slot], ring.lengths[slot]):
            break
        ring.control[HEAD] += 1
        count += 1
    if count > 0:
        tx_flush(port, frames)
        ring.control[PASSED] += count
    return count


@jit
def next_due_ns(ring: Held, otherwise: int) -> int:
    """Return when the first frame of a ring is due."""
    if ring.control[HEAD] == ring.control[TAIL]:
        return otherwise
    return min(otherwise, ring.due_ns[ring.control[HEAD] & (HELD - 1)])


@jit
def early_ns(early: int, late: int) -> int:
    """Return how long before work to wake next time, given that of the last time, and by how much that came too late."""
    return min(max(2 * late, early - (early >> FORGET_SHIFT), SPIN_NS), MOST_SPIN_NS)


@jit
def delay_line(a: Port, b: Port, frames: Frames, there: Held, back: Held, work: Scratch, stop: Any) -> None:
    """Pass frames between two ports until stop[0] is set (seen within IDLE_NS)."""
    refill(a, frames)
    refill(b, frames)
    active, early = np.int64(0), np.int64(SPIN_NS)
    while load_acquire(stop, 0) == 0:
        moved = hold(a, frames, there, work) + hold(b, frames, back, work)
        now = now_ns(work.time)
        moved += release(there, b, frames, now) + release(back, a, frames, now)
        reclaim(a, frames)
        reclaim(b, frames)
        if moved > 0:
            refill(a, frames)
            refill(b, frames)
            active = now
            continue
        due = next_due_ns(back, next_due_ns(there, now + IDLE_NS + early))
        if due - now <= early or now - active <= SPIN_NS:
            sched_yield()
            continue
        work.pollfds[0] = pollfd(a.control[FD], POLLIN)
        work.pollfds[1] = pollfd(b.control[FD], POLLIN)
        if poll(work.pollfds, 2, due - now - early, work.time) == 0:
            early = early_ns(early, now_ns(work.time) - (due - early))


class Wire:
    """The middle of one cable: two interfaces of this namespace and the thread between them."""

    def __init__(self, name: str, interfaces: tuple[str, str], delay_ns: int, stop: np.ndarray) -> None:
        self.frames = make_frames(FRAMES)
        self.ports: list[OpenPort] = open_ports(list(interfaces), self.frames)
        self.there, self.back, self.delay_ns = held(), held(), delay_ns
        self.trim(0)
        a, b = (opened.port for opened in self.ports)
        line = (a, b, self.frames, self.there, self.back, scratch())
        delay_line(*line, np.ones(1, np.uint32))  # compiled or loaded, and the ports given frames, before "ready" is said
        self.thread = threading.Thread(target=delay_line, args=(*line, stop), name=name, daemon=True)

    def trim(self, trim_ns: int) -> None:
        """Hold frames this much shorter than asked for: what crossing the wire costs beyond the hold."""
        for ring in (self.there, self.back):
            ring.control[DELAY_NS] = max(0, self.delay_ns - trim_ns)

    def counts(self) -> dict[str, int]:
        """Return the frames passed each way and dropped: by this wire, and by the kernel before it saw them."""
        before = sum(sum(opened.statistics().values()) for opened in self.ports)
        return {"passed_there": int(self.there.control[PASSED]), "passed_back": int(self.back.control[PASSED]),
                "dropped": int(self.there.control[DROPPED] + self.back.control[DROPPED]),
                "dropped_before": before}  # fmt: skip


def run(config: dict[str, Any], control: Any) -> None:
    """The wire process. config: {"cables": [{"name", "interfaces": [a, b], "delay_us"}]}.

    Answers {"ready": true} when all ports are open; any message after that with {"cables": {name: counts}}, until "stop".
    {"trim_us": 20} shortens every hold by so much.
    """
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)  # the default lets timers be 50 us late; threads inherit it
    stop = np.zeros(1, np.uint32)
    wires = {}
    for cable in config["cables"]:
        first, second = cable["interfaces"]
        wires[cable["name"]] = Wire(cable["name"], (first, second), round(cable["delay_us"] * 1000), stop)
    for wire in wires.values():
        wire.thread.start()
    control.send({"ready": True})
    while (message := control.receive(None)) is not None and not message.get("stop"):
        if "trim_us" in message:
            for wire in wires.values():
                wire.trim(round(1000 * message["trim_us"]))
        control.send({"cables": {name: wire.counts() for name, wire in wires.items()}})
    stop[0] = 1
    for wire in wires.values():
        wire.thread.join(1)


def warm() -> None:
    """Compile the wire: stopped before it starts, on ports that are open nowhere."""
    port, frames = closed_port(), make_frames(1)
    delay_line(port, port, frames, held(), held(), scratch(), np.ones(1, np.uint32))
