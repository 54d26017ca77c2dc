"""The store process: a table, the server on it, and what follows the coordinator, made from a configuration."""

from __future__ import annotations

import signal
import socket
import time
from typing import Any

from datastore.base.errors import NearstateError
from datastore.base.partitioning import PARTITIONS
from datastore.coordination.heartbeats import Timing
from datastore.process.member import Member
from datastore.process.server import (
    CLIENT_PLACES,
    COMMON_PLACES,
    DESCRIPTOR,
    HEARD_NS,
    IDLE_NS,
    NUMBER,
    PLACES_OF_A_PEER,
    TURN_NS,
    disconnect,
    new_state,
    occupy,
    serve,
)
from datastore.security.challenge import Identity
from datastore.security.door import Door
from datastore.security.secret import ADMINISTRATOR, STORE, Secret, forget_key
from datastore.store.bells import STORE as STORE_BELL
from datastore.store.layout import ADDRESS, PORT
from datastore.store.partitions import PartitionMap
from datastore.store.table import Table


def apply_map(table: Table, host: str, placement: PartitionMap) -> None:
    """Make this host primary of what the map gives it, and of nothing else."""
    for partition in range(PARTITIONS):
        table.set_role(partition, placement.replicas[partition][0] == host, placement.epoch)


def listen(address: str, port: int) -> socket.socket:
    """Return a listening socket; raises NearstateError when the address cannot be had. Port 0: any free one."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        listener.bind((address, port))
        listener.listen(COMMON_PLACES)
    except OSError as error:
        listener.close()
        raise NearstateError(
            f"store cannot listen on {address}:{port}: {error.strerror}; choose an address of this host and a free port"
        ) from None
    return listener


class StoreProcess:
    """A table and the server on it: made from a configuration, run until told to stop."""

    def __init__(self, config: dict[str, Any], waker: int = -1) -> None:
        """config: host, table, capacity, value_bytes, address, port, cluster, map (JSON), create, secret; see `main`."""
        self.host, secret = config["host"], Secret.received(config.get("secret", -1))
        replication = config.get("replication")
        placement = None if replication else PartitionMap.from_json(config["map"])
        self._created = bool(config["create"]) and not config.get("keep", False)
        if config["create"]:
            self.table = Table.create(
                config["table"], config["capacity"], config["value_bytes"], epoch=placement.epoch if placement else 0,
                cluster=config["cluster"], clients=COMMON_PLACES, replication_secret=secret.table_secret if replication else None,
            )  # fmt: skip
        else:
            self.table = Table.attach(config["table"])
        try:
            self.table.claim_server()
            self.owner = self.table.register_owner()
            if placement:
                apply_map(self.table, self.host, placement)
            listener = listen(config["address"], config["port"])
            self._door = Door(listener, secret, STORE, self.host)
        except BaseException:
            self.close()
            raise
        address, self.port = listener.getsockname()
        words = self.table.words
        words[PORT] = self.port
        words[ADDRESS] = int.from_bytes(socket.inet_aton(address), "big")
        peers = replication["peers"] if replication else []
        self.bell = self.table.bell(STORE_BELL) if replication else None
        self.state = new_state(
            words, self._door.fileno(), waker, len(peers), bool(replication and replication["asynchronous"]),
            self.bell.state if self.bell else None,
        )  # fmt: skip
        serve(self.state, self.owner, 0)  # compiled before anybody is told that the store is ready
        self._peers = [str(peer["host"]) for peer in peers]
        self.member = Member(
            self.host, self.table, self.owner, config["cluster"], peers, replication["coordinators"], self.state.shipping,
            self.state.links, (address, self.port), secret, Timing.of(replication.get("lease_ms")),
        ) if replication else None  # fmt: skip

    def turn(self) -> bool:
        """Serve for TURN_NS, or until a signal or the waker; tell whether the waker has input."""
        until_ns = time.monotonic_ns() + TURN_NS
        for connection, identity in self._door.admit():
            self._admit(connection, identity)
        if self.member is None:
            serve(self.state, self.owner, until_ns)
            return bool(self.state.polled[1] >> 48)
        self.member.work()
        self.state.wakers[0], self.state.wakers[1] = self.member.fileno(), self.member.gossip.fileno()
        serve(self.state, self.owner, min(until_ns, self.member.due_ns()))
        return bool(self.state.polled[1] >> 48)

    def _admit(self, connection: socket.socket, identity: Identity) -> None:
        """Give a connection whose speaker is known a place, if there is one."""
        place = self._place(identity)
        if place is None:
            connection.close()
            return
        if self.state.connections[place, DESCRIPTOR] >= 0:
            disconnect(self.state, place)
        occupy(self.state, place, connection.detach(), identity.role, identity.number)

    def _place(self, identity: Identity) -> int | None:
        """Return the place for a speaker: its own, else a free one, else that of whoever is silent for longest, if for long.

        A peer's second place goes to who has spoken last: of two processes under one name neither ends the other.
        """
        connections, rows = self.state.connections, self._rows(identity)
        used = [n for n in rows if connections[n, DESCRIPTOR] >= 0]
        own = [n for n in used if identity.number and connections[n, NUMBER] == identity.number]
        free = [n for n in rows if n not in used]
        if own or free:
            return (own or free)[0]
        idlest = min(used, key=lambda n: int(connections[n, HEARD_NS]), default=None)
        is_idle = idlest is not None and time.monotonic_ns() - connections[idlest, HEARD_NS] > IDLE_NS
        return idlest if is_idle or identity.role == STORE else None

    def _rows(self, identity: Identity) -> range:
        """Return the places of a speaker's kind; none for a store that is no peer."""
        if identity.role == ADMINISTRATOR:
            return range(CLIENT_PLACES, COMMON_PLACES)
        if identity.role != STORE:
            return range(CLIENT_PLACES)
        if identity.name not in self._peers:
            return range(0)
        first = COMMON_PLACES + PLACES_OF_A_PEER * self._peers.index(identity.name)
        return range(first, first + PLACES_OF_A_PEER)

    def close(self) -> None:
        """Close connections and door, and remove the table's name if this process made it."""
        member: Member | None = getattr(self, "member", None)
        if member:
            member.close()
        if hasattr(self, "state"):
            if self.bell:
                self.bell.close()
            for n in range(len(self.state.connections)):
                if self.state.connections[n, DESCRIPTOR] >= 0:
                    disconnect(self.state, n)
            self._door.close()
        self.table.close()
        if self._created:
            self.table.unlink()


def main(config: dict[str, Any], control: Any) -> None:
    """Run a store process under the launcher: target of `Launcher.spawn`.

    config: {"host": name in the map, "table": name, "capacity": records, "value_bytes": n, "address": IPv4, "port": n,
    "cluster": id, "map": PartitionMap as JSON, "create": bool, "secret": descriptor of the deployment's secret,
    "keep": bool (optional: leave the table behind)}, and optionally
    "replication": {"coordinators": [[address, port], ...], "peers": [{"host", "address", "port"}],
    "asynchronous": bool, "lease_ms": optional}: then it follows the coordinator's maps, and "map" is not looked at.
    control: `send(dict)`, `receive(timeout_s)`, `fileno()`. Sends {"ready": true, "port": n} (or {"error": line}); answers
    {"statistics": true} and {"map": ...}; ends at {"stop": true}, SIGTERM, or when the other side is gone.
    """
    stopping = stop_at_signals()
    try:
        store = StoreProcess(config, control.fileno())
        forget_key(config["secret"])
    except NearstateError as error:
        control.send({"error": str(error)})
        return
    try:
        control.send({"ready": True, "port": store.port})
        while not stopping:
            if store.turn() and not _obey(store, control):
                break
    finally:
        store.close()


def stop_at_signals() -> list[int]:
    """Return a list that gets the number of the first SIGTERM or SIGINT."""
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: signals.append(received))
    return signals


def _obey(store: StoreProcess, control: Any) -> bool:
    """Do what a control message asks; return False when it is to stop."""
    try:
        message = control.receive(0)
    except (EOFError, OSError):
        return False
    if message is None:
        return True
    if "map" in message:
        try:
            placement = PartitionMap.from_json(message["map"])
            apply_map(store.table, store.host, placement)
            control.send({"epoch": placement.epoch})
        except NearstateError as error:
            control.send({"error": str(error)})
    if "statistics" in message:
        control.send({"statistics": store.table.statistics()})
    return "stop" not in message
