"""Which process speaks on which of the coordinator's connections, what is each told, and what does the end of one mean?

Pure, like the coordinator: the caller owns connections and clock, and sends what it is given to send. So the simulator runs the
same code (`datastore/verification/`, `nfs/verification/`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from datastore.coordination.coordinator import Coordinator
from datastore.coordination.heartbeats import Grant, Heartbeat
from datastore.coordination.messages import grant_message
from datastore.coordination.switchover import Switchover

Line = TypeVar("Line")
"""A connection of a process; compared by identity."""


class Steers(Protocol):
    """The switch, as `switch.py` knows it."""

    found: list[str] | None
    confirmed: list[str] | None
    settled_ns: int
    down: frozenset[str]

    def hear(self) -> None:
        """Take what the switch has said."""

    def ask(self) -> None:
        """Have it say in `found` what it does."""

    def tell(self, steering: list[str], unsettled: bool) -> None:
        """Have it steer as `steering` says. unsettled: it is to say when packets have settled."""


class Attendance(Generic[Line]):
    """stores: the connection of each host's store process. instances: of its NF process. announced: the map all were told of."""

    def __init__(
        self, coordinator: Coordinator, switchover: Switchover | None, switch: Steers | None,
        tell: Callable[[Line, dict[str, Any]], None], now_ns: int,
    ) -> None:  # fmt: skip
        """switchover: None where packets do not follow the map. switch: None: there is none, or nobody to tell it. tell: sends a
        message on a connection, and raises nothing."""
        self.coordinator, self.switchover, self.switch, self._tell = coordinator, switchover, switch, tell
        self.stores: dict[str, Line] = {}
        self.instances: dict[str, Line] = {}
        self._closed: dict[str, int] = {}
        """Store processes whose connection was closed by their end, and on whose table an NF process may still work."""
        self._parted: list[Line] = []
        self._ordered: dict[str, dict[str, Any]] = {}
        self._answered_ns: dict[str, int] = {}
        self._looked_ns = now_ns
        self.announced = coordinator.map.epoch

    # ---- time ---------------------------------------------------------------------------------------------------------

    def look(self, now_ns: int) -> None:
        """Note that this process runs. After a stop nobody is judged before all had time to speak."""
        if now_ns - self._looked_ns > 2 * self.coordinator.timing.heartbeat_ns:
            self.coordinator.was_stopped(now_ns)
        self._looked_ns = now_ns

    def advance(self, now_ns: int) -> None:
        """Do what is due, steering included."""
        switchover, switch = self.switchover, self.switch
        if switchover and switch:
            switch.hear()
            if switchover.is_blind and switch.found:
                switchover.learn(switch.found)
            switchover.confirmed = switch.confirmed or switchover.confirmed
            switchover.see(now_ns, switch.down, switch.settled_ns)
            switchover.plan(now_ns, self.coordinator)
            if switchover.is_blind:
                switch.ask()
            else:
                switch.tell(switchover.steering, switchover.unsettled())
        elif switchover:
            switchover.learn(switchover.steering)
            switchover.confirmed = list(switchover.steering)
            switchover.see(now_ns, frozenset(), now_ns)
            switchover.plan(now_ns, self.coordinator)
        self.coordinator.advance(now_ns)

    # ---- what arrives -------------------------------------------------------------------------------------------------

    def hear_store(self, now_ns: int, line: Line, beat: Heartbeat) -> Grant:
        """Take a heartbeat; return the answer, to be sent once what was decided is saved."""
        grant = self.coordinator.hear(now_ns, beat)
        if not grant.refusal:
            self.stores[beat.host] = line
            self._closed.pop(beat.host, None)
            if self.switchover and beat.function_ended:
                self.switchover.end(beat.host, beat.function_ended)
        return grant

    def hear_instance(self, now_ns: int, line: Line, report: dict[str, Any]) -> None:
        """Take an instance's report, and tell it once a lease that it was heard.

        Raises NearstateError for an unknown instance, ValueError for a report that is none.
        """
        assert self.switchover
        name = self.switchover.hear(now_ns, report)
        if name is None:
            return
        if ended := self.switchover.instances[name].store_ended:
            self.coordinator.end(now_ns, name, ended)
        if self.instances.get(name) is not line:
            self.instances[name] = line
            self._ordered.pop(name, None)
            self._answered_ns.pop(name, None)
        if now_ns - self._answered_ns.get(name, 0) >= self.coordinator.timing.lease_ns:
            self._answered_ns[name] = now_ns
            self._tell(line, {"heard": True})

    def part(self, line: Line) -> None:
        """The process at the other end says that it closes the connection itself, and goes on."""
        self._parted.append(line)

    def lose(self, now_ns: int, line: Line, is_closed: bool) -> None:
        """Know a connection no longer. is_closed: it came to its end, after all that was sent; else it is lost, or left."""
        if is_closed and not any(parted is line for parted in self._parted):
            self._take_end(now_ns, line)
        self._parted = [parted for parted in self._parted if parted is not line]
        self.stores = {host: other for host, other in self.stores.items() if other is not line}
        self.instances = {name: other for name, other in self.instances.items() if other is not line}

    def _take_end(self, now_ns: int, line: Line) -> None:
        """A process' connection was closed, and not by the process itself, which says so before: the kernel did, at its end.

        The end of a store process is not the end of its host's lease where an NF process works on the same table. That one says
        when it does so no longer (`store_ended`), or has ended too.
        """
        instances = self.switchover.instances if self.switchover else {}
        for name in [name for name, other in self.instances.items() if other is line]:
            instances[name].has_ended = True
            if name in self._closed:
                self.coordinator.end(now_ns, name, self._closed[name])
        for host in [host for host, other in self.stores.items() if other is line]:
            incarnation = self._closed[host] = self.coordinator.hosts[host].incarnation
            if host not in instances or not instances[host].may_work_on(incarnation):
                self.coordinator.end(now_ns, host, incarnation)

    # ---- what is told -------------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """Tell every store of a new map, and instances what they are to do, where that is news; what was decided is saved."""
        coordinator = self.coordinator
        if coordinator.map.epoch != self.announced:
            self.announced = coordinator.map.epoch
            for host, line in list(self.stores.items()):
                self._tell(line, grant_message(coordinator.news(host)))
        if self.switchover:
            self._give_orders(self.switchover)

    def _give_orders(self, switchover: Switchover) -> None:
        epoch = self.coordinator.map.epoch
        for name, line in list(self.instances.items()):
            orders = switchover.orders(name, self.coordinator)
            if orders["map"] and self._ordered.get(name, {}).get("epoch") == epoch:
                orders["map"] = None  # it is on its way
            known = {"epoch": epoch, "park": orders["park"], "watch": orders["watch"]}
            if orders["map"] or known != self._ordered.get(name):
                self._ordered[name] = known
                self._tell(line, {"orders": orders})
