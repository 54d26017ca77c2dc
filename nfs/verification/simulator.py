"""Replication, failover and moves with packets under way, on an imagined network, with everything that can go wrong.

    world = Rack(seed=7)
    world.play(1.0)          seconds of imagined time, then all heals; raises Violation

The product's code runs: stores, coordinator and clients as in `datastore/verification/simulator.py`, and an NF process beside
each store (`instance.py`), in every third seed one that claims a name for each flow. An imagined switch steers packets to it as
the coordinator's `Switchover` wishes. An NF process and its store die together or apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datastore.coordination.heartbeats import MILLISECOND_NS
from datastore.coordination.maps import ClusterMap
from datastore.verification.hosts import COORDINATOR, PARTITIONS, InPlaceWriter, StoreHost
from datastore.verification.imagined import CALM, Violation
from datastore.verification.simulator import SETTLED_S, World
from nfs.verification.claimed import NAME_HIGH
from nfs.verification.instance import InstanceHost
from nfs.verification.packets import Flow, Packets
from nfs.verification.steering import ImaginedSwitch, SteeringCoordinator

LINK_NS = 100_000
"""From the switch into an instance's ring."""
LOOK_NS = 10 * MILLISECOND_NS
PATIENCE_NS = 300 * MILLISECOND_NS
"""No packet waits longer while a copy of its partition lives and can be reached, and nothing else goes wrong meanwhile."""


class RackStore(StoreHost):
    """A store process whose table an NF process maps, too: it outlives the store."""

    def work_in_place(self) -> None:
        self.function: InPlaceWriter | None = None

    def start(self) -> None:
        super().start()
        self.table.claim_server()
        self.table.renews_lease()

    def crash(self, how: str = "close") -> None:
        super().crash(how)
        self.table.leave_server()
        instance = self.world.instance(self.name)
        if how != "vanish" and instance.table is self.table:
            instance.see_end()

    def see_function_end(self, number: int) -> None:
        """The NF process on this table has ended: its thread's life there says so."""

        def tell() -> None:
            self.spokesman.end_function(number)
            if self.talk:
                self.talk.tell()

        self.later(self.world.random.randrange(MILLISECOND_NS), tell)

    def close(self) -> None:
        self.world.tables.append(self.table)


@dataclass
class Rack(World):
    """Stores, NF processes, a coordinator that steers, a switch, packets, clients; and what befalls them."""

    clients: int = 2
    patience_ns: int = 300 * MILLISECOND_NS
    flows: int = 6

    def speaks_over_lines(self) -> bool:
        return True

    def build(self, first: ClusterMap) -> None:
        self.tables: list[Any] = []
        self.switch = ImaginedSwitch(self, [str(group.primary) for group in first.groups], self.flows)
        self.packets = Packets(self, PARTITIONS, self.flows)
        self.has_claims = self.seed % 3 == 2
        SteeringCoordinator(self, first)
        for name in self.store_names:
            RackStore(self, name)
        for name in self.store_names:
            InstanceHost(self, self.actors[name])
        for number in range(self.flows):
            self.emit(number)
        self.at(LOOK_NS, self.look)

    def partition_of(self, flow: int) -> int:
        return flow % PARTITIONS

    def instance(self, host: str) -> Any:
        return self.actors[f"{host}/nf"]

    def instances(self) -> list[Any]:
        return [self.instance(name) for name in self.store_names]

    def newest_map(self) -> ClusterMap:
        found: ClusterMap = self.actors[COORDINATOR].coordinator.map
        return found

    def emit(self, number: int) -> None:
        """Send a packet of a flow, and the next one after a while."""
        if self.ending:
            return
        frame, way = self.packets.flows[number].frame(), self.switch.ways[number]
        self.at(self.now + LINK_NS, lambda: self.instance(way).receive(frame))
        self.at(self.now + self.random.randrange(1, 6) * MILLISECOND_NS, lambda: self.emit(number))

    # ---- what goes wrong ----------------------------------------------------------------------------------------------

    def strikes(self) -> tuple[tuple[float, Callable[[], None]], ...]:
        rest = tuple(pair for pair in super().strikes() if pair[1] != self.strike_crash)
        return ((self.faults.crash_s, self.strike_part), *rest)

    def strike_part(self) -> None:
        """Let a host, or one of its two processes, die."""
        name, what = self.random.choice(self.store_names), self.random.choice(("host", "store", "nf"))
        self.lose(name, what)

    def lose(self, name: str, what: str, how: str = "") -> None:
        """Let `what` of a host die (host, store, nf), unless too few stores would be left; it comes back after a while.

        how: as in `datastore/verification/lines.py`, by default any.
        """
        store, instance = self.actors[name], self.instance(name)
        dead = sum(not self.actors[other].alive for other in self.store_names)
        if what != "nf" and (dead >= 2 or not store.alive):
            return
        if what == "nf" and not instance.alive:
            return
        how = how or ("vanish" if what == "host" and self.random.random() < 0.5 else self.some_end())
        self.count(f"{what} crash", (f"{what} of {name} dies" if what != "host" else f"{name} dies") + f" ({how})")
        self.trouble()
        if what != "nf":
            store.crash(how)
            self.at(self.now + self._away_ns(), lambda: self.revive(store))
        if what != "store" and instance.alive:
            instance.crash(how)
            self.at(self.now + self._away_ns(), lambda: self.revive(instance))

    def _away_ns(self) -> int:
        return int(1e9 * self.random.choice((self.random.uniform(0.002, 0.06), self.random.uniform(0.05, 0.8))))

    def some_end(self) -> str:
        """Return how a process dies whose host lives on."""
        return self.random.choices(("close", "reset", "part"), (4, 1, 1))[0]

    def strike_main_thread(self) -> None:
        super().strike_main_thread()
        self.trouble()

    def strike_pause(self) -> None:
        names = [*self.store_names, *(f"{name}/nf" for name in self.store_names), COORDINATOR]
        actor = self.actors[self.random.choice(names)]
        if actor.alive and self.now >= actor.paused_until:
            span_ms = self.random.choice((20, 60, 100, 150, 300, 700))
            self.count("pause", f"{actor.name} is stopped for {span_ms} ms")
            actor.paused_until = self.now + span_ms * MILLISECOND_NS
            self.trouble(self.host_of(actor.name) if isinstance(actor, InstanceHost) else "", actor.paused_until)

    def strike_cut(self) -> None:
        before = set(self.cuts)
        super().strike_cut()
        for one, other in self.cuts - before:
            for host in {one, other} - {COORDINATOR}:
                self.trouble(host, self.now + int(0.6e9))

    def strike_move(self) -> None:
        """Move a partition that is not on its way elsewhere: of others a command is refused (`coordination.py`)."""
        host = self.actors[COORDINATOR]
        partition, target = self.random.randrange(PARTITIONS), self.random.choice(self.store_names)
        is_there = self.newest_map().groups[partition].primary == target or partition in host.coordinator.moves
        if host.alive and self.now >= host.paused_until and not is_there:
            self.count("move", f"partition {partition} is to move to {target}")
            host.coordinator.move([partition], target)

    def strike_coordinator(self) -> None:
        super().strike_coordinator()
        self.trouble()

    def trouble(self, host: str = "", until_ns: int = 0) -> None:
        """Something goes wrong: patience begins anew; an instance that is stopped or cut off may be overtaken."""
        for instance in self.instances():
            instance.bad_ns = [instance.now()] * PARTITIONS
        if host:
            self.instance(host).troubled_ns = max(self.instance(host).troubled_ns, until_ns)

    # ---- what must hold -----------------------------------------------------------------------------------------------

    def violated(self, what: str) -> None:
        """Raise Violation."""
        self.note(f"!!! {what}")
        raise Violation(f"seed {self.seed}: at {self.now / 1e6:.3f} ms {what}")

    def watch_instance(self, instance: InstanceHost) -> None:
        """After each turn of a packet loop: no other store may be primary of what it works on in place, with a lease."""
        for partition in (p for p in range(PARTITIONS) if instance.rules(p)):
            for name in self.store_names:
                store = self.actors[name]
                if store.alive and store.table is not instance.table and self.rules(store, partition):
                    self.violated(f"both {instance.name}, on the table of its host, and {name} are primary of partition "
                                  f"{partition} and may answer")  # fmt: skip

    def look(self) -> None:
        """See whether a packet waits for too long."""
        self.at(self.now + LOOK_NS, self.look)
        coordinator = self.actors[COORDINATOR]
        is_whole = (not self.cuts and coordinator.alive and self.now >= coordinator.paused_until
                    and not coordinator.waits_for_unheard())  # fmt: skip
        groups = self.newest_map().groups
        reached = [is_whole and any(self.serves(self.actors[name]) for name in group.members) for group in groups]
        if self.has_claims:  # the name that a packet claims may be of any partition
            reached = [all(reached)] * PARTITIONS
        for instance in self.instances():
            if not instance.alive:
                continue
            instance.note_oldest()
            for partition in range(PARTITIONS):
                if not reached[partition] or self.now < instance.paused_until:
                    instance.bad_ns[partition] = instance.now()
                elif instance.longest_wait_ns(partition) > self.longest_ns():
                    self.violated(f"a packet of partition {partition} waits in {instance.name} for "
                                  f"{instance.longest_wait_ns(partition) / 1e6:.0f} ms")  # fmt: skip

    def serves(self, store: StoreHost) -> bool:
        """Tell whether a store process lives and runs."""
        return store.alive and self.now >= max(store.paused_until, store.busy_until)

    def lost(self) -> list[int]:
        """Return the partitions of which no copy is left."""
        return [partition for partition, group in enumerate(self.newest_map().groups) if not group.members]

    def longest_ns(self) -> int:
        """Return how long a packet may wait: messages that come late hold up leases and frames."""
        faults = self.faults
        return PATIENCE_NS + (0 if self.calm or not faults.late else int(2e6 * faults.late_ms))

    def unsettled(self) -> str:
        waits = [instance.name for instance in self.instances()
                 if instance.alive and max(map(instance.longest_wait_ns, range(PARTITIONS))) > PATIENCE_NS // 3]  # fmt: skip
        return super().unsettled() or (f"packets wait in {', '.join(waits)}" if waits else "")

    def check(self) -> None:
        super().check()
        groups = self.newest_map().groups
        for flow in self.packets.flows:
            group = groups[flow.partition]
            self.packets.check(flow, self.counted(flow.port, flow.partition, str(group.primary)) if group.members else None)
            self.check_claim(flow)
        for instance in self.instances():
            instance.check()
            if instance.counts()["waiting"] and not self.lost():
                self.violated(f"packets wait in {instance.name} at the end")

    def counted(self, port: int, partition: int, primary: str) -> int:
        """Return what the record of a flow has counted, at its primary."""
        found = [record for record in self.actors[primary].table.records(partition) if record.low >> 48 == port]
        return int.from_bytes(found[0].value[: 4 if self.has_claims else 8], "little") if found else 0

    def check_claim(self, flow: Flow) -> None:
        """Raise Violation unless the record of a flow's name says that the flow has it."""
        group = self.newest_map().groups[flow.name % PARTITIONS]
        if flow.name and group.members:
            records = self.actors[str(group.primary)].table.records(flow.name % PARTITIONS)
            holders = [int.from_bytes(record.value[:8], "little") for record in records
                       if record.high == NAME_HIGH and record.low >> 24 == flow.name]  # fmt: skip
            if holders != [flow.port]:
                self.violated(f"flow {flow.number} has left as {flow.name}, which ports {holders} have claimed, not {flow.port}")

    def close(self) -> None:
        for instance in self.instances():
            instance.end()
        super().close()
        for table in self.tables:
            table.leave_server()
            table.close()


def simulate(seed: int, seconds: float = 0.6, **options: Any) -> Rack:
    """Run one seed to its end; raises Violation. Returns the world, for its trace and history."""
    world = Rack(seed, **options)
    world.play(seconds)
    return world


def lose_one(seed: int, what: str, how: str = "", coordinator: bool = False) -> Rack:
    """Run a calm rack in which `what` (store, nf, host) of nf1 dies, or all partitions move (move); raises Violation.

    how: see `Rack.lose`. coordinator: it crashes while packets follow, and another one goes on.
    """
    world = Rack(seed, CALM, keep_trace=False, replicas=2)
    try:
        world.run(0.15)
        if what == "move":
            for partition in range(PARTITIONS):
                world.actors[COORDINATOR].coordinator.move([partition], world.random.choice(world.store_names))
        else:
            world.lose("nf1", what, how)
        if coordinator:
            world.run(world.random.uniform(0.0, 0.06))
            world.lose_coordinator(world.random.choice((world.random.uniform(0.002, 0.02), world.random.uniform(0.01, 0.2))))
        world.run(0.45)
        world.heal()
        world.settle(SETTLED_S)
        world.check()
    finally:
        world.close()
    return world
