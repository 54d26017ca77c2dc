"""The NF process as a member of a cluster: the coordinator hears that it is there, and says who has which partition.

What it hears are *orders*; the packet loop is called back to Python and carries them out between two bursts:

    map     the cluster map, if it is news
    park    the partitions whose packets are to be kept until further orders: they are on their way to this host
    watch   the partitions of which the coordinator wants to know when all their packets that came here are gone
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from datastore.coordination.heartbeats import Timing
from datastore.coordination.reporter import Reporter
from datastore.security.secret import Credential


class Follower:
    """Tells and hears until closed. `orders`: what was heard and not yet carried out, oldest first."""

    def __init__(
        self, coordinators: Sequence[Sequence[Any]], report: Callable[[], dict[str, Any] | None], call: Callable[[], None],
        timing: Timing, credential: Credential,
    ) -> None:  # fmt: skip
        """coordinators: (host, port) of each; one leads and listens. report: what to tell ({"instance": ...} of
        `coordination.py`), None: nothing now. call: wakes the loop. credential: of this instance, a client.
        """
        self.orders: deque[dict[str, Any]] = deque()
        self._call, self._report, self._met = call, report, threading.Event()
        self._reporter = Reporter("follower", coordinators, self._message, self._hear, timing, credential)

    def _message(self) -> dict[str, Any] | None:
        report = self._report()
        return None if report is None else {"instance": report}

    def tell(self) -> None:
        """Have the coordinator told at once, because orders were carried out; from another thread."""
        self._reporter.tell()

    def wait_until_met(self, timeout_s: float) -> bool:
        """Wait until a coordinator knows of this instance; tell whether one does."""
        return self._met.wait(timeout_s)

    def watch(self, descriptor: int, act: Callable[[], None]) -> None:
        """Call `act` once a descriptor is readable, from the follower's thread, and report anew; then close the descriptor."""
        self._reporter.watch(descriptor, act)

    def _hear(self, message: dict[str, Any]) -> None:
        orders = message.get("orders")
        if orders or "heard" in message:
            self._met.set()
        if orders:
            self.orders.append(orders)
            self._call()

    def close(self) -> None:
        """Stop telling: for the coordinator the instance is gone after a lease."""
        self._reporter.close()
