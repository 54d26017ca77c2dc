"""A fingerprint of 128 bits for what does not fit a key of 16 bytes: SipHash-1-3 of five words.

J.-P. Aumasson, D. Bernstein: SipHash: a fast short-input PRF, INDOCRYPT 2012, with one round a word and three at the end, as in
Linux, Rust and CPython for hash tables, and the reference code's longer answer. Its key is a constant: every process of every
host must come to the same fingerprints. They are as good as random for traffic, but who knows the key can search for collisions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit

KEY_0, KEY_1 = 0x243F6A8885A308D3, 0x13198A2E03707344
"""The first 128 bits of the fraction of pi: nothing up the sleeve."""
INITIAL = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)
V0, V1, V2, V3 = (np.uint64(word ^ key) for word, key in zip(INITIAL, (KEY_0, KEY_1 ^ 0xEE, KEY_0, KEY_1), strict=True))
SIZE = np.uint64(40 << 56)
"""The last block: the length of the message, five words, and no bytes left over."""


@inline
def _rotated(word: int, bits: int) -> Any:
    return word << np.uint64(bits) | word >> np.uint64(64 - bits)


@inline
def _round(v0: int, v1: int, v2: int, v3: int) -> Any:
    v0 += v1
    v2 += v3
    v1 = _rotated(v1, 13) ^ v0
    v3 = _rotated(v3, 16) ^ v2
    v0 = _rotated(v0, 32)
    v2 += v1
    v0 += v3
    v1 = _rotated(v1, 17) ^ v2
    v3 = _rotated(v3, 21) ^ v0
    return v0, v1, _rotated(v2, 32), v3


@jit
def siphash(first: int, second: int, third: int, fourth: int, fifth: int) -> Any:
    """Return two words, the fingerprint of five (all uint64)."""
    v0, v1, v2, v3 = V0, V1, V2, V3
    for block in (first, second, third, fourth, fifth, SIZE):
        v3 ^= block
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
        v0 ^= block
    v2 ^= np.uint64(0xEE)
    for _ in range(3):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    high = v0 ^ v1 ^ v2 ^ v3
    v1 ^= np.uint64(0xDD)
    for _ in range(3):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    return high, v0 ^ v1 ^ v2 ^ v3
