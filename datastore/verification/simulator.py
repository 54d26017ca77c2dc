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
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from datastore.replication import holds as held
from datastore.replication import shipping as ship
from datastore.replication.coordinator import MILLISECOND_NS, Coordinator, HostState, Timing
from datastore.replication.maps import ClusterMap
from datastore.replication.replica import Replica
from datastore.store.operations import ADD, ANY_VERSION, DELETE, GET, INSERT, OPERATION_VALUE, PUT, operation_word
from datastore.store.partitions import PARTITION_BITS
from datastore.store.protocol import FRAME_HEADER_WORDS, find_client, frame_words, write_frame_header
from datastore.store.statuses import ABSENT, EXISTS, NAMES, OK, STALE_SEQUENCE, VERSION_MISMATCH
from datastore.store.table import STAMP, VALUE, Table, commit_record, open_record
from datastore.verification.linearizability import VIOLATION, check
from datastore.verification.model import UNANSWERED, Operation

CLUSTER, VALUE_BYTES, PARTITIONS = 0xC1, 16, 4
COORDINATOR = "control"
CONNECTIONS, ANSWER_WORDS = 256, FRAME_HEADER_WORDS + OPERATION_VALUE + VALUE_BYTES // 8
FRAME_BUFFER_WORDS = 1 << 14
SETTLED_S = 6.0
"""Within this time after all is well, everything must be answered and every group full."""
OUTCOMES = (OK, ABSENT, EXISTS, VERSION_MISMATCH, STALE_SEQUENCE)


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


NEVER = 1e9
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

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.alive, self.paused_until = world, name, True, 0
        drift = world.faults.drift
        self.clock = Clock(1 + world.random.uniform(-drift, drift), world.random.randrange(1, 10**12))
        self.life = 0

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


class StoreHost(Actor):
    """A store process, as far as its decisions go."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.start()

    def start(self) -> None:
        """Begin with an empty table."""
        world = self.world
        peers = [name for name in world.store_names if name != self.name]
        name = f"nearstate-simulated-{world.serial()}"
        self.table = Table.anonymous(
            name, PARTITIONS * 14, VALUE_BYTES, PARTITIONS, epoch=0, cluster=CLUSTER, clients=16, window=64, replication_secret=7
        )
        self.words, self.owner = self.table.words, self.table.register_owner()
        self.connected = np.zeros(16, np.uint8)
        self.shipping = ship.make_shipping(self.words, len(peers), self.connected)
        self.holds = held.make_holds(CONNECTIONS, 1, 1)
        self.answers = np.zeros((CONNECTIONS, ANSWER_WORDS), np.uint64)
        self.waiting: dict[int, str] = {}
        self.free = list(range(CONNECTIONS))
        self.buffer = np.zeros(FRAME_BUFFER_WORDS, np.uint64)
        self.replica = Replica(self.name, peers, self.words, self.shipping, self.owner, CLUSTER, world.serial(), world.timing)
        self.function = NetworkFunction(self, 1000 + world.serial())
        self.beat()
        self.retry()

    def crash(self) -> None:
        self.alive, self.life = False, self.life + 1
        self.function.crash()
        self.table.close()

    def restart(self) -> None:
        self.alive, self.paused_until = True, 0
        self.start()

    def beat(self) -> None:
        self.tell_coordinator()
        self.later(self.world.timing.heartbeat_ns, self.beat)

    def tell_coordinator(self) -> None:
        self.world.send(self.name, COORDINATOR, "beat", self.replica.beat(self.now()))
        for host in self.replica.peers:
            self.world.send(self.name, host, "ping", self.replica.ping(self.now()))

    def retry(self) -> None:
        for peer in range(len(self.replica.peers)):
            before_ns = self.now() - self.world.timing.retry_ns
            ship.lose(self.shipping, peer, before_ns, before_ns)
        self.pump()
        self.later(self.world.timing.retry_ns // 2, self.retry)

    def deliver(self, source: str, kind: str, body: Any) -> None:
        if kind == "grant":
            if self.replica.hear(self.now(), body):
                self.world.note(f"{self.name} follows map {self.replica.map.epoch}")
                self.tell_coordinator()
        elif kind == "request":
            self.serve(source, body)
        elif kind == "frames":
            self.apply(source, body)
        elif kind == "ping":
            pong = self.replica.pinged(self.now(), body)
            if pong:
                self.world.send(self.name, source, "pong", pong)
        elif kind == "pong":
            self.replica.ponged(body)
        elif kind == "ack":
            ship.take_ack(self.shipping, self.words, self.replica.peers.index(source), body, 0)
        self.pump()

    def serve(self, client: str, request: np.ndarray) -> None:
        if not self.free:
            return
        connection = self.free.pop()
        slot = int(find_client(self.words, request[2], self.now() // 10**9, self.connected))
        length = int(frame_words(request, 0, request.size, 0))
        held.serve_frame(
            self.shipping, self.holds, self.words, self.owner, slot, connection, self.now(), request, 0, length,
            self.answers[connection], 0,
        )  # fmt: skip
        self.world.watch(self, int(request[FRAME_HEADER_WORDS + 2] & PARTITION_BITS))
        self.waiting[connection] = client

    def apply(self, source: str, frames: np.ndarray) -> None:
        at = 0
        while at < frames.size:
            length = int(frames[at] >> np.uint64(32)) // 8
            ack = np.zeros(3, np.uint64)
            if ship.apply(
                self.shipping, self.words, self.owner, self.now() // 10**9, frames, at + FRAME_HEADER_WORDS,
                length - FRAME_HEADER_WORDS, ack, 0,
            ):  # fmt: skip
                self.world.send(self.name, source, "ack", ack)
            at += length

    def pump(self) -> None:
        """Ship what is due, and answer what may be answered."""
        self.replica.advance(self.now())
        for peer, host in enumerate(self.replica.peers):
            end = int(ship.ship_all(
                self.shipping, self.words, self.owner, peer, self.now(), self.buffer, 0, FRAME_BUFFER_WORDS
            ))  # fmt: skip
            if end:
                self.world.send(self.name, host, "frames", self.buffer[:end].copy())
        self.function.release()
        for connection, client in list(self.waiting.items()):
            if held.let_go(self.holds, self.words, connection, self.answers[connection]) > 0:
                self.world.send(self.name, client, "answer", self.answers[connection].copy())
                del self.waiting[connection]
                held.forget(self.holds, connection)
                self.free.append(connection)


class NetworkFunction:
    """A network function beside a store: it works on records in place, and its packets leave when the changes are committed.

    What it does is an ADD in the history. When its host is no longer primary its packet is dropped: no answer.
    """

    def __init__(self, host: StoreHost, number: int) -> None:
        self.host, self.number, self.sequence = host, number, 0
        self.waiting: list[tuple[Operation, int, int]] = []
        self.owner = host.table.register_owner()
        self.tick()

    def tick(self) -> None:
        if not self.host.world.ending:
            self.work()
            self.host.later(self.host.world.random.randrange(2, 20) * MILLISECOND_NS, self.tick)

    def work(self) -> None:
        """Add to a record of a partition this host is primary of."""
        host, world = self.host, self.host.world
        low, high = world.some_key()
        partition = low & int(PARTITION_BITS)
        if not host.replica.has_lease(host.now()):
            return
        slot = int(open_record(host.words, self.owner, np.uint64(low), np.uint64(high), host.replica.map.epoch, 1))
        if slot < 0:
            return
        world.watch(host, partition)
        self.sequence += 1
        host.words[slot + VALUE] += np.uint64(self.number)
        version, value = (int(host.words[slot + STAMP]) >> 20) + 1, host.words[slot + VALUE : slot + VALUE + 2].tobytes()
        operation = Operation(self.number, self.sequence, low, high, ADD, self.number.to_bytes(8, "little"), status=OK,
                              version=version, answer=value, invoked_ns=world.now)  # fmt: skip
        commit_record(host.words, self.owner, slot, 0)
        self.waiting.append((operation, int(ship.changes(host.words, partition)), int(ship.reign(host.words, partition))))

    def release(self) -> None:
        """Let the packets leave whose changes are committed; drop those whose changes may be lost."""
        words, still = self.host.words, []
        for operation, changes, reign in self.waiting:
            partition = operation.low & int(PARTITION_BITS)
            if ship.reign(words, partition) != reign or not ship.rules(ship.role(words, partition)):
                self.give_up(operation)
            elif ship.committed(words, partition) >= changes:
                self.host.world.record(operation._replace(answered_ns=self.host.world.now))
            else:
                still.append((operation, changes, reign))
        self.waiting = still

    def give_up(self, operation: Operation) -> None:
        self.host.world.record(operation._replace(status=UNANSWERED, version=0, answer=None))

    def crash(self) -> None:
        for operation, _, _ in self.waiting:
            self.give_up(operation)
        self.waiting = []


class CoordinatorHost(Actor):
    """A coordinator, as far as its decisions go; `saved` is its disk."""

    def __init__(self, world: World, first: ClusterMap) -> None:
        super().__init__(world, COORDINATOR)
        hosts = {name: HostState(0) for name in world.store_names}
        self.coordinator = Coordinator(first, CLUSTER, world.replicas, hosts, world.timing)
        self.saved = self.coordinator.save()
        self.tick()

    def crash(self) -> None:
        self.alive, self.life = False, self.life + 1

    def restart(self) -> None:
        self.alive, self.paused_until = True, 0
        self.coordinator = Coordinator.start(self.saved, self.now(), self.world.timing)
        self.tick()

    def tick(self) -> None:
        self.coordinator.advance(self.now())
        self.publish()
        self.later(self.world.timing.heartbeat_ns // 3, self.tick)

    def publish(self) -> None:
        """Save what was decided, then tell everybody."""
        if self.coordinator.dirty:
            self.saved, self.coordinator.dirty = self.coordinator.save(), False
            self.world.note(f"coordinator: map {self.coordinator.map.epoch} "
                            + " ".join(_short(group) for group in self.coordinator.map.groups))  # fmt: skip
            for host in self.world.store_names:
                self.world.send(self.name, host, "grant", self.coordinator.news(host))

    def deliver(self, source: str, kind: str, body: Any) -> None:
        if kind == "beat":
            grant = self.coordinator.hear(self.now(), body)
            self.publish()
            self.world.send(self.name, source, "grant", grant)
        elif kind == "map?":
            self.world.send(self.name, source, "map", self.coordinator.map)


def _short(group: Any) -> str:
    text = ",".join(group.members) + ("+" + ",".join(group.learners) if group.learners else "")
    return text + ("-" + ",".join(group.leaving) if group.leaving else "") + (f">{group.successor}" if group.successor else "")


class ClientHost(Actor):
    """A client with one operation at a time, on a few keys, which it asks again until it is answered or gives up.

    Every other client mostly reads, and follows an old map as long as that works: who answers from old state is found out so.
    """

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, f"client{number}")
        self.number, self.sequence, self.map = number, 0, ClusterMap(0, ())
        self.pending: Operation | None = None
        self.versions: dict[tuple[int, int], int] = {}
        self.next()

    def next(self) -> None:
        self.pending = None
        if self.world.ending:
            return
        self.later(self.world.random.randrange(1, 2 * MILLISECOND_NS), self.invoke)

    def invoke(self) -> None:
        rng = self.world.random
        self.sequence += 1
        key = self.world.some_key()
        kind = rng.choices((GET, PUT, INSERT, ADD, DELETE), (40, 3, 2, 4, 1) if self.number % 2 else (5, 3, 2, 4, 1))[0]
        known = ANY_VERSION if rng.random() < 0.5 else self.versions.get(key, 1)
        expected = known if kind in (PUT, DELETE) else ANY_VERSION
        value = rng.randrange(1, 1 << 16).to_bytes(8, "little") + (bytes(8) if kind in (PUT, INSERT) else b"")
        self.pending = Operation(self.number, self.sequence, *key, kind, value if kind in (PUT, INSERT, ADD) else b"", expected,
                                 invoked_ns=self.world.now)  # fmt: skip
        self.ask()

    def ask(self) -> None:
        """Send the operation to whom the map names, and look again after a while."""
        operation = self.pending
        if operation is None:
            return
        rng = self.world.random
        group = self.map.groups[operation.low & int(PARTITION_BITS)] if self.map.groups else None
        if group and group.members:
            reads_anywhere = operation.kind == GET and rng.random() < 0.6
            target = rng.choice(group.members) if reads_anywhere else group.members[0]
            self.world.send(self.name, target, "request", self.frame(operation))
        if not group or rng.random() < 0.02:
            self.world.send(self.name, COORDINATOR, "map?", None)
        self.later(rng.randrange(20, 60) * MILLISECOND_NS, lambda: self.look_again(operation))

    def look_again(self, operation: Operation) -> None:
        if self.pending is not operation:
            return
        if self.world.now - operation.invoked_ns > self.world.patience_ns:
            self.world.record(operation)  # its answer never came
            self.next()
            return
        self.world.send(self.name, COORDINATOR, "map?", None)
        self.ask()

    def frame(self, operation: Operation) -> np.ndarray:
        words = np.zeros(ANSWER_WORDS, np.uint64)
        write_frame_header(words, 0, 1, ANSWER_WORDS - FRAME_HEADER_WORDS, 0, self.map.epoch, np.uint64(self.number + 1),
                           np.uint64(CLUSTER))  # fmt: skip
        at = FRAME_HEADER_WORDS
        words[at] = operation_word(operation.kind, 0, len(operation.value), operation.offset)
        words[at + 1], words[at + 2], words[at + 3] = operation.sequence, operation.low, operation.high
        words[at + 4] = (operation.expected << 20) & 0xFFFFFFFFFFFFFFFF if operation.kind in (PUT, DELETE) else 0
        given = np.frombuffer(operation.value, np.uint64)
        words[at + OPERATION_VALUE : at + OPERATION_VALUE + given.size] = given
        return words

    def deliver(self, source: str, kind: str, body: Any) -> None:
        if kind == "map":
            if body.epoch > self.map.epoch:
                self.map = body
            return
        operation, at = self.pending, FRAME_HEADER_WORDS
        if operation is None or int(body[at + 1]) != operation.sequence:
            return
        status = int(body[at]) >> 8 & 0xFF
        if status not in OUTCOMES:
            self.world.note(f"{self.name} is refused by {source}: {NAMES[status]}")
            return  # `look_again` comes
        version = int(body[at + 4]) >> 20
        shows = status in (OK, EXISTS, VERSION_MISMATCH)
        answer = body[at + OPERATION_VALUE :].tobytes() if shows else None
        self.versions[operation.low, operation.high] = version
        self.world.record(operation._replace(status=status, version=version if shows else 0, answer=answer,
                                             answered_ns=self.world.now))  # fmt: skip
        self.next()


@dataclass
class World:
    """A cluster, its clients, and what befalls them."""

    seed: int
    faults: Faults = ANY_FAULTS
    """By default what `Faults.of` the seed says."""
    stores: int = 4
    replicas: int = 0
    """0: two or three, by seed."""
    clients: int = 6
    timing: Timing = field(default_factory=lambda: Timing(heartbeat_ns=15 * MILLISECOND_NS))
    """More heartbeats than by default, so more that can go wrong; and seeds that once found something find it still."""
    patience_ns: int = 1_000 * MILLISECOND_NS
    keep_trace: bool = True

    def __post_init__(self) -> None:
        self.random, self.now, self._serial = random.Random(self.seed), 0, 0
        self.faults = Faults.of(self.seed) if self.faults is ANY_FAULTS else self.faults
        self.replicas = self.replicas or 2 + self.seed % 2
        self.queue: list[tuple[int, int, Callable[[], None]]] = []
        self.trace: list[str] = []
        self.digest = hashlib.sha256()
        self.history: list[Operation] = []
        self.cuts: set[tuple[str, str]] = set()
        self.happened: dict[str, int] = {}
        self.calm = self.ending = False
        self.store_names = [f"nf{n + 1}" for n in range(self.stores)]
        self.keys = [(partition | 1 << 32, 5) for partition in range(PARTITIONS)] + [(2 << 32, 5), (3 << 32, 6)]
        first = ClusterMap.first([[self.store_names[(p + r) % self.stores] for r in range(self.replicas)]
                                  for p in range(PARTITIONS)])  # fmt: skip
        self.actors: dict[str, Any] = {}
        self.actors[COORDINATOR] = CoordinatorHost(self, first)
        for name in self.store_names:
            self.actors[name] = StoreHost(self, name)
        for number in range(self.clients):
            self.actors[f"client{number}"] = ClientHost(self, number)
        for period_s, strike in ((self.faults.crash_s, self.strike_crash), (self.faults.pause_s, self.strike_pause),
                                 (self.faults.cut_s, self.strike_cut), (self.faults.move_s, self.strike_move),
                                 (self.faults.coordinator_s, self.strike_coordinator)):  # fmt: skip
            self.again(period_s, strike)

    # ---- time and messages --------------------------------------------------------------------------------------------

    def serial(self) -> int:
        self._serial += 1
        return self._serial

    def some_key(self) -> tuple[int, int]:
        """Return a key, often the same one."""
        return self.keys[0] if self.random.random() < 0.5 else self.random.choice(self.keys)

    def at(self, when_ns: int, act: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (when_ns, self.serial(), act))

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + int(seconds * 1e9)
        while self.queue and self.queue[0][0] <= end:
            self.now, _, act = heapq.heappop(self.queue)
            act()
        self.now = end

    def send(self, source: str, target: str, kind: str, body: Any) -> None:
        """Send a message: it arrives once, twice or never, sooner or later."""
        rng, faults = self.random, self.faults
        copies = 1
        if not self.calm:
            if (source, target) in self.cuts or rng.random() < faults.loss:
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
            shown = "" if isinstance(body, np.ndarray) or body is None else f" {body!r:.160}"
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

    def strike_crash(self) -> None:
        host = self.actors[self.random.choice(self.store_names)]
        dead = sum(not self.actors[name].alive for name in self.store_names)
        if host.alive and dead < 2:
            self.count("crash", f"{host.name} crashes")
            host.crash()
            away_s = self.random.choice((self.random.uniform(0.002, 0.06), self.random.uniform(0.05, 0.8)))
            self.at(self.now + int(away_s * 1e9), lambda: self.revive(host))

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

    def mend(self, cut: set[tuple[str, str]]) -> None:
        self.cuts -= cut
        self.note(f"*** mended {sorted(cut)}")

    def strike_move(self) -> None:
        host = self.actors[COORDINATOR]
        if host.alive and self.now >= host.paused_until:
            partition, target = self.random.randrange(PARTITIONS), self.random.choice(self.store_names)
            self.count("move", f"partition {partition} is to move to {target}")
            host.coordinator.move([partition], target)

    def strike_coordinator(self) -> None:
        host = self.actors[COORDINATOR]
        if host.alive:
            self.count("coordinator crash", "the coordinator crashes")
            host.crash()
            self.at(self.now + int(self.random.uniform(0.01, 0.4) * 1e9), lambda: self.revive(host))

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
        return bool(host.replica.has_lease(host.now()) and ship.role(host.words, partition) == ship.PRIMARY)

    def record(self, operation: Operation) -> None:
        self.history.append(operation)

    def heal(self) -> None:
        """Let nothing go wrong any more, and everybody come back."""
        self.note("*** all is well from here on")
        self.calm = True
        self.cuts.clear()
        for actor in self.actors.values():
            actor.paused_until = min(actor.paused_until, self.now)
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
        groups = self.actors[COORDINATOR].coordinator.map.groups
        lost = [p for p, group in enumerate(groups) if not group.members]
        for partition, group in enumerate(groups):
            if partition in lost:
                continue
            if len(group.members) != min(self.replicas, self.stores) or group.leaving or group.learners or group.successor:
                return f"partition {partition} still is {_short(group)}"
        late = [actor.name for actor in self.actors.values() if isinstance(actor, ClientHost) and actor.pending
                and self.now - actor.pending.invoked_ns > 300 * MILLISECOND_NS
                and (actor.pending.low & int(PARTITION_BITS)) not in lost]  # fmt: skip
        return f"operations of {', '.join(late)} are not answered" if late else ""

    def check(self) -> None:
        """Raise Violation unless the history is linearizable and replicas are alike."""
        pending = [actor.pending for actor in self.actors.values() if isinstance(actor, ClientHost) and actor.pending]
        for name in self.store_names:
            self.actors[name].function.crash()
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
            self.actors[name].table.close()


def simulate(seed: int, seconds: float = 1.5, **options: Any) -> World:
    """Run one seed to its end; raises Violation. Returns the world, for its trace and history."""
    world = World(seed, **options)
    world.play(seconds)
    return world
