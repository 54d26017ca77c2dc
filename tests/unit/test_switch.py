"""The coordinator's line to the controller: what it does when that goes away, and what it hears of links."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datastore.coordination.switch import Switch


class Controller:
    """Where the controller would listen."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.listener.settimeout(5)
        self.lines: list[socket.socket] = []

    def accept(self) -> socket.socket:
        self.lines.append(self.listener.accept()[0])
        return self.lines[-1]

    def close(self) -> None:
        for line in [self.listener, *self.lines]:
            line.close()


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    made = Controller(tmp_path / "controller")
    yield made
    made.close()


def told(line: socket.socket) -> dict[str, Any]:
    return dict(json.loads(line.recv(1 << 16)))


def say(switch: Switch, line: socket.socket, message: dict[str, Any]) -> None:
    """Answer, and let the switch hear it."""
    line.sendall(json.dumps(message).encode() + b"\n")
    assert select.select(list(switch.filenos()), [], [], 5)[0]
    switch.hear()


def test_links_are_asked_for_once_and_then_watched(controller: Controller, tmp_path: Path) -> None:
    switch = Switch(tmp_path / "controller")
    switch.confirmed = ["nf1"]
    switch.tell(["nf1"], False)
    line = controller.accept()
    assert told(line) == {"command": "ports"}
    for down, names in (([], set()), (["nf1.inside", "nf1.outside"], {"nf1"}), ([], set())):
        say(switch, line, {"down": down})
        assert switch.down == names
        switch.tell(["nf1"], False)
        assert told(line) == {"command": "ports", "known": down}
    switch.close()


def test_a_controller_that_goes_away_leaves_nothing_to_read(controller: Controller, tmp_path: Path) -> None:
    """A descriptor that stays readable would keep the coordinator turning without a pause, whatever it waits for."""
    switch = Switch(tmp_path / "controller")
    switch.tell(["nf1"], True)
    lines = {told(line)["command"]: line for line in (controller.accept() for _ in range(3))}
    assert lines.keys() == {"follow", "ports", "settled"}
    say(switch, lines["follow"], {"steered": 1})
    assert switch.confirmed == ["nf1"]
    controller.close()
    deadline = time.monotonic() + 5
    while switch.filenos():
        switch.hear()
        assert time.monotonic() < deadline
    switch.close()
