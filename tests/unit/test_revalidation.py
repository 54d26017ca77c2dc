"""When has a switch looked at every flow again? Asked of one that is imagined here, so that rounds end when a test says so."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path

import pytest

from topologies.controller import revalidation


class Vswitchd:
    """Answers `revalidator/wait` once it was nudged `patience` times; or with an error."""

    def __init__(self, folder: Path, patience: int = 1, error: str | None = None) -> None:
        self.patience, self.error, self.nudges, self.asked = patience, error, 0, 0
        (folder / "ovs-vswitchd.pid").write_text("77\n")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "ovs-vswitchd.77.ctl"))
        self.listener.listen()
        self.nudged = threading.Condition()
        threading.Thread(target=self.serve, daemon=True).start()

    def nudge(self) -> None:
        with self.nudged:
            self.nudges += 1
            self.nudged.notify_all()

    def serve(self) -> None:
        connection, _ = self.listener.accept()
        while data := connection.recv(4096):
            assert json.loads(data)["method"] == "revalidator/wait"
            with self.nudged:
                self.asked += 1
                while self.nudges < self.asked * self.patience:
                    self.nudged.wait()
            answer = json.dumps({"id": 0, "result": "", "error": self.error}).encode()
            connection.sendall(answer[:9])
            connection.sendall(answer[9:])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(revalidation, "RUN_FOLDER", tmp_path)
    return tmp_path


@pytest.mark.parametrize("patience", [1, 3])
def test_two_rounds_must_end_and_each_is_nudged_until_it_does(folder: Path, patience: int) -> None:
    switch = Vswitchd(folder, patience)
    revalidation.settle(switch.nudge)
    assert switch.asked == 2
    assert switch.nudges >= 2 * patience


@pytest.mark.parametrize("is_there", [True, False])
def test_where_it_cannot_be_known_a_fixed_time_is_waited(folder: Path, is_there: bool) -> None:
    nudge = Vswitchd(folder, error="can't wait on multiple udpifs.").nudge if is_there else lambda: None
    began = time.monotonic()
    revalidation.settle(nudge)
    assert revalidation.UNKNOWN_S <= time.monotonic() - began < revalidation.PATIENCE_S
