"""The coordinator's line to the controller of the switch: which instance is to get each partition's packets.

One command at a time, never waited for; the newest wish goes out when the one before is answered. The controller's socket is a
file, so that it can be reached from the network namespace of the `control` host: switches have a management network of their own.
"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

from datastore.replication.messages import LineSocket

AGAIN_S = 0.05


class Switch:
    """What the switch was told, and what it said."""

    def __init__(self, controller: Path) -> None:
        self._path = controller
        self._line: LineSocket | None = None
        self._asked: list[str] | None = None
        self._confirmed: list[str] | None = None
        self._tried_s = 0.0

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
                if "error" in answer:
                    print(f"controller: {answer['error']}", file=sys.stderr, flush=True)
                    self._tried_s = time.monotonic()
                else:
                    self._confirmed = self._asked
                self._asked = None
            due = self._asked is None and time.monotonic() - self._tried_s > AGAIN_S
            if due and steering != self._confirmed:
                self._asked = list(steering)
                line.send({"command": "follow", "instances": self._asked})
        except OSError as error:
            print(f"controller: {error}", file=sys.stderr, flush=True)
            self.close()
        return self._confirmed

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
        self._line, self._asked = None, None
