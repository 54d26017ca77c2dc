"""Python compiled to machine code: how every hot function of nearstate is compiled, and where the result is kept.

Compiled functions lie on disk below `.venv/compiled`, one folder for each kind of compilation; `cache` says when one is stale,
`base.surroundings` where they lie for a user who cannot write there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

# isort: off
import datastore.base  # noqa: F401  (before Numba, which reads its settings when it is imported)
import numba
# isort: on

from datastore.compiled.cache import forget_what_cannot_be_read
from datastore.compiled.indices import count_from_the_front

forget_what_cannot_be_read()
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
