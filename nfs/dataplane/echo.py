"""How does an NF process know that the switch is past all that it sent to the process, or got from it?

By an echo: a frame that the switch sends back by the port at which it came in (`topologies/controller/steering.py`). It comes
back behind the packets that the switch had decided to send here before. By then the switch has forwarded what left here before.

    switch ---- packet, packet ----> ring of the port ... echo behind them
    switch <--- packet, packet, echo ------------------- the port

So no time is guessed. A port's echoes are numbered; one that is lost is followed by a later one, which says as much.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Sequence

import numpy as np

from datastore.compiled import jit
from datastore.compiled.memory import network16
from nfs.dataplane.engine import ECHO_MAGIC, ECHOED, Engine
from nfs.dataplane.frames import Frames, give_frame, take_frame
from nfs.dataplane.port import Port, tx_flush, tx_push

ETHERTYPE = 0x88B5
"""IEEE Std 802, local experimental EtherType 1."""
MAGIC_AT, NUMBER_AT, ECHO_BYTES = 14, 22, 60
AGAIN_NS = 5_000_000
"""An echo that has not come back for so long is followed by another one."""
_ADDRESSES = bytes.fromhex("02000000ec0002000000ec01")


@jit
def word_at(frame: np.ndarray, at: int) -> int:
    """Return the 64-bit word at byte `at`, in network order."""
    word = np.int64(0)
    for n in range(4):
        word = word << 16 | np.int64(network16(frame, at + 2 * n))
    return word


@jit
def take_echo(engine: Engine, frame: np.ndarray, at: int, length: int, arrived_from: int) -> bool:
    """Tell whether the frame at byte `at` is an echo of this process; if so, note its number."""
    if (
        length < ECHO_BYTES
        or network16(frame, at + 12) != ETHERTYPE
        or word_at(frame, at + MAGIC_AT) != engine.control[ECHO_MAGIC]
    ):
        return False
    engine.control[ECHOED + arrived_from] = max(engine.control[ECHOED + arrived_from], word_at(frame, at + NUMBER_AT))
    return True


class Echoes:
    """The echoes of one NF process. Not while the packet loop runs."""

    def __init__(self, engine: Engine, ports: Sequence[Port], frames: Frames) -> None:
        self._engine, self._ports, self._frames = engine, list(ports), frames
        self._number, self._sent_ns = 0, 0
        engine.control[ECHO_MAGIC] = secrets.randbits(62) | 1

    def ask(self, now_ns: int) -> int:
        """Send an echo by every port; return its number, for `answered`."""
        self._number, self._sent_ns = self._number + 1, now_ns
        frame = _ADDRESSES + struct.pack("!HqQ", ETHERTYPE, int(self._engine.control[ECHO_MAGIC]), self._number)
        for port in self._ports:
            at = int(take_frame(self._frames))
            if at < 0:
                continue  # asked again when there are frames
            self._frames.memory[at : at + ECHO_BYTES] = np.frombuffer(frame.ljust(ECHO_BYTES, b"\0"), np.uint8)
            if not tx_push(port, self._frames, at, ECHO_BYTES):
                give_frame(self._frames, at)
            tx_flush(port, self._frames)
        return self._number

    def answered(self, number: int, now_ns: int) -> bool:
        """Tell whether echo `number`, or a later one, has come back by every port; ask again where it takes long."""
        if all(self._engine.control[ECHOED + side] >= number for side in range(len(self._ports))):
            return True
        if now_ns - self._sent_ns > AGAIN_NS:
            self.ask(now_ns)
        return False


def warm() -> None:
    """Load what Python calls to send an echo."""
    from nfs.dataplane.frames import make_frames
    from nfs.dataplane.port import closed_port

    frames, port = make_frames(2), closed_port()
    at = int(take_frame(frames))
    if tx_push(port, frames, at, ECHO_BYTES):
        tx_flush(port, frames)
    give_frame(frames, at)
