"""How is a connection made without waiting for it?"""

from __future__ import annotations

import errno
import select
import socket
import time

AGAIN_S = 0.02
"""Pause between two attempts."""
PATIENCE_S = 0.2
"""How long an attempt may take."""


class Dialer:
    """Attempts to connect to one address, one after the other, a step at each `dial`."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
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
                self.close()
            return None
        if attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.close()
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
        if attempt.connect_ex(self.address) not in (0, errno.EINPROGRESS):
            attempt.close()
            return False
        self._attempt = attempt
        return True

    def close(self) -> None:
        """Give up the attempt under way."""
        if self._attempt is not None:
            self._attempt.close()
        self._attempt = None
