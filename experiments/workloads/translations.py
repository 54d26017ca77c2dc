"""Where does a packet of a recorded file have to go, when the network function has translated its flow?

A file knows its hosts' own addresses. A NAT or a load balancer gives the other side different ones, and an answer reaches its
connection only when it is aimed at these. Each side of a replay therefore learns from what arrives, flow by flow:

    file            10.0.1.0:51000 -> 10.128.0.1:443      10.128.0.1:443 -> 10.0.1.0:51000
    the server sees 10.64.0.0:51000 -> 10.128.0.1:443     and sends 10.128.0.1:443 -> 10.64.0.0:51000

So does a host's own stack, whose sockets hold the endpoints that they were spoken to by. The headers, ICMP errors' quotations and
the checksums are changed as `nfs/dataplane/rewrite.py` does it (RFC 1624); a later fragment's addresses alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from datastore.compiled import inline, jit
from nfs.dataplane.headers import make_packets, parse
from nfs.dataplane.ledger import FRAGMENT
from nfs.dataplane.rewrite import write_back

UNKNOWN, KNOWN, GIVEN_UP = range(3)
"""`Translations.state`. GIVEN_UP: waited for in vain; the flow's packets leave as the file has them."""
FAR_ADDRESS, FAR_PORT, NEAR_ADDRESS, NEAR_PORT = range(4)
"""Columns of `Translations.seen`: the other party's end and this side's own, as they stood in what arrived."""
LOOK = 64
"""Frames alike that are compared with the ends of one that has arrived."""


class Translations(NamedTuple):
    """What one side has learnt. active: int64[1], 0: no function translates, nothing is learnt. aim: `capture.Prepared`. state:
    uint8 per flow. seen: int64[flows, 4]. arrived, sent: int64[4], the ends of a frame that has arrived, and of one of the file;
    packet: PACKET[1]; these three are scratch."""

    active: np.ndarray
    aim: np.ndarray
    state: np.ndarray
    seen: np.ndarray
    arrived: np.ndarray
    sent: np.ndarray
    packet: np.ndarray


def make_translations(aim: np.ndarray, flows: int, active: bool) -> Translations:
    """Return what a side knows before its first packet: nothing."""
    return Translations(np.array([active], np.int64), aim, np.zeros(flows, np.uint8), np.zeros((flows, 4), np.int64),
                        np.zeros(4, np.int64), np.zeros(4, np.int64), make_packets(1))  # fmt: skip


@jit
def read_ends(translations: Translations, memory: np.ndarray, at: int, length: int, side: int, ends: np.ndarray) -> bool:
    """Put the ends of a frame that came from `side` into `ends` (int64[4]); False for one that tells nothing of its flow's."""
    packets = translations.packet
    if parse(memory, at, length, side, packets, 0) != 0 or packets[0].ip_version != 4 or packets[0].icmp_error:
        return False
    ends[FAR_ADDRESS], ends[FAR_PORT] = packets[0].source_address, packets[0].source_port
    ends[NEAR_ADDRESS], ends[NEAR_PORT] = packets[0].destination_address, packets[0].destination_port
    return True


@inline
def same(one: np.ndarray, other: np.ndarray, first: int) -> Any:
    """Tell whether two rows of ends have the same end, the one that begins at column `first`."""
    return one[first] == other[first] and one[first + 1] == other[first + 1]


@jit
def agrees(translations: Translations, number: int, memory: np.ndarray, at: int, length: int, side: int) -> bool:
    """Tell whether the frame whose ends are `arrived` can be frame `number` of the file, which `side` sent and which lies at byte
    `at` of `memory`.

    It has the ends that its flow was seen with, or one of those that it was sent with: a NAT changes the client's, a balancer the
    server's.
    """
    flow, arrived, sent = translations.aim[number], translations.arrived, translations.sent
    if flow >= 0 and translations.state[flow] == KNOWN:
        seen = translations.seen[flow]
        return same(seen, arrived, FAR_ADDRESS) and same(seen, arrived, NEAR_ADDRESS)
    if not read_ends(translations, memory, at, length, side, sent):
        return False
    return same(sent, arrived, FAR_ADDRESS) or same(sent, arrived, NEAR_ADDRESS)


@jit
def learn(translations: Translations, number: int) -> None:
    """Take over the ends that frame `number` has arrived with."""
    flow = translations.aim[number]
    if flow >= 0:
        for column in range(4):
            translations.seen[flow, column] = translations.arrived[column]
        translations.state[flow] = KNOWN


@jit
def aim(translations: Translations, number: int, memory: np.ndarray, at: int, length: int, side: int) -> None:
    """Aim frame `number`, which `side` sends and whose copy lies at byte `at`: at the other party as it was seen."""
    flow = translations.aim[number]
    if flow < 0 or translations.state[flow] != KNOWN:
        return
    seen, packets = translations.seen[flow], translations.packet
    status = parse(memory, at, length, side, packets, 0)
    if packets[0].ip_version != 4 or (status != 0 and (status != FRAGMENT or packets[0].fragment_offset == 0)):
        return
    packets[0].source_address, packets[0].destination_address = seen[NEAR_ADDRESS], seen[FAR_ADDRESS]
    packets[0].source_port, packets[0].destination_port = seen[NEAR_PORT], seen[FAR_PORT]
    write_back(memory, packets, 0)


@inline
def must_wait(translations: Translations, number: int, before: int) -> Any:
    """Tell whether frame `number` is not to leave yet: what it answers is under way, and will say where it has to go."""
    flow = translations.aim[number]
    return translations.active[0] != 0 and before >= 0 and flow >= 0 and translations.state[flow] == UNKNOWN
