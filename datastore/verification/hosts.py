"""Store processes and a coordinator, as far as their decisions go: the product's, with messages in place of sockets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from datastore.coordination.attendance import Attendance
from datastore.coordination.coordinator import Coordinator, HostState
from datastore.coordination.heartbeats import MILLISECOND_NS
from datastore.coordination.maps import ClusterMap
from datastore.coordination.messages import grant_message, read_beat
from datastore.replication import applying
from datastore.replication import holds as held
from datastore.replication import shipping as ship
from datastore.replication.frames import image_words
from datastore.replication.link import make_shipping
from datastore.replication.links import ACKS_DUE, DESCRIPTOR, ROUND_NS, acknowledged_frames, make_links, pause_ns
from datastore.replication.replica import Replica
from datastore.replication.spokesman import Spokesman
from datastore.store import roles
from datastore.store.layout import CHANGES_AT, STAMP, VALUE
from datastore.store.operations import ADD, OPERATION_VALUE
from datastore.store.partitions import PARTITION_BITS
from datastore.store.protocol import FRAME_HEADER_WORDS, find_client, frame_words, highest_sequence
from datastore.store.records import commit_record, open_record
from datastore.store.statuses import OK
from datastore.store.table import Table
from datastore.verification.imagined import Actor, Stream, Violation
from datastore.verification.lines import COORDINATOR, Line, Talk
from datastore.verification.model import UNANSWERED, Operation

CLUSTER, VALUE_BYTES, PARTITIONS = 0xC1, 16, 4
CLIENT_SLOTS, WINDOW = 32, 64
CONNECTIONS, ANSWER_WORDS = 256, FRAME_HEADER_WORDS + OPERATION_VALUE + VALUE_BYTES // 8


class StoreHost(Actor):
    """A store process, as far as its decisions go: its main thread, and `talk`, the reporter's thread.

    Without `world.has_lines` it has one thread, whose heartbeats and leases may be lost, doubled and late like all messages.
    """

    def __init__(self, world: Any, name: str) -> None:
        super().__init__(world, name)
        self.busy_until = 0
        self.talk = Talk(self, self.report, self.hear) if world.has_lines else None
        self.start()

    def act(self, act: Callable[[], None], life: int) -> None:
        """As for every actor, once the main thread has time."""
        if self.alive and life == self.life and self.world.now < self.busy_until:
            self.world.at(self.busy_until, lambda: self.act(act, life))
        else:
            super().act(act, life)

    def start(self) -> None:
        """Begin with an empty table."""
        world = self.world
        peers = [name for name in world.store_names if name != self.name]
        name = f"nearstate-simulated-{world.serial()}"
        self.table = Table.anonymous(
            name,
            PARTITIONS * 14,
            VALUE_BYTES,
            PARTITIONS,
            epoch=0,
            cluster=CLUSTER,
            clients=CLIENT_SLOTS,
            window=WINDOW,
            replication_secret=7,
        )
        self.words, self.owner = self.table.words, self.table.register_owner()
        self.connected = np.zeros(CLIENT_SLOTS, np.uint8)
        self.shipping = make_shipping(self.words, len(peers), self.connected)
        self.holds = held.make_holds(CONNECTIONS, 1, 1)
        self.answers = np.zeros((CONNECTIONS, ANSWER_WORDS), np.uint64)
        self.waiting: dict[int, str] = {}
        self.free = list(range(CONNECTIONS))
        self.links = make_links(self.words, len(peers))
        self.links.control[:, DESCRIPTOR] = 0  # connected
        self.buffer = np.zeros(image_words(self.words), np.uint64)
        self.lines: list[StoreLine] = []
        self.is_pumping = False
        self.replica = Replica(self.name, peers, self.words, self.shipping, self.owner, CLUSTER, world.serial(), world.timing)
        self.work_in_place()
        if self.talk:
            self.spokesman = Spokesman(self.replica, world.timing, self.now())
            self.is_called, self.pinged_ns = False, 0
            self.talk.start()
            self.work()
        else:
            self.beat()
        self.retry()

    def work_in_place(self) -> None:
        """Begin what shares the table with this process."""
        self.function: InPlaceWriter | None = InPlaceWriter(self, 1000 + self.world.serial())

    def crash(self, how: str = "close") -> None:
        """Die. how: see `lines.py`; but for "vanish" the kernel lives on, and closes the connections of clients."""
        if self.talk:
            self.talk.end(how)
        self.alive, self.life = False, self.life + 1
        self.end()
        for line in self.lines if how != "vanish" else ():
            line.close()
        self.close()

    def changes_total(self) -> int:
        """Return how often something was changed, of all partitions."""
        at = int(self.words[CHANGES_AT])
        return int(self.words[at : at + PARTITIONS].sum())

    def end(self) -> None:
        """Nothing more will come of what works in place."""
        if self.function:
            self.function.crash()

    def close(self) -> None:
        self.table.close()

    def restart(self) -> None:
        self.alive, self.paused_until, self.busy_until = True, 0, 0
        self.start()

    # ---- heartbeats, with one thread ----------------------------------------------------------------------------------

    def beat(self) -> None:
        self.tell_coordinator()
        self.later(self.world.timing.heartbeat_ns, self.beat)

    def tell_coordinator(self) -> None:
        self.world.send(self.name, COORDINATOR, "beat", self.replica.beat(self.now()))
        self.ping()

    def ping(self) -> None:
        for host in self.replica.peers:
            self.world.send(self.name, host, "ping", self.replica.ping(self.now()))

    # ---- heartbeats, with two threads, as in `process/member.py` ----------------------------------------------------

    def report(self) -> dict[str, Any] | None:
        return self.spokesman.report(self.now())

    def hear(self, message: dict[str, Any]) -> None:
        if self.spokesman.hear(message) and not self.is_called:
            self.is_called = True
            self.later(self.world.random.randrange(10_000, 200_000), self.follow)

    def work(self) -> None:
        """What the main thread does every heartbeat, or sooner while the coordinator waits for its word."""
        now_ns = self.now()
        self.spokesman.work(now_ns)
        self.replica.advance(now_ns)
        if now_ns - self.pinged_ns >= self.world.timing.heartbeat_ns * 3 // 4:
            self.pinged_ns = now_ns
            self.ping()
        self.look()
        self.later(self.spokesman.pause_ns(), self.work)

    def follow(self) -> None:
        """Follow the maps that the reporter's thread has heard."""
        self.is_called = False
        if self.spokesman.follow(self.now()):
            self.world.note(f"{self.name} follows map {self.replica.map.epoch}")
            self.ping()
            self.look()
            self.pump()

    def look(self) -> None:
        if self.spokesman.look(self.now()) and self.talk:
            self.talk.tell()

    # ---- what the main thread does ------------------------------------------------------------------------------------

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
        elif kind == "pong":
            self.replica.ponged(body)
            return
        elif kind == "ping":
            pong = self.replica.pinged(self.now(), body)
            if pong:
                self.world.send(self.name, source, "pong", pong)
            return
        elif kind == "ack":
            peer = self.replica.peers.index(source)
            ship.take_ack(self.shipping, self.words, peer, body, 0)
            self.links.control[peer, ACKS_DUE] -= 1
        self.pump()

    def ship(self, peer: int, host: str) -> None:
        """Send a peer what is due, in rounds, as `replication/links.py` does."""
        control, now_ns = self.links.control, self.now()
        pause = int(pause_ns(self.links, peer, now_ns))
        if pause > 0:
            self.pump_later(pause + 1)
            return
        end = int(ship.ship_all(self.shipping, self.words, self.owner, peer, now_ns, self.buffer, 0, self.buffer.size))
        if end:
            due = int(acknowledged_frames(self.buffer, 0, end))
            control[peer, ACKS_DUE] += due
            control[peer, ROUND_NS] = now_ns if due else control[peer, ROUND_NS]
            self.world.send(self.name, host, "frames", self.buffer[:end].copy())

    def pump_later(self, delay_ns: int) -> None:
        """`pump` after a while; once."""
        if not self.is_pumping:
            self.is_pumping = True
            self.later(delay_ns, self.pump)

    def greet(self, client_id: int) -> int:
        """Return the highest sequence number that was done for a client, as HELLO is answered."""
        slot = int(find_client(self.words, np.uint64(client_id), self.now() // 10**9, self.connected))
        return int(highest_sequence(self.words, slot)) if slot >= 0 else 0

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
            if applying.apply(
                self.shipping, self.words, self.owner, self.now() // 10**9, frames, at + FRAME_HEADER_WORDS,
                length - FRAME_HEADER_WORDS, ack, 0,
            ):  # fmt: skip
                self.world.send(self.name, source, "ack", ack)
            at += length

    def pump(self) -> None:
        """Ship what is due, and answer what may be answered."""
        self.is_pumping = False
        self.replica.advance(self.now())
        for peer, host in enumerate(self.replica.peers):
            self.ship(peer, host)
        if self.function:
            self.function.release()
        for line in self.lines:
            if line.sent < line.written:
                line.release()
        for connection, client in list(self.waiting.items()):
            if held.let_go(self.holds, self.words, connection, self.answers[connection]) > 0:
                self.world.send(self.name, client, "answer", self.answers[connection].copy())
                del self.waiting[connection]
                held.forget(self.holds, connection)
                self.free.append(connection)


class StoreLine:
    """A connection of an NF process at a store: frames of operations in, answers out, in order (`process/server.py`)."""

    def __init__(self, host: StoreHost, answers: Stream, close: Callable[[], None]) -> None:
        """answers: where they go. close: tells the other end that the connection is gone."""
        self.host, self.stream, self.close = host, answers, close
        self.holds = held.make_holds(1, 4 * WINDOW, 2 * WINDOW)
        self.answers, self.written, self.sent = np.zeros(1 << 16, np.uint64), 0, 0
        self.unread = b""

    def receive(self, data: bytes) -> None:
        """Do all operations of all whole frames that have arrived."""
        self.unread += data
        while len(self.unread) >= 8 * FRAME_HEADER_WORDS:
            words = np.frombuffer(self.unread[: len(self.unread) // 8 * 8], np.uint64)
            length = int(frame_words(words, 0, words.size, 0))
            if length <= 0:
                break
            self.serve(words[:length].copy())
            self.unread = self.unread[length * 8 :]
        self.host.pump()

    def serve(self, request: np.ndarray) -> None:
        host = self.host
        slot = int(find_client(host.words, request[2], host.now() // 10**9, host.connected))
        if self.sent == self.written > self.answers.size // 2:
            self.sent = self.written = 0
        self.written += int(held.serve_frame(
            host.shipping, self.holds, host.words, host.owner, slot, 0, host.now(), request, 0, request.size, self.answers,
            self.written,
        ))  # fmt: skip

    def release(self) -> None:
        """Send the answers that need not wait any more."""
        end = int(held.let_go(self.holds, self.host.words, 0, self.answers))
        if end > self.sent:
            self.stream.send(self.answers[self.sent : end].tobytes())
            self.sent = end


class InPlaceWriter:
    """A process beside a store that works on records in place, and is answered when the changes are committed.

    What it does is an ADD in the history. When its host is no longer primary there is no answer. (The packet loop itself is in
    `nfs/verification/instance.py`.)
    """

    def __init__(self, host: StoreHost, number: int) -> None:
        self.host, self.number, self.sequence = host, number, 0
        self.waiting: list[tuple[Operation, int, int]] = []
        self.owner = host.table.register_owner()
        self.tick()

    def tick(self) -> None:
        if not self.host.world.ending:
            self.work()
            (self.host.talk or self.host).later(self.host.world.random.randrange(2, 20) * MILLISECOND_NS, self.tick)

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
        self.waiting.append((operation, int(roles.changes(host.words, partition)), int(roles.reign(host.words, partition))))

    def release(self) -> None:
        """Let the packets leave whose changes are committed; drop those whose changes may be lost."""
        words, still = self.host.words, []
        for operation, changes, reign in self.waiting:
            partition = operation.low & int(PARTITION_BITS)
            if roles.reign(words, partition) != reign or not roles.rules(roles.role(words, partition)):
                self.give_up(operation)
            elif roles.committed(words, partition) >= changes:
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
    """A coordinator, as far as its decisions go; `saved` is its disk, `lines` are its connections."""

    def __init__(self, world: Any, first: ClusterMap) -> None:
        super().__init__(world, COORDINATOR)
        hosts = {name: HostState(0) for name in world.store_names}
        self.lines: list[Line] = []
        self.coordinator = Coordinator(first, CLUSTER, world.replicas, hosts, world.timing)
        self.saved = self.coordinator.save()
        self.start()

    def start(self) -> None:
        """Begin, or go on after a crash."""
        self.is_turning = False
        self.attendance = self.attend()
        self.tick()

    def attend(self) -> Attendance[Line]:
        return Attendance(self.coordinator, None, None, Line.tell, self.now())

    def crash(self) -> None:
        self.alive, self.life = False, self.life + 1
        for line in self.lines:
            line.drop()
        self.lines = []

    def restart(self) -> None:
        self.alive, self.paused_until = True, 0
        self.coordinator = Coordinator.start(self.saved, self.now(), self.world.timing)
        self.start()

    def tick(self) -> None:
        self.turn()
        self.later(self.world.timing.heartbeat_ns // 3, self.tick)

    def turn(self) -> None:
        """Do what is due, after the messages that had arrived."""
        self.is_turning = False
        if self.world.has_lines:
            self.attendance.look(self.now())
        self.attendance.advance(self.now())
        self.publish()

    def turn_soon(self) -> None:
        """End this turn: what arrives until then is heard in the same one."""
        if not self.is_turning:
            self.is_turning = True
            self.later(self.world.random.randrange(5_000, 60_000), self.turn)

    def publish(self) -> None:
        """Save what was decided, then tell everybody."""
        coordinator = self.coordinator
        if coordinator.dirty:
            self.saved, coordinator.dirty = coordinator.save(), False
            self.check_ends()
            self.world.note(f"coordinator: map {coordinator.map.epoch} "
                            + " ".join(short(group) for group in coordinator.map.groups))  # fmt: skip
            for host in () if self.world.has_lines else self.world.store_names:
                self.world.send(self.name, host, "grant", coordinator.news(host))
        self.attendance.announce()
        if self.world.has_lines and len(coordinator.moves) != len(self.saved["moves"]):
            coordinator.dirty = True

    def check_ends(self) -> None:
        """Raise Violation when a process that lives is taken for one that has ended."""
        for host, incarnation in self.coordinator.map.ended.items():
            store = self.world.actors[host]
            if store.alive and store.replica.incarnation == incarnation:
                raise Violation(f"seed {self.world.seed}: at {self.world.now / 1e6:.3f} ms the store process of {host} lives, "
                                "and the map says that it has ended")  # fmt: skip

    def deliver(self, source: str, kind: str, body: Any) -> None:
        if kind == "beat":
            grant = self.coordinator.hear(self.now(), body)
            self.publish()
            self.world.send(self.name, source, "grant", grant)
        elif kind == "map?":
            self.world.send(self.name, source, "map", self.coordinator.map)

    # ---- connections, as in `coordination/process.py` -------------------------------------------------------------

    def converse(self, line: Line, message: dict[str, Any]) -> None:
        """Take a message of a process."""
        if "parting" in message:
            self.attendance.part(line)
        elif "instance" in message:
            self.attendance.hear_instance(self.now(), line, message["instance"])
        else:
            grant = self.attendance.hear_store(self.now(), line, read_beat(message["beat"]))
            self.publish()
            line.tell(grant_message(grant))
        self.turn_soon()

    def lose(self, line: Line, is_closed: bool) -> None:
        """A connection is closed, or lost."""
        self.world.note(f"the connection of {line.speaker.name} is {'closed' if is_closed else 'lost'}")
        self.attendance.lose(self.now(), line, is_closed)
        self.turn_soon()


def short(group: Any) -> str:
    text = ",".join(group.members) + ("+" + ",".join(group.learners) if group.learners else "")
    return text + ("-" + ",".join(group.leaving) if group.leaving else "") + (f">{group.successor}" if group.successor else "")
