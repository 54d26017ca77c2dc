"""What do coordinator and stores tell each other to be known as living, and for how long does it hold?

store        Heartbeat -> coordinator    what it follows, has, has not
coordinator  Grant     -> store          a lease from when the heartbeat was sent, and the map where that is news
store        Ping      -> store          which map it follows
store        Pong      -> store          the answer, with a promise for a lease's time or without
"""

from __future__ import annotations

from dataclasses import dataclass

from datastore.base.errors import NearstateError
from datastore.coordination.maps import ClusterMap

MILLISECOND_NS = 1_000_000


@dataclass(frozen=True)
class Timing:
    """How long a lease is, how much longer the coordinator waits, how often hosts ask for a new one; after what time a frame
    is sent again, a peer without acknowledgments is called unreachable, and it may learn from that primary again."""

    lease_ns: int = 80 * MILLISECOND_NS
    margin_ns: int = 8 * MILLISECOND_NS
    heartbeat_ns: int = 25 * MILLISECOND_NS
    retry_ns: int = 20 * MILLISECOND_NS
    unreachable_ns: int = 100 * MILLISECOND_NS
    suspect_ns: int = 1000 * MILLISECOND_NS

    @classmethod
    def of(cls, lease_ms: float | None) -> Timing:
        """Return the timing for a lease, all in proportion; None: the default. Raises NearstateError for one that is no time."""
        if lease_ms is None:
            return cls()
        if not 10 <= lease_ms <= 60_000:
            raise NearstateError(f"lease of {lease_ms} ms: 10 to 60000 ms are possible; the default is 80")
        factor = lease_ms * MILLISECOND_NS / cls.lease_ns
        return cls(*(int(getattr(cls, name) * factor) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class Heartbeat:
    """What a store host says of itself: the map it follows; (partition, host) pairs that have all; partitions that it has
    stopped serving for their successors; peers that do not acknowledge; how many of its changes are not committed yet; which NF
    process (its number) on its table has ended, 0: none."""

    host: str
    cluster: int
    incarnation: int
    epoch: int
    sent_ns: int
    synchronised: tuple[tuple[int, str], ...] = ()
    released: tuple[int, ...] = ()
    unreachable: tuple[str, ...] = ()
    lag: int = 0
    function_ended: int = 0


@dataclass(frozen=True)
class Grant:
    """What the coordinator answers: a lease from `sent_ns` on, for the map of `epoch`; the map itself if it is news.

    incarnation: of the process it is for. An older map makes primary a host whose process ended; the next one there is empty.
    """

    incarnation: int
    sent_ns: int
    lease_ns: int
    epoch: int
    map: ClusterMap | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Ping:
    """What stores tell each other every while: whom, and which map they follow."""

    host: str
    cluster: int
    incarnation: int
    epoch: int
    sent_ns: int


@dataclass(frozen=True)
class Pong:
    """The answer: of host `host`, to the ping that process `incarnation` sent at `sent_ns`, with or without a promise."""

    host: str
    epoch: int
    incarnation: int
    sent_ns: int
    promise: bool
