"""Which store sent this datagram, to whom, and is it new?

    HMAC-SHA256 (32 bytes) | incarnation (8) | counter (8) | length of the name (1) | sender's name | text

The key is the sender's. What is authenticated are the receiver's name and everything behind the HMAC, so a datagram is worth
nothing at another store. A receiver takes each counter of an incarnation once, with a window for datagrams that overtook
each other (RFC 4303, section 3.4.3). It takes an incarnation that it does not remember only if it is newer than all it does:
two processes of one name are both heard, and nothing of a process that is gone.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from datastore.security.secret import NAME_BYTES, Secret

PROOF_BYTES = 32
HEADER = struct.Struct("<QQB")
WINDOW, INCARNATIONS = 64, 4
LONGEST_BYTES = 2048


@dataclass
class Counters:
    """Which counters were taken of an incarnation. seen: bit n says that `highest` - n was."""

    highest: int = 0
    seen: int = 0

    def is_new(self, counter: int) -> bool:
        """Tell whether a counter is taken, and remember it."""
        if counter > self.highest:
            self.seen = (self.seen << min(counter - self.highest, WINDOW) | 1) & (1 << WINDOW) - 1
            self.highest = counter
            return True
        behind = self.highest - counter
        if behind >= WINDOW or self.seen >> behind & 1:
            return False
        self.seen |= 1 << behind
        return True


class Sender:
    """The key of a peer, and what was taken of its newest incarnations."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self._heard: dict[int, Counters] = {}

    def is_new(self, incarnation: int, counter: int) -> bool:
        """Tell whether a datagram is taken, and remember it."""
        if incarnation not in self._heard:
            if incarnation <= max(self._heard, default=0):
                return False
            self._heard[incarnation] = Counters()
            if len(self._heard) > INCARNATIONS:
                del self._heard[min(self._heard)]
        return self._heard[incarnation].is_new(counter)


class Seals:
    """Seals datagrams of one store, and opens those of its peers."""

    def __init__(self, secret: Secret, name: str, peers: Sequence[str], incarnation: int) -> None:
        """incarnation: 1 to 2^64 - 1, above that of every earlier process of this name."""
        self._name, self._incarnation, self._counter = name, incarnation, 0
        self._key = secret.derive("datagram", name)
        self._peers = {peer.encode(): Sender(secret.derive("datagram", peer)) for peer in peers}

    def seal(self, receiver: str, text: bytes) -> bytes:
        """Return the datagram for a receiver."""
        self._counter += 1
        name = self._name.encode()
        body = HEADER.pack(self._incarnation, self._counter, len(name)) + name + text
        return hmac.digest(self._key, _to(receiver) + body, "sha256") + body

    def open(self, data: bytes) -> tuple[str, bytes] | None:
        """Return sender and text; None for what no peer sent to this store, or sent before."""
        body = data[PROOF_BYTES:]
        if not HEADER.size <= len(body) <= LONGEST_BYTES:
            return None
        incarnation, counter, name_bytes = HEADER.unpack_from(body)
        name = body[HEADER.size : HEADER.size + min(name_bytes, NAME_BYTES)]
        if len(name) != name_bytes or name not in self._peers:
            return None
        sender = self._peers[name]
        if not hmac.compare_digest(data[:PROOF_BYTES], hmac.digest(sender.key, _to(self._name) + body, "sha256")):
            return None
        return (name.decode(), body[HEADER.size + name_bytes :]) if sender.is_new(incarnation, counter) else None


def _to(receiver: str) -> bytes:
    name = receiver.encode()
    return len(name).to_bytes(1, "big") + name
