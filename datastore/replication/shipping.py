"""How do a partition's changes get from its primary to its backups?

Replicas are alike word for word, so a change is "these slots now read so". The table keeps a dirty bit for each slot; whoever
changes a record under the partition's lock sets it and counts the partition's changes, be it the store process or a network
function in place. The store process alone ships. For each peer and partition there is at most one frame under way:

    ship     lock; hand the table's dirty bits to every peer's pending ones; write what this peer's bits stand for; unlock
    apply    at the peer: all of a frame, under the lock, or nothing of it
    take_ack the frame's bits are forgotten; when every counted peer has the changes up to n, n is `committed`

What changes while a frame is under way waits for the next one, and a record that changes often is shipped once a round trip.
A lost frame's bits are pending again. Frames carry two epochs, since when their primary is primary and since when the peer is
its replica (older than what the peer knows: refused), a serial number, and the serial of the last frame acknowledged: a peer
whose own is not in between has missed something and asks for an image. So frames may be lost, doubled and late.

    image    every record of the partition; the first frame of a primary to a peer that learns, or misses something
    claim    the first frame of a new primary to a peer that was a member before: what changed since the primary took over, for
             whoever then had as many changes of the same earlier primary; others ask for an image
    delta    what changed
    news     nothing but what is committed by now: a clean backup may answer reads

Why a claim can be trusted: within one reign the changes of a partition are one sequence, so two replicas that have the first n of
it are alike (as entries of one term and index are in Raft: D. Ongaro, J. Ousterhout, 2014, section 5.3).

Completion records travel in the frame of the changes they belong to: a retry after a failover finds both or neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.replication.completions import count_completions, write_all_completions, write_noted_completion
from datastore.replication.frames import CLAIM, COUNTED_FLAG, GAP, IMAGE, LOW16, NEWS, REPLICATE_WORDS, REPLICATES
from datastore.replication.link import (
    ACKED,
    ASYNCHRONOUS,
    CHANGES_ACKED,
    CHANGES_SENT,
    COMMITTED_MORE,
    COUNTED,
    COUNTED_FROM,
    DONE_ACKED,
    DONE_QUEUE,
    DONE_SENT,
    FIRST,
    LEARNING,
    LINK_JOINED,
    MODE,
    NEWS_WAIT,
    NEXT_FIRST,
    OUT,
    OWING_NS,
    REFUSALS_WAIT,
    REFUSED,
    SENT,
    SENT_FIRST,
    SENT_NS,
    TOLD,
    UNDER_WAY,
    Shipping,
)
from datastore.store.layout import (
    BUCKET_DIRTY,
    BUCKET_WORDS,
    BUCKETS,
    BUCKETS_OFFSET,
    CLUSTER,
    COMMITTED_ALWAYS,
    COMMITTED_AT,
    COUNT,
    DIRTY_OFFSET,
    DONE_VALUE,
    FLOOR,
    SLOT_WORDS,
    SLOTS,
    U0,
    U1,
    VALUE_WORDS,
    partition_at,
    word,
)
from datastore.store.layout import EPOCH as EPOCH_OF_MAP
from datastore.store.locking import lock, release
from datastore.store.protocol import FRAME_HEADER_WORDS, write_frame_header
from datastore.store.roles import changes, committed, reign, role, rules
from datastore.store.statuses import BAD_FRAME, OK

REFUSED_AGAIN_NS = 1_000_000
"""A peer refuses frames for a map that it does not know yet; in a move both hear of it within a few milliseconds."""
NEWS_AFTER_NS = 2_000_000
"""News wait so long for a frame that they can travel with: sent at once they would double frames and wake-ups, for reads at
backups that find a record clean a little earlier."""
IMAGES_AT_ONCE = 4
"""Under way to a peer that learns. Measured: a refill of 100,000 records under 60 kpps takes 250 to 370 ms with 16 at a time, and
costs 4 to 29 % of the packets meanwhile; with 4 it takes 410 to 510 ms, and costs 7 to 11 %."""


@jit
def feed(shipping: Shipping, words: np.ndarray, peer: int, partition: int, mode: int, joined: int, first: int) -> None:
    """Begin to ship a partition to a peer, with `first`, IMAGE or CLAIM. COUNTED: nothing is committed until that is
    acknowledged."""
    link = shipping.links[peer, partition]
    link[MODE], link[FIRST], link[UNDER_WAY], link[LINK_JOINED], link[OWING_NS] = mode, first, 0, joined, 0
    link[CHANGES_ACKED], link[COUNTED_FROM] = 0, changes(words, partition)
    link[DONE_ACKED] = shipping.done_end[partition]
    for n in range(shipping.pending.shape[2]):
        shipping.pending[peer, partition, n] = shipping.unacked[peer, partition, n] = U0
    recommit(shipping, words, partition)


@jit
def starve(shipping: Shipping, words: np.ndarray, peer: int, partition: int) -> None:
    """Ship no more of a partition to a peer: it is no replica any longer."""
    link = shipping.links[peer, partition]
    link[MODE], link[UNDER_WAY], link[OWING_NS] = OUT, 0, 0
    recommit(shipping, words, partition)


@jit
def leave_all(shipping: Shipping, words: np.ndarray, partition: int) -> None:
    """Ship a partition to nobody, and take nothing of it for committed."""
    for peer in range(shipping.links.shape[0]):
        link = shipping.links[peer, partition]
        link[MODE], link[UNDER_WAY], link[OWING_NS] = OUT, 0, 0
    words[word(words, COMMITTED_AT) + partition] = U0


@inline
def has_to_ship(shipping: Shipping, words: np.ndarray, peer: int, partition: int, now_ns: int) -> Any:
    """Tell whether a frame is due: none is under way, and there are changes, an image, completions or news.

    Asked of all partitions at each turn, so without a view of the link, which costs 20 ns.
    """
    links = shipping.links
    return (
        links[peer, partition, MODE] != OUT
        and links[peer, partition, UNDER_WAY] == 0
        and (
            links[peer, partition, FIRST] != 0
            or changes(words, partition) != links[peer, partition, CHANGES_SENT]
            or shipping.done_end[partition] != links[peer, partition, DONE_ACKED]
            or news_is_due(shipping, words, peer, partition, now_ns)
        )
    )


@inline
def has_news(shipping: Shipping, words: np.ndarray, peer: int, partition: int) -> Any:
    """Tell whether a counted peer can learn that it is clean."""
    links = shipping.links
    acked = links[peer, partition, CHANGES_ACKED]
    counts = links[peer, partition, MODE] == COUNTED
    return counts and acked > links[peer, partition, TOLD] and committed(words, partition) >= acked


@inline
def news_is_due(shipping: Shipping, words: np.ndarray, peer: int, partition: int, now_ns: int) -> Any:
    """Tell whether news is to be sent by itself, because nothing else was for a while."""
    if not has_news(shipping, words, peer, partition):
        return False
    if now_ns - shipping.links[peer, partition, SENT_NS] >= NEWS_AFTER_NS:
        return True
    shipping.control[NEWS_WAIT] = 1
    return False


@jit
def hand_out_dirty(shipping: Shipping, words: np.ndarray, partition: int) -> None:
    """Move the table's dirty bits of a partition to every peer it is shipped to; the lock is held."""
    at = partition_at(words, partition) + word(words, DIRTY_OFFSET)
    for n in range(shipping.pending.shape[2]):
        bits = words[at + n]
        if bits != U0:
            for peer in range(shipping.links.shape[0]):
                if shipping.links[peer, partition, MODE] != OUT:
                    shipping.pending[peer, partition, n] |= bits
            words[at + n] = U0


@jit
def want_all(shipping: Shipping, words: np.ndarray, peer: int, partition: int) -> None:
    """Make every record of a partition pending, and every bucket that says anything."""
    pending = shipping.pending[peer, partition]
    first = partition_at(words, partition) + word(words, BUCKETS_OFFSET)
    for n in range(pending.size):
        pending[n] = U0
    for bucket in range(word(words, BUCKETS)):
        tags = words[first + bucket * word(words, BUCKET_WORDS)]
        bits = U0
        for position in range(SLOTS):
            bits |= (tags >> np.uint64(8 * position + 7) & U1) << np.uint64(position)
        if tags != U0:
            bits |= U1 << np.uint64(BUCKET_DIRTY)
        pending[bucket >> 3] |= bits << np.uint64((bucket & 7) * 8)


@jit
def pending_words(shipping: Shipping, words: np.ndarray, peer: int, partition: int) -> int:
    """Return how many words a peer's pending buckets take in a frame."""
    total = 0
    slot_words = word(words, SLOT_WORDS)
    for n in range(shipping.pending.shape[2]):
        bits = shipping.pending[peer, partition, n]
        while bits != U0:
            bucket_bits = bits & np.uint64(0xFF)
            if bucket_bits != U0:
                total += 2
                for position in range(SLOTS):
                    if bucket_bits >> np.uint64(position) & U1 != U0:
                        total += slot_words
            bits >>= np.uint64(8)
    return total


@jit
def write_buckets(shipping: Shipping, words: np.ndarray, peer: int, partition: int, out: np.ndarray, at: int) -> tuple[int, int]:
    """Write a peer's pending buckets, which are then unacknowledged ones; return (how many, where they end)."""
    first, slot_words = partition_at(words, partition) + word(words, BUCKETS_OFFSET), word(words, SLOT_WORDS)
    pending, unacked = shipping.pending[peer, partition], shipping.unacked[peer, partition]
    count = 0
    for n in range(pending.size):
        unacked[n] = pending[n]
        pending[n] = U0
        bits = unacked[n]
        bucket = n * 8
        while bits != U0:
            bucket_bits = bits & np.uint64(0xFF)
            if bucket_bits != U0 and bucket < word(words, BUCKETS):
                source = first + bucket * word(words, BUCKET_WORDS)
                out[at] = np.uint64(bucket) << np.uint64(8) | bucket_bits
                out[at + 1] = words[source]
                at += 2
                count += 1
                for position in range(SLOTS):
                    if bucket_bits >> np.uint64(position) & U1 != U0:
                        for m in range(slot_words):
                            out[at + m] = words[source + 1 + position * slot_words + m]
                        at += slot_words
            bits >>= np.uint64(8)
            bucket += 1
    return count, at


@jit
def ship(
    shipping: Shipping, words: np.ndarray, owner: int, peer: int, partition: int, now_ns: int, out: np.ndarray, at: int,
    end: int,
) -> int:  # fmt: skip
    """Write the frame that is due for a peer, without its header, to `out[at:end]`; return its words.

    0: this host does not rule any more; -1: there is no room, or the lock cannot be had: later.
    """
    base = partition_at(words, partition)
    if lock(words, owner, base) != OK:
        return -1
    written = 0
    if rules(role(words, partition)):
        hand_out_dirty(shipping, words, partition)
        written = write_frame(shipping, words, peer, partition, now_ns, out, at, end)
    release(words, base)
    return written


@jit
def write_frame(
    shipping: Shipping, words: np.ndarray, peer: int, partition: int, now_ns: int, out: np.ndarray, at: int, end: int,
) -> int:  # fmt: skip
    """`ship`, with the lock held and the dirty bits handed out."""
    link, base = shipping.links[peer, partition], partition_at(words, partition)
    if shipping.done_end[partition] - link[DONE_ACKED] > DONE_QUEUE:
        link[FIRST] = IMAGE
    step = 1 + DONE_VALUE + word(words, VALUE_WORDS)
    kind = link[FIRST]
    now_changed = changes(words, partition)
    if kind == IMAGE:
        want_all(shipping, words, peer, partition)
        completions = count_completions(shipping, words, partition)
    else:
        completions = shipping.done_end[partition] - link[DONE_ACKED]
        if kind == 0 and completions == 0 and now_changed == link[CHANGES_SENT]:
            kind = NEWS
    needed = REPLICATE_WORDS + completions * step
    if kind != NEWS:
        needed += pending_words(shipping, words, peer, partition)
    if needed > end - at:
        return -1
    buckets, to = 0, at + REPLICATE_WORDS
    if kind != NEWS:
        buckets, to = write_buckets(shipping, words, peer, partition, out, to)
        if kind == IMAGE:
            to = write_all_completions(shipping, words, partition, out, to)
        else:
            for n in range(link[DONE_ACKED], shipping.done_end[partition]):
                to = write_noted_completion(words, partition, shipping.done[partition, n % DONE_QUEUE], out, to)
        link[SENT] += 1
        link[UNDER_WAY], link[REFUSED] = 1, -abs(link[REFUSED])
        if link[OWING_NS] == 0:
            link[OWING_NS] = now_ns
        link[CHANGES_SENT], link[DONE_SENT] = now_changed, shipping.done_end[partition]
        link[SENT_FIRST], link[FIRST], link[SENT_NS] = kind, 0, now_ns
    link[TOLD] = min(committed(words, partition), link[CHANGES_ACKED] if kind == NEWS else now_changed)
    flags = kind | (COUNTED_FLAG if link[MODE] == COUNTED else 0)
    out[at] = np.uint64(partition) | np.uint64(flags) << np.uint64(16) | np.uint64(buckets) << np.uint64(32)
    out[at + 1] = np.uint64(reign(words, partition)) | np.uint64(link[LINK_JOINED]) << np.uint64(32)
    out[at + 2], out[at + 3] = np.uint64(link[ACKED]), np.uint64(link[SENT])
    out[at + 4], out[at + 5], out[at + 6] = np.uint64(now_changed), np.uint64(link[TOLD]), words[base + FLOOR]
    if kind == CLAIM:
        link[TOLD] = 0  # it says nothing of what is committed
        out[at + 2], out[at + 5] = np.uint64(shipping.claims[partition, 0]), np.uint64(shipping.claims[partition, 1])
    out[at + 7] = words[base + COUNT] | np.uint64(completions) << np.uint64(32)
    return to - at


@jit
def images_under_way(shipping: Shipping, peer: int) -> int:
    """Return how many images a peer has not acknowledged yet."""
    count = np.int64(0)
    for partition in range(shipping.links.shape[1]):
        count += shipping.links[peer, partition, UNDER_WAY] != 0 and shipping.links[peer, partition, SENT_FIRST] == IMAGE
    return count


@jit
def ship_all(
    shipping: Shipping, words: np.ndarray, owner: int, peer: int, now_ns: int, out: np.ndarray, at: int, end: int,
) -> int:  # fmt: skip
    """Write the frames that are due for a peer, as many as fit into `out[at:end]`; return where they end.

    Partitions take turns in being first, so that a small buffer starves none. Images of those that learn are few at a time:
    commits of the others queue behind them.
    """
    partitions = shipping.done_end.size
    first, images = shipping.control[NEXT_FIRST] % partitions, np.int64(-1)
    for n in range(partitions):
        partition = first + n if first + n < partitions else first + n - partitions
        if not has_to_ship(shipping, words, peer, partition, now_ns):
            continue
        if shipping.links[peer, partition, MODE] == LEARNING and shipping.links[peer, partition, FIRST] == IMAGE:
            if images < 0:
                images = images_under_way(shipping, peer)
            if images >= IMAGES_AT_ONCE:
                continue
            images += 1
        written = ship(shipping, words, owner, peer, partition, now_ns, out, at + FRAME_HEADER_WORDS, end)
        if written > 0:
            write_frame_header(out, at, 1, written, REPLICATES, words[EPOCH_OF_MAP], U0, words[CLUSTER])
            at += FRAME_HEADER_WORDS + written
        elif written < 0:
            shipping.control[NEXT_FIRST] = partition
            break
    return at


@jit
def take_ack(shipping: Shipping, words: np.ndarray, peer: int, ack: np.ndarray, at: int) -> int:
    """Take an acknowledgment, three words; return its status, BAD_FRAME when it cannot be one."""
    partition, status = np.int64(ack[at] & LOW16), np.int64(ack[at] >> np.uint64(16) & np.uint64(0xFF))
    if partition >= shipping.done_end.size:
        return BAD_FRAME
    link = shipping.links[peer, partition]
    epochs = np.uint64(reign(words, partition)) | np.uint64(link[LINK_JOINED]) << np.uint64(32)
    if ack[at + 1] != epochs or not rules(role(words, partition)) or link[MODE] == OUT:
        return status
    if np.int64(ack[at + 2]) != link[SENT] or link[UNDER_WAY] == 0:
        return status
    if status == GAP:
        link[UNDER_WAY], link[FIRST] = 0, IMAGE
        return status
    if status != OK:  # it does not know of a map yet that this host knows, or the other way round: `lose` sends it again
        link[REFUSED] = 1 + abs(link[REFUSED])
        return status
    link[UNDER_WAY], link[OWING_NS], link[ACKED], link[REFUSED] = 0, 0, link[SENT], 0
    link[CHANGES_ACKED], link[DONE_ACKED] = link[CHANGES_SENT], link[DONE_SENT]
    for n in range(shipping.unacked.shape[2]):
        shipping.unacked[peer, partition, n] = U0
    if link[MODE] == LEARNING:
        link[MODE], link[COUNTED_FROM] = COUNTED, changes(words, partition)
        link[TOLD] = -1  # news is due even if nothing changes any more: without it the peer does not know that it counts
    recommit(shipping, words, partition)
    return OK


@jit
def recommit(shipping: Shipping, words: np.ndarray, partition: int) -> None:
    """Work out again how many changes of a partition are committed."""
    least = COMMITTED_ALWAYS
    if shipping.control[ASYNCHRONOUS] == 0:
        for peer in range(shipping.links.shape[0]):
            link = shipping.links[peer, partition]
            if link[MODE] == COUNTED:
                least = min(least, link[CHANGES_ACKED])
    words[word(words, COMMITTED_AT) + partition] = np.uint64(least)
    shipping.control[COMMITTED_MORE] = 1


def synchronised(shipping: Shipping) -> np.ndarray:
    """Return bool[peers, partitions], whether a peer has all that was ever committed, and will have all that ever is.

    For all at once: asked one by one, while 256 were filled, it took two thirds of the store's time from filling them.
    """
    links = shipping.links
    found: np.ndarray = (links[:, :, MODE] == COUNTED) & (links[:, :, CHANGES_ACKED] >= links[:, :, COUNTED_FROM])
    return found


@jit
def lose(shipping: Shipping, peer: int, before_ns: int, refused_before_ns: int) -> int:
    """Take frames to a peer for lost that were sent before `before_ns`, those it refused before `refused_before_ns`.

    What they held is pending again. Returns how many. A peer refuses what is for a map that it does not know yet; from the second
    time on it is given twice as long as before.
    """
    lost = 0
    for partition in range(shipping.done_end.size):
        link = shipping.links[peer, partition]
        if link[MODE] == OUT or link[UNDER_WAY] == 0:
            continue
        limit_ns = before_ns
        if link[REFUSED] > 0:
            limit_ns = max(before_ns, refused_before_ns - ((1 << min(link[REFUSED], 5)) - 2) * REFUSED_AGAIN_NS)
        if link[SENT_NS] >= limit_ns:
            shipping.control[REFUSALS_WAIT] |= link[REFUSED] > 0
            continue
        for n in range(shipping.unacked.shape[2]):
            shipping.pending[peer, partition, n] |= shipping.unacked[peer, partition, n]
        if link[FIRST] == 0:
            link[FIRST] = link[SENT_FIRST]
        link[UNDER_WAY], link[CHANGES_SENT] = 0, -1
        lost += 1
    return lost


@jit
def owes_since(shipping: Shipping, peer: int, counted_ns: int, learning_ns: int) -> bool:
    """Tell whether a peer owes an acknowledgment since before `counted_ns` for a partition that it counts for, since before
    `learning_ns` for one that it learns."""
    for partition in range(shipping.done_end.size):
        link = shipping.links[peer, partition]
        if link[OWING_NS] != 0 and link[MODE] != OUT and link[OWING_NS] < (counted_ns if link[MODE] == COUNTED else learning_ns):
            return True
    return False
