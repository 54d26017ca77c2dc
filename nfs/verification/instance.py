"""An NF process on the imagined network: the product's packet loop, client and orders; the simulator carries the bytes.

The client's sockets are real ones, one end of a pair each. What the loop sends arrives at the other end, goes over the imagined
network as a stream, and what a store answers is put in there. So the loop's own client runs, with its windows, streams and
retries. Time stands still within a turn of the loop; a turn comes when there is something to do, as in `loop.wait`.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Any

import numpy as np

from datastore.coordination.heartbeats import MILLISECOND_NS
from datastore.coordination.maps import ClusterMap
from datastore.store import roles
from datastore.store.client import Client, give_up
from datastore.store.layout import PRIMARY, lease_holds
from datastore.store.statuses import NOT_PRIMARY
from datastore.verification.hosts import CLUSTER, VALUE_BYTES, WINDOW, StoreHost, StoreLine
from datastore.verification.imagined import Actor, Stream
from datastore.verification.lines import Talk
from nfs.dataplane.engine import DOWN, HELD_NS, HERE, NEVER, PUT_OFF, QUEUES, make_engine
from nfs.dataplane.frames import free_frames, make_frames
from nfs.dataplane.headers import INSIDE
from nfs.dataplane.ledger import RECEIVED, to_counts
from nfs.dataplane.loop import turn_at, waiting
from nfs.dataplane.orders import Orders
from nfs.dataplane.passage import note_oldest
from nfs.dataplane.process import MET_S
from nfs.dataplane.steps import make_chain
from nfs.verification.claimed import claimed
from nfs.verification.counted import counted
from nfs.verification.rings import arrive, departed, memory_port

FRAMES = 512
FLIGHTS = 48
"""Fewer than the client's window, as `make_engine` asks."""
MET_NS = int(MET_S * 1_000) * MILLISECOND_NS
RECONNECT_NS = 50 * MILLISECOND_NS


class Connection:
    """A connection to a store: this process' end of a pair of sockets, and the streams that carry what goes through it."""

    def __init__(self, instance: InstanceHost, number: int, store: StoreHost) -> None:
        self.instance, self.number = instance, number
        ours, self.far = socket.socketpair()
        for end in (ours, self.far):
            end.setblocking(False)
        world = instance.world
        self.to_store = Stream(world, instance.name, store.name, self._ask, self._reset)
        self.to_instance = Stream(world, store.name, instance.name, self._answer)
        self.line = StoreLine(store, self.to_instance, self._hang_up)
        store.lines.append(self.line)
        instance.client.take_connection(number, ours, store.greet(instance.stream(number)))

    def carry(self) -> None:
        """Take what the loop has sent and let it travel."""
        try:
            data = self.far.recv(1 << 20)
        except OSError:  # nothing, or closed
            return
        self.to_store.send(data)

    def _ask(self, data: bytes) -> None:
        self.line.receive(data)

    def _answer(self, data: bytes) -> None:
        if data and self.far.fileno() >= 0:
            self.far.send(data)
        else:
            self.far.close()  # the store's process has ended: its kernel says so
        self.instance.wake()

    def _hang_up(self) -> None:
        self.to_instance.send(b"")

    def _reset(self) -> None:
        """Another process answers there by now, and knows no such connection."""
        self.far.close()
        self.instance.wake()

    def close(self) -> None:
        """Carry nothing more."""
        self.to_store.is_open = self.to_instance.is_open = False
        if self.line in self.line.host.lines:
            self.line.host.lines.remove(self.line)
        self.far.close()


class InstanceHost(Actor):
    """The NF process of a host; `store` is the store process there (`RackStore`). It lives and dies apart from it."""

    def __init__(self, world: Any, store: Any) -> None:
        super().__init__(world, f"{store.name}/nf", store.clock)
        self.store, self.host = store, store.name
        self.chain = make_chain([claimed if world.has_claims else counted], {}, VALUE_BYTES)
        self.troubled_ns = -MILLISECOND_NS * 1000
        self.talk = Talk(self, self.report, self.hear)
        self.start()

    # ---- as `process.py` does -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin with the store that is there; the coordinator's map is the one of its disk."""
        world, newest = self.world, self.world.newest_map()
        self.frames, self.ports = make_frames(FRAMES), (memory_port(), memory_port())
        self.table = self.store.table
        self.names = list(world.store_names)
        self.client_id = 100 + world.serial()
        primary = self._primaries(newest)
        owner = self.table.register_owner()
        self.client = Client([("", 0)] * len(self.names), self.client_id, VALUE_BYTES, CLUSTER, newest.epoch, WINDOW)
        self.engine = make_engine(self.chain, self.frames, primary, owner, newest.epoch, VALUE_BYTES // 8, len(self.names),
                                  flights=FLIGHTS, replicates=True)  # fmt: skip
        self.engine.remote[:] = [self.names.index(group.primary or self.host) for group in newest.groups]
        self.engine.control[DOWN] = (1 << len(self.names)) - 1
        self.orders = Orders(self.engine, self.ports, self.client.state, self.names, self.host, set(newest.ruled), newest.epoch)
        self.connections: dict[int, Connection] = {}
        self.heard: deque[dict[str, Any]] = deque()
        self.store_ended, self.is_met, self.began_ns = 0, False, self.now()
        self.is_due = self.is_napping = False
        self.oldest = np.zeros(len(newest.groups), np.int64)
        self.bad_ns = [self.now()] * len(newest.groups)
        for number in range(len(self.names)):
            self.connect(number)
        self.reconnect()
        self.talk.start()
        self.later(MET_NS + MILLISECOND_NS, self.wake)

    def _primaries(self, newest: ClusterMap) -> np.ndarray:
        return np.array([HERE if group.primary in (None, self.host) else self.names.index(group.primary)
                         for group in newest.groups])  # fmt: skip

    def stream(self, number: int) -> int:
        """Return the id under which the store of this number knows the client."""
        return self.client_id + (number << 32)

    def connect(self, number: int) -> None:
        """Connect to a store, if it can be reached."""
        store = self.world.actors[self.names[number]]
        is_cut = self.world.is_cut(self.name, store.name) or self.world.is_cut(store.name, self.name)
        if store.alive and self.world.now >= store.paused_until and not is_cut:
            self.disconnect(number)
            self.connections[number] = Connection(self, number, store)
            if store.name == self.orders.here and store.table is not self.table:
                self.orders.forsake()
            self.engine.control[DOWN] &= ~(1 << number)
            self.wake()

    def disconnect(self, number: int) -> None:
        connection = self.connections.pop(number, None)
        if connection:
            connection.close()
        self.client.disconnect(number)

    def reconnect(self) -> None:
        """Try the stores that are down, several times a second."""
        for number in range(len(self.names)):
            if self.engine.control[DOWN] >> number & 1:
                self.connect(number)
        self.later(RECONNECT_NS, self.reconnect)

    def leave(self, number: int) -> None:
        """A store that is primary of nothing any more is asked for nothing more; what it did not answer is asked elsewhere."""
        self.disconnect(number)
        self.engine.control[DOWN] |= 1 << number
        give_up(self.client.state, number, NOT_PRIMARY)

    def report(self) -> dict[str, Any]:
        """Return what the coordinator is told now."""
        quiet = [] if self.heard else list(self.orders.quiet)
        return {"instance": {"host": self.host, "number": self.client_id, "cluster": CLUSTER, "epoch": self.orders.epoch,
                             "parked": self.orders.parked(), "quiet": quiet, "store_ended": self.store_ended}}  # fmt: skip

    def hear(self, message: dict[str, Any]) -> None:
        """Take orders, for the loop to carry out. The loop begins when the coordinator knows of this process."""
        self.is_met = True
        self.wake()
        if orders := message.get("orders"):
            self.world.note(f"{self.name} is to park {orders['park']} watch {orders['watch']}"
                            + (" and has a map" if orders["map"] else ""))  # fmt: skip
            self.heard.append(orders)

    def see_end(self) -> None:
        """The store process of this host has ended: its threads' lives in the table say so."""
        self.later(self.world.random.randrange(MILLISECOND_NS), self.end_lease)

    def end_lease(self) -> None:
        """End the host's lease, and say so."""
        self.store_ended = self.table.end_lease() or 0
        if self.store_ended:
            self.orders.leave_own_store(self.leave)
        self.talk.tell()

    # ---- the loop -----------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Let the loop take a turn soon; once."""
        if not self.is_due:
            self.is_due = True
            self.later(self.world.random.randrange(5_000, 60_000), self.turn)

    def nap(self) -> None:
        """Wake up after the longest time that the loop sleeps while packets wait; one such timer at a time."""
        if not self.is_napping:
            self.is_napping = True
            self.later(HELD_NS, self._rise)

    def _rise(self) -> None:
        self.is_napping = False
        self.wake()

    def turn(self) -> None:
        """Carry out orders, as between two bursts, and take a turn of the loop."""
        self.is_due = False
        if not self.is_met and self.now() - self.began_ns < MET_NS:
            return
        while self.heard:
            self.orders.carry_out(self.heard.popleft(), self.now(), self.leave)
            self.talk.tell()
        self.loop()
        if self.orders.look(self.now()):
            self.talk.tell()
        control = self.engine.control
        if control[QUEUES] or control[PUT_OFF] or self.orders.watches():
            self.nap()

    def loop(self) -> None:
        """Take one turn of the loop, and carry what it sent."""
        before = self.store.changes_total() if self.store.alive else 0
        turn_at(self.engine, *self.ports, self.frames, self.table.words, self.client.state, self.now())
        for connection in self.connections.values():
            connection.carry()
        for number in range(len(self.names)):
            if self.engine.control[DOWN] >> number & 1 and number in self.connections:
                self.disconnect(number)
        for port in self.ports:
            for frame in departed(port, self.frames):
                self.world.packets.left(self, frame)
        if self.store.alive and self.store.table is self.table and self.store.changes_total() != before:
            self.store.pump_later(self.world.random.randrange(10_000, 100_000))
        self.check()
        self.world.watch_instance(self)

    def receive(self, frame: bytes) -> None:
        """A frame arrives from inside; the ring is filled whether or not the process runs."""
        if self.alive and arrive(self.ports[INSIDE], self.frames, frame):
            self.world.packets.entered(self, frame)
            self.wake()

    # ---- life and death -----------------------------------------------------------------------------------------------

    def crash(self, how: str = "close") -> None:
        """Die. how: see `datastore/verification/lines.py`."""
        self.talk.end(how)
        self.alive, self.life = False, self.life + 1
        if how != "vanish" and self.store.alive and self.store.table is self.table:
            self.store.see_function_end(self.client_id)
        self.end()

    def end(self) -> None:
        """Close every connection to a store."""
        for number in list(self.connections):
            self.disconnect(number)

    def restart(self) -> None:
        """Start again, on the table of the store that is there."""
        if self.store.alive:
            self.alive, self.paused_until = True, 0
            self.start()
        else:
            self.world.at(self.world.now + 20 * MILLISECOND_NS, lambda: None if self.alive else self.restart())

    # ---- what must hold -----------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Return the ledger, with what waits."""
        self.engine.ledger[-1] = waiting(self.engine)
        return to_counts(self.engine.ledger)

    def check(self) -> None:
        """Raise Violation unless every packet, and every frame, is accounted for."""
        inside = sum((int(p.rx_producer[0]) - int(p.rx_consumer[0])) & 0xFFFFFFFF for p in self.ports)
        missing = self.frames.stack.size - int(free_frames(self.frames)) - inside - waiting(self.engine)
        self.engine.ledger[-1] = waiting(self.engine)
        unaccounted = 2 * int(self.engine.ledger[RECEIVED]) - int(self.engine.ledger.sum())
        if missing or unaccounted:
            self.world.violated(f"{self.name}: {missing} frames are missing, {unaccounted} packets unaccounted for")

    def rules(self, partition: int) -> bool:
        """Tell whether this process works on records of a partition in place, by the lease of its table."""
        words = self.table.words
        return bool(self.alive and lease_holds(words, self.now()) and roles.role(words, partition) == PRIMARY)

    def longest_wait_ns(self, partition: int) -> int:
        """Return for how long the oldest packet of a partition has waited here, not counting until `bad_ns`."""
        oldest = int(self.oldest[partition])
        return 0 if oldest == NEVER else self.now() - max(oldest, self.bad_ns[partition])

    def was_troubled(self, since_ns: int) -> bool:
        """Tell whether this process was stopped or cut off, in the simulator's time since shortly before `since_ns`."""
        return self.troubled_ns > since_ns - 200 * MILLISECOND_NS

    def note_oldest(self) -> None:
        """See which packets wait since when."""
        note_oldest(self.engine, self.oldest)
