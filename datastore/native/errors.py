"""The one error a user sees: its message is the line printed, saying what was tried, with which value, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NearstateError(Exception):
    """Something the user can mend; `str(error)` is one clear line."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> NearstateError:
    """Return the error for a `name` that is none of the `valid` ones of its `kind`, naming the nearest first."""
    names = sorted(filter(None, valid))
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    return NearstateError(f"unknown {kind} {name!r}: {hint}valid are {', '.join(names) or 'none'}")
