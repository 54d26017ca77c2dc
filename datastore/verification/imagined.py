"""Imagined time and an imagined network: who acts when, what arrives and when, and what goes wrong.

All of it comes from one seed, so a seed is a run, byte for byte; `Imagined.trace` says what happened, for people.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from datastore.coordination.heartbeats import MILLISECOND_NS

NEVER = 1e9
AGAIN_NS = 10 * MILLISECOND_NS
"""After what time bytes of a stream that did not get through are sent again."""


class Violation(Exception):
    """Something happened that the protocol promises will not; the text says what, for people."""


@dataclass(frozen=True)
class Faults:
    """How often what goes wrong. Probabilities a message; mean times between events, in seconds, for the whole cluster."""

    loss: float = 0.03
    duplicate: float = 0.03
    late: float = 0.03
    late_ms: float = 150.0
    crash_s: float = 0.8
    pause_s: float = 0.6
    cut_s: float = 0.5
    move_s: float = 0.3
    coordinator_s: float = 1.5
    drift: float = 0.04
    """Of each clock, fast or slow. Two of them, one each way, must stay within the lease's margin (8 in 80)."""

    @classmethod
    def of(cls, seed: int) -> Faults:
        """Return what goes wrong in a seed: each kind often, seldom or never.

        Runs in which a few things go wrong often find more than runs in which everything does sometimes. (A. Groce et al.:
        Swarm testing, ISSTA 2012.)
        """
        rng = random.Random(f"faults {seed}")

        def rate(least: float, most: float) -> float:
            return 0.0 if rng.random() < 0.25 else least * (most / least) ** rng.random()

        def period(least: float, most: float) -> float:
            return NEVER if rng.random() < 0.25 else least * (most / least) ** rng.random()

        return cls(rate(0.01, 0.2), rate(0.01, 0.2), rate(0.01, 0.2), 50 * 8 ** rng.random(), period(0.2, 2), period(0.1, 1),
                   period(0.1, 1), period(0.03, 0.5), period(0.3, 2), rng.choice((0.0, 0.02, 0.04)))  # fmt: skip


ANY_FAULTS = Faults()
CALM = Faults(0, 0, 0, 0, NEVER, NEVER, NEVER, NEVER, NEVER, 0)


class Clock:
    """A host's own CLOCK_MONOTONIC."""

    def __init__(self, rate: float, offset_ns: int) -> None:
        self.rate, self.offset_ns = rate, offset_ns

    def read(self, true_ns: int) -> int:
        return self.offset_ns + int(true_ns * self.rate)

    def true(self, duration_ns: int) -> int:
        """How long a duration on this clock is."""
        return int(duration_ns / self.rate)


class Actor:
    """Somebody with an address and a clock, who can crash, be stopped, and go on."""

    def __init__(self, world: Any, name: str, clock: Clock | None = None) -> None:
        """clock: of the machine, where it is another actor's, too."""
        self.world, self.name, self.alive, self.paused_until = world, name, True, 0
        self.clock = clock or Clock(1 + world.random.uniform(-world.faults.drift, world.faults.drift),
                                    world.random.randrange(1, 10**12))  # fmt: skip
        self.life = 0
        world.actors[name] = self

    def now(self) -> int:
        return self.clock.read(self.world.now)

    def later(self, delay_ns: int, act: Callable[[], None]) -> None:
        """Do something after a delay on this actor's clock, unless it has died meanwhile."""
        life = self.life
        self.world.at(self.world.now + self.clock.true(delay_ns), lambda: self.act(act, life))

    def act(self, act: Callable[[], None], life: int) -> None:
        if not self.alive or life != self.life:
            return
        if self.world.now < self.paused_until:
            self.world.at(self.paused_until, lambda: self.act(act, life))
            return
        act()

    def deliver(self, source: str, kind: str, body: Any) -> None:
        raise NotImplementedError


@dataclass
class Imagined:
    """Time, a network, and what goes wrong on it; `actors` by their addresses."""

    seed: int
    faults: Faults = ANY_FAULTS
    """By default what `Faults.of` the seed says."""
    keep_trace: bool = True
    actors: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.random, self.now, self._serial = random.Random(self.seed), 0, 0
        self.faults = Faults.of(self.seed) if self.faults is ANY_FAULTS else self.faults
        self.queue: list[tuple[int, int, Callable[[], None]]] = []
        self.trace: list[str] = []
        self.digest = hashlib.sha256()
        self.cuts: set[tuple[str, str]] = set()
        self.happened: dict[str, int] = {}
        self.calm = self.ending = False

    # ---- time and messages --------------------------------------------------------------------------------------------

    def serial(self) -> int:
        self._serial += 1
        return self._serial

    def at(self, when_ns: int, act: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (when_ns, self.serial(), act))

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + int(seconds * 1e9)
        while self.queue and self.queue[0][0] <= end:
            self.now, _, act = heapq.heappop(self.queue)
            act()
        self.now = end

    def host_of(self, address: str) -> str:
        """Return the machine that an actor is on: cuts are between machines."""
        return address.partition("/")[0]

    def is_cut(self, source: str, target: str) -> bool:
        return not self.calm and (self.host_of(source), self.host_of(target)) in self.cuts

    def send(self, source: str, target: str, kind: str, body: Any) -> None:
        """Send a message: it arrives once, twice or never, sooner or later."""
        rng, faults = self.random, self.faults
        copies = 1
        if not self.calm:
            if self.is_cut(source, target) or rng.random() < faults.loss:
                copies = 0
            elif rng.random() < faults.duplicate:
                copies = 2
        self.log(f"{source} -> {target} {kind}" + ("" if copies == 1 else f" x{copies}"), body)
        for _ in range(copies):
            delay_ms = rng.uniform(0.05, 1.0)
            if not self.calm and rng.random() < faults.late:
                delay_ms += rng.uniform(0, faults.late_ms)
            self.at(self.now + int(delay_ms * MILLISECOND_NS), lambda: self.arrive(source, target, kind, body))

    def arrive(self, source: str, target: str, kind: str, body: Any) -> None:
        actor = self.actors[target]
        actor.act(lambda: actor.deliver(source, kind, body), actor.life)

    def log(self, line: str, body: Any = None) -> None:
        content = body.tobytes() if isinstance(body, np.ndarray) else b"%d" % getattr(body, "epoch", 0)
        self.digest.update(f"{self.now} {line}".encode() + content)
        if self.keep_trace:
            shown = "" if isinstance(body, (np.ndarray, bytes)) or body is None else f" {body!r:.160}"
            self.trace.append(f"{self.now / 1e6:10.3f} ms  {line}{shown}")

    def note(self, line: str) -> None:
        self.log(line)

    # ---- what goes wrong ----------------------------------------------------------------------------------------------

    def again(self, period_s: float, strike: Callable[[], None]) -> None:
        if period_s < 1e6:
            self.at(self.now + int(self.random.expovariate(1 / period_s) * 1e9), lambda: self.strike(period_s, strike))

    def strike(self, period_s: float, strike: Callable[[], None]) -> None:
        if not self.calm:
            strike()
            self.again(period_s, strike)

    def count(self, what: str, line: str) -> None:
        self.happened[what] = self.happened.get(what, 0) + 1
        self.note(f"*** {line}")

    def mend(self, cut: set[tuple[str, str]]) -> None:
        self.cuts -= cut
        self.note(f"*** mended {sorted(cut)}")


class Stream:
    """One direction of a TCP connection: bytes arrive once, whole and in order, or late, or never when the connection is gone.

    A cut, or a machine that is down, holds them up. `deliver` gets what arrives. A target that lives another life by then knows
    no such connection: `reset` hears so.
    """

    def __init__(
        self, world: Imagined, source: str, target: str, deliver: Callable[[Any], None], reset: Callable[[], None] | None = None
    ) -> None:
        self.world, self.source, self.target, self.deliver, self.reset = world, source, target, deliver, reset
        self.is_open, self.life, self._waiting = True, world.actors[target].life, list[Any]()

    def send(self, body: Any) -> None:
        """Send something."""
        self._waiting.append(body)
        if len(self._waiting) == 1:
            self._go()

    def _go(self) -> None:
        rng, world = self.world.random, self.world
        delay_ns = int(rng.uniform(0.02, 0.3) * MILLISECOND_NS)
        if world.is_cut(self.source, self.target):
            delay_ns = AGAIN_NS
        elif not world.calm and rng.random() < world.faults.loss:
            delay_ns += int(rng.uniform(1, 10) * MILLISECOND_NS)
        world.at(world.now + delay_ns, self._arrive)

    def _arrive(self) -> None:
        if not self.is_open or not self._waiting:
            return
        actor = self.world.actors[self.target]
        if not actor.alive or self.world.is_cut(self.source, self.target):
            self.world.at(self.world.now + AGAIN_NS, self._arrive)
            return
        bodies, self._waiting = self._waiting, []
        if actor.life != self.life:
            self.is_open = False
            if self.reset:
                self.reset()
            return
        actor.act(lambda: self._take(bodies), self.life)

    def _take(self, bodies: list[Any]) -> None:
        for body in bodies if self.is_open else ():
            self.deliver(body)
