"""Indices of arrays in compiled code are not negative: Numba compiles `array[i]` without asking whether `i` counts from the end.

That question is a compare and a select at every access, and it hides from the optimiser that two accesses are to one place:
it measured a fifth to a quarter of the packet loop. In the checked mode a negative index raises IndexError, as one behind the
end does. Slices are as always.
"""

from __future__ import annotations

from typing import Any

from numba.core import types
from numba.np import arrayobj


def _index(context: Any, builder: Any, kind: Any, index: Any, size: Any) -> Any:
    """Take the place of `numba.np.arrayobj.fix_integer_index`, which adds `size` to an index below zero."""
    return context.cast(builder, index, kind, types.intp if kind.signed else types.uintp)


def count_from_the_front() -> None:
    """Let what is compiled from now on, in this process, take indices as they are."""
    arrayobj.fix_integer_index = _index
