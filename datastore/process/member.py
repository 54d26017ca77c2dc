"""The store process as a member of a cluster: it hears the coordinator, follows its maps, and keeps up its links."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from datastore.coordination.heartbeats import Pong, Timing
from datastore.coordination.messages import gossip, read_gossip
from datastore.coordination.reporter import Reporter
from datastore.replication.link import Shipping
from datastore.replication.links import Links, Peers
from datastore.replication.replica import Replica
from datastore.replication.spokesman import Spokesman
from datastore.security.datagrams import LONGEST_BYTES, Seals
from datastore.security.secret import STORE, Secret
from datastore.store.layout import EPOCH, LEASE_NS, PROMISE_NS
from datastore.store.table import Table

CHALLENGE_NS = 1_000_000
"""How soon an answer to a challenge is looked for."""


class Member:
    """What `process/server.py` calls between turns of its compiled loop. It never waits.

    Heartbeats and leases are the reporter's, a thread of its own; maps are followed here, between two turns.
    """

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
        self._spokesman = Spokesman(self.replica, self.timing, time.monotonic_ns())
        self._ping_ns = [0] * len(peers)
        self._called = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._function = 0
        """The NF process on this host's table whose end is watched."""
        self.reporter = Reporter("reporter", coordinators, self._report, self._hear, self.timing, credential,
                                 table.renews_lease)  # fmt: skip

    def fileno(self) -> int:
        """Return the descriptor whose input is a reason to call `work`."""
        return self._called

    # ---- the reporter's thread -----------------------------------------------------------------------------------------

    def _report(self) -> dict[str, Any] | None:
        return self._spokesman.report(time.monotonic_ns())

    def _hear(self, message: dict[str, Any]) -> None:
        if self._spokesman.hear(message):
            os.eventfd_write(self._called, 1)

    # ---- the main thread ----------------------------------------------------------------------------------------------

    def _watch_function(self) -> None:
        """Have the coordinator told at once when the NF process on this host's table ends."""
        with contextlib.suppress(OSError):
            watched = None if self.table.function() == self._function else self.table.watch_function()
            if watched:
                self._function, descriptor = watched
                self.reporter.watch(descriptor, partial(self._spokesman.end_function, self._function))

    def due_ns(self) -> int:
        """Return when `work` is due at the latest."""
        if self.peers.are_challenged:
            return time.monotonic_ns() + CHALLENGE_NS
        look_ns = self._spokesman.looked_ns + self._spokesman.pause_ns()
        return min([look_ns, *(at_ns + self.timing.heartbeat_ns for at_ns in self._ping_ns)])

    def _slack_ns(self) -> int:
        """Return how much earlier something is done if this process is awake: a heartbeat and pings share a wake-up, 0.2 ms."""
        return self._spokesman.pause_ns() // 4

    def work(self) -> None:
        """Follow the coordinator's maps, have it told what is news, mend connections."""
        now_ns = time.monotonic_ns()
        self._spokesman.work(now_ns)
        self.peers.mend()
        self._listen()
        self.replica.advance(now_ns)
        self._ping(now_ns, self.timing.heartbeat_ns - self._slack_ns())
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._called)
        changed = self._spokesman.follow(now_ns)
        if changed:
            self.table.words[EPOCH] = self.replica.map.epoch
            self._ping(time.monotonic_ns(), 0)
        is_due = now_ns - self._spokesman.looked_ns >= self._spokesman.pause_ns() - self._slack_ns()
        if changed or is_due:
            self._watch_function()
        if changed or is_due:
            if self._spokesman.look(time.monotonic_ns()):
                self.reporter.tell()
            self._spokesman.looked_ns = time.monotonic_ns()  # on busy cores looking takes longer than its pause is

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
        until_ns = max(int(self.table.words[LEASE_NS]), int(self.table.words[PROMISE_NS]))
        return {"epoch": self.replica.map.epoch, "lease_ms": (until_ns - now_ns) / 1e6, "refusal": self.replica.refusal,
                "coordinator": self.reporter.connected}  # fmt: skip

    def close(self) -> None:
        """Close every connection."""
        self.reporter.close()
        self.peers.close()
        self.gossip.close()
        os.close(self._called)
