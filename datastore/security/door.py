"""How does a process learn who connects, while its other work goes on?

    listener --accept--> at the door, unproven (a second at most) --challenge--> known: (connection, identity) --> the owner
                         MOST_UNPROVEN in all, MOST_OF_A_SOURCE of one address; one more ends the oldest of the busiest source

Everything is in one epoll(7) descriptor, which its owner waits for beside its own. One `admit` does a bounded amount of work.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import Counter
from typing import NamedTuple

from datastore.security.challenge import Identity, Listener
from datastore.security.secret import Secret

UNPROVEN_NS = 1_000_000_000
"""How long a connection may take to prove who is there: a round trip and some 0.1 ms of work at each end."""
MOST_UNPROVEN, MOST_OF_A_SOURCE = 128, 32
ACCEPTED_AT_ONCE = 16
KEEPALIVE_S, PROBES = 10, 3
"""The kernel asks an idle end after this time whether it is there, and closes after so many questions without an answer."""


class _Unproven(NamedTuple):
    connection: socket.socket
    source: str
    exchange: Listener
    until_ns: int


class Door:
    """A listening socket, and the connections that have not proven yet who speaks."""

    def __init__(self, listener: socket.socket, secret: Secret, role: int, name: str) -> None:
        """listener: non-blocking; it is closed with this door. role, name: of the process that listens."""
        self._listener, self._secret, self._role, self._name = listener, secret, role, name
        self._unproven: dict[int, _Unproven] = {}
        self._epoll = select.epoll()
        self._epoll.register(listener.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """Return the descriptor whose input is a reason to call `admit`."""
        return self._epoll.fileno()

    def admit(self) -> list[tuple[socket.socket, Identity]]:
        """Go on with all challenges; return the connections, non-blocking, whose speakers are known now."""
        known = []
        for descriptor, _ in self._epoll.poll(0, ACCEPTED_AT_ONCE):
            if descriptor == self._listener.fileno():
                self._accept()
            elif (proven := self._go_on(descriptor)) is not None:
                known.append(proven)
        now_ns = time.monotonic_ns()
        while self._unproven and (oldest := next(iter(self._unproven.items())))[1].until_ns <= now_ns:
            self._refuse(oldest[0])
        return known

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                connection, address = self._listener.accept()
            except OSError:  # nobody waits any more, or whoever waited is gone
                return
            connection.setblocking(False)
            unproven = _Unproven(connection, str(address[0]), Listener(self._secret, self._role, self._name),
                                 time.monotonic_ns() + UNPROVEN_NS)  # fmt: skip
            self._unproven[connection.fileno()] = unproven
            self._epoll.register(connection.fileno(), select.EPOLLIN)
            self._make_room(unproven.source)

    def _make_room(self, source: str) -> None:
        """Refuse the oldest of the source that has most, if there are too many in all or of this one."""
        counts = Counter(each.source for each in self._unproven.values())
        if counts[source] <= MOST_OF_A_SOURCE:
            if len(self._unproven) <= MOST_UNPROVEN:
                return
            source = counts.most_common(1)[0][0]
        self._refuse(next(descriptor for descriptor, each in self._unproven.items() if each.source == source))

    def _go_on(self, descriptor: int) -> tuple[socket.socket, Identity] | None:
        unproven = self._unproven.get(descriptor)
        if unproven is None:  # refused since
            return None
        try:
            if not unproven.exchange.step(unproven.connection):
                return None
        except OSError:
            self._refuse(descriptor)
            return None
        del self._unproven[descriptor]
        self._epoll.unregister(descriptor)
        assert unproven.exchange.identity
        notice_its_end(unproven.connection)
        return unproven.connection, unproven.exchange.identity

    def _refuse(self, descriptor: int) -> None:
        unproven = self._unproven.pop(descriptor)
        self._epoll.unregister(descriptor)
        unproven.connection.close()

    def close(self) -> None:
        """Close listener and door; whoever was admitted stays."""
        for descriptor in list(self._unproven):
            self._refuse(descriptor)
        self._epoll.close()
        self._listener.close()


def notice_its_end(connection: socket.socket) -> None:
    """Have the kernel close a connection whose other end is gone without a word."""
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S),
               (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S), (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES),
               (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)]  # fmt: skip
    for level, option, value in options:
        with contextlib.suppress(OSError):
            connection.setsockopt(level, option, value)
