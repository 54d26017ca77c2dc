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

A frame, after the header of four words that all frames have (`store/protocol.py`):

    0   partition (16) | kind and flags (16) | buckets that follow (32)
    1   epoch of the primary (32) | epoch of the peer (32)    2  serial of the last frame acknowledged    3  serial
        of a claim: epoch of the earlier primary
    4   changes after this frame    5  changes committed    6  version floor    7  records (32) | completions that follow (32)
                                       of a claim: the earlier primary's changes
    8.. a bucket: number << 8 | bits; its first word; the slots of bits 0 to 6
        a completion: client id, then the record of its ring

and its acknowledgment: partition (16) | status (8 of 16); word 1 of the frame; serial.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from datastore.native import inline, jit
from datastore.native.memory import fence, trailing_zeros
from datastore.store.layout import (
    BACKUP,
    BUCKET_DIRTY,
    BUCKET_WORDS,
    BUCKETS,
    BUCKETS_OFFSET,
    CHANGES_AT,
    CLIENT_ID,
    CLIENT_STRIDE,
    CLIENT_USED_S,
    CLIENTS,
    CLIENTS_AT,
    CLUSTER,
    COMMITTED_ALWAYS,
    COMMITTED_AT,
    COUNT,
    DIRTY_OFFSET,
    DONE_SEQUENCE,
    DONE_VALUE,
    FLOOR,
    NO_ROLE,
    PARTITION_COUNT,
    PRIMARY,
    RETIRING,
    ROLE,
    ROLE_BITS,
    ROLE_MASK,
    SLOT_WORDS,
    SLOTS,
    U0,
    U1,
    VALUE_WORDS,
    WINDOW,
    client_at,
    completion_at,
    partition_at,
    word,
)
from datastore.store.layout import EPOCH as EPOCH_OF_MAP
from datastore.store.locking import lock, release, role_word
from datastore.store.operations import KEY_LOW, OPERATION_VALUE, SEQUENCE, done_partition
from datastore.store.partitions import PARTITION_BITS
from datastore.store.protocol import FRAME_HEADER_WORDS, PROTOCOL_MAGIC, find_client, frame_operations, write_frame_header
from datastore.store.statuses import BAD_FRAME, OK, STALE_EPOCH, TOO_MANY_CLIENTS, UNKNOWN_PARTITION

GAP = 254
"""Status of an acknowledgment: a frame before this one is missing, send an image."""
DUPLICATE = 253
"""`judge`: this frame, or a later one, was applied already; it is acknowledged again."""
REPLICATE_WORDS, ACK_WORDS = 8, 3
IMAGE, NEWS, COUNTED_FLAG, CLAIM = 1, 2, 4, 8

# how a peer takes part in a partition
OUT, LEARNING, COUNTED = range(3)
"""COUNTED: nothing is committed without it. A learning one becomes that with the acknowledgment of its image."""
# words of a link; those of the first cache line are looked at for all partitions whenever something may be due
MODE, UNDER_WAY, FIRST, SENT_FIRST, CHANGES_SENT, CHANGES_ACKED, DONE_ACKED, TOLD = range(8)
SENT, ACKED, DONE_SENT, SENT_NS, COUNTED_FROM, LINK_JOINED, OWING_NS, REFUSED = range(8, 16)
LINK_WORDS = 16
"""FIRST: IMAGE or CLAIM where one is to be sent, else 0; SENT_FIRST: what that was of the frame sent last. SENT, ACKED: serials.
LINK_JOINED: the epoch at which the peer became a replica, this time. OWING_NS: when the first frame was sent that the peer owes
an acknowledgment for; 0: it owes none. REFUSED: how often in a row the peer has refused the frame under way; negative: it has not
answered the last time yet."""
# words of `followed`
EPOCH, SERIAL, JOINED, STANDING = range(4)
"""JOINED: the epoch at which this host became a replica, this time; 0: it is none, and takes no frames. STANDING: bits."""
MEMBER, COUNTS = 1, 2
"""Standing: the map that this host follows names it a member; the primary said that nothing is committed without it. Who is both
is a backup and may be read. Counting is not enough: a next primary waits for members, not for a learner that once counted."""
REFUSED_AGAIN_NS = 1_000_000
"""A peer refuses frames for a map that it does not know yet; in a move both hear of it within a few milliseconds."""
NEWS_AFTER_NS = 2_000_000
"""News wait so long for a frame that they can travel with: sent at once they would double frames and wake-ups, for reads at
backups that find a record clean a little earlier."""
IMAGES_AT_ONCE = 4
"""Under way to a peer that learns. Measured: a refill of 100,000 records under 60 kpps takes 250 to 370 ms with 16 at a time, and
costs 4 to 29 % of the packets meanwhile; with 4 it takes 410 to 510 ms, and costs 7 to 11 %."""
NO_BASE = 1 << 62
"""Serial before a frame that needs a claim to be right: nobody has it."""
DONE_QUEUE = 1024
"""Completion records of a partition that can be on their way; more, and the peer gets an image."""
LOW16, LOW32 = np.uint64(0xFFFF), np.uint64(0xFFFFFFFF)


class Shipping(NamedTuple):
    """What the store process remembers; it ends with it, and then every peer gets images.

    links: int64[peers, partitions, LINK_WORDS]. pending, unacked: uint64[peers, partitions, dirty words], as the table's dirty
    bytes. done: int64[partitions, DONE_QUEUE], word indices of completion records, and done_end: int64[partitions], how many
    there ever were. has_done: uint8[partitions], 0: the table has no completion record of the partition, and is not searched for
    them, which takes 10 us. followed: int64[partitions, 4], the last frame applied. claims: int64[partitions, 2], the earlier
    primary of a partition that this host rules, and how many of its changes there were; 0: none. connected: uint8[clients], for
    `find_client`. control: int64[5].
    """

    links: np.ndarray
    pending: np.ndarray
    unacked: np.ndarray
    done: np.ndarray
    done_end: np.ndarray
    has_done: np.ndarray
    followed: np.ndarray
    claims: np.ndarray
    connected: np.ndarray
    control: np.ndarray


ASYNCHRONOUS, NEXT_FIRST, COMMITTED_MORE, NEWS_WAIT, REFUSALS_WAIT = range(5)
"""COMMITTED_MORE: something was committed since somebody looked. NEWS_WAIT: there is news that is not old enough to be sent.
REFUSALS_WAIT: there are refused frames that it is too early to send again."""
REPLICATES, ACKNOWLEDGES = 2, 4
"""Flags of the frames between stores."""


def make_shipping(words: np.ndarray, peers: int, connected: np.ndarray, asynchronous: bool = False) -> Shipping:
    """Return the state of a store process that replicates the table `words` to and from `peers` others."""
    partitions, dirty_words = int(words[PARTITION_COUNT]), -(-int(words[BUCKETS]) // 8)
    control = np.zeros(5, np.int64)
    control[ASYNCHRONOUS] = asynchronous
    return Shipping(
        np.zeros((peers, partitions, LINK_WORDS), np.int64),
        np.zeros((peers, partitions, dirty_words), np.uint64),
        np.zeros((peers, partitions, dirty_words), np.uint64),
        np.zeros((partitions, DONE_QUEUE), np.int64),
        np.zeros(partitions, np.int64),
        np.ones(partitions, np.uint8),
        np.zeros((partitions, 4), np.int64),
        np.zeros((partitions, 2), np.int64),
        connected,
        control,
    )


def image_words(words: np.ndarray) -> int:
    """Return how long a frame of this table can be."""
    completions = int(words[CLIENTS]) * int(words[WINDOW]) * (1 + DONE_VALUE + int(words[VALUE_WORDS]))
    return FRAME_HEADER_WORDS + REPLICATE_WORDS + int(words[BUCKETS]) * (2 + SLOTS * int(words[SLOT_WORDS])) + completions


@inline
def changes(words: np.ndarray, partition: int) -> Any:
    """Return how often a partition has changed."""
    return word(words, word(words, CHANGES_AT) + partition)


@inline
def committed(words: np.ndarray, partition: int) -> Any:
    """Return how many of a partition's changes every counted peer has."""
    return word(words, word(words, COMMITTED_AT) + partition)


@inline
def reign(words: np.ndarray, partition: int) -> Any:
    """Return since which epoch the partition's primary is primary, as far as this host knows."""
    return word(words, partition_at(words, partition) + ROLE) >> ROLE_BITS


@inline
def role(words: np.ndarray, partition: int) -> Any:
    """Return what this host is to a partition."""
    return word(words, partition_at(words, partition) + ROLE) & ROLE_MASK


@inline
def rules(role: int) -> Any:
    """Tell whether a role ships: a retiring primary does until all it has changed is committed."""
    return role in (PRIMARY, RETIRING)


# ---- at the primary ---------------------------------------------------------------------------------------------------


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


@jit
def note_completion(shipping: Shipping, partition: int, done: int) -> None:
    """Remember that a completion record belongs to the changes of a partition."""
    shipping.done[partition, shipping.done_end[partition] % DONE_QUEUE] = done
    shipping.done_end[partition] += 1
    shipping.has_done[partition] = 1


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


@inline
def done_client(words: np.ndarray, done: int) -> Any:
    """Return the word index of the client's slot that a completion record is in."""
    return word(words, CLIENTS_AT) + (done - word(words, CLIENTS_AT)) // word(words, CLIENT_STRIDE) * word(words, CLIENT_STRIDE)


@jit
def write_completion(words: np.ndarray, done: int, out: np.ndarray, at: int) -> int:
    """Write a completion record into a frame; return where it ends."""
    out[at] = words[done_client(words, done) + CLIENT_ID]
    for n in range(DONE_VALUE + word(words, VALUE_WORDS)):
        out[at + 1 + n] = words[done + n]
    return at + 1 + DONE_VALUE + word(words, VALUE_WORDS)


@jit
def write_noted_completion(words: np.ndarray, partition: int, done: int, out: np.ndarray, at: int) -> int:
    """As `write_completion`, for a record that was a partition's when it was noted.

    The client may have gone on a whole window since, with another partition: that one's changes carry what is there now, and
    before them it must not arrive. An empty record takes its room.
    """
    end = write_completion(words, done, out, at)
    if done_partition(words, done) != partition:
        out[at + 1 + DONE_SEQUENCE] = U0
    return end


@jit
def next_completion(words: np.ndarray, partition: int, place: int) -> int:
    """Return the first place from `place` on (client * window + number) whose completion record is a partition's, or -1."""
    window = word(words, WINDOW)
    while place < word(words, CLIENTS) * window:
        client = place // window
        if words[client_at(words, client) + CLIENT_ID] == U0:
            place = (client + 1) * window
            continue
        done = completion_at(words, client, place % window)
        if words[done + DONE_SEQUENCE] != U0 and done_partition(words, done) == partition:
            return place
        place += 1
    return -1


@inline
def first_completion(shipping: Shipping, words: np.ndarray, partition: int) -> Any:
    """Return the first place whose completion record is a partition's, or -1."""
    place = np.int64(-1)
    if shipping.has_done[partition]:
        place = next_completion(words, partition, 0)
        shipping.has_done[partition] = place >= 0
    return place


@inline
def completion_of(words: np.ndarray, place: int) -> Any:
    """Return the word index of the completion record at a place."""
    return completion_at(words, place // word(words, WINDOW), place % word(words, WINDOW))


@jit
def count_completions(shipping: Shipping, words: np.ndarray, partition: int) -> int:
    """Return how many completion records a partition has."""
    count, place = 0, first_completion(shipping, words, partition)
    while place >= 0:
        count += 1
        place = next_completion(words, partition, place + 1)
    return count


@jit
def write_all_completions(shipping: Shipping, words: np.ndarray, partition: int, out: np.ndarray, at: int) -> int:
    """Write every completion record of a partition; return where they end."""
    place = first_completion(shipping, words, partition)
    while place >= 0:
        at = write_completion(words, completion_of(words, place), out, at)
        place = next_completion(words, partition, place + 1)
    return at


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


@inline
def is_peer_frame(buffer: np.ndarray, at: int) -> Any:
    """Tell whether the frame at `at`, which has a header, is another store's."""
    return np.int64(buffer[at + 1] >> np.uint64(16) & LOW16) == REPLICATES


@inline
def is_news(buffer: np.ndarray, at: int) -> Any:
    """Tell whether the frame at `at`, a store's, is news: it is not acknowledged."""
    return buffer[at + FRAME_HEADER_WORDS] >> np.uint64(16) & np.uint64(NEWS) != U0


@jit
def peer_frame_words(buffer: np.ndarray, at: int, end: int, longest: int) -> int:
    """As `frame_words`, for a frame of another store, of at most `longest` words."""
    if end - at < FRAME_HEADER_WORDS:
        return 0 if end == at or buffer[at] & LOW32 == np.uint64(PROTOCOL_MAGIC) else -1
    if buffer[at] & LOW32 != np.uint64(PROTOCOL_MAGIC) or not is_peer_frame(buffer, at):
        return -1
    frame_bytes = np.int64(buffer[at] >> np.uint64(32))
    if frame_bytes & 7 or frame_bytes < (FRAME_HEADER_WORDS + REPLICATE_WORDS) * 8 or frame_bytes > longest * 8:
        return -1
    return frame_bytes >> 3 if end - at >= frame_bytes >> 3 else 0


@jit
def note_answers(shipping: Shipping, words: np.ndarray, client: int, answer: np.ndarray, at: int) -> None:
    """Note the completion records of the answered frame at `answer[at]`, so that they are shipped with the changes."""
    count = frame_operations(answer, at)
    answer_words = OPERATION_VALUE + word(words, VALUE_WORDS)
    if client < 0 or words[DIRTY_OFFSET] == U0:
        return
    for n in range(count):
        operation = at + FRAME_HEADER_WORDS + n * answer_words
        sequence = answer[operation + SEQUENCE]
        done = completion_at(words, client, sequence)
        partition = np.int64(answer[operation + KEY_LOW] & PARTITION_BITS)
        if sequence != U0 and words[done + DONE_SEQUENCE] == sequence and partition == done_partition(words, done):
            note_completion(shipping, partition, done)


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


# ---- at the backup ----------------------------------------------------------------------------------------------------


@inline
def judge(is_first: bool, epoch: int, joined: int, base: int, serial: int, my_epoch: int, my_joined: int, my_serial: int) -> Any:
    """Return what to do with a frame, given the last one applied: OK (apply it), DUPLICATE, STALE_EPOCH or GAP.

    is_first: it needs none before it: an image, or a claim that is right. STALE_EPOCH is also the answer to a frame for a replica
    that this host does not know to be; nobody joins in epoch 0.
    """
    if epoch < my_epoch or joined != my_joined or joined == 0:
        return STALE_EPOCH
    if epoch > my_epoch:
        return OK if is_first else GAP
    if serial <= my_serial:
        return DUPLICATE
    return OK if is_first or base <= my_serial else GAP


@inline
def is_right(shipping: Shipping, words: np.ndarray, frame: np.ndarray, at: int) -> Any:
    """Tell whether a frame that claims how much this host has of the earlier primary is right, or one of this primary was before:
    then all that changed since is in it."""
    partition, epoch = np.int64(frame[at] & LOW16), np.int64(frame[at + 1] & LOW32)
    if shipping.followed[partition, EPOCH] == epoch:
        return reign(words, partition) == epoch
    return shipping.followed[partition, EPOCH] == np.int64(frame[at + 2]) and changes(words, partition) == np.int64(frame[at + 5])


@jit
def check_body(words: np.ndarray, frame: np.ndarray, at: int, length: int) -> int:
    """Return OK when a frame's buckets and completions fill its `length` words and name places that exist."""
    buckets, completions = np.int64(frame[at] >> np.uint64(32)), np.int64(frame[at + 7] >> np.uint64(32))
    end, slot_words = at + length, word(words, SLOT_WORDS)
    to = at + REPLICATE_WORDS
    for _ in range(buckets):
        if to + 2 > end or frame[to] >> np.uint64(8) >= words[BUCKETS]:
            return BAD_FRAME
        bits = frame[to] & np.uint64(0x7F)
        to += 2
        while bits != U0:
            to += slot_words
            bits &= bits - U1
    step = 1 + DONE_VALUE + word(words, VALUE_WORDS)
    return OK if completions >= 0 and completions <= (end - to) // step and to + completions * step == end else BAD_FRAME


@jit
def apply(
    shipping: Shipping, words: np.ndarray, owner: int, now_s: int, frame: np.ndarray, at: int, length: int, ack: np.ndarray,
    ack_at: int,
) -> int:  # fmt: skip
    """Apply the frame, without its header, of `length` words at `frame[at]`; return the words of the acknowledgment, 0 or 3."""
    if length < REPLICATE_WORDS:
        ack[ack_at], ack[ack_at + 1], ack[ack_at + 2] = np.uint64(BAD_FRAME << 16), U0, U0
        return ACK_WORDS
    if np.int64(frame[at] & LOW16) >= shipping.done_end.size:
        return acknowledge(frame, at, UNKNOWN_PARTITION, ack, ack_at)
    partition = np.int64(frame[at] & LOW16)
    status = check_body(words, frame, at, length)
    if status != OK:
        return acknowledge(frame, at, status, ack, ack_at)
    flags = np.int64(frame[at] >> np.uint64(16) & LOW16)
    if flags & NEWS:
        hear_news(shipping, words, owner, frame, at)
        return 0
    epoch, joined = np.int64(frame[at + 1] & LOW32), np.int64(frame[at + 1] >> np.uint64(32))
    followed = shipping.followed[partition]
    my_epoch = reign(words, partition)
    my_serial = followed[SERIAL] if my_epoch == followed[EPOCH] else -1
    is_first, base = flags & IMAGE != 0, np.int64(frame[at + 2])
    if flags & CLAIM:
        is_first, base = is_right(shipping, words, frame, at), NO_BASE
    status = judge(is_first, epoch, joined, base, np.int64(frame[at + 3]), my_epoch, followed[JOINED], my_serial)
    if status == OK and my_epoch == epoch and rules(role(words, partition)):
        status = STALE_EPOCH
    if status == OK:
        status = overwrite(shipping, words, owner, now_s, frame, at, length, partition)
    return acknowledge(frame, at, OK if status == DUPLICATE else status, ack, ack_at)


@inline
def acknowledge(frame: np.ndarray, at: int, status: int, ack: np.ndarray, ack_at: int) -> Any:
    """Write the acknowledgment of a frame; return its words."""
    ack[ack_at] = frame[at] & LOW16 | np.uint64(status) << np.uint64(16)
    ack[ack_at + 1], ack[ack_at + 2] = frame[at + 1], frame[at + 3]
    return ACK_WORDS


@jit
def overwrite(
    shipping: Shipping, words: np.ndarray, owner: int, now_s: int, frame: np.ndarray, at: int, length: int, partition: int,
) -> int:  # fmt: skip
    """Make the partition read as a frame, of `length` words, says it does; return OK. Or BUSY or TOO_MANY_CLIENTS: nothing is
    done then."""
    to, base = at + REPLICATE_WORDS, partition_at(words, partition)
    flags, epoch = np.int64(frame[at] >> np.uint64(16) & LOW16), np.int64(frame[at + 1] & LOW32)
    status = lock(words, owner, base)
    if status != OK:
        return status
    completions = np.int64(frame[at + 7] >> np.uint64(32))
    to_completions = at + length - completions * (1 + DONE_VALUE + word(words, VALUE_WORDS))
    if not find_room(shipping, words, now_s, frame, to_completions, completions):
        release(words, base)
        return TOO_MANY_CLIENTS
    words[base + ROLE] = role_word(epoch, NO_ROLE)  # a kill from here on leaves a partition that nobody may use
    fence()
    shipping.followed[partition, EPOCH] = -1
    shipping.followed[partition, STANDING] &= ~COUNTS
    if flags & IMAGE:
        for bucket in range(word(words, BUCKETS)):
            words[base + word(words, BUCKETS_OFFSET) + bucket * word(words, BUCKET_WORDS)] = U0
        forget_completions(shipping, words, partition)
    read_buckets(words, base, frame, to, np.int64(frame[at] >> np.uint64(32)))
    shipping.has_done[partition] |= completions > 0
    read_completions(shipping, words, now_s, frame, to_completions, completions)
    words[base + FLOOR], words[base + COUNT] = frame[at + 6], frame[at + 7] & LOW32
    words[word(words, CHANGES_AT) + partition] = frame[at + 4]
    words[word(words, COMMITTED_AT) + partition] = U0 if flags & CLAIM else frame[at + 5]
    shipping.followed[partition, EPOCH], shipping.followed[partition, SERIAL] = epoch, np.int64(frame[at + 3])
    fence()
    stand(shipping, words, partition, flags & COUNTED_FLAG)
    release(words, base)
    return OK


@jit
def stand(shipping: Shipping, words: np.ndarray, partition: int, counted: int) -> None:
    """Make this host a backup if it counts, as the primary says with `counted`, and is a member; the lock is held."""
    followed = shipping.followed[partition]
    followed[STANDING] |= COUNTS if counted else 0
    if followed[STANDING] == MEMBER | COUNTS:
        words[partition_at(words, partition) + ROLE] = role_word(followed[EPOCH], BACKUP)
    else:
        words[partition_at(words, partition) + ROLE] = role_word(followed[EPOCH], NO_ROLE)


@jit
def read_buckets(words: np.ndarray, base: int, frame: np.ndarray, at: int, buckets: int) -> int:
    """Copy buckets' first words and slots from a frame; return where they end."""
    first, slot_words = base + word(words, BUCKETS_OFFSET), word(words, SLOT_WORDS)
    for _ in range(buckets):
        target = first + np.int64(frame[at] >> np.uint64(8)) * word(words, BUCKET_WORDS)
        bits = frame[at] & np.uint64(0x7F)
        words[target] = frame[at + 1]
        at += 2
        while bits != U0:
            slot = target + 1 + np.int64(trailing_zeros(bits)) * slot_words
            for n in range(slot_words):
                words[slot + n] = frame[at + n]
            at += slot_words
            bits &= bits - U1
    return at


@jit
def forget_completions(shipping: Shipping, words: np.ndarray, partition: int) -> None:
    """Drop the completion records of a partition: an image brings those that hold."""
    place = first_completion(shipping, words, partition)
    while place >= 0:
        words[completion_of(words, place) + DONE_SEQUENCE] = U0
        place = next_completion(words, partition, place + 1)


@jit
def find_room(shipping: Shipping, words: np.ndarray, now_s: int, frame: np.ndarray, at: int, completions: int) -> bool:
    """Give the clients of a frame's completion records slots, and note that they are in use; False when one finds none."""
    for _ in range(completions):
        client = find_client(words, frame[at], now_s, shipping.connected)
        if client < 0:
            return False
        words[client_at(words, client) + CLIENT_USED_S] = np.uint64(now_s)
        at += 1 + DONE_VALUE + word(words, VALUE_WORDS)
    return True


@jit
def read_completions(shipping: Shipping, words: np.ndarray, now_s: int, frame: np.ndarray, at: int, completions: int) -> None:
    """Copy completion records from a frame to the rings of their clients, unless a later one is there."""
    step = DONE_VALUE + word(words, VALUE_WORDS)
    for _ in range(completions):
        client = find_client(words, frame[at], now_s, shipping.connected)
        done = completion_at(words, client, frame[at + 1 + DONE_SEQUENCE])
        if words[done + DONE_SEQUENCE] <= frame[at + 1 + DONE_SEQUENCE]:
            for n in range(step):
                words[done + n] = frame[at + 1 + n]
        at += 1 + step


@jit
def hear_news(shipping: Shipping, words: np.ndarray, owner: int, frame: np.ndarray, at: int) -> None:
    """Learn what is committed, and that this host counts, if nothing was missed before."""
    partition = np.int64(frame[at] & LOW16)
    base, epoch = partition_at(words, partition), np.int64(frame[at + 1] & LOW32)
    followed = shipping.followed[partition]
    if followed[EPOCH] != epoch or reign(words, partition) != epoch or followed[SERIAL] != np.int64(frame[at + 3]):
        return
    if followed[JOINED] != np.int64(frame[at + 1] >> np.uint64(32)):
        return
    if rules(role(words, partition)) or lock(words, owner, base) != OK:
        return
    words[word(words, COMMITTED_AT) + partition] = frame[at + 5]
    stand(shipping, words, partition, np.int64(frame[at] >> np.uint64(16)) & COUNTED_FLAG)
    release(words, base)
