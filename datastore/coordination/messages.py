"""How stores, clients and coordinator speak beside the data: JSON, in lines over TCP and in datagrams, few and small.

A connection begins with a challenge (`datastore/security/challenge.py`), a datagram is sealed (`security/datagrams.py`).
What is read is checked here, whoever sent it: nothing deep, long, or not finite, and numbers of the range that they count in.

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

from datastore.base.errors import NearstateError
from datastore.coordination.heartbeats import Grant, Heartbeat, Ping, Pong
from datastore.coordination.maps import ClusterMap
from datastore.security import strict
from datastore.security.strict import LARGEST_EPOCH, LARGEST_TIME, WORD, members, whole

LONGEST_LINE, LONGEST_TOLD = 1 << 16, 1 << 22
"""Bytes that somebody may say to a coordinator, and a coordinator to others: maps, and status."""
MOST_PARTITIONS, MOST_HOSTS = 1 << 16, 1 << 10


def beat_message(beat: Heartbeat) -> dict[str, Any]:
    """Return a heartbeat as a message."""
    return {"beat": asdict(beat)}


def read_beat(fields: dict[str, Any]) -> Heartbeat:
    """Return the heartbeat in a message; raises NearstateError when it is none."""
    try:
        return Heartbeat(
            strict.name(fields["host"]), whole(fields["cluster"], WORD), whole(fields["incarnation"], LARGEST_TIME),
            whole(fields["epoch"], LARGEST_EPOCH), whole(fields["sent_ns"], LARGEST_TIME),
            tuple((whole(partition, MOST_PARTITIONS), strict.name(host))
                  for partition, host in members(fields["synchronised"], MOST_PARTITIONS)),
            tuple(whole(partition, MOST_PARTITIONS) for partition in members(fields["released"], MOST_PARTITIONS)),
            tuple(map(strict.name, members(fields["unreachable"], MOST_HOSTS))), whole(fields["lag"], WORD),
            whole(fields["function_ended"], LARGEST_TIME),
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
        return Grant(whole(fields["incarnation"], LARGEST_TIME), whole(fields["sent_ns"], LARGEST_TIME),
                     whole(fields["lease_ns"], LARGEST_TIME), whole(fields["epoch"], LARGEST_EPOCH), given,
                     str(fields["refusal"]))  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise NearstateError(f"not a grant: {error!r}") from None


def gossip(*said: Ping | Pong) -> bytes:
    """Return the datagram in which a store says a pong, a ping or both."""
    return json.dumps({type(each).__name__.lower(): vars(each) for each in said}).encode()


def read_gossip(sender: str, text: bytes) -> tuple[Pong | None, Ping | None]:
    """Return what a store says of itself in a datagram; nothing when it is not whole, or of somebody else."""
    try:
        message = strict.message(text)
        pong, ping = message.get("pong"), message.get("ping")
        if any(said["host"] != sender for said in (pong, ping) if said):
            return None, None
        return (
            Pong(sender, whole(pong["epoch"], LARGEST_EPOCH), whole(pong["incarnation"], LARGEST_TIME),
                 whole(pong["sent_ns"], LARGEST_TIME), pong["promise"] is True) if pong else None,
            Ping(sender, whole(ping["cluster"], WORD), whole(ping["incarnation"], LARGEST_TIME),
                 whole(ping["epoch"], LARGEST_EPOCH), whole(ping["sent_ns"], LARGEST_TIME)) if ping else None,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return None, None


class Closed(ConnectionError):
    """The other side has closed the connection, after all that it sent had arrived (the end of the stream).

    A reset is no such proof: it also answers what reaches a socket that its process closed by itself (RFC 1122, 4.2.2.13), and
    what that sent before may be lost with it.
    """


class LineSocket:
    """A connection that carries messages; it never waits."""

    def __init__(self, connection: socket.socket, longest: int = LONGEST_LINE) -> None:
        """longest: bytes of a line that is taken."""
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self._longest, self._in, self._out = connection, longest, b"", b""
        self._lost: OSError | None = None

    def fileno(self) -> int:
        return self.connection.fileno()

    @property
    def has_output(self) -> bool:
        """Whether something is left that the socket did not take."""
        return bool(self._out)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message, or as much of it as the socket takes now. Raises OSError when the connection is lost, or the other end
        does not read."""
        self._out += json.dumps(message, separators=(",", ":")).encode() + b"\n"
        self.flush()
        if len(self._out) > 2 * LONGEST_TOLD:
            raise ConnectionAbortedError("the other end does not read")

    def flush(self) -> None:
        """Go on sending. Raises OSError."""
        while self._out:
            try:
                sent = self.connection.send(self._out)
            except BlockingIOError:
                return
            except OSError as error:
                self._lost = self._lost or error
                raise
            self._out = self._out[sent:]

    def receive(self) -> Iterator[dict[str, Any]]:
        """Yield the messages that have arrived, then raise OSError when the connection is closed or lost.

        Closed, which is one: it has come to its end. Raises OSError also for what is no message.
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
                lost = Closed("closed") if self._has_ended() else self._lost
                break
            self._in += data
            if len(self._in) - self._in.rfind(b"\n") - 1 > self._longest:
                raise ConnectionAbortedError(f"a line of over {self._longest} bytes")
            if len(self._in) > 2 * self._longest:  # the rest waits in the socket
                break
        *lines, self._in = self._in.split(b"\n")
        for line in lines:
            if len(line) > self._longest:
                raise ConnectionAbortedError(f"a line of over {self._longest} bytes")
            try:
                yield strict.message(line)
            except ValueError as error:
                raise ConnectionAbortedError(f"no message: {error}") from None
        if lost:
            raise lost

    def _has_ended(self) -> bool:
        """Tell whether nothing to read is the end of the stream, not a reset that a call of `send` was told of.

        The kernel tells of a reset once, and reads nothing from then on. After the end of the stream it calls that EPIPE.
        """
        return self._lost is None or isinstance(self._lost, BrokenPipeError)

    def close(self) -> None:
        self.connection.close()
