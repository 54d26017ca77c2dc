"""Heavy hitters: who sends most? A count-min sketch that all instances share; every packet adds, nobody waits for an answer.

G. Cormode, S. Muthukrishnan: An improved data stream summary: the count-min sketch and its applications, J. Algorithms 55, 2005.
Four rows of `width` counters; a packet adds its weight (1, or its bytes) to one counter of each row. Three rows are hashed by
the address, the fourth by its upper 16 bits. Adds commute, so what the instances add in whatever order is one sketch.

    estimate(address) = the least of its four counters       never below its weight
    estimate <= weight + epsilon * total  with probability 1 - delta,  epsilon = e / width,  delta = exp(-3)  (theorem 1, d = 3)

Adds give no answer, so nobody can keep a list of candidates as in section 5.2; it is found when asked, from the sketch alone, by
the dyadic search of the same section with two levels (`top`): a prefix's counter is never below that of any address under it, so
prefixes are opened by their counter, best first, until `k` addresses stand above every prefix that is left. No address that
belongs to the first k by its estimate is missed. An address that never sent is taken for a heavy one when it meets heavy ones in
all four rows: about 2^32 * (heavy / width)^4 of them, 0.01 for ten heavy senders and a width of 8,192.

An IPv6 address is counted under 28 bits of a fingerprint, written as an address in 240.0.0.0/4, where no IPv4 host is: what `top`
finds there is an IPv6 sender. `item_of` leads from an address there; nothing leads back.

Sketches are linear: the sum of the tables of several hosts, or the difference of two moments, is one too. Try it on the host
of a running store: python -m nfs.heavy_hitters (and --help).

Verdicts in trouble: none; it forwards everything. An add that the store refuses is lost and the store counts it.
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, ip_address
from typing import Any

import numpy as np

from datastore.base.errors import NearstateError, unknown
from datastore.compiled import inline
from datastore.store.partitions import hashed_partition, key_high, key_low
from nfs.dataplane import FORWARD, NONE, add, kind_of, network_function
from nfs.dataplane.ipv6 import destination_word, named, source_word

KIND = kind_of("heavy_hitters")
ROWS, PREFIX_ROW, PREFIX_BITS = 4, 3, 16
WORDS = 4
"""Counters in one record of 32 bytes."""
SMALLEST_WIDTH, LARGEST_WIDTH = 64, 1 << 18
MULTIPLIERS = (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xABC98388FB8FAC03, 0x8CB92BA72F3D8DD7)
OFFSETS = (0x2545F4914F6CDD1D, 0x5851F42D4C957F2D, 0x14057B7EF767814F, 0x369DEA0F31A53F85)
"""Random odd multipliers and random offsets, one for each row."""
UNITS = {"packets": 0, "bytes": 1}
PARTIES = {"source": 0, "destination": 1}


def width_for(epsilon: float) -> int:
    """Return the least width whose error is at most `epsilon` of the total: e / epsilon, rounded up to whole records."""
    return math.ceil(math.e / epsilon / WORDS) * WORDS


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """Check the width; choices become numbers."""
    width = settings["width"]
    if not SMALLEST_WIDTH <= width <= LARGEST_WIDTH or width % WORDS:
        raise NearstateError(f"heavy hitters with width={width}: a multiple of {WORDS}, {SMALLEST_WIDTH} to {LARGEST_WIDTH}; "
                             "the error is e / width of the total")  # fmt: skip
    for name, choices in (("counts", UNITS), ("of", PARTIES)):
        if settings[name] not in choices:
            raise unknown(f"heavy hitters' {name}", settings[name], choices)
    return settings | {"counts": UNITS[settings["counts"]], "of": PARTIES[settings["of"]]}


def _column(item: Any, row: int, width: int) -> Any:
    """Return where an item of up to 32 bits, uint64 or an array of them, is counted: 0 to `width` - 1.

    The upper 32 bits of (a * x + b) mod 2^64 are pairwise independent, as the sketch's theorem asks (M. Dietzfelbinger:
    Universal hashing and k-wise independent random variables via integer arithmetic without primes, STACS 1996).
    """
    hashed = (item * np.uint64(MULTIPLIERS[row]) + np.uint64(OFFSETS[row])) >> np.uint64(32)
    return hashed * np.uint64(width) >> np.uint64(32)


column = inline(_column)


@inline
def record_key(row: int, block: int) -> Any:
    """Return (high, low) of the record with counters 4 * block to 4 * block + 3 of a row."""
    high, low = key_high(row, block), key_low(0, 0, 0, KIND, 0)
    return high, low | np.uint64(hashed_partition(high, low))


@network_function(
    key=NONE,
    passes=("truncated", "oversized", "malformed", "not_ip", "unreadable", "fragment"),
    settings={
        "width": ("i8", 8192),  # 4 * width counters, 32 bytes of records for 4 of them: 256 KB
        "counts": ("u1", "packets"),  # or "bytes" of the frames, without padding and trailers
        "of": ("u1", "source"),  # or "destination"
    },
    prepare=prepare,
)
def heavy_hitters(packet, record, env):
    item = np.uint64(destination_word(packet) if env.of else source_word(packet))
    weight = np.int64(packet.network_offset) + np.int64(packet.ip_bytes) if env.counts else np.int64(1)
    for row in range(ROWS):
        place = np.int64(column(item >> np.uint64(PREFIX_BITS) if row == PREFIX_ROW else item, row, env.width))
        high, low = record_key(row, place >> 2)
        add(env, high, low, place & 3, weight)
    return FORWARD


def item_of(address: str) -> IPv4Address:
    """Return what an address of either version is counted under."""
    found = ip_address(address)
    high, low = np.uint64(int(found) >> 64), np.uint64(int(found) & (1 << 64) - 1)
    return IPv4Address(int(named(found.version, high, low)))


def snapshot(read: Callable[[int, int], np.ndarray], width: int) -> np.ndarray:
    """Return the sketch, uint64[4, width]; `read(key_high, key_low)` gives the words of a record, zeros for none."""
    counters = np.zeros((ROWS, width), np.uint64)
    for row in range(ROWS):
        for block in range(width // WORDS):
            counters[row, block * WORDS : block * WORDS + WORDS] = read(*map(int, record_key(row, block)))[:WORDS]
    return counters


def of_records(records: Iterable[tuple[int, int, bytes]], width: int) -> np.ndarray:
    """Return the sum of the sketch's records among `records`, (key high, key low, value); of several hosts together, too."""
    counters = np.zeros((ROWS, width), np.uint64)
    for high, low, value in records:
        row, block = high >> 32, high & 0xFFFFFFFF
        if low >> 16 == KIND and row < ROWS and (block + 1) * WORDS <= width:
            counters[row, block * WORDS : block * WORDS + WORDS] += np.frombuffer(value, np.uint64, WORDS)
    return counters


def estimates(counters: np.ndarray, addresses: np.ndarray) -> np.ndarray:
    """Return for each address (uint64[n]) the least of its counters: its weight, or more."""
    width = counters.shape[1]
    found = counters[PREFIX_ROW][_column(addresses >> np.uint64(PREFIX_BITS), PREFIX_ROW, width)]
    for row in range(PREFIX_ROW):
        found = np.minimum(found, counters[row][_column(addresses, row, width)])
    return found


def top(counters: np.ndarray, k: int) -> list[tuple[IPv4Address, int]]:
    """Return the `k` addresses with the highest estimates, best first; fewer when fewer have sent anything."""
    width = counters.shape[1]
    prefixes = np.arange(1 << (32 - PREFIX_BITS), dtype=np.uint64)
    bounds = counters[PREFIX_ROW][_column(prefixes, PREFIX_ROW, width)]
    best: list[tuple[int, int]] = []  # (estimate, -address), the least first
    for prefix in np.argsort(bounds)[::-1]:
        if not bounds[prefix] or (len(best) == k and int(bounds[prefix]) <= best[0][0]):
            break
        under = (np.uint64(prefix) << np.uint64(PREFIX_BITS)) + np.arange(1 << PREFIX_BITS, dtype=np.uint64)
        found = estimates(counters, under)
        least = best[0][0] if len(best) == k else 0
        likely = np.flatnonzero(found > np.uint64(least))
        for n in likely[np.argsort(found[likely])[::-1][:k]]:
            heapq.heappush(best, (int(found[n]), -int(under[n])))
        best = heapq.nlargest(k, best)[::-1]
    return [(IPv4Address(-address), estimate) for estimate, address in sorted(best, reverse=True)]


def asked(counters: np.ndarray, address: str) -> list[tuple[IPv4Address, int]]:
    """Return what one address is counted under, and its estimate. Raises NearstateError for what is no address."""
    try:
        item = item_of(address)
    except ValueError:
        raise NearstateError(f"--of {address!r}: give an address of IPv4 or IPv6, as 10.0.1.7 or fd00::a00:1") from None
    return [(item, int(estimates(counters, np.array([int(item)], np.uint64))[0]))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the heaviest senders that the stores on this host have counted."""
    from datastore.__main__ import tables

    parser = argparse.ArgumentParser(prog="python -m nfs.heavy_hitters", description=main.__doc__)
    parser.add_argument("-k", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument("--width", type=int, default=8192, help="the network function's setting (default: %(default)s)")
    parser.add_argument("--of", metavar="ADDRESS", help="one address, of IPv4 or IPv6, instead of the heaviest")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="names of tables (default: all on this host)")
    chosen = parser.parse_args(arguments)
    found = [table for table in tables() if not chosen.tables or table.name in chosen.tables]
    counters = of_records(((r.high, r.low, r.value) for table in found for r in table.records()), chosen.width)
    total = int(counters[0].sum())
    error = math.e / chosen.width * total
    print(f"{total:,} counted in {len(found)} tables; 95 in 100 estimates are at most {error:,.0f} too high")
    for address, estimate in asked(counters, chosen.of) if chosen.of else top(counters, chosen.k):
        print(f"{address!s:>15}  {estimate:>15,}  {estimate / max(total, 1):6.2%}")


if __name__ == "__main__":
    main()
