"""The store process' connections to the other stores: frames go out, acknowledgments come back.

Each store connects to every other one and ships over its own connection; what a peer ships arrives at the server like a client's
request (`process/server.py`). Python makes the connections, compiled code uses them.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from datastore.compiled import inline, jit
from datastore.compiled.libc import EAGAIN, POLLIN, POLLOUT, pollfd, recv, send
from datastore.compiled.memory import copy
from datastore.coordination.dialer import Dialer
from datastore.replication.frames import ACK_WORDS, ACKNOWLEDGES, image_words, is_news
from datastore.replication.link import Shipping
from datastore.replication.shipping import REFUSED_AGAIN_NS, lose, ship_all, take_ack
from datastore.security.secret import STORE, Credential
from datastore.store.protocol import FRAME_HEADER_WORDS, PROTOCOL_MAGIC

# words of a link's `control`
DESCRIPTOR, TO_SEND, SENT, RECEIVED, ACKS_DUE, ROUND_NS = range(6)
CONTROL_FIELDS = 8
ACK_FRAME_WORDS = FRAME_HEADER_WORDS + ACK_WORDS
RECEIVE_BYTES = 1 << 16
UNACKNOWLEDGED_MS = 200
"""A connection whose bytes are not acknowledged for so long is lost."""
LOST_NS = 500_000_000
"""A frame without an acknowledgment for so long is shipped again; a connection that breaks says so earlier."""
ROUND_PAUSE_NS = 1_000_000
"""Frames go to a peer in rounds: the next one when the last is acknowledged, so that what changes meanwhile travels together, or
after this time, so that a long image stalls nothing. Every round costs both hosts four wake-ups, some 100 us of CPU."""


class Links(NamedTuple):
    """control: int64[peers, CONTROL_FIELDS], DESCRIPTOR -1: not connected; ACKS_DUE: frames not acknowledged, ROUND_NS: when the
    last round began. Byte and word arrays of a buffer are two views of one memory."""

    control: np.ndarray
    send_words: np.ndarray
    send_bytes: np.ndarray
    receive_words: np.ndarray
    receive_bytes: np.ndarray


def make_links(words: np.ndarray, peers: int) -> Links:
    """Return links to so many peers, connected to none; each has room for the longest frame of the table `words`."""
    control = np.zeros((peers, CONTROL_FIELDS), np.int64)
    control[:, DESCRIPTOR] = -1
    sending = np.zeros(peers * image_words(words), np.uint64)
    receiving = np.zeros(peers * RECEIVE_BYTES // 8, np.uint64)
    return Links(control, sending, sending.view(np.uint8), receiving, receiving.view(np.uint8))


@jit
def take_acks(links: Links, shipping: Shipping, words: np.ndarray, peer: int) -> bool:
    """Read a peer's acknowledgments; return False when the connection is lost, or what arrives are none."""
    control = links.control
    start = peer * RECEIVE_BYTES
    while True:
        got = recv(control[peer, DESCRIPTOR], links.receive_bytes, start + control[peer, RECEIVED], start + RECEIVE_BYTES)
        if got <= 0:
            return got == -EAGAIN
        control[peer, RECEIVED] += got
        at, end = start >> 3, (start + control[peer, RECEIVED]) >> 3
        while end - at >= ACK_FRAME_WORDS:
            header = np.uint64(PROTOCOL_MAGIC) | np.uint64(ACK_FRAME_WORDS * 8) << np.uint64(32)
            flags = np.int64(links.receive_words[at + 1] >> np.uint64(16) & np.uint64(0xFFFF))
            if links.receive_words[at] != header or flags != ACKNOWLEDGES:
                return False
            take_ack(shipping, words, peer, links.receive_words, at + FRAME_HEADER_WORDS)
            control[peer, ACKS_DUE] -= 1
            at += ACK_FRAME_WORDS
        rest = control[peer, RECEIVED] - (at * 8 - start)
        if rest > 0 and at * 8 > start:
            copy(links.receive_bytes, start, links.receive_bytes, at * 8, rest)
        control[peer, RECEIVED] = rest
        if got < RECEIVE_BYTES - rest:
            return True


@jit
def send_frames(links: Links, shipping: Shipping, words: np.ndarray, owner: int, peer: int, now_ns: int) -> bool:
    """Ship what is due to a peer, as far as its socket takes it; return False when the connection is lost."""
    control = links.control
    size = links.send_words.size // links.control.shape[0]
    start = peer * size
    while True:
        if control[peer, SENT] == control[peer, TO_SEND]:
            if pause_ns(links, peer, now_ns) > 0:
                return True
            end = ship_all(shipping, words, owner, peer, now_ns, links.send_words, start, start + size)
            control[peer, SENT], control[peer, TO_SEND] = 0, (end - start) * 8
            if end == start:
                return True
            due = acknowledged_frames(links.send_words, start, end)
            control[peer, ACKS_DUE] += due
            control[peer, ROUND_NS] = now_ns if due > 0 else control[peer, ROUND_NS]
        first = start * 8
        sent = send(control[peer, DESCRIPTOR], links.send_bytes, first + control[peer, SENT], first + control[peer, TO_SEND])
        if sent < 0:
            return sent == -EAGAIN
        control[peer, SENT] += sent


@inline
def pause_ns(links: Links, peer: int, now_ns: int) -> Any:
    """Return how long the next round to a peer must still wait."""
    if links.control[peer, ACKS_DUE] <= 0:
        return np.int64(0)
    return max(links.control[peer, ROUND_NS] + ROUND_PAUSE_NS - now_ns, 0)


@jit
def acknowledged_frames(words: np.ndarray, at: int, end: int) -> int:
    """Return how many of the frames in `words[at:end]` will be acknowledged: all but news."""
    count = 0
    while at < end:
        if not is_news(words, at):
            count += 1
        at += np.int64(words[at] >> np.uint64(32)) >> 3
    return count


@jit
def shortest_pause_ns(links: Links, now_ns: int) -> int:
    """Return after what time a round that waits may begin; a second when none does."""
    shortest = np.int64(1_000_000_000)
    for peer in range(links.control.shape[0]):
        if links.control[peer, DESCRIPTOR] >= 0:
            pause = pause_ns(links, peer, now_ns)
            if pause > 0:
                shortest = min(shortest, pause)
    return shortest


@jit
def all_pause(links: Links, now_ns: int) -> bool:
    """Tell whether nothing can be shipped to anybody now: what changes waits for acknowledgments anyway."""
    connected = pausing = 0
    for peer in range(links.control.shape[0]):
        if links.control[peer, DESCRIPTOR] >= 0:
            connected += 1
            pausing += pause_ns(links, peer, now_ns) > 0
    return connected > 0 and pausing == connected


@jit
def exchange(
    links: Links, shipping: Shipping, words: np.ndarray, owner: int, now_ns: int, polled: np.ndarray, at: int
) -> int:  # fmt: skip
    """Take acknowledgments and ship what is due, to all peers; return how many connections are lost.

    polled: what `poll_links` wrote from `at` on, after `poll`.
    """
    lost = 0
    for peer in range(links.control.shape[0]):
        if links.control[peer, DESCRIPTOR] < 0:
            continue
        lose(shipping, peer, now_ns - LOST_NS, now_ns - REFUSED_AGAIN_NS)
        is_lost = polled[at + peer] >> 48 != 0 and not take_acks(links, shipping, words, peer)
        if is_lost or not send_frames(links, shipping, words, owner, peer, now_ns):
            links.control[peer, DESCRIPTOR] = -2 - links.control[peer, DESCRIPTOR]
            lost += 1
    return lost


@jit
def poll_links(links: Links, polled: np.ndarray, at: int) -> int:
    """Write what to wait for to `polled` from `at` on; return where it ends."""
    for peer in range(links.control.shape[0]):
        waits = links.control[peer, SENT] < links.control[peer, TO_SEND]
        polled[at + peer] = pollfd(max(links.control[peer, DESCRIPTOR], -1), POLLIN | POLLOUT if waits else POLLIN)
    return at + links.control.shape[0]


class Peers:
    """The connections behind `Links`, made and made again without waiting."""

    def __init__(self, peers: Sequence[dict[str, Any]], links: Links, shipping: Shipping, credential: Credential) -> None:
        """peers: {"host", "address", "port"} of each. credential: of this store."""
        self.links, self.shipping = links, shipping
        self._dialers = [Dialer((peer["address"], peer["port"]), credential=credential, wanted=STORE, name=str(peer["host"]))
                         for peer in peers]  # fmt: skip
        self._sockets: list[socket.socket | None] = [None] * len(peers)

    @property
    def are_challenged(self) -> bool:
        """Whether a peer is about to answer a challenge."""
        return any(dialer.is_challenged for dialer in self._dialers)

    def mend(self) -> None:
        """Close what is lost, and go on connecting. Call it often."""
        for peer in range(len(self._dialers)):
            if self.links.control[peer, DESCRIPTOR] < -1:
                self._lose(peer)
            if self.links.control[peer, DESCRIPTOR] == -1:
                self._connect(peer)

    def _lose(self, peer: int) -> None:
        connection = self._sockets[peer]
        if connection is not None:
            connection.close()
        self._sockets[peer] = None
        self.links.control[peer] = (-1, *[0] * (CONTROL_FIELDS - 1))
        now_ns = time.monotonic_ns() + 1
        lose(self.shipping, peer, now_ns, now_ns)

    def _connect(self, peer: int) -> None:
        connection = self._dialers[peer].dial()
        if connection is not None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
            self._sockets[peer] = connection
            self.links.control[peer] = (connection.fileno(), *[0] * (CONTROL_FIELDS - 1))

    def close(self) -> None:
        """Close every connection."""
        for connection in (*self._sockets, *self._dialers):
            if connection is not None:
                connection.close()


__all__ = ["Links", "Peers", "all_pause", "exchange", "make_links", "poll_links", "shortest_pause_ns"]
