"""Python compiled to machine code: how every hot function of nearstate is compiled, and where the result is kept.

Compiled functions lie on disk below `.venv/compiled`, one folder for each kind of compilation; `cache` says when one is stale,
`datastore.base.surroundings` where they lie for a user who cannot write there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from datastore.base import ROOT
from datastore.base.surroundings import prepare

CHECKED = os.environ.get("NUMBA_BOUNDSCHECK") == "1"
"""True when array accesses, also the unaligned ones of `memory`, are checked against the array's length."""

prepare(ROOT, f"python{sys.version_info[0]}.{sys.version_info[1]}{'-checked' * CHECKED}")

import numba  # noqa: E402  (Numba reads its settings when it is imported)

from datastore.compiled.indices import count_from_the_front  # noqa: E402

count_from_the_front()

INTERPRETED = bool(numba.config.DISABLE_JIT)
"""True under NUMBA_DISABLE_JIT=1: network functions run as ordinary Python, for tests and debuggers."""

Function = TypeVar("Function", bound=Callable[..., Any])


def jit(function: Function) -> Function:
    """Compile `function` at its first call: no interpreter, no GIL, cached on disk, integer division unchecked.

    Arrays are not reference counted inside (callers in Python hold them), so a compiled function can neither make an array
    nor return one. Counting measured 43 % of the packet loop: every call counts every array it is given, atomically.
    Indices are not negative (see `indices`).
    """
    compiled: Function = numba.njit(cache=True, nogil=True, error_model="numpy", _nrt=False)(function)
    return compiled


def allocating(function: Function) -> Function:
    """As `jit`, for functions off the hot path that make or return arrays."""
    compiled: Function = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    return compiled


def inline(function: Function) -> Function:
    """As `jit`, and every caller gets the body in place of a call: for functions of a few instructions."""
    compiled: Function = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True, _nrt=False)(function)
    return compiled
