"""How does a process speak to the coordinator while its main thread is busy? From a thread of its own that takes a core at once.

What a coordinator hears of a host decides whether that is taken for dead. So nothing that the process works on may keep its
messages waiting: neither the packets of a loop, nor a map that is being followed, nor other processes that want the core.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from datastore.base.errors import NearstateError
from datastore.base.threads import take_precedence
from datastore.coordination.dialer import Dialer
from datastore.coordination.heartbeats import Timing
from datastore.coordination.messages import LONGEST_TOLD, LineSocket
from datastore.security.secret import COORDINATOR, Credential

SILENCE_LEASES = 5
"""A coordinator that is silent for so many leases is left for the next one: it is stopped, or its machine is gone."""
STOPPED_PAUSES = 4
"""A reporter that did not run for so many heartbeats was stopped itself, perhaps with its machine. It has heard no silence."""
CHALLENGE_S = 0.001
"""How soon an answer to a challenge is looked for."""


class Reporter:
    """Tells a coordinator what there is to tell, every heartbeat and when asked to, and passes on what it says, until closed.

    connected: whether there is a connection.
    """

    def __init__(
        self, name: str, coordinators: Sequence[Sequence[Any]], report: Callable[[], dict[str, Any] | None],
        hear: Callable[[dict[str, Any]], None], timing: Timing, credential: Credential,
        begin: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """coordinators: (host, port) of each; one leads and listens. report: returns the message to send now, None for none.
        hear: takes each message. credential: what proves to coordinators on whose behalf it speaks.

        The functions are called from the reporter's thread; `begin` before the others. A KeyError or NearstateError of `hear`
        ends the connection.
        """
        self.connected = False
        self._report, self._hear, self._begin = report, hear, begin
        self._pause_s, self._silence_s = timing.heartbeat_ns / 1e9, SILENCE_LEASES * timing.lease_ns / 1e9
        self._dialer = Dialer(*coordinators, credential=credential, wanted=COORDINATOR)
        self._told = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = threading.Event()
        self._watched: dict[int, Callable[[], None]] = {}
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def tell(self) -> None:
        """Have the coordinator told at once; from another thread."""
        os.eventfd_write(self._told, 1)

    def watch(self, descriptor: int, act: Callable[[], None]) -> None:
        """Have the reporter's thread call `act` once a descriptor is readable, and then close that; from another thread."""
        self._watched[descriptor] = act
        self.tell()

    def _run(self) -> None:
        take_precedence()
        self._begin()
        while not self._closed.is_set():
            connection = self._dialer.dial()
            if connection is None:
                self._wait(CHALLENGE_S if self._dialer.is_challenged else self._pause_s / 3)
                continue
            line = LineSocket(connection, LONGEST_TOLD)
            self.connected = True
            try:
                with contextlib.suppress(OSError, KeyError, NearstateError):
                    self._converse(line)
            finally:
                self.connected = False
                with contextlib.suppress(OSError):  # else a coordinator takes the closed connection for the process' end
                    line.send({"parting": True})
                line.close()
            self._dialer.turn_away()

    def _wait(self, timeout_s: float, *lines: LineSocket) -> set[Any]:
        """Wait until there is something to hear or to tell, and act on what is watched; return which `lines` can be read, and
        whether this thread was called (`_told`)."""
        waited: list[Any] = [*lines, self._told, *self._watched]
        ready = set(select.select(waited, [line for line in lines if line.has_output], [], timeout_s)[0])
        for descriptor in self._watched.keys() & ready:
            self._watched.pop(descriptor)()
            os.close(descriptor)
            ready.add(self._told)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._told)
        return ready

    def _converse(self, line: LineSocket) -> None:
        """Speak on a connection until it is lost, which is an OSError, or the reporter is closed."""
        due_s, heard_s = 0.0, time.monotonic()
        looked_s = heard_s
        while not self._closed.is_set():
            now_s = time.monotonic()
            if now_s - looked_s > STOPPED_PAUSES * self._pause_s:
                heard_s = now_s
            looked_s = now_s
            if now_s - heard_s > self._silence_s:
                raise TimeoutError
            if now_s >= due_s:
                message = self._report()
                if message is not None:
                    line.send(message)
                due_s = now_s + self._pause_s
            ready = self._wait(max(0.0, due_s - now_s), line)
            if self._told in ready:
                due_s = 0.0
            if line.has_output:
                line.flush()
            if line not in ready:
                continue
            heard_s = time.monotonic()
            for message in line.receive():
                self._hear(message)

    def close(self) -> None:
        """Stop telling. The connection is closed as by a process that goes on without it."""
        self._closed.set()
        self.tell()
        self._thread.join(timeout=1.0)
        self._dialer.close()
        os.close(self._told)
