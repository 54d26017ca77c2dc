"""Python compiled to machine code: how every hot function of nearstate is compiled, and where the result is kept.

Numba's on-disk cache notices a change of the function's own file but not of an *imported* one, so the cache folder is
named by the hash of every compiled source that others import. Network functions (`nfs/*.py`) are imported by nobody and
left out: adding one compiles that one only.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("datastore/native/*.py", "datastore/store/*.py", "nfs/dataplane/*.py", "experiments/workloads/*.py",
           "experiments/peers/*.py", "topologies/emulation/wire.py")  # fmt: skip

CHECKED = os.environ.get("NUMBA_BOUNDSCHECK") == "1"
"""True when array accesses, also the unaligned ones of `memory`, are checked against the array's length."""


def source_hash() -> str:
    """Return 12 hexadecimal digits that change whenever a compiled source that others import changes."""
    digest = hashlib.sha256(f"{sys.version}{CHECKED}".encode())
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


CACHE = ROOT / ".venv" / "compiled" / source_hash()
os.environ.setdefault("NUMBA_CACHE_DIR", str(CACHE))

import numba  # noqa: E402  (the cache folder must be named before Numba reads its settings)

INTERPRETED = bool(numba.config.DISABLE_JIT)
"""True under NUMBA_DISABLE_JIT=1: network functions run as ordinary Python, for tests and debuggers."""

Function = TypeVar("Function", bound=Callable[..., Any])


def jit(function: Function) -> Function:
    """Compile `function` at its first call: no interpreter, no GIL, cached on disk, integer division unchecked."""
    compiled: Function = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    return compiled


def inline(function: Function) -> Function:
    """As `jit`, and every caller gets the body in place of a call: for functions of a few instructions."""
    compiled: Function = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)(function)
    return compiled
