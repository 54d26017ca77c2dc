"""The connection of a process to the coordinator on the imagined network, and the ways in which it ends.

part     the process closes it and says so before; the process lives on, or stops in an orderly way
close    the process has ended: its kernel closes the connection, behind all that was sent
reset    the connection is lost, with what was on its way; each end that lives hears so, each at its own time
vanish   the machine has lost its power: nothing more is heard
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datastore.coordination.heartbeats import MILLISECOND_NS
from datastore.coordination.reporter import SILENCE_LEASES
from datastore.verification.imagined import Actor, Stream

CLOSED: dict[str, Any] = {}
"""The end of a stream, in place of a message."""
COORDINATOR = "control"


class Line:
    """A stream each way between a process and the coordinator."""

    def __init__(self, speaker: Actor, hear: Callable[[dict[str, Any]], None], lost: Callable[[], None]) -> None:
        """hear: takes what the coordinator says. lost: the connection is closed or reset from the other side."""
        world = speaker.world
        self.world, self.speaker, self._hear, self._lost = world, speaker, hear, lost
        self.coordinator = world.actors[COORDINATOR]
        self.up = Stream(world, speaker.name, COORDINATOR, self._arrive, self._hear_loss)
        self.down = Stream(world, COORDINATOR, speaker.name, self._take, self._hear_reset)
        self.coordinator.lines.append(self)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to the coordinator."""
        self.up.send(message)

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to the process."""
        self.down.send(message)

    def _arrive(self, message: dict[str, Any]) -> None:
        if message is CLOSED:
            self.leave()
            self.coordinator.lose(self, True)
        else:
            self.coordinator.converse(self, message)

    def _take(self, message: dict[str, Any]) -> None:
        self._hear(message)

    def _hear_loss(self) -> None:
        """The process finds its connection gone."""
        self.up.is_open = self.down.is_open = False
        self.speaker.act(self._lost, self.speaker.life)

    def _hear_reset(self) -> None:
        """The coordinator finds the connection gone."""
        life = self.coordinator.life
        self.coordinator.act(lambda: self._be_lost() if self in self.coordinator.lines else None, life)

    def _be_lost(self) -> None:
        self.leave()
        self.coordinator.lose(self, False)

    def leave(self) -> None:
        """Carry nothing more."""
        self.up.is_open = self.down.is_open = False
        if self in self.coordinator.lines:
            self.coordinator.lines.remove(self)

    # ---- ends ---------------------------------------------------------------------------------------------------------

    def part(self) -> None:
        """The process closes it by itself."""
        self.up.send({"parting": True})
        self.close()

    def close(self) -> None:
        """Close it from the process' side, behind what was sent."""
        self.up.send(CLOSED)
        self.down.is_open = False

    def reset(self, is_dead: bool = False) -> None:
        """Lose it. is_dead: there is no process that could hear of that."""
        self.up.is_open = self.down.is_open = False
        self._after(self._hear_reset)
        if not is_dead:
            self._after(self._hear_loss)

    def vanish(self) -> None:
        """The process' machine is gone. The coordinator hears no more than what has arrived, until it speaks to the next one."""
        self.up.is_open = False

    def drop(self) -> None:
        """The coordinator has ended: its kernel says so."""
        self._after(self._hear_loss)

    def _after(self, act: Callable[[], None]) -> None:
        self.world.at(self.world.now + self.world.random.randrange(MILLISECOND_NS), act)


class Talk(Actor):
    """A thread of a process that keeps a connection to the coordinator, as `Reporter` does. The process' other threads may be
    busy meanwhile; it lives, dies and is stopped with the process."""

    def __init__(
        self, process: Actor, report: Callable[[], dict[str, Any] | None], hear: Callable[[dict[str, Any]], None]
    ) -> None:
        """report: returns what is to be said now. hear: takes what the coordinator says."""
        self.world, self.process, self.clock = process.world, process, process.clock
        self.name = f"{process.name}/reporter"
        self._report, self._hear = report, hear
        self.line: Line | None = None
        self.world.actors[self.name] = self

    @property
    def alive(self) -> bool:  # type: ignore[override]
        return bool(self.process.alive)

    @property
    def life(self) -> int:  # type: ignore[override]
        return int(self.process.life)

    @property
    def paused_until(self) -> int:  # type: ignore[override]
        return int(self.process.paused_until)

    def start(self) -> None:
        """Begin with the process."""
        self.line, self.heard_ns = None, self.now()
        self.beat()

    def beat(self) -> None:
        """Say what there is to say; leave a coordinator that is silent, and find one."""
        timing = self.world.timing
        if self.line and self.now() - self.heard_ns > SILENCE_LEASES * timing.lease_ns:
            self.part()
        self.connect()
        self.tell()
        self.later(timing.heartbeat_ns, self.beat)

    def connect(self) -> None:
        """Connect, if the coordinator can be reached."""
        coordinator = self.world.actors[COORDINATOR]
        is_cut = self.world.is_cut(self.name, COORDINATOR) or self.world.is_cut(COORDINATOR, self.name)
        if self.line is None and coordinator.alive and not is_cut:
            self.line, self.heard_ns = Line(self, self._take, self._lose), self.now()

    def tell(self) -> None:
        """Say what there is to say now."""
        message = self._report() if self.line else None
        if self.line and message is not None:
            self.line.send(message)

    def _take(self, message: dict[str, Any]) -> None:
        self.heard_ns = self.now()
        self._hear(message)

    def _lose(self) -> None:
        if self.line and not self.line.up.is_open:
            self.line = None

    def part(self) -> None:
        """Close the connection."""
        if self.line:
            self.line.part()
        self.line = None

    def end(self, how: str) -> None:
        """The process ends. how: "close", "reset", "part" or "vanish", see the module's text."""
        line, self.line = self.line, None
        if line and how == "reset":
            line.reset(is_dead=True)
        elif line:
            {"close": line.close, "part": line.part, "vanish": line.vanish}[how]()
