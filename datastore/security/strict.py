"""How is text from the network read, whoever wrote it?

JSON (RFC 8259) of a bounded depth whose numbers are finite and fit into 64 bits; the caller bounds its length. A refusal is a
ValueError, which ends no process: `json` alone takes `Infinity`, and ends in RecursionError for a thousand opening brackets.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import numpy as np

from datastore.security.secret import NAME_BYTES

DEEPEST = 16
LARGEST_DIGITS = 20
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_LONG = re.compile(rb"\d{%d}" % (LARGEST_DIGITS + 1))
_STEP = np.zeros(256, np.int8)
"""By how much a character changes the depth."""
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
WORD, LARGEST_EPOCH, LARGEST_TIME = (1 << 64) - 1, (1 << 32) - 1, (1 << 62) - 1


def loads(text: bytes) -> Any:
    """Return what a JSON text says. Raises ValueError for what is none, too deep, or has a number that is not finite or long."""
    bare = _STRINGS.sub(b"", text)
    if bare and np.cumsum(_STEP[np.frombuffer(bare, np.uint8)], dtype=np.int64).max() > DEEPEST:
        raise ValueError(f"nested deeper than {DEEPEST}: {_shown(text)}")
    if long := _LONG.search(bare):
        raise ValueError(f"{long.group().decode()[:40]}... has more than {LARGEST_DIGITS} digits")
    try:
        return json.loads(text.decode(), parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"nested too deep: {_shown(text)}") from None


def message(text: bytes) -> dict[str, Any]:
    """As `loads`, of an object."""
    said = loads(text)
    if not isinstance(said, dict):
        raise ValueError(f"no object: {_shown(text)}")
    return said


def whole(value: Any, largest: int, least: int = 0) -> int:
    """Return a whole number from `least` to `largest`. Raises ValueError for everything else."""
    if type(value) is not int or not least <= value <= largest:
        raise ValueError(f"{str(value)[:40]} is no whole number from {least} to {largest}")
    return value


def name(value: Any) -> str:
    """Return a name. Raises ValueError for what is none."""
    if not isinstance(value, str) or not _is_name(value):
        raise ValueError(f"{str(value)[:40]!r} is no name of at most {NAME_BYTES} bytes")
    return value


@lru_cache(1024)
def _is_name(text: str) -> bool:
    return len(text) <= NAME_BYTES and len(text.encode(errors="replace")) <= NAME_BYTES and "\0" not in text


def members(value: Any, most: int) -> Collection[Any]:
    """Return a list of at most `most` members. Raises ValueError for everything else."""
    if not isinstance(value, (list, tuple)) or len(value) > most:
        raise ValueError(f"no list of at most {most}")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is not finite")
    return number


def _shown(text: bytes) -> str:
    return repr(text[:60])
