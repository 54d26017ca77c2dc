"""How stores, clients and coordinator speak beside the data: JSON, in lines over TCP and in datagrams, few and small.

store  -> coordinator   {"beat": {...}}      coordinator -> store    {"grant": {...}}     also unasked, with a new map
anyone -> coordinator   {"map": epoch}       coordinator -> anyone   {"map": {...}}       null: that epoch is the newest
either   -> coordinator {"parting": true}    before it closes the connection itself; else its kernel does, at its end
instance -> coordinator {"instance": {...}}  coordinator -> instance {"heard": true}, once a lease; unasked {"orders": {...}}
store <-> store         {"pong": {...}, "ping": {...}}, either or both, in a datagram
people -> coordinator   {"status": true}, {"move": {"partitions": [...], "target": host}} ...
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from datastore.native.errors import NearstateError
from datastore.replication.coordinator import Grant, Heartbeat
from datastore.replication.maps import ClusterMap
from datastore.replication.replica import Ping, Pong

LONGEST_LINE = 1 << 22


def beat_message(beat: Heartbeat) -> dict[str, Any]:
    """Return a heartbeat as a message."""
    return {"beat": asdict(beat)}


def read_beat(fields: dict[str, Any]) -> Heartbeat:
    """Return the heartbeat in a message; raises NearstateError when it is none."""
    try:
        return Heartbeat(
            str(fields["host"]), int(fields["cluster"]), int(fields["incarnation"]), int(fields["epoch"]), int(fields["sent_ns"]),
            tuple((int(partition), str(host)) for partition, host in fields["synchronised"]),
            tuple(map(int, fields["released"])), tuple(map(str, fields["unreachable"])), int(fields["lag"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise NearstateError(f"not a heartbeat: {error!r}") from None


def grant_message(grant: Grant) -> dict[str, Any]:
    """Return a grant as a message."""
    return {"grant": vars(grant) | {"map": grant.map.to_json() if grant.map else None}}


def read_grant(fields: dict[str, Any]) -> Grant:
    """Return the grant in a message; raises NearstateError when it is none."""
    try:
        given = ClusterMap.from_json(fields["map"]) if fields["map"] else None
        return Grant(int(fields["incarnation"]), int(fields["sent_ns"]), int(fields["lease_ns"]), int(fields["epoch"]), given,
                     str(fields["refusal"]))  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise NearstateError(f"not a grant: {error!r}") from None


def gossip(*said: Ping | Pong) -> bytes:
    """Return the datagram in which a store says a pong, a ping or both."""
    return json.dumps({type(each).__name__.lower(): vars(each) for each in said}).encode()


def read_gossip(data: bytes) -> tuple[Pong | None, Ping | None]:
    """Return what another store says in a datagram; nothing when it is not whole."""
    try:
        message = json.loads(data)
        pong, ping = message.get("pong"), message.get("ping")
        return (
            Pong(str(pong["host"]), int(pong["epoch"]), int(pong["incarnation"]), int(pong["sent_ns"]), bool(pong["promise"]))
            if pong else None,
            Ping(str(ping["host"]), *(int(ping[name]) for name in ("cluster", "incarnation", "epoch", "sent_ns")))
            if ping else None,
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError):
        return None, None


class LineSocket:
    """A connection that carries messages; it never waits."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self._in, self._out = connection, b"", b""

    def fileno(self) -> int:
        return self.connection.fileno()

    @property
    def has_output(self) -> bool:
        """Whether something is left that the socket did not take."""
        return bool(self._out)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, or as much of it as the socket takes now. Raises OSError when the connection is lost."""
        self._out += json.dumps(message, separators=(",", ":")).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Go on sending. Raises OSError."""
        while self._out:
            try:
                sent = self.connection.send(self._out)
            except BlockingIOError:
                return
            self._out = self._out[sent:]

    def receive(self) -> Iterator[dict[str, Any]]:
        """Yield the messages that have arrived, then raise OSError when the connection is closed or lost.

        ConnectionResetError: the other side has closed it. Raises OSError also for what is no message.
        """
        lost: OSError | None = None
        while lost is None:
            try:
                data = self.connection.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                lost = error
                break
            if not data:
                lost = ConnectionResetError("closed")
                break
            self._in += data
            if len(self._in) > LONGEST_LINE:
                raise ConnectionAbortedError("a line of over 4 MB")
        *lines, self._in = self._in.split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                raise ConnectionAbortedError(f"no message: {line[:60]!r}") from None
            if not isinstance(message, dict):
                raise ConnectionAbortedError(f"no message: {line[:60]!r}")
            yield message
        if lost:
            raise lost

    def close(self) -> None:
        self.connection.close()
