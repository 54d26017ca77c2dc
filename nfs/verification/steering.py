"""The switch on the imagined network: a command takes a while, and after it has confirmed, flows go on the old way for a while.

What it decided for a flow it does again until it has looked at that flow anew (`topologies/controller/revalidation.py`). The
coordinator's side is that of `coordination/switch.py`: the newest wish goes out when the one before is answered. What a
coordinator that has ended wished last may still be carried out.
"""

from __future__ import annotations

from typing import Any

from datastore.coordination.attendance import Attendance
from datastore.coordination.heartbeats import MILLISECOND_NS
from datastore.coordination.maps import ClusterMap
from datastore.coordination.switchover import Switchover
from datastore.verification.hosts import CoordinatorHost
from datastore.verification.lines import COORDINATOR, Line

LOOKS_AGAIN_MS = 10.0
"""Within this time it has looked at every flow again."""


class ImaginedSwitch:
    """What the switch does with flows, and what the coordinator knows of it (`attendance.Steers`)."""

    def __init__(self, world: Any, steering: list[str], flows: int) -> None:
        self.world, self.rules = world, list(steering)
        self.ways = [steering[world.partition_of(flow)] for flow in range(flows)]
        """What it does with each flow's packets."""
        self._free_ns = 0
        self._listener = 0
        self.begin()

    def begin(self) -> None:
        """A coordinator begins, and knows of nothing that was asked before."""
        self.found: list[str] | None = None
        self.confirmed: list[str] | None = None
        self.settled_ns, self.down = 0, frozenset[str]()
        self._is_asked = self._is_settling = False
        self._listener += 1

    def hear(self) -> None:
        """What it says is known at once."""

    def ask(self) -> None:
        """See `attendance.Steers`."""
        if not self._is_asked:
            self._is_asked, listener = True, self._listener
            self._command(lambda: self._say(listener))

    def _say(self, listener: int) -> None:
        if listener == self._listener:
            self._is_asked, self.found = False, list(self.rules)

    def tell(self, steering: list[str], unsettled: bool) -> None:
        """See `attendance.Steers`."""
        wish, listener = list(steering), self._listener
        if wish != self.confirmed and not self._is_asked:
            self._is_asked = True
            self._command(lambda: self._obey(wish, listener))
        if unsettled and not self._is_settling:
            self._is_settling = True
            self._settle(self.world.actors[COORDINATOR].now(), listener)

    def _command(self, act: Any) -> None:
        """Do one thing after the other."""
        delay_ms = self.world.random.uniform(0.1, 3.0)
        self._free_ns = max(self._free_ns, self.world.now) + int(delay_ms * MILLISECOND_NS)
        self.world.at(self._free_ns, act)
        self._free_ns += MILLISECOND_NS  # it is confirmed by then

    def _after(self, least_ms: float, most_ms: float, act: Any) -> None:
        delay_ms = self.world.random.uniform(least_ms, most_ms)
        self.world.at(self.world.now + int(delay_ms * MILLISECOND_NS), act)

    def _obey(self, wish: list[str], listener: int) -> None:
        """Change the rules; flows follow, each when it is looked at again."""
        changed = [flow for flow in range(len(self.ways)) if wish[self.world.partition_of(flow)] != self.ways[flow]]
        self.rules = wish
        self.world.note(f"switch: {' '.join(wish)}")
        for flow in changed:
            self._after(0.0, LOOKS_AGAIN_MS, lambda flow=flow: self._look(flow))
        self._after(0.1, 1.0, lambda: self._confirm(wish, listener))

    def _look(self, flow: int) -> None:
        self.ways[flow] = self.rules[self.world.partition_of(flow)]

    def _confirm(self, wish: list[str], listener: int) -> None:
        if listener == self._listener:
            self._is_asked, self.confirmed = False, wish

    def _settle(self, asked_ns: int, listener: int) -> None:
        """Say so once every flow goes as the rules said when this was asked: a round over all flows that began since."""
        self._after(1.0, LOOKS_AGAIN_MS, lambda: self._round(asked_ns, listener))

    def _round(self, asked_ns: int, listener: int) -> None:
        for flow in range(len(self.ways)):
            self._look(flow)
        self._after(0.1, 1.0, lambda: self._say_settled(asked_ns, listener))

    def _say_settled(self, asked_ns: int, listener: int) -> None:
        if listener == self._listener:
            self._is_settling, self.settled_ns = False, max(self.settled_ns, asked_ns)


class SteeringCoordinator(CoordinatorHost):
    """A coordinator that steers packets, too."""

    def __init__(self, world: Any, first: ClusterMap) -> None:
        self.first = [str(group.primary) for group in first.groups]
        super().__init__(world, first)

    def waits_for_unheard(self) -> bool:
        """Tell whether this coordinator has gone on after another one and waits for instances that it has not heard yet."""
        return bool(self.life and self.switchover._unheard(self.now(), self.coordinator.timing))

    def attend(self) -> Attendance[Line]:
        self.switchover = Switchover.of(self.world.store_names, self.first, True)
        self.switchover.take_charge(self.coordinator)
        if self.life:
            self.switchover.resume(self.coordinator)
        self.world.switch.begin()
        return Attendance(self.coordinator, self.switchover, self.world.switch, Line.tell, self.now())
