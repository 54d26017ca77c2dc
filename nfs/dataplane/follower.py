"""The NF process as a member of a cluster: the coordinator hears that it is there, and says who has which partition.

A thread of its own beside the packet loop, so that heartbeats do not wait for packets nor packets for the network. What it hears
are *orders*; the loop is called back to Python and carries them out between two bursts:

    map     the cluster map, if it is news
    park    the partitions whose packets are to be kept until further orders: they are on their way to this host
    watch   the partitions of which the coordinator wants to know when all their packets that came here are gone
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from datastore.replication.coordinator import Timing
from datastore.replication.dialer import Dialer
from datastore.replication.member import SILENCE_LEASES
from datastore.replication.messages import LONGEST_TOLD, LineSocket
from datastore.security.secret import COORDINATOR, Credential

CHALLENGE_S = 0.001
"""How soon an answer to a challenge is looked for."""


class Follower:
    """Tells and hears until closed. `orders`: what was heard and not yet carried out, oldest first."""

    def __init__(
        self, coordinators: Sequence[Sequence[Any]], report: Callable[[], dict[str, Any]], call: Callable[[], None],
        timing: Timing, credential: Credential,
    ) -> None:  # fmt: skip
        """coordinators: (host, port) of each; one leads and listens. report: what to tell ({"instance": ...} of
        `coordination.py`). call: wakes the loop. credential: of this instance, a client.
        """
        self.orders: deque[dict[str, Any]] = deque()
        self._report, self._call = report, call
        self._pause_s, self._silence_s = timing.heartbeat_ns / 1e9, SILENCE_LEASES * timing.lease_ns / 1e9
        self._dialer = Dialer(*coordinators, credential=credential, wanted=COORDINATOR)
        self._told = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
        self._thread.start()

    def tell(self) -> None:
        """Have the coordinator told at once, because orders were carried out; from another thread."""
        os.eventfd_write(self._told, 1)

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # on a machine of its own it would find a core free; here hosts share a few
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -10)
            os.sched_setscheduler(threading.get_native_id(), os.SCHED_OTHER, os.sched_param(0))
        while not self._closed.is_set():
            connection = self._dialer.dial()
            if connection is None:
                self._closed.wait(CHALLENGE_S if self._dialer.is_challenged else self._pause_s / 3)
                continue
            line = LineSocket(connection, LONGEST_TOLD)
            with contextlib.suppress(OSError):
                self._converse(line)
            line.close()
            self._dialer.turn_away()

    def _converse(self, line: LineSocket) -> None:
        """Speak on a connection until it is lost, which is an OSError."""
        due_s, heard_s = 0.0, time.monotonic()
        while not self._closed.is_set():
            now_s = time.monotonic()
            if now_s - heard_s > self._silence_s:
                raise TimeoutError
            if now_s >= due_s:
                line.send({"instance": self._report()})
                due_s = now_s + self._pause_s
            waited: list[Any] = [line, self._told]
            ready = select.select(waited, [], [], max(0.0, due_s - now_s))[0]
            if self._told in ready:
                os.eventfd_read(self._told)
                due_s = 0.0
            if line not in ready:
                continue
            heard_s = time.monotonic()
            for message in line.receive():
                orders = message.get("orders")
                if orders:
                    self.orders.append(orders)
                    self._call()

    def close(self) -> None:
        """Stop telling: for the coordinator the instance is gone after a lease."""
        self._closed.set()
        self._thread.join(timeout=1.0)
        self._dialer.close()
        os.close(self._told)
