"""Real TCP handshakes: the client host's kernel connects to a listener on the server host, open-loop, through what is between.

Each connection has an intended start; its time runs from there until the client's kernel says that it is established. What is
not established within the time-out has failed. The client resets each at once, so nothing else is on the path.
"""

from __future__ import annotations

import contextlib
import ctypes as C
import select
import socket
import struct
import time
from collections import deque
from typing import Any

import numpy as np

from datastore.compiled.histogram import encode, make_counts, record_ns, summary_us
from experiments.workloads.generator import PR_SET_TIMERSLACK

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
"""SO_LINGER with no time to linger: close() sends RST and leaves no TIME_WAIT behind (socket(7))."""
BACKLOG = 4096


def listen(config: dict[str, Any], control: Any) -> None:
    """Process target: {"address", "ports": [...]}. Accepts every connection until its client ends it; ends at {"stop": true}."""
    listeners = {}
    accepted: dict[int, socket.socket] = {}
    poller = select.epoll()
    poller.register(control.fileno(), select.EPOLLIN)
    for port in config["ports"]:
        listener = socket.create_server((config["address"], port), backlog=BACKLOG)
        listener.setblocking(False)
        listeners[listener.fileno()] = listener
        poller.register(listener.fileno(), select.EPOLLIN)
    control.send({"ready": True})
    while True:
        for fd, _ in poller.poll():
            if fd in listeners:
                with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
                    connection = listeners[fd].accept()[0]
                    accepted[connection.fileno()] = connection
                    poller.register(connection.fileno(), select.EPOLLIN)
            elif fd in accepted:  # nobody sends anything: this is the end
                poller.unregister(fd)
                accepted.pop(fd).close()
            elif (message := control.receive(0)) is not None and message.get("stop"):
                return


class Handshakes:
    """One step: `total` connects to `target`, `gap_ns` apart. counts: times of those established; lateness: of the starts."""

    def __init__(self, target: tuple[str, int], total: int, gap_ns: float, timeout_s: float) -> None:
        self.target, self.total, self.gap_ns, self.timeout_ns = target, total, gap_ns, int(timeout_s * 1e9)
        self.counts, self.lateness = make_counts(), make_counts()
        self.attempts = self.established = self.refused = 0
        self.pending: dict[int, tuple[socket.socket, int]] = {}
        self.oldest: deque[tuple[int, int]] = deque()  # (due, descriptor), in the order of the starts
        self.poller = select.epoll()

    def run(self) -> None:
        """Make all connects and wait for the last one's end."""
        began = time.monotonic_ns() + 1_000_000
        while self.attempts < self.total or self.pending:
            now = time.monotonic_ns()
            while self.attempts < self.total and (due := began + int(self.attempts * self.gap_ns)) <= now:
                self._start(due)
            self._give_up(now)
            self._wait(began + int(self.attempts * self.gap_ns) if self.attempts < self.total else None)

    def result(self) -> dict[str, Any]:
        """Return what came of the connects."""
        return {"attempts": self.attempts, "established": self.established, "refused": self.refused,
                "latency": summary_us(self.counts), "lateness": summary_us(self.lateness),
                "histogram": encode(self.counts)}  # fmt: skip

    def _start(self, due: int) -> None:
        connection = socket.socket()
        connection.setblocking(False)
        self.attempts += 1
        record_ns(self.lateness, time.monotonic_ns() - due)
        connection.connect_ex(self.target)
        self.poller.register(connection.fileno(), select.EPOLLOUT)
        self.pending[connection.fileno()] = (connection, due)
        self.oldest.append((due, connection.fileno()))

    def _wait(self, next_due: int | None) -> None:
        """Take what is established, until the next start or time-out."""
        limits = [next_due] if next_due is not None else []
        limits += [self.oldest[0][0] + self.timeout_ns] if self.oldest else []
        wait_s = max(0.0, (min(limits) - time.monotonic_ns()) / 1e9) if limits else 0.0
        select.select([self.poller], [], [], wait_s)  # to the microsecond; epoll's own time-out counts milliseconds
        for fd, _ in self.poller.poll(0):
            connection, due = self.pending.pop(fd)
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.refused += 1
            else:
                self.established += 1
                record_ns(self.counts, time.monotonic_ns() - due)
            self._end(connection)

    def _give_up(self, now: int) -> None:
        while self.oldest and self.oldest[0][0] + self.timeout_ns <= now:
            due, fd = self.oldest.popleft()
            if fd in self.pending and self.pending[fd][1] == due:  # descriptors are given anew
                self._end(self.pending.pop(fd)[0])

    def _end(self, connection: socket.socket) -> None:
        self.poller.unregister(connection.fileno())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        connection.close()


def connect(config: dict[str, Any], control: Any) -> None:
    """Process target: {"address"}. Answers {"port", "rate_per_s", "seconds", "timeout_s"} with what came of the connects."""
    C.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)  # sleeps end when they should
    control.send({"ready": True})
    while (message := control.receive(None)) is not None and not message.get("stop"):
        total = max(1, round(message["rate_per_s"] * message["seconds"]))
        step = Handshakes((config["address"], message["port"]), total, 1e9 / message["rate_per_s"], message["timeout_s"])
        step.run()
        control.send(step.result())


def warm() -> None:
    """Compile the histogram's entry point."""
    record_ns(make_counts(), np.int64(1))
