"""The store's replication on an imagined network, under imagined clocks, with everything that can go wrong.

The decisions are the real ones: tables, shipping, holds, replicas and the coordinator run here as in the store process. What is
imagined is what they cannot see: when a message arrives and whether, whose clock goes how fast, who is dead, paused or cut off.
All of it comes from one seed, so a seed is a run, byte for byte; `World.trace` says what happened, for people.

    world = World(seed=7, faults=True)
    world.run(2.0)              seconds of imagined time
    world.heal(); world.settle(5.0)
    world.check()               raises Violation

Messages may be lost, doubled, late and out of order; hosts crash and come back empty, or are stopped for a while and go on as
if nothing had been; clocks drift up to what the lease's margin allows; cuts may be one-way.

In every other pair of seeds (`has_lines`) stores speak to the coordinator over connections, from a thread of their own. The end
of a process is then known by the end of its connection, unless that is reset, its host loses power, or the process parts. In
the other seeds heartbeats and leases are messages like all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datastore.coordination.heartbeats import MILLISECOND_NS, Timing
from datastore.coordination.maps import ClusterMap
from datastore.store import roles
from datastore.store.layout import PRIMARY
from datastore.store.partitions import PARTITION_BITS
from datastore.verification.clients import ClientHost
from datastore.verification.hosts import COORDINATOR, PARTITIONS, VALUE_BYTES, CoordinatorHost, StoreHost, short
from datastore.verification.imagined import ANY_FAULTS, CALM, NEVER, Faults, Imagined, Violation
from datastore.verification.linearizability import VIOLATION, check
from datastore.verification.lines import Talk
from datastore.verification.model import Operation

SETTLED_S = 6.0
"""Within this time after all is well, everything must be answered and every group full."""


@dataclass
class World(Imagined):
    """A cluster, its clients, and what befalls them."""

    stores: int = 4
    replicas: int = 0
    """0: two or three, by seed."""
    lines: bool | None = None
    """Whether stores speak to the coordinator over connections; None: by seed."""
    clients: int = 6
    timing: Timing = field(default_factory=lambda: Timing(heartbeat_ns=15 * MILLISECOND_NS))
    """More heartbeats than by default, so more that can go wrong; and seeds that once found something find it still."""
    patience_ns: int = 1_000 * MILLISECOND_NS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.replicas = self.replicas or 2 + self.seed % 2
        self.has_lines = self.speaks_over_lines()
        self.history: list[Operation] = []
        self.store_names = [f"nf{n + 1}" for n in range(self.stores)]
        self.keys = [(partition | 1 << 32, 5) for partition in range(PARTITIONS)] + [(2 << 32, 5), (3 << 32, 6)]
        first = ClusterMap.first([[self.store_names[(p + r) % self.stores] for r in range(self.replicas)]
                                  for p in range(PARTITIONS)])  # fmt: skip
        self.build(first)
        for number in range(self.clients):
            ClientHost(self, number)
        for period_s, strike in self.strikes():
            self.again(period_s, strike)

    def speaks_over_lines(self) -> bool:
        """Tell whether stores have connections to the coordinator in this world."""
        return self.seed // 2 % 2 == 1 if self.lines is None else self.lines

    def build(self, first: ClusterMap) -> None:
        """Make the coordinator and the hosts."""
        CoordinatorHost(self, first)
        for name in self.store_names:
            StoreHost(self, name)

    def strikes(self) -> tuple[tuple[float, Callable[[], None]], ...]:
        """Return what goes wrong, and after what mean time each."""
        return ((self.faults.crash_s, self.strike_crash), (self.faults.pause_s, self.strike_pause),
                (self.faults.cut_s, self.strike_cut), (self.faults.move_s, self.strike_move),
                (self.faults.coordinator_s, self.strike_coordinator), *self.strikes_of_lines())  # fmt: skip

    def strikes_of_lines(self) -> tuple[tuple[float, Callable[[], None]], ...]:
        if not self.has_lines:
            return ()
        return (self.faults.cut_s, self.strike_line), (self.faults.pause_s, self.strike_main_thread)

    def some_key(self) -> tuple[int, int]:
        """Return a key, often the same one."""
        return self.keys[0] if self.random.random() < 0.5 else self.random.choice(self.keys)

    def strike_crash(self) -> None:
        host = self.actors[self.random.choice(self.store_names)]
        dead = sum(not self.actors[name].alive for name in self.store_names)
        if host.alive and dead < 2:
            how = self.some_end()
            self.count("crash", f"{host.name} crashes ({how})")
            host.crash(how)
            away_s = self.random.choice((self.random.uniform(0.002, 0.06), self.random.uniform(0.05, 0.8)))
            self.at(self.now + int(away_s * 1e9), lambda: self.revive(host))

    def some_end(self) -> str:
        """Return how a process dies, see `lines.py`."""
        return self.random.choices(("close", "reset", "vanish", "part"), (4, 1, 1, 1))[0] if self.has_lines else "close"

    def talks(self) -> list[Talk]:
        """Return the threads that have a connection to the coordinator now."""
        return [actor for actor in self.actors.values() if isinstance(actor, Talk) and actor.alive and actor.line]

    def strike_line(self) -> None:
        """Let a connection to the coordinator be lost, or left by a process that lives on."""
        talks = self.talks()
        if talks:
            talk, parts = self.random.choice(talks), self.random.random() < 0.5
            self.count("line", f"{talk.name} {'parts' if parts else 'is reset'}")
            if parts:
                talk.part()
            elif talk.line:
                talk.line.reset()

    def strike_main_thread(self) -> None:
        """Let the main thread of a store be busy; its reporter's thread goes on."""
        host = self.actors[self.random.choice(self.store_names)]
        if host.alive and self.now >= host.busy_until:
            span_ms = self.random.choice((5, 20, 60, 100, 150))
            self.count("busy", f"the main thread of {host.name} is busy for {span_ms} ms")
            host.busy_until = self.now + span_ms * MILLISECOND_NS

    def revive(self, host: Any) -> None:
        if not host.alive:
            self.note(f"*** {host.name} starts again")
            host.restart()

    def strike_pause(self) -> None:
        host = self.actors[self.random.choice([*self.store_names, COORDINATOR])]
        if host.alive and self.now >= host.paused_until:
            span_ms = self.random.choice((20, 60, 100, 150, 300, 700))
            self.count("pause", f"{host.name} is stopped for {span_ms} ms")
            host.paused_until = self.now + span_ms * MILLISECOND_NS

    def strike_cut(self) -> None:
        names = [*self.store_names, COORDINATOR]
        one, other = self.random.sample(names, 2)
        both = self.random.random() < 0.5
        cut = {(one, other), (other, one)} if both else {(one, other)}
        self.count("cut", f"cut {one} {'<->' if both else '->'} {other}")
        self.cuts |= cut
        self.at(self.now + int(self.random.uniform(0.05, 0.6) * 1e9), lambda: self.mend(cut))

    def strike_move(self) -> None:
        host = self.actors[COORDINATOR]
        if host.alive and self.now >= host.paused_until:
            partition, target = self.random.randrange(PARTITIONS), self.random.choice(self.store_names)
            self.count("move", f"partition {partition} is to move to {target}")
            host.coordinator.move([partition], target)

    def strike_coordinator(self) -> None:
        if self.actors[COORDINATOR].alive:
            self.lose_coordinator()

    def lose_coordinator(self, away_s: float = 0.0) -> None:
        """Let the coordinator die, and the next one begin after a while; by default after any."""
        host = self.actors[COORDINATOR]
        self.count("coordinator crash", "the coordinator crashes")
        host.crash()
        self.at(self.now + int((away_s or self.random.uniform(0.01, 0.4)) * 1e9), lambda: self.revive(host))

    # ---- what must hold -----------------------------------------------------------------------------------------------

    def watch(self, host: StoreHost, partition: int) -> None:
        """At each request: nobody else may be primary of the partition now, with a lease."""
        if not self.rules(host, partition):
            return
        for name in self.store_names:
            other = self.actors[name]
            if other is not host and other.alive and self.rules(other, partition):
                raise Violation(f"seed {self.seed}: at {self.now / 1e6:.3f} ms both {host.name} and {name} are primary of "
                                f"partition {partition} and may answer")  # fmt: skip

    @staticmethod
    def rules(host: StoreHost, partition: int) -> bool:
        return bool(host.replica.has_lease(host.now()) and roles.role(host.words, partition) == PRIMARY)

    def record(self, operation: Operation) -> None:
        self.history.append(operation)

    def heal(self) -> None:
        """Let nothing go wrong any more, and everybody come back; who is stopped goes on when that is over."""
        self.note("*** all is well from here on")
        self.calm = True
        self.cuts.clear()
        for actor in self.actors.values():
            if not actor.alive:
                self.revive(actor)

    def settle(self, seconds: float) -> None:
        """Let everybody finish; raises Violation when somebody cannot."""
        deadline = self.now + int(seconds * 1e9)
        while self.now < deadline:
            self.run(0.05)
            if not self.unsettled():
                break
        else:
            raise Violation(f"seed {self.seed}: {self.unsettled()} {seconds:.1f} s after all was well")
        self.ending = True
        self.run(self.patience_ns / 1e9 + 0.2)

    def unsettled(self) -> str:
        stopped = [actor.name for actor in self.actors.values() if self.now < actor.paused_until]
        if stopped:
            return f"{', '.join(stopped)} are stopped"
        groups = self.actors[COORDINATOR].coordinator.map.groups
        lost = [p for p, group in enumerate(groups) if not group.members]
        for partition, group in enumerate(groups):
            if partition in lost:
                continue
            if len(group.members) != min(self.replicas, self.stores) or group.leaving or group.learners or group.successor:
                return f"partition {partition} still is {short(group)}"
        late = [actor.name for actor in self.actors.values() if isinstance(actor, ClientHost) and actor.pending
                and self.now - actor.pending.invoked_ns > 300 * MILLISECOND_NS
                and (actor.pending.low & int(PARTITION_BITS)) not in lost]  # fmt: skip
        return f"operations of {', '.join(late)} are not answered" if late else ""

    def check(self) -> None:
        """Raise Violation unless the history is linearizable and replicas are alike."""
        pending = [actor.pending for actor in self.actors.values() if isinstance(actor, ClientHost) and actor.pending]
        for name in self.store_names:
            self.actors[name].end()
        result = check(self.history + pending, VALUE_BYTES)
        if result.verdict == VIOLATION:
            raise Violation(f"seed {self.seed}: not linearizable\n" + "\n".join(result.explanation))
        for partition, group in enumerate(self.actors[COORDINATOR].coordinator.map.groups):
            copies = {self.contents(name, partition) for name in group.members}
            if len(copies) > 1:
                raise Violation(f"seed {self.seed}: replicas of partition {partition} differ: {', '.join(group.members)}")
        for name in self.store_names:
            self.actors[name].table.verify()

    def contents(self, name: str, partition: int) -> tuple[Any, ...]:
        """Return what a host's table holds of a partition, as something that can be compared."""
        return tuple(sorted((r.low, r.high, r.version, r.value) for r in self.actors[name].table.records(partition)))

    def play(self, seconds: float) -> None:
        """Let things go wrong for so long, heal, and check everything; raises Violation. Then the world is over."""
        try:
            self.run(seconds)
            self.heal()
            self.settle(SETTLED_S)
            self.check()
        finally:
            self.close()

    def close(self) -> None:
        for name in self.store_names:
            self.actors[name].close()


def simulate(seed: int, seconds: float = 1.5, **options: Any) -> World:
    """Run one seed to its end; raises Violation. Returns the world, for its trace and history."""
    world = World(seed, **options)
    world.play(seconds)
    return world


__all__ = ["ANY_FAULTS", "CALM", "NEVER", "Faults", "Violation", "World", "simulate"]
