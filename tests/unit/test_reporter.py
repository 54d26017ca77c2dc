"""Does a process go on telling to the coordinator whatever its main thread does?"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from datastore.base.threads import take_precedence
from datastore.coordination import reporter as module
from datastore.coordination.heartbeats import Timing
from datastore.coordination.reporter import Reporter
from datastore.security.challenge import Listener
from datastore.security.secret import COORDINATOR, STORE, Secret

TIMING = Timing()
SECRET = Secret.fresh()


class Ear:
    """Where a coordinator would listen: keeps every message, and when it came."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.heard: list[tuple[float, dict[str, Any]]] = []
        self.connections: list[socket.socket] = []
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            challenge = Listener(SECRET, COORDINATOR, "control")
            while not challenge.step(connection):
                pass
            self.connections.append(connection)
            for line in connection.makefile():
                self.heard.append((time.monotonic(), json.loads(line)))

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 10
        while len(self.heard) < count:
            assert time.monotonic() < deadline, self.heard
            time.sleep(0.005)

    def say(self, message: dict[str, Any]) -> None:
        self.connections[-1].sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def ear() -> Iterator[Ear]:
    made = Ear()
    yield made
    made.close()


def reporter(ear: Ear, hear: Any = lambda message: None, report: Any = lambda: {"beat": 1}) -> Reporter:
    return Reporter("reporter", [ear.listener.getsockname()], report, hear, TIMING, SECRET.credential(STORE, "nf1"))


def test_it_speaks_every_heartbeat_and_when_told_to(ear: Ear) -> None:
    telling = reporter(ear)
    ear.wait_for(3)
    telling.tell()
    ear.wait_for(5)
    telling.close()
    assert ear.heard[0][1] == {"beat": 1}


def test_what_is_said_is_passed_on(ear: Ear) -> None:
    heard: list[dict[str, Any]] = []
    telling = reporter(ear, heard.append)
    ear.wait_for(1)
    ear.say({"grant": 7})
    deadline = time.monotonic() + 5
    while heard != [{"grant": 7}]:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    telling.close()


def test_who_has_nothing_to_say_is_silent(ear: Ear) -> None:
    telling = reporter(ear, report=lambda: None)
    time.sleep(5 * TIMING.heartbeat_ns / 1e9)
    telling.close()
    assert [message for _, message in ear.heard if "beat" in message] == []


def test_a_connection_that_is_left_is_parted_from_and_made_again(ear: Ear) -> None:
    def hear(message: dict[str, Any]) -> None:
        raise KeyError("grant")

    telling = reporter(ear, hear)
    ear.wait_for(1)
    ear.say({"nonsense": True})
    deadline = time.monotonic() + 5
    while {"parting": True} not in [message for _, message in ear.heard]:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    said = len(ear.heard)
    ear.wait_for(said + 1)
    telling.close()


def test_a_machine_that_stood_still_takes_nobody_for_silent(ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes stop and go on together, 10 s later by the clock: the connection stays."""
    telling = reporter(ear)
    ear.wait_for(3)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 10))
    ear.wait_for(len(ear.heard) + 3)
    assert {"parting": True} not in [message for _, message in ear.heard]
    assert len(ear.connections) == 1
    telling.close()


def test_a_reporter_that_is_closed_parts(ear: Ear) -> None:
    telling = reporter(ear)
    ear.wait_for(1)
    telling.close()
    ear.wait_for(2)
    deadline = time.monotonic() + 5
    while ear.heard[-1][1] != {"parting": True}:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: real-time priority")
def test_precedence_is_the_threads_own() -> None:
    policies: list[int] = []

    def ask() -> None:
        take_precedence()
        policies.append(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert policies[0] in (os.SCHED_RR, os.SCHED_OTHER)  # OTHER: a control group without real time
    assert os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK != os.SCHED_RR


def test_a_descriptor_that_becomes_readable_is_acted_on_once_and_told(ear: Ear) -> None:
    acts: list[int] = []
    telling = reporter(ear, report=lambda: {"acts": len(acts)})
    reading, writing = os.pipe()
    telling.watch(reading, lambda: acts.append(1))
    ear.wait_for(2)
    assert acts == []
    os.close(writing)
    deadline = time.monotonic() + 5
    while ear.heard[-1][1] != {"acts": 1}:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    telling.close()
    assert acts == [1]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reading)
