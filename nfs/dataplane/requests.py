"""What a network function knows, and may ask the engine for, beyond its packet and its record.

    claim   one more record, by its key: "let this key hold these words, for so long"
    add     a commutative update of a counter that all instances share; its answer is not waited for

A **claim** succeeds when nobody has the key, or when the record there already has the same first word (then the other words
and the time-out are renewed). It is committed before the function's own record, and the packet leaves after both. When
somebody else has the key, the function runs again on the record as it is, with `env.attempt` one higher, and may claim another.
The insertion is the allocation: a number that is claimed (a NAT's port) is free again when its record expires, whatever became
of the instance, and two instances cannot get the same.

An **add** takes effect when the packet's own record is committed, once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline

CLAIM_WORDS, ADDS = 4, 4
ENV = np.dtype(
    [
        ("now_ns", "i8"),  # CLOCK_MONOTONIC, read once per burst
        ("idle_timeout_s", "i8"),  # set by the function: forget the record after this many idle seconds; 0: keep as it is
        ("cause", "i8"),  # set by the function that returns DROP: which of the ledger's causes; 0: its verdict
        ("attempt", "i8"),  # how many claims for this packet have failed
        ("claim_timeout_s", "i8"),  # above 0: there is a claim
        ("claim_high", "u8"),
        ("claim_low", "u8"),
        ("claim_words", "u8", (CLAIM_WORDS,)),
        ("add_count", "i8"),
        ("add_high", "u8", (ADDS,)),
        ("add_low", "u8", (ADDS,)),
        ("add_word", "i8", (ADDS,)),
        ("add_delta", "u8", (ADDS,)),
    ]
)
"""Every field is one or more words of 8 bytes; `settings.py` puts a function's settings behind them."""


def _word_of(field: str) -> int:
    assert ENV.fields
    return ENV.fields[field][1] // 8


(
    NOW_NS,
    IDLE_TIMEOUT_S,
    CAUSE,
    ATTEMPT,
    CLAIM_TIMEOUT_S,
    CLAIM_HIGH,
    CLAIM_LOW,
    CLAIM_VALUE,
    ADD_COUNT,
    ADD_HIGH,
    ADD_LOW,
    ADD_WORD,
    ADD_DELTA,
) = (_word_of(name) for name in ENV.names or ())
"""Where each field begins, in words."""
ENV_WORDS = ENV.itemsize // 8


@inline
def claim(env: Any, key_high: int, key_low: int, word_0: int, word_1: int, timeout_s: int) -> None:
    """Ask for the key to hold `word_0` (which says whose it is) and `word_1`, the rest zero, for `timeout_s` seconds.

    The low word of the key names its partition (`datastore.store.partitions.key_low`). One claim a packet: the last counts.
    """
    env.claim_high = np.uint64(key_high)
    env.claim_low = np.uint64(key_low)
    env.claim_words[0] = np.uint64(word_0)
    env.claim_words[1] = np.uint64(word_1)
    env.claim_timeout_s = timeout_s


@inline
def add(env: Any, key_high: int, key_low: int, word: int, delta: int) -> None:
    """Add `delta` to 64-bit word `word` of the key's record, which all instances share; at most ADDS a packet, more are lost."""
    n = env.add_count
    if n < ADDS:
        env.add_high[n] = np.uint64(key_high)
        env.add_low[n] = np.uint64(key_low)
        env.add_word[n] = word
        env.add_delta[n] = np.uint64(delta)
        env.add_count = n + 1
