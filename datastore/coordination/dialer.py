"""How is a connection made without waiting for it, to whichever of some addresses listens, and proves to be who it should?"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

from datastore.security.challenge import Speaker
from datastore.security.secret import Credential

AGAIN_S = 0.02
"""Pause between two attempts."""
PATIENCE_S, ANSWER_S = 0.2, 0.5
"""How long connecting may take, and after that the challenge, which waits for a process and not only for its kernel."""


class Dialer:
    """Attempts to connect, one after the other and to each address in turn, a step at each `dial`."""

    def __init__(self, *addresses: Sequence[Any], credential: Credential, wanted: int, name: str = "") -> None:
        """addresses: (host, port) of each. credential: what to prove. wanted, name: role and name of whoever should listen; "":
        any of that role."""
        self.addresses = [(str(host), int(port)) for host, port in addresses]
        self._credential, self._wanted, self._name = credential, wanted, name
        self._attempt: socket.socket | None = None
        self._challenge: Speaker | None = None
        self._tried_at = 0.0

    @property
    def is_challenged(self) -> bool:
        """Whether the other end is about to answer: `dial` is worth a call every millisecond."""
        return self._challenge is not None

    def dial(self) -> socket.socket | None:
        """Go on; return the connection once it is there and proven (non-blocking, TCP_NODELAY), then it is the caller's."""
        if self._attempt is None and not self._begin():
            return None
        attempt = self._attempt
        assert attempt is not None
        try:
            if not self._go_on(attempt):
                if time.monotonic() - self._tried_at > (ANSWER_S if self._challenge else PATIENCE_S):
                    self.turn_away()
                return None
        except OSError:
            self.turn_away()
            return None
        self._attempt = self._challenge = None
        return attempt

    def _go_on(self, attempt: socket.socket) -> bool:
        """Tell whether the attempt is connected and proven. Raises OSError when it failed."""
        if self._challenge is None:
            if not select.select([], [attempt], [], 0)[1]:
                return False
            if error := attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, "not connected")
            self._tried_at = time.monotonic()
            self._challenge = Speaker(self._credential, self._wanted, self._name)
        return self._challenge.step(attempt)

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
        self._attempt = self._challenge = None
