"""The coordinator's line to the controller of the switch: which instance is to get each partition's packets, and what the switch
says: whether it does so, whether packets have settled on their new way, whose links are down.

Nothing is ever waited for; the newest wish goes out when the one before is answered. The controller's socket is a file, so that
it can be reached from the network namespace of the `control` host: switches have a management network of their own.
"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path
from typing import Any

from datastore.coordination.messages import LONGEST_TOLD, LineSocket

AGAIN_S = 0.05


class Line:
    """A connection to the controller for one command at a time, made again when it is lost."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._line: LineSocket | None = None
        self._tried_s = 0.0
        self.is_waiting = False

    def fileno(self) -> int:
        """Return the descriptor that is readable when the controller answered, or -1."""
        return self._line.fileno() if self._line else -1

    def ask(self, command: dict[str, Any]) -> bool:
        """Send a command, if none is unanswered and the controller is there; tell whether it was."""
        if self.is_waiting:
            return False
        try:
            line = self._connected()
            if line is None:
                return False
            line.send(command)
        except OSError as error:
            self._lose(error)
            return False
        self.is_waiting = True
        return True

    def answer(self) -> dict[str, Any] | None:
        """Return the answer to the command asked last, once; None: not yet. One that was lost is {"error": why}."""
        if self._line is None:
            return None
        was_waiting = self.is_waiting
        try:
            for answer in self._line.receive():
                if not was_waiting:
                    raise ConnectionAbortedError("an answer to nothing")
                self.is_waiting = False
                if "error" in answer:
                    print(f"controller: {answer['error']}", file=sys.stderr, flush=True)
                return answer
        except OSError as error:  # also where nothing was asked, or the descriptor would stay readable
            self._lose(error)
            return {"error": str(error)} if was_waiting else None
        return None

    def _connected(self) -> LineSocket | None:
        if self._line is None and time.monotonic() - self._tried_s > AGAIN_S:
            self._tried_s = time.monotonic()
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self._path))
            except OSError:
                connection.close()
                raise
            self._line = LineSocket(connection, LONGEST_TOLD)
        return self._line

    def _lose(self, error: OSError) -> None:
        print(f"controller: {error}", file=sys.stderr, flush=True)
        self.close()

    def close(self) -> None:
        """Close the connection; what was asked gets no answer."""
        if self._line:
            self._line.close()
        self._line, self.is_waiting = None, False


class Switch:
    """What the switch was told, and what it said.

    found: what it did when it was asked, None: not yet. confirmed: the steering that its rules say, None before the first time.
    settled_ns: what was confirmed by then, no packet goes otherwise any more. down: the instances one of whose links is down.
    """

    def __init__(self, controller: Path) -> None:
        self._rules, self._flows, self._links = Line(controller), Line(controller), Line(controller)
        self._asked: list[str] | None = None
        self._refused_s = self._missed_s = 0.0
        self._settling_ns = 0
        self.found: list[str] | None = None
        self.confirmed: list[str] | None = None
        self.settled_ns = 0
        self.down: frozenset[str] = frozenset()
        self._known_links: dict[str, list[str]] = {}

    def filenos(self) -> set[int]:
        """Return the descriptors that are readable when the controller answered."""
        return {line.fileno() for line in (self._rules, self._flows, self._links)} - {-1}

    def hear(self) -> None:
        """Take what the switch has said."""
        self._take(self._rules.answer())
        told = self._flows.answer()
        if told and "settled" in told:
            self.settled_ns = self._settling_ns
        links = self._links.answer()
        if links and "down" in links:
            self._known_links = {"known": list(links["down"])}
            self.down = frozenset(interface.partition(".")[0] for interface in links["down"])
        elif links:
            self._known_links, self._missed_s = {}, time.monotonic()

    def ask(self) -> None:
        """Have it say what it does, in `found`: another coordinator told it."""
        if time.monotonic() - self._refused_s > AGAIN_S:
            self._rules.ask({"command": "where"})

    def tell(self, steering: list[str], unsettled: bool) -> None:
        """Have it steer as `steering` says. unsettled: it is to say when packets have settled."""
        may_ask = steering != self.confirmed and time.monotonic() - self._refused_s > AGAIN_S
        if may_ask and self._rules.ask({"command": "follow", "instances": list(steering)}):
            self._asked = list(steering)
        self._watch_links()
        asked_ns = time.monotonic_ns()
        if unsettled and self._flows.ask({"command": "settled"}):
            self._settling_ns = asked_ns

    def _watch_links(self) -> None:
        """Have the controller tell of links: at once of those that are down, later of every change."""
        if time.monotonic() - self._missed_s > AGAIN_S:
            self._links.ask({"command": "ports", **self._known_links})

    def _take(self, answer: dict[str, Any] | None) -> None:
        """Take the answer to a wish."""
        if answer is None:
            return
        if "instances" in answer:
            self.found = list(answer["instances"])
        elif "steered" in answer:
            self.confirmed = self._asked
        else:
            self._refused_s = time.monotonic()

    def close(self) -> None:
        """Close the lines; what was asked is asked again."""
        for line in (self._rules, self._flows, self._links):
            line.close()
