"""The coordinator process: the decisions of `coordinator.py` on a network, with their state on disk.

Nothing is sent before the state it follows from is saved. That may take seconds on a disk that others use, so a thread does it,
and leases for the map before are renewed meanwhile; all else waits. When it cannot be saved (a full disk), the decision is taken
back: leases go on as they are, no map changes, and `status` says why.

Who speaks has proven its role and name (`datastore/security/door.py`), and is heard in that role alone: a store with heartbeats
of its own, a client with reports of its own instance, an administrator with moves and questions; each may ask for the map.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from datastore.base.errors import NearstateError
from datastore.coordination import etcd
from datastore.coordination.attendance import Attendance
from datastore.coordination.coordinator import Coordinator, Failover, HostState
from datastore.coordination.heartbeats import Grant, Timing
from datastore.coordination.maps import ClusterMap
from datastore.coordination.messages import MOST_PARTITIONS, Closed, LineSocket, grant_message, read_beat
from datastore.coordination.state_file import FileState
from datastore.coordination.switch import Switch
from datastore.coordination.switchover import Switchover, check_steering
from datastore.security import strict
from datastore.security.challenge import Identity
from datastore.security.door import Door
from datastore.security.secret import ADMINISTRATOR, CLIENT, COORDINATOR, ROLES, STORE, Secret, forget_key

BACKLOG = 64
MOST_LINES = {STORE: 256, CLIENT: 512, ADMINISTRATOR: 16}
"""Connections of a role; one more ends the one that is silent for longest."""
LINES_OF_A_CALLER = 4
"""Of one store or client, which has one; a process of the same name ends none of it."""
IDLE_LEASES, IDLE_NS = 5, 10_000_000_000
"""Who is silent for so many leases, and for that time, is left."""
RIVAL_NS = 1_000_000_000
"""For how long status tells of a second process of a host's name."""
RENEWALS_S = 0.005
"""How often leases are renewed while state is being saved."""
MOST_UNHEARD = 1024
"""Messages of a caller that wait until state is saved; the rest waits in its socket."""


class StateStore(Protocol):
    """Where a coordinator's state outlives it, and which of several coordinators leads."""

    def campaign(self, give_up: Callable[[], bool]) -> bool:
        """Wait until this coordinator leads; False when `give_up` says so before."""

    def leads(self) -> bool:
        """Tell whether no other coordinator can lead now."""

    def close(self) -> None:
        """Lead no longer."""

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last, or None. Raises NearstateError when it cannot be read."""

    def save(self, document: dict[str, Any]) -> None:
        """Save, so that no crash can undo it. Raises NearstateError when that is impossible."""


def open_state(config: dict[str, Any]) -> StateStore:
    """Return where the state of a coordinator with this configuration is. Raises NearstateError for an address that is none."""
    if str(config["state"]).startswith(etcd.SCHEME):
        return etcd.EtcdState(config["state"], f"{config['address']}:{config['port']}")
    return FileState(Path(config["state"]))


@dataclass(eq=False)
class Caller:
    """A connection, who has proven to be at its other end, and when that was heard last."""

    line: LineSocket
    identity: Identity
    heard_ns: int
    unheard: deque[dict[str, Any] | OSError] = field(default_factory=deque)
    """What came while state was being saved, and what ended the connection."""

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield what has arrived, then raise OSError when the connection is closed or lost (see `LineSocket.receive`)."""
        while self.unheard:
            said = self.unheard.popleft()
            if isinstance(said, OSError):
                raise said
            yield said
        yield from self.line.receive()

    def may(self, role: int, name: str | None = None) -> None:
        """Raise NearstateError unless it has a role, and a name if one is given."""
        if self.identity.role != role or name not in (None, self.identity.name):
            mine, wanted = f"{ROLES[self.identity.role]} {self.identity.name}", f"{ROLES[role]} {name or ''}"
            raise NearstateError(f"{mine.strip()} may not speak as {wanted.strip()}")


class Coordination:
    """A coordinator on a listening socket. config: see `main`."""

    def __init__(self, config: dict[str, Any], state: StateStore | None = None) -> None:
        """state: in which this coordinator leads; None: as the configuration says."""
        timing, secret = Timing.of(config.get("lease_ms")), Secret.received(config.get("secret", -1))
        self.state = state or open_state(config)
        self.trouble = ""
        document, now_ns = self.state.load(), time.monotonic_ns()
        if document is None:
            hosts = {name: HostState(now_ns) for name in config["hosts"]}
            first = ClusterMap.first(config["placement"])
            self.coordinator = Coordinator(first, config["cluster"], config["replicas"], hosts, timing)
            self.state.save(self.coordinator.save())
        else:
            if document["cluster"] != config["cluster"]:
                raise NearstateError(
                    f"state in {config['state']} is of cluster {document['cluster']:x}, not {config['cluster']:x}"
                )
            self.coordinator = Coordinator.start(document, now_ns, timing)
        self.switchover, self.switch = self._steering(config.get("steering"))
        if self.switchover:
            self.switchover.take_charge(self.coordinator)
            if document is not None:
                self.switchover.resume(self.coordinator)
        self.attendance: Attendance[LineSocket] = Attendance(self.coordinator, self.switchover, self.switch, self._tell, now_ns)
        self._switch_descriptors: set[int] = set()
        self._saved = self.coordinator.save()
        self._failovers: list[Failover] = []
        self._given_up: set[str] = set()
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._lines: dict[int, Caller] = {}
        listener = socket.create_server((config["address"], config["port"]), backlog=BACKLOG)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self.door = Door(listener, secret, COORDINATOR, "")
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.door, selectors.EVENT_READ)

    def _steering(self, config: dict[str, Any] | None) -> tuple[Switchover | None, Switch | None]:
        """Return who decides where packets go, and who tells the switch."""
        if config is None:
            return None, None
        check_steering(config["steering"], config["instances"], len(self.coordinator.map.groups))
        switch = Switch(Path(config["controller"])) if config["controller"] else None
        return Switchover.of(config["instances"], config["steering"], config["aligned"]), switch

    def pause_s(self) -> float:
        """Return for how long there is nothing to do if no message comes. Each turn costs the stores' host some 0.1 ms."""
        if any(caller.unheard for caller in self._lines.values()):
            return 0.0
        now_ns, coordinator = time.monotonic_ns(), self.coordinator
        due_ns = coordinator.next_lapse_ns(now_ns)
        if coordinator.moves:
            due_ns = min(due_ns, now_ns + coordinator.timing.heartbeat_ns // 5)
        if self.switchover:
            due_ns = min(due_ns, self.switchover.next_lapse_ns(now_ns, coordinator.timing))
        return max(due_ns - now_ns, 0) / 1e9

    def turn(self, timeout_s: float) -> None:
        """Wait for messages, answer them, and do what is due."""
        self._watch_switch()
        self.selector.select(timeout_s)
        looked_ns = time.monotonic_ns()  # what was said before is heard before anybody is taken for silent, however late this is
        self.attendance.look(looked_ns)
        for connection, identity in self.door.admit():
            self._admit(connection, identity, looked_ns)
        callers = [key.data for key, _ in self.selector.select(0) if isinstance(key.data, Caller)]
        for caller in dict.fromkeys([*(caller for caller in self._lines.values() if caller.unheard), *callers]):
            if self._lines.get(caller.line.fileno()) is caller:
                self._converse(caller, looked_ns)
        for line in [caller.line for caller in self._lines.values() if caller.line.has_output]:
            with contextlib.suppress(OSError):  # what is lost is found when it is read from
                line.flush()
        self._drop_idle(looked_ns)
        self.attendance.advance(looked_ns)
        self.publish()

    def _watch_switch(self) -> None:
        """Wake up when the controller answers."""
        descriptors = self.switch.filenos() if self.switch else set()
        for descriptor in self._switch_descriptors - descriptors:
            self.selector.unregister(descriptor)
        for descriptor in descriptors - self._switch_descriptors:
            self.selector.register(descriptor, selectors.EVENT_READ)
        self._switch_descriptors = descriptors

    def _hear_instance(self, line: LineSocket, report: dict[str, Any]) -> None:
        """Take an instance's report. Raises NearstateError when it is of another cluster."""
        if self.switchover is None or report["cluster"] != self.coordinator.cluster:
            raise NearstateError(f"instance {report['host']} of cluster {report['cluster']:x}: this coordinator steers others")
        self.attendance.hear_instance(time.monotonic_ns(), line, report)

    def _admit(self, connection: socket.socket, identity: Identity, now_ns: int) -> None:
        """Take a connection whose caller is known; one too many ends another."""
        alike = [caller for caller in self._lines.values() if caller.identity == identity]
        of_role = [caller for caller in self._lines.values() if caller.identity.role == identity.role]
        if identity.role != ADMINISTRATOR and len(alike) >= LINES_OF_A_CALLER:
            self._drop(min(alike, key=lambda caller: caller.heard_ns).line)
        elif len(of_role) >= MOST_LINES[identity.role]:
            self._drop(min(of_role, key=lambda caller: caller.heard_ns).line)
        caller = Caller(LineSocket(connection), identity, now_ns)
        self._lines[caller.line.fileno()] = caller
        self.selector.register(connection, selectors.EVENT_READ, caller)

    def _converse(self, caller: Caller, now_ns: int) -> None:
        line, caller.heard_ns = caller.line, now_ns
        try:
            for message in caller.messages():
                if self._lines.get(line.fileno()) is not caller:  # it was left meanwhile
                    return
                if "parting" in message:
                    self.attendance.part(line)
                    continue
                if "instance" in message:
                    caller.may(CLIENT, strict.name(message["instance"]["host"]))
                    self._hear_instance(line, message["instance"])
                    continue
                self._tell(line, self._answer(caller, message))
        except NearstateError as error:
            self._tell(line, {"error": str(error)})
            self._drop(line)
        except Closed:
            self._drop(line, is_closed=True)
        except (OSError, KeyError, TypeError, ValueError):
            self._drop(line)

    def _tell(self, line: LineSocket, message: dict[str, Any]) -> None:
        """Send a message. A lost connection is found when it is read from: there may be something left to hear."""
        try:
            line.send(message)
        except ConnectionAbortedError:  # its other end does not read
            self._drop(line)
        except OSError:
            pass

    def _drop_idle(self, now_ns: int) -> None:
        idle_ns = max(IDLE_LEASES * self.coordinator.timing.lease_ns, IDLE_NS)
        for caller in [caller for caller in self._lines.values() if now_ns - caller.heard_ns > idle_ns]:
            self._drop(caller.line)

    def _drop(self, line: LineSocket, is_closed: bool = False) -> None:
        """Close a connection. is_closed: its other end did."""
        if self._lines.pop(line.fileno(), None) is None:
            return
        self.selector.unregister(line.connection)
        self.attendance.lose(time.monotonic_ns(), line, is_closed)
        line.close()

    def _answer(self, caller: Caller, message: dict[str, Any]) -> dict[str, Any]:
        coordinator = self.coordinator
        try:
            if "beat" in message:
                beat = read_beat(message["beat"])
                caller.may(STORE, beat.host)
                if not self.state.leads():
                    return grant_message(Grant(beat.incarnation, beat.sent_ns, 0, 0, None, "this coordinator leads no longer"))
                grant = self.attendance.hear_store(time.monotonic_ns(), caller.line, beat)
                if not self.publish():
                    grant = Grant(beat.incarnation, beat.sent_ns, 0, coordinator.map.epoch, None, self.trouble)
                return grant_message(grant)
            if "map" not in message:
                caller.may(ADMINISTRATOR)
            return self.saved_command(message)
        except (NearstateError, KeyError, TypeError, ValueError) as error:
            return {"error": str(error)}

    def saved_command(self, message: dict[str, Any]) -> dict[str, Any]:
        """As `command`, and save: of a map or a move that could not be saved nobody is told."""
        answer = self.command(message)
        if not self.publish() and ("map" in message or "move" in message):
            return {"error": self.trouble}
        return answer

    def command(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to what people and tools ask: {"map": epoch}, {"move": ...}, {"moves": true} or {"status": true}."""
        coordinator = self.coordinator
        try:
            if "map" in message:
                newest = coordinator.map if message["map"] != coordinator.map.epoch else None
                return {"map": newest.to_json() if newest else None}
            if "move" in message:
                partitions = [strict.whole(partition, MOST_PARTITIONS)
                              for partition in strict.members(message["move"]["partitions"], MOST_PARTITIONS)]  # fmt: skip
                self._move(partitions, strict.name(message["move"]["target"]))
                return {"epoch": coordinator.map.epoch}
            if "moves" in message:
                return {"moves": len(coordinator.moves)}
            if "status" in message:
                return {"status": self.status()}
        except (NearstateError, KeyError, TypeError, ValueError) as error:
            return {"error": str(error)}
        return {"error": f"unknown message {sorted(message)}: send beat, map, move, moves or status"}

    def _move(self, partitions: list[int], target: str) -> None:
        """Begin a move. Raises NearstateError for partitions that are on their way elsewhere, or do not exist."""
        coordinator = self.coordinator
        alive = coordinator.alive(time.monotonic_ns())
        for partition in partitions:
            other = coordinator.moves.get(partition, target)
            if other != target and other in alive:
                raise NearstateError(f"partition {partition} is on its way to {other}: move it again once it is there")
        groups = coordinator.map.groups
        there = {partition for partition in range(len(groups)) if partition not in coordinator.moves
                 and groups[partition].primary == target and not groups[partition].successor}  # fmt: skip
        coordinator.move([partition for partition in partitions if partition not in there], target)

    def publish(self) -> bool:
        """Save what was decided and tell every store; False when it could not be saved, and is taken back."""
        coordinator = self.coordinator
        if not self.state.leads():
            self.trouble = self.trouble or "this coordinator leads no longer"
            return False
        if coordinator.dirty:
            coordinator.dirty = False
            document = coordinator.save()
            try:
                self._save(document)
            except NearstateError as error:
                if not self.trouble:
                    print(error, file=sys.stderr, flush=True)
                self.trouble = str(error)
                coordinator.restore(self._saved)
                coordinator.failovers, coordinator.given_up = list(self._failovers), set(self._given_up)
                return False
            self._saved, self.trouble = document, ""
            self._failovers, self._given_up = list(coordinator.failovers), set(coordinator.given_up)
        self.attendance.announce()
        if len(coordinator.moves) != len(self._saved["moves"]):  # some have ended: nobody waits until that is saved
            coordinator.dirty = True
        return True

    def _save(self, document: dict[str, Any]) -> None:
        """Save, and renew leases while that takes long. Raises NearstateError."""
        saving = self._saver.submit(self.state.save, document)
        while not wait([saving], RENEWALS_S).done:
            for key, _ in self.selector.select(0):
                if isinstance(key.data, Caller) and key.data.identity.role in (STORE, CLIENT):
                    self._renew(key.data)
        saving.result()

    def _renew(self, caller: Caller) -> None:
        """Take what a store or an NF process says, to be heard later; renew the one's lease, and tell the other it was heard."""
        if len(caller.unheard) >= MOST_UNHEARD or (caller.unheard and isinstance(caller.unheard[-1], OSError)):
            return
        try:
            for message in caller.line.receive():
                caller.unheard.append(message)
                if "instance" in message:
                    if caller.line in self.attendance.instances.values():  # else it would begin before it is known
                        self._tell(caller.line, {"heard": True})
                elif "beat" in message and (grant := self._renewal(caller, message["beat"])):
                    self._tell(caller.line, grant_message(grant))
        except OSError as error:
            caller.unheard.append(error)

    def _renewal(self, caller: Caller, told: Any) -> Grant | None:
        """Return a lease for the map that was published last, if the sender of this heartbeat may have one."""
        with contextlib.suppress(NearstateError):
            beat = read_beat(told)
            caller.may(STORE, beat.host)
            if self.state.leads():
                return self.coordinator.renew(time.monotonic_ns(), beat, self.attendance.announced)
        return None

    def status(self) -> dict[str, Any]:
        """Return map, hosts, leases and trouble, as a JSON object."""
        now_ns = time.monotonic_ns()
        hosts = {name: {"lease_ms": max(state.granted_until_ns - now_ns, 0) / 1e6, "epoch": state.epoch, "lag": state.lag,
                        "heard_ms_ago": (now_ns - state.heard_ns) / 1e6 if state.heard_ns else None,
                        "rival": state.rival_ns > 0 and now_ns - state.rival_ns < RIVAL_NS}
                 for name, state in self.coordinator.hosts.items()}  # fmt: skip
        instances = self.switchover.instances if self.switchover else {}
        groups = [group.to_json() for group in self.coordinator.map.groups]
        return {"map": {"epoch": self.coordinator.map.epoch, "groups": groups}, "hosts": hosts,
                "moves": self.coordinator.moves, "trouble": self.trouble,
                "steering": self.switchover.confirmed if self.switchover else [],
                "instances": {name: {"heard_ms_ago": (now_ns - instance.heard_ns) / 1e6 if instance.heard_ns else None,
                                     "link": not instance.cut_ns}
                              for name, instance in instances.items()},
                "replicas": self.coordinator.replicas, "log": self.coordinator.log[-20:],
                "failovers": [vars(failover) for failover in self.coordinator.failovers]}  # fmt: skip

    def close(self) -> None:
        """Close every connection."""
        self._saver.shutdown()
        for caller in list(self._lines.values()):
            self._drop(caller.line)
        self.selector.close()
        self.door.close()
        if self.switch:
            self.switch.close()


def main(config: dict[str, Any], control: Any) -> None:
    """Run a coordinator under the launcher: target of `Launcher.spawn`.

    config: {"address", "port", "cluster": id, "replicas": n, "hosts": [names], "placement": hosts of each partition, "state":
    path, or etcd://host:port/prefix for one of several coordinators, "lease_ms": optional}, and where packets are to follow
    the map, "steering": {"instances": [NF hosts], "steering": the instance of each partition now, "aligned": whether the
    stores are on those hosts, "controller": path of its socket, or ""}. "secret": descriptor of
    the deployment's secret. Sends {"ready": true, "port": n}, with "leads": false
    while it stands by, or {"error": line}; answers commands; ends at {"stop": true}, SIGTERM, or when the other side is gone.
    """
    with contextlib.suppress(OSError):  # on a machine of its own it would not wait behind packets; here it shares a few cores
        os.nice(-10)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    told: list[str] = []

    def stand_by() -> bool:
        """While another one leads: tell so once, and whether to give up."""
        if not told:
            told.append("standing by")
            control.send({"ready": True, "port": config["port"], "leads": False})
        message = control.receive(0)
        if message and not message.get("stop"):
            control.send({"error": "this coordinator stands by: another one leads, or etcd is away"})
        return bool(stopping or (message or {}).get("stop"))

    state: StateStore | None = None
    try:
        state = open_state(config)
        while not stopping and state.campaign(stand_by):
            process = _begin(config, state)
            if process is None:
                continue
            if not told:
                told.append("leading")
                control.send({"ready": True, "port": process.port})
            if _lead(process, control, stopping):
                return
    except EOFError:
        pass
    except (NearstateError, OSError) as error:
        control.send({"error": str(error)})
    finally:
        forget_key(config.get("secret", -1))
        if state:
            state.close()


def _begin(config: dict[str, Any], state: StateStore) -> Coordination | None:
    """Take over the state; None: it could not be had, and by now somebody else may lead. Raises NearstateError, OSError."""
    try:
        return Coordination(config, state)
    except etcd.Unavailable as error:
        print(error, file=sys.stderr, flush=True)
        return None


def _lead(process: Coordination, control: Any, stopping: Sequence[int]) -> bool:
    """Coordinate until told to stop (then True), or until this coordinator leads no longer. Raises EOFError."""
    process.selector.register(control, selectors.EVENT_READ)
    try:
        while not stopping and process.state.leads():
            process.turn(process.pause_s())
            message = control.receive(0)
            if message and message.get("stop"):
                return True
            if message:
                control.send(process.saved_command(message))
        return bool(stopping)
    finally:
        process.close()
