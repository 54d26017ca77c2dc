"""What does a store process remember of each partition and peer that it ships to, and of what it follows?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from datastore.store.layout import BUCKETS, PARTITION_COUNT

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
DONE_QUEUE = 1024
"""Completion records of a partition that can be on their way; more, and the peer gets an image."""


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
