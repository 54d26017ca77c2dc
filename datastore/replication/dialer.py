"""How is a connection made without waiting for it, to whichever of some addresses listens?"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

AGAIN_S = 0.02
"""Pause between two attempts."""
PATIENCE_S = 0.2
"""How long an attempt may take."""


class Dialer:
    """Attempts to connect, one after the other and to each address in turn, a step at each `dial`."""

    def __init__(self, *addresses: Sequence[Any]) -> None:
        """addresses: (host, port) of each."""
        self.addresses = [(str(host), int(port)) for host, port in addresses]
        self._attempt: socket.socket | None = None
        self._tried_at = 0.0

    def dial(self) -> socket.socket | None:
        """Go on; return the connection once it is there (non-blocking, TCP_NODELAY), then it is the caller's."""
        if self._attempt is None and not self._begin():
            return None
        attempt = self._attempt
        assert attempt is not None
        if not select.select([], [attempt], [], 0)[1]:
            if time.monotonic() - self._tried_at > PATIENCE_S:
                self.turn_away()
            return None
        if attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.turn_away()
            return None
        self._attempt = None
        return attempt

    def _begin(self) -> bool:
        """Start an attempt, if it is time for one and it does not fail at once."""
        if time.monotonic() - self._tried_at < AGAIN_S:
            return False
        self._tried_at = time.monotonic()
        attempt = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        attempt.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._attempt = attempt
        if attempt.connect_ex(self.addresses[0]) not in (0, errno.EINPROGRESS):
            self.turn_away()
            return False
        return True

    def turn_away(self) -> None:
        """Give up the attempt under way, or a connection that came of it: the next one is to the next address."""
        self.close()
        self.addresses = self.addresses[1:] + self.addresses[:1]

    def close(self) -> None:
        """Give up the attempt under way."""
        if self._attempt is not None:
            self._attempt.close()
        self._attempt = None
