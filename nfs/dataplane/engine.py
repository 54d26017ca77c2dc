"""What the packet loop works on: one `Engine`, arrays made once, and what their words mean.

What it does is in files of their own, each on top of those before it; `loop.py` walks a packet through them:

    verdicts   run a step's functions on a packet, let it leave, drop it
    in_place   records of this host: expiry, claims, additions, writing back
    flights    records of other hosts: the one access in progress for a key, and the packets that wait in it
    passage    a packet's way through its steps: here, there, held or parked
    answers    what stores said, and what goes on by it
    loop       bursts from frames that arrived to frames that leave
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from datastore.store.bells import Bells, silent
from datastore.store.layout import EXPIRY_BITS
from nfs.dataplane.fragments import MOST_HELD, Room, make_fragments, make_room
from nfs.dataplane.frames import Frames
from nfs.dataplane.headers import make_packets
from nfs.dataplane.held import Held, make_held
from nfs.dataplane.late import Late, make_late
from nfs.dataplane.ledger import make_ledger
from nfs.dataplane.pending import Pending, make_pending
from nfs.dataplane.port import BURST
from nfs.dataplane.requests import ADDS, CLAIM_WORDS
from nfs.dataplane.steps import Chain

HERE = -1
"""In `primary`: the partition's primary is the store on this host, so access is in place."""

# words of `Engine.control`
PASSES, VALUE_WORDS, OWNER, EPOCH, NOW_NS, FLIGHTS_FREE, WAITING, WAITING_LIMIT, HOSTS, DOWN, SPIN_NS = range(11)
CONFLICTS, FETCHES, WRITES, BURSTS = range(11, 15)
STEPS, TIMEOUT_S, CLAIMER, ADDING, HERE_FLIGHTS = range(15, 20)
REPLICATES, QUEUES, CHANGED, CALLED, PUT_OFF, ALSO, SEEN_COMMITS, CLAIMED_IN, BY_ADDRESS = range(20, 29)
ECHO_MAGIC, ECHOED = 29, 30
"""What echoes of this process begin with; the number of the last one that came back from inside, and behind it from outside."""
"""TIMEOUT_S, CLAIMER, ADDING: what the last run of a step's functions asked for (its time-out, the env that claims or -1,
whether it adds). HERE_FLIGHTS: flights of records on this host, which wait for a claim elsewhere. REPLICATES: partitions may
change hosts. QUEUES: partitions with waiting packets. CHANGED: records of this host changed in this pass. CALLED: another thread
wants the loop to return. PUT_OFF: flights that are to be asked again. ALSO: partition of the last claim here, -1: none.
CLAIMED_IN: the reign it was made in. BY_ADDRESS: every record's key is made of addresses alone, so fragments have theirs."""
# words of a flight
PHASE, HOST, NEXT, WAITING_HEAD, WAITING_TAIL, BATCH_HEAD, BATCH_TAIL, ABSENT, SINCE_NS, STEP, ATTEMPTS, BATCH_TIMEOUT_S = range(
    12
)
AGAIN, AGAIN_SEQUENCE, AGAIN_STREAM = range(12, 15)
"""AGAIN: 1 while nobody has been asked. The sequence number and stream of a write that may have been done; 0: none was."""
FLIGHT_WORDS = 15
FETCHING, CLAIMING, RENEWING, COMMITTING = 1, 2, 3, 4
# where `drive` goes on
RUN, CLAIM, COMMIT, COMMITTED = range(4)
# how a claim ends, or that its answer is awaited
TAKEN, CONFLICT, AWAITED, REFUSED = range(4)
# words of a claim, as it waits in a flight
C_TIMEOUT_S, C_HIGH, C_LOW, C_VALUE = 0, 1, 2, 3
DROP_CAUSE = 16
"""A verdict code of DROP_CAUSE + n is DROP with the ledger's cause n."""
WAITS, MOVED = 255, 254
"""Verdict codes: the packet waits; its partition is not (or no longer) here, and nothing was done."""
MOST_ATTEMPTS = 4096
"""Runs of a function on one packet; far above what any function should claim."""
STAGE, CAME_NS = range(2)
"""Of a packet, in `Engine.stages`."""
NEVER = np.iinfo(np.int64).max
TURNED = 1 << 8
RECLAIM_NS = 10_000_000
"""How long the loop sleeps at most while the kernel has frames of ours. Longer than the scheduler's tick (4 ms): an earlier
timer is programmed at every sleep, which costs 15 us on a virtual machine (measured), four times the sleep itself."""
LONGEST_WAIT_NS = 2_000_000_000
"""How long a packet waits for somebody to have its partition: far above a failover."""
HELD_NS = 2_000_000
"""How long the loop sleeps at most while packets wait here; normally the store rings (`bells.py`)."""
STAMP_SECONDS = (1 << EXPIRY_BITS) - 1
"""Low bits of a record's stamp: the second, modulo 2^20, at which it expires; 0: never."""


class Engine(NamedTuple):
    """State of one packet loop.

    packets: PACKET[frames], by frame number; originals: the same before a function that rewrites saw them; next_packet:
    int64[frames], the packet that waits behind this one; stages: int64[frames, 2], by STAGE: steps taken, by CAME_NS: when the
    packet came. steps, members: see `steps.py`.
    env: int64[n], what the functions know and ask for. primary: int64[partitions], HERE or the number of the store host.
    flights: int64[limit, FLIGHT_WORDS], keys and stamps uint64[limit, 3], values uint64[limit + 1, 2 * value words]: the
    record the functions work on, and the one last committed (the last row is scratch). claims: uint64[limit, 7]. adds:
    int64[frames, ...], the counters a waiting packet adds to. heads: int64[buckets], hash index of the flights by key. remote:
    int64[partitions], the number of the host whose store answers for it, be it this host's. room: fragments that
    wait for their first one. burst: int64[BURST + MOST_HELD], packets that go on together. held, late, bells: see there.
    """

    control: np.ndarray
    ledger: np.ndarray
    packets: np.ndarray
    originals: np.ndarray
    next_packet: np.ndarray
    stages: np.ndarray
    steps: np.ndarray
    members: np.ndarray
    env: np.ndarray
    primary: np.ndarray
    flights: np.ndarray
    flight_keys: np.ndarray
    values: np.ndarray
    claims: np.ndarray
    adds: np.ndarray
    pending: Pending
    fragments: np.ndarray
    room: Room
    free_flights: np.ndarray
    heads: np.ndarray
    remote: np.ndarray
    held: Held
    late: Late
    bells: Bells
    addresses: np.ndarray
    lengths: np.ndarray
    burst: np.ndarray
    scratch: np.ndarray
    pollfds: np.ndarray


def make_engine(chain: Chain, frames: Frames, primary: np.ndarray, owner: int, epoch: int,
                value_words: int, hosts: int, flights: int = 1000, spin_us: float = 5.0, replicates: bool = False,
                bells: Bells | None = None) -> Engine:  # fmt: skip
    """Return an engine that runs `chain`; `primary` says for each partition HERE or which of `hosts` stores has it.

    replicates: partitions may change hosts while it runs; then `bells` are those of the table on this host, if there is one.

    flights: fewer than the client's window (1,024 operations a host), so that a flight always finds room for its next request.
    """
    count = frames.stack.size
    control = np.zeros(32, np.int64)
    control[PASSES], control[STEPS] = chain.passes_mask, len(chain.steps)
    control[VALUE_WORDS], control[OWNER], control[EPOCH] = value_words, owner, epoch
    control[FLIGHTS_FREE], control[WAITING_LIMIT], control[HOSTS] = flights, count // 2, hosts
    control[SPIN_NS], control[REPLICATES] = int(spin_us * 1000), replicates
    control[BY_ADDRESS] = chain.by_address
    index, stages = np.full(count, -1, np.int64), np.zeros((count, 2), np.int64)
    return Engine(control, make_ledger(), make_packets(count), make_packets(count if chain.rewrites else 1), index,
                  stages, chain.steps, chain.members, chain.env, primary.astype(np.int64),
                  np.full((flights, FLIGHT_WORDS), -1, np.int64), np.zeros((flights, 3), np.uint64),
                  np.zeros((flights + 1, 2 * value_words), np.uint64), np.zeros((flights, 3 + CLAIM_WORDS), np.uint64),
                  np.zeros((count, 1 + 4 * ADDS), np.int64), make_pending(), make_fragments(), make_room(count),
                  np.arange(flights, dtype=np.int64),
                  np.full(4 * flights, -1, np.int64), primary.astype(np.int64), make_held(count, primary.size),
                  make_late(hosts if replicates else 0), bells or silent(), np.zeros(BURST, np.int64), np.zeros(BURST, np.int64),
                  np.zeros(BURST + MOST_HELD, np.int64), np.zeros(8, np.int64), np.zeros(5 + hosts, np.int64))  # fmt: skip
