"""The switch on the imagined network: a command takes a while, and after it has confirmed, flows go on the old way for a while.

What it decided for a flow it does again until it has looked at that flow anew (`topologies/controller/revalidation.py`). The
coordinator's side is that of `replication/switch.py`: the newest wish goes out when the one before is answered.
"""

from __future__ import annotations

from typing import Any

from datastore.replication.coordinator import MILLISECOND_NS
from datastore.replication.maps import ClusterMap
from datastore.replication.switchover import Switchover
from datastore.verification.hosts import CoordinatorHost
from datastore.verification.imagined import Stream

LOOKS_AGAIN_MS = 10.0
"""Within this time it has looked at every flow again."""


class ImaginedSwitch:
    """What the switch does with flows; `tell` and the fields below are what `Switchover` and its caller know of it."""

    def __init__(self, world: Any, steering: list[str], flows: int) -> None:
        self.world, self.rules = world, list(steering)
        self.ways = [steering[world.partition_of(flow)] for flow in range(flows)]
        """What it does with each flow's packets."""
        self.confirmed: list[str] | None = list(steering)
        self.settled_ns, self.down = 0, frozenset[str]()
        self._is_asked = self._is_settling = False
        self._looked = 0

    def tell(self, steering: list[str], unsettled: bool, now_ns: int) -> None:
        """Have it steer as `steering` says. unsettled: it is to say when packets have settled. now_ns: of the coordinator."""
        wish = list(steering)
        if wish != self.confirmed and not self._is_asked:
            self._is_asked = True
            self._after(0.1, 3.0, lambda: self._obey(wish))
        if unsettled and not self._is_settling:
            self._is_settling = True
            self._settle(now_ns)

    def _after(self, least_ms: float, most_ms: float, act: Any) -> None:
        delay_ms = self.world.random.uniform(least_ms, most_ms)
        self.world.at(self.world.now + int(delay_ms * MILLISECOND_NS), act)

    def _obey(self, wish: list[str]) -> None:
        """Change the rules; flows follow, each when it is looked at again."""
        changed = [flow for flow in range(len(self.ways)) if wish[self.world.partition_of(flow)] != self.ways[flow]]
        self.rules = wish
        self.world.note(f"switch: {' '.join(wish)}")
        for flow in changed:
            self._after(0.0, LOOKS_AGAIN_MS, lambda flow=flow: self._look(flow))
        self._after(0.1, 1.0, lambda: self._confirm(wish))

    def _look(self, flow: int) -> None:
        self.ways[flow] = self.rules[self.world.partition_of(flow)]

    def _confirm(self, wish: list[str]) -> None:
        self._is_asked, self.confirmed = False, wish

    def _settle(self, asked_ns: int) -> None:
        """Say so once every flow goes as the rules said when this was asked: a round over all flows that began since."""
        self._after(1.0, LOOKS_AGAIN_MS, lambda: self._round(asked_ns))

    def _round(self, asked_ns: int) -> None:
        for flow in range(len(self.ways)):
            self._look(flow)
        self._after(0.1, 1.0, lambda: self._say_settled(asked_ns))

    def _say_settled(self, asked_ns: int) -> None:
        self._is_settling, self.settled_ns = False, max(self.settled_ns, asked_ns)


class SteeringCoordinator(CoordinatorHost):
    """A coordinator that steers packets, too: what `coordination.py` does between two looks at its sockets."""

    def __init__(self, world: Any, first: ClusterMap) -> None:
        self.first = [str(group.primary) for group in first.groups]
        super().__init__(world, first)

    def tick(self) -> None:
        if not hasattr(self, "switchover") or self.switchover_life != self.life:
            self._begin()
        super().tick()

    def _begin(self) -> None:
        self.switchover_life = self.life
        self.switchover = Switchover.of(self.world.store_names, self.first, True)
        self.switchover.take_charge(self.coordinator)
        self.switchover.resume(self.coordinator)
        self.lines: dict[str, Stream] = {}
        self.ordered: dict[str, dict[str, Any]] = {}
        self.answered_ns: dict[str, int] = {}
        self.looked_ns = self.now()
        self.world.switch.confirmed = None

    def crash(self) -> None:
        super().crash()
        for name in self.world.store_names:
            self.world.instance(name).hang_up()

    def publish(self) -> None:
        """Steer, decide, save, and tell everybody."""
        now_ns, coordinator, switch = self.now(), self.coordinator, self.world.switch
        if now_ns - self.looked_ns > 2 * coordinator.timing.heartbeat_ns:
            coordinator.was_stopped(now_ns)
        self.looked_ns = now_ns
        self.switchover.confirmed = switch.confirmed or self.switchover.confirmed
        self.switchover.see(now_ns, switch.down, switch.settled_ns)
        self.switchover.plan(now_ns, coordinator)
        switch.tell(self.switchover.steering, self.switchover.unsettled(), now_ns)
        coordinator.advance(now_ns)
        super().publish()
        self._give_orders()

    def _give_orders(self) -> None:
        for name, line in self.lines.items():
            orders = self.switchover.orders(name, self.coordinator)
            epoch = self.coordinator.map.epoch
            if orders["map"] and self.ordered.get(name, {}).get("epoch") == epoch:
                orders["map"] = None  # it is on its way
            known = {"epoch": epoch, "park": orders["park"], "watch": orders["watch"]}
            if orders["map"] or known != self.ordered.get(name):
                self.ordered[name] = known
                self.world.note(f"{name}/nf is to park {orders['park']} watch {orders['watch']}"
                                + (f" map {epoch}" if orders["map"] else ""))  # fmt: skip
                line.send(orders)

    def hear_instance(self, name: str, line: Stream, report: dict[str, Any]) -> None:
        """Take a report of an instance that came over `line`'s connection."""
        now_ns = self.now()
        self.switchover.hear(now_ns, report)
        if self.lines.get(name) is not line:
            self.lines[name] = line
            self.ordered.pop(name, None)
            self.answered_ns.pop(name, None)
        if now_ns - self.answered_ns.get(name, 0) >= self.coordinator.timing.lease_ns:
            self.answered_ns[name] = now_ns
            line.send({})
        self.publish()
