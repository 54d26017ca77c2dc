"""What do stores send each other? Frames with a partition's changes, and their acknowledgments (`shipping.py` says why).

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

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.store.layout import BUCKETS, CLIENTS, DONE_VALUE, SLOT_WORDS, SLOTS, U0, VALUE_WORDS, WINDOW
from datastore.store.protocol import FRAME_HEADER_WORDS, PROTOCOL_MAGIC

GAP = 254
"""Status of an acknowledgment: a frame before this one is missing, send an image."""
DUPLICATE = 253
"""`judge`: this frame, or a later one, was applied already; it is acknowledged again."""
REPLICATE_WORDS, ACK_WORDS = 8, 3
IMAGE, NEWS, COUNTED_FLAG, CLAIM = 1, 2, 4, 8
NO_BASE = 1 << 62
"""Serial before a frame that needs a claim to be right: nobody has it."""
LOW16, LOW32 = np.uint64(0xFFFF), np.uint64(0xFFFFFFFF)
REPLICATES, ACKNOWLEDGES = 2, 4
"""Flags of the frames between stores."""


def image_words(words: np.ndarray) -> int:
    """Return how long a frame of this table can be."""
    completions = int(words[CLIENTS]) * int(words[WINDOW]) * (1 + DONE_VALUE + int(words[VALUE_WORDS]))
    return FRAME_HEADER_WORDS + REPLICATE_WORDS + int(words[BUCKETS]) * (2 + SLOTS * int(words[SLOT_WORDS])) + completions


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
