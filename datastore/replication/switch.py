"""The coordinator's line to the controller of the switch: which instance is to get each partition's packets, and whose links are
down.

One command at a time, never waited for; the newest wish goes out when the one before is answered. The controller's socket is a
file, so that it can be reached from the network namespace of the `control` host: switches have a management network of their own.
"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path
from typing import Any

from datastore.replication.messages import LineSocket

AGAIN_S = 0.05
PORTS_S = 0.03
"""How often the controller is asked for links that are down."""


class Switch:
    """What the switch was told, and what it said."""

    def __init__(self, controller: Path) -> None:
        self._path = controller
        self._line: LineSocket | None = None
        self._asked: list[str] | None = None
        self._confirmed: list[str] | None = None
        self._waiting = False
        self._tried_s = self._looked_s = 0.0
        self.down: frozenset[str] = frozenset()
        """The instances one of whose links the switch sees down."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when the controller answered, or -1."""
        return self._line.fileno() if self._line else -1

    def follow(self, steering: list[str]) -> list[str] | None:
        """Have the switch steer as `steering` says; return what it last confirmed, None before the first time."""
        try:
            line = self._connected()
            if line is None:
                return self._confirmed
            for answer in line.receive():
                self._take(answer)
            now_s = time.monotonic()
            if self._waiting:
                pass
            elif steering != self._confirmed and now_s - self._tried_s > AGAIN_S:
                self._asked, self._waiting = list(steering), True
                line.send({"command": "follow", "instances": self._asked})
            elif now_s - self._looked_s > PORTS_S:
                self._looked_s, self._waiting = now_s, True
                line.send({"command": "ports"})
        except OSError as error:
            print(f"controller: {error}", file=sys.stderr, flush=True)
            self.close()
        return self._confirmed

    def _take(self, answer: dict[str, Any]) -> None:
        """Take the answer to what was asked last."""
        if "error" in answer:
            print(f"controller: {answer['error']}", file=sys.stderr, flush=True)
            self._tried_s = self._looked_s = time.monotonic()
        elif "down" in answer:
            self.down = frozenset(interface.partition(".")[0] for interface in answer["down"])
        else:
            self._confirmed = self._asked
        self._waiting = False

    def _connected(self) -> LineSocket | None:
        if self._line is None and time.monotonic() - self._tried_s > AGAIN_S:
            self._tried_s = time.monotonic()
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self._path))
            except OSError:
                connection.close()
                raise
            self._line = LineSocket(connection)
            self._tried_s = 0.0
        return self._line

    def close(self) -> None:
        """Close the line; what was asked is asked again."""
        if self._line:
            self._line.close()
        self._line, self._waiting = None, False
