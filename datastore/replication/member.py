"""The store process as a member of a cluster: it hears the coordinator, follows its maps, and keeps up its links."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from typing import Any

from datastore.native.errors import NearstateError
from datastore.replication.coordinator import Timing
from datastore.replication.dialer import Dialer
from datastore.replication.links import Links, Peers
from datastore.replication.messages import LONGEST_TOLD, LineSocket, beat_message, gossip, read_gossip, read_grant
from datastore.replication.replica import Pong, Replica
from datastore.replication.shipping import Shipping
from datastore.security.datagrams import LONGEST_BYTES, Seals
from datastore.security.secret import COORDINATOR, STORE, Secret
from datastore.store.layout import EPOCH, LEASE_NS
from datastore.store.table import Table

CHALLENGE_NS = 1_000_000
"""How soon an answer to a challenge is looked for."""
SILENCE_LEASES = 5
"""A coordinator that is silent for so many leases is left for the next one: it is stopped, or its machine is gone."""


class Member:
    """What `store/server.py` calls between turns of its compiled loop. It never waits."""

    def __init__(
        self, host: str, table: Table, owner: int, cluster: int, peers: Sequence[dict[str, Any]],
        coordinators: Sequence[Sequence[Any]], shipping: Shipping, links: Links,
        address: tuple[str, int], secret: Secret, timing: Timing | None = None,
    ) -> None:  # fmt: skip
        """peers: {"host", "address", "port"} of the other stores. coordinators: (host, port) of each; one leads and listens.
        address: this store's; datagrams go to the same port. secret: of the deployment.

        Raises OSError when that port is not free.
        """
        self.table, self.timing = table, timing or Timing()
        incarnation = time.time_ns() & (1 << 62) - 1
        self.replica = Replica(host, [peer["host"] for peer in peers], table.words, shipping, owner, cluster, incarnation,
                               self.timing)  # fmt: skip
        credential = secret.credential(STORE, host)
        self.peers = Peers(peers, links, shipping, credential)
        self._seals = Seals(secret, host, self.replica.peers, incarnation)
        self._addresses = [(peer["address"], peer["port"]) for peer in peers]
        self.gossip = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self.gossip.bind(address)
        self._line: LineSocket | None = None
        self._dialer = Dialer(*coordinators, credential=credential, wanted=COORDINATOR)
        self._worked_ns = self._looked_ns = self._beat_ns = self._heard_ns = 0
        self._told: tuple[Any, ...] = ()
        self._ping_ns = [0] * len(peers)

    def fileno(self) -> int:
        """Return the descriptor whose input is a reason to call `work`, or -1."""
        return self._line.fileno() if self._line else -1

    def due_ns(self) -> int:
        """Return when `work` is due at the latest."""
        if self._dialer.is_challenged or self.peers.are_challenged:
            return time.monotonic_ns() + CHALLENGE_NS
        if self._line is None:
            return time.monotonic_ns() + self.timing.heartbeat_ns // 3
        return min([self._looked_ns + self._pause_ns(), *(at_ns + self.timing.heartbeat_ns for at_ns in self._ping_ns)])

    def _pause_ns(self) -> int:
        """Return after what time is looked for something to tell the coordinator: soon, while it waits for that."""
        return self.timing.heartbeat_ns // 12 if self.replica.expected() else self.timing.heartbeat_ns

    def _slack_ns(self) -> int:
        """Return how much earlier something is done if this process is awake: a heartbeat and pings share a wake-up, 0.2 ms."""
        return self._pause_ns() // 4

    def work(self) -> None:
        """Hear the coordinator, tell it what is due, mend connections."""
        now_ns = time.monotonic_ns()
        if now_ns - self._worked_ns > 2 * self.timing.heartbeat_ns:
            self.replica.was_stopped(now_ns)
        self._worked_ns = now_ns
        self.peers.mend()
        self._listen()
        self.replica.advance(now_ns)
        self._ping(now_ns, self.timing.heartbeat_ns - self._slack_ns())
        if self._line is None:
            connection = self._dialer.dial()
            self._line, self._heard_ns = LineSocket(connection, LONGEST_TOLD) if connection else None, now_ns
            self._told = ()
        if self._line is None:
            return
        try:
            changed = False
            for message in self._line.receive():
                self._heard_ns = now_ns
                changed |= self.replica.hear(now_ns, read_grant(message["grant"]))
            if changed:
                self.table.words[EPOCH] = self.replica.map.epoch
                self._ping(time.monotonic_ns(), 0)
            if changed or now_ns - self._looked_ns >= self._pause_ns() - self._slack_ns():
                self._beat(changed)
            self._line.flush()
            if now_ns - self._heard_ns > SILENCE_LEASES * self.timing.lease_ns:
                raise TimeoutError
        except (OSError, KeyError, NearstateError):
            self._line.close()
            self._line = None
            self._dialer.turn_away()

    def _beat(self, changed: bool) -> None:
        """Send a heartbeat if it is time for one, the map changed, or there is something to tell. Raises OSError."""
        self._looked_ns = now_ns = time.monotonic_ns()
        beat = self.replica.beat(now_ns)
        news = (beat.synchronised, beat.released, beat.unreachable)
        if changed or news != self._told or now_ns - self._beat_ns >= self.timing.heartbeat_ns - self._slack_ns():
            assert self._line
            self._beat_ns, self._told = now_ns, news
            self._line.send(beat_message(beat))

    def _ping(self, now_ns: int, after_ns: int) -> None:
        """Ping the peers whose last ping is at least `after_ns` ago."""
        for peer, pinged_ns in enumerate(self._ping_ns):
            if now_ns - pinged_ns >= after_ns:
                self._say(peer)

    def _say(self, peer: int, pong: Pong | None = None, ping: bool = True) -> None:
        """Send a peer a datagram. The clock is read for the ping: a promise counts from when it was asked for."""
        said: list[Any] = [pong] if pong else []
        if ping:
            self._ping_ns[peer] = time.monotonic_ns()
            said.append(self.replica.ping(self._ping_ns[peer]))
        with contextlib.suppress(OSError):
            self.gossip.sendto(self._seals.seal(self.replica.peers[peer], gossip(*said)), self._addresses[peer])

    def _listen(self) -> None:
        """Take what other stores said of themselves. Who is answered need not be pinged soon: both travel together."""
        for _ in range(256):
            try:
                opened = self._seals.open(self.gossip.recv(LONGEST_BYTES))
            except OSError:  # nothing more, or a peer whose port is closed
                return
            if opened is None:
                continue
            pong, ping = read_gossip(*opened)
            if pong:
                self.replica.ponged(pong)
            now_ns = time.monotonic_ns()
            answer = self.replica.pinged(now_ns, ping) if ping else None
            if ping and answer:
                peer = self.replica.peers.index(ping.host)
                self._say(peer, answer, now_ns - self._ping_ns[peer] >= self.timing.heartbeat_ns // 2)

    def status(self) -> dict[str, Any]:
        """Return what this host knows of itself, for people and tests."""
        now_ns = time.monotonic_ns()
        return {"epoch": self.replica.map.epoch, "lease_ms": (int(self.table.words[LEASE_NS]) - now_ns) / 1e6,
                "refusal": self.replica.refusal, "coordinator": self._line is not None}  # fmt: skip

    def close(self) -> None:
        """Close every connection."""
        self.peers.close()
        self.gossip.close()
        self._dialer.close()
        if self._line:
            self._line.close()
