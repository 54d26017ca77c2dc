"""What does an NF process do when the coordinator tells it to, between two bursts?

Pure, like the coordinator: the caller tells the time, owns sockets and threads (`process.py`), and sends the reports. So the
simulator (`nfs/verification/`) runs the same code under an imagined clock.

    map     follow a newer cluster map: whose stores are asked from now on, and whose are left
    park    keep the packets of these partitions until further orders
    watch   find out when every packet of these partitions that came before is gone: the switch has none on its way here, no
            packet older than that waits in the loop, and the switch has forwarded what was sent (`Drain`, `echo.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from datastore.coordination.maps import ClusterMap
from datastore.store.client import EPOCH as CLIENT_EPOCH
from datastore.store.client import ClientState
from nfs.dataplane.engine import EPOCH, HERE, NEVER, Engine
from nfs.dataplane.passage import note_oldest
from nfs.dataplane.port import Port, has_passed, mark

ARRIVAL_NS = 1_000_000
"""How long a frame may take into this process' ring, where no switch answers echoes."""


class Passing(Protocol):
    """Tells when all that was under way between this process and the switch has arrived (`echo.py`)."""

    def ask(self, now_ns: int) -> int:
        """Begin to find out about what is under way now; return a number for `answered`."""

    def answered(self, number: int, now_ns: int) -> bool:
        """Tell whether all of it has arrived."""


class RingMarks:
    """Where no switch answers: marks in the receive rings, a while later."""

    def __init__(self, ports: Sequence[Port]) -> None:
        self._ports = list(ports)
        self._asked: dict[int, tuple[int, list[int]]] = {}
        """What has not arrived yet, as far as was looked: since when it is asked for, and the marks."""
        self._next = 0

    def ask(self, now_ns: int) -> int:
        """See `Passing`."""
        self._asked = {number: asked for number, asked in self._asked.items() if not self.answered(number, now_ns)}
        self._asked[self._next] = now_ns, []
        self._next += 1
        return self._next - 1

    def answered(self, number: int, now_ns: int) -> bool:
        """See `Passing`."""
        if number not in self._asked:
            return True
        since_ns, marks = self._asked[number]
        if not marks and now_ns - since_ns >= ARRIVAL_NS:
            marks += [mark(port) for port in self._ports]
        return bool(marks) and all(map(has_passed, self._ports, marks))


@dataclass
class Drain:
    """What is known of partitions, of one order, whose packets the switch sends elsewhere: which answer tells that none is on its
    way here any more, and since when the loop is past the last of them; 0: not yet."""

    asked: int
    passed_ns: int = 0


class Orders:
    """The orders that one packet loop follows."""

    def __init__(
        self, engine: Engine, ports: Sequence[Port], client: ClientState, stores: Sequence[str], here: str | None,
        asked: set[str], epoch: int, passing: Passing | None = None,
    ) -> None:  # fmt: skip
        """stores: hosts by their number in `engine.primary`. here: the host whose table this process shares, None: no host.
        asked: the stores that the map of `epoch` names primaries. passing: None where no switch answers."""
        self.engine, self.ports, self.client, self.here, self.epoch = engine, list(ports), client, here, epoch
        self.stores, self.numbers = list(stores), {host: number for number, host in enumerate(stores)}
        self.quiet: list[int] = []
        """The watched partitions of which no packet that came before their marks is here any more, as the loop saw last."""
        self._asked = asked
        if here in self.numbers:  # in place of HERE, for what must be asked by a message
            engine.remote[engine.primary == HERE] = self.numbers[here]
        self._passing: Passing = passing or RingMarks(ports)
        self._drains: dict[int, Drain] = {}
        self._left: dict[int, int] = {}
        """By partition, once none of its packets is in the loop: which answer tells that the switch has forwarded the last."""
        self._oldest = np.zeros(engine.primary.size, np.int64)

    def load_code(self) -> None:
        """Load the code that `look` needs, which takes 10 ms, before there are packets."""
        note_oldest(self.engine, self._oldest)

    def parked(self) -> list[int]:
        """Return the partitions whose packets are kept."""
        return [int(partition) for partition in np.flatnonzero(self.engine.held.parking)]

    def carry_out(self, orders: dict[str, Any], now_ns: int, leave: Callable[[int], None]) -> None:
        """Do what the coordinator says. leave: closes the connection to a store, by number, that serves no partition any more."""
        self.quiet = []
        if orders["map"]:
            self._adopt(ClusterMap.from_json(orders["map"]), leave)
        parking = np.zeros(self.engine.primary.size, np.int64)
        parking[orders["park"]] = 1
        self.engine.held.parking[:] = parking
        if orders["watch"] and not self._drains.keys() >= set(orders["watch"]):
            new = Drain(self._passing.ask(now_ns))
            self._drains |= {partition: new for partition in orders["watch"] if partition not in self._drains}
        self._drains = {partition: self._drains[partition] for partition in orders["watch"]}

    def look(self, now_ns: int) -> bool:
        """See of the partitions that are sent elsewhere now whether all their packets have been through the loop, and left it;
        tell whether that is news.

        Requires that the loop does not run: while it does, a packet may be on its way from one place to another.
        """
        for drain in self._unfinished():
            if self._passing.answered(drain.asked, now_ns):
                drain.passed_ns = now_ns
        if self._drains:
            note_oldest(self.engine, self._oldest)
        empty = [partition for partition, drain in self._drains.items()
                 if 0 < drain.passed_ns < self._oldest[partition]]  # fmt: skip
        if not self._left.keys() >= set(empty):
            asked = self._passing.ask(now_ns)
            self._left |= {partition: asked for partition in empty if partition not in self._left}
        self._left = {partition: self._left[partition] for partition in empty}
        has_left = {asked: self._passing.answered(asked, now_ns) for asked in set(self._left.values())}
        before = set(self.quiet)
        self.quiet = [partition for partition in empty if has_left[self._left[partition]]]
        return bool(set(self.quiet) - before)

    def watches(self) -> bool:
        """Tell whether a watched partition is not quiet yet."""
        return len(self.quiet) < len(self._drains)

    def _unfinished(self) -> list[Drain]:
        return [drain for drain in {id(drain): drain for drain in self._drains.values()}.values() if not drain.passed_ns]

    def leave_own_store(self, leave: Callable[[int], None]) -> None:
        """The store process whose table this process shares has ended: packets wait until a map says whom to ask, even before the
        connection to it is closed. What ran on its table without a lease could not be let go. leave: as in `carry_out`."""
        if self.here in self.numbers:
            leave(self.numbers[self.here])

    def forsake(self) -> None:
        """The store process whose table this process shares is gone, and another one is in its place: its table is that of no
        store any more. From now on the store on this host is asked by messages, like all others."""
        engine = self.engine
        engine.held.deposed[:] = NEVER
        if self.here in self.numbers:
            engine.primary[engine.primary == HERE] = self.numbers[self.here]
        self.here = None

    def _adopt(self, new: ClusterMap, leave: Callable[[int], None]) -> None:
        """Ask whom a newer map names from now on. A partition that nobody serves stays where it was."""
        if new.epoch <= self.epoch:
            return
        engine = self.engine
        for partition, group in enumerate(new.groups):
            if group.primary in self.numbers:
                engine.remote[partition] = self.numbers[group.primary]
                engine.primary[partition] = HERE if group.primary == self.here else self.numbers[group.primary]
            if group.primary and self.here is not None and self.here not in group.members:
                engine.held.deposed[partition] = group.reign
        self.epoch = engine.control[EPOCH] = new.epoch
        self.client.identity[CLIENT_EPOCH] = new.epoch
        for name in sorted((self._asked - new.ruled.keys()) & self.numbers.keys()):
            if name != self.here:  # its connection tells whether the store of this host lives (`passage.reachable`)
                leave(self.numbers[name])
        self._asked = set(new.ruled)
