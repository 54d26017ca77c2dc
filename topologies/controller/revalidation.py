"""When does Open vSwitch stop doing what it decided for a flow before its rules changed?

What it decided for a flow it does again without looking at the rules, until a *round* over all flows finds that they changed. Its
control socket answers `revalidator/wait` (ovs-vswitchd(8)) at the end of a round; of one that was under way already, which may
have begun before the change. So: wait for the end of a round, and then for the end of the next. Rounds begin after changes; a
change that changes nothing, the *nudge*, makes sure that one does.

Measured with 260 flows under 20 kpps on two busy cores: 4 to 10 ms, and 1 ms a round when nothing else runs.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path

RUN_FOLDER = Path(os.environ.get("OVS_RUNDIR", "/var/run/openvswitch"))
NUDGE_AGAIN_S = 0.01
"""A round may end between the nudge before and the request; without changes the next one begins after half a second."""
PATIENCE_S = 5.0
UNKNOWN_S = 0.02
"""How long is waited where the switch is not on this machine, or has no such command."""


def settle(nudge: Callable[[], None]) -> None:
    """Return when the switch does for every flow as the rules say that it confirmed before the call."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            pid = (RUN_FOLDER / "ovs-vswitchd.pid").read_text().strip()
            connection.connect(str(RUN_FOLDER / f"ovs-vswitchd.{pid}.ctl"))
            for number in range(2):
                _wait(connection, number, nudge)
    except OSError:
        time.sleep(UNKNOWN_S)


def _wait(connection: socket.socket, number: int, nudge: Callable[[], None]) -> None:
    """Wait for the end of a round. Raises OSError where that cannot be had."""
    request = {"id": number, "method": "revalidator/wait", "params": []}
    connection.sendall(json.dumps(request).encode())
    answer, deadline = b"", time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        nudge()
        while select.select([connection], [], [], NUDGE_AGAIN_S)[0]:
            more = connection.recv(4096)
            if not more:
                raise ConnectionResetError("the switch closed its control socket")
            answer += more
            try:
                said = json.loads(answer)
            except ValueError:
                continue  # the rest is on its way
            if said.get("error") is not None:
                raise OSError(said["error"])
            return
    raise TimeoutError(f"no round over the flows ended in {PATIENCE_S:g} s")
