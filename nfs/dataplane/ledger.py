"""Where every packet went: the causes, and the rule that they add up.

received = forwarded + dropped by the verdict + dropped by each other cause + still inside. An entry is one word of an
int64 array that the packet loop increments; a trial whose ledger does not balance cannot be believed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

CAUSES = (
    "received",
    "forwarded",
    "dropped_by_verdict",
    "truncated",  # shorter than its own headers say
    "oversized",  # longer than a frame of the network
    "malformed",  # header fields that contradict each other
    "not_ip",  # a link protocol with a name: ARP, LLDP, IPv6's neighbour discovery ... (`link.py`); no flow that the NF tracks
    "fragment",  # a later fragment whose first one did not come in time: no ports, so no flow
    "unreadable",  # neither IP nor a link protocol with a name: IP may be hidden in it
    "fragment_room_full",  # a later fragment that waited for its first one, when others needed the room
    "table_full",
    "state_unreachable",  # the host with the packet's state does not answer
    "waiting_room_full",  # too many packets already wait for remote state
    "state_refused",  # the store answered with an error: see its statistics
    "uncommitted",  # this host ceased to be primary before what the packet changed, or saw, was committed
    "transmit_ring_full",
    # what a network function may name when it drops (`env.cause`)
    "refused_by_rule",
    "out_of_window",  # TCP: not what the other side can take now
    "ports_exhausted",
    "no_backend",
    "rate_exceeded",
    "blocked_source",
    "waiting",  # still inside when the count was taken; not a drop
)
RECEIVED, FORWARDED, BY_VERDICT, TRUNCATED, OVERSIZED, MALFORMED, NOT_IP, FRAGMENT = range(8)
UNREADABLE, FRAGMENT_ROOM_FULL = 8, 9
TABLE_FULL, STATE_UNREACHABLE, WAITING_ROOM_FULL, STATE_REFUSED, UNCOMMITTED, TRANSMIT_RING_FULL = range(10, 16)
REFUSED_BY_RULE, OUT_OF_WINDOW, PORTS_EXHAUSTED, NO_BACKEND, RATE_EXCEEDED, BLOCKED_SOURCE, WAITING = range(16, 23)


def make_ledger() -> np.ndarray:
    """Return an empty ledger: int64[len(CAUSES)]."""
    return np.zeros(len(CAUSES), np.int64)


def to_counts(ledger: np.ndarray) -> dict[str, int]:
    """Return the ledger by name, zero entries too."""
    return {cause: int(count) for cause, count in zip(CAUSES, ledger, strict=True)}


def imbalance(counts: dict[str, int]) -> int:
    """Return how many received packets no cause accounts for; zero when the ledger balances."""
    return counts["received"] - sum(count for cause, count in counts.items() if cause != "received")


def device_drops() -> dict[str, dict[str, int]]:
    """Return frames dropped by the devices of this network namespace, receiving and sending."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    drops = {}
    for line in lines:
        name, _, numbers = line.partition(":")
        fields = [int(number) for number in numbers.split()]
        drops[name.strip()] = {"received": fields[3], "sent": fields[11]}
    return drops
