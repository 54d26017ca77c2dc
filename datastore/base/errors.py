"""The one error a user sees: its message is the line printed, saying what was tried, with which value, and the fix."""

from __future__ import annotations

import difflib
import importlib
import traceback
from collections.abc import Iterable
from types import ModuleType

from datastore.base import ROOT


class NearstateError(Exception):
    """Something the user can mend; `str(error)` is one clear line."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> NearstateError:
    """Return the error for a `name` that is none of the `valid` ones of its `kind`, naming the nearest first."""
    names = sorted(filter(None, valid))
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    return NearstateError(f"unknown {kind} {name!r}: {hint}valid are {', '.join(names) or 'none'}")


def import_file(module: str) -> ModuleType:
    """Import one of the files that users add (`nfs.firewall`). Raises NearstateError naming its line and what is wrong there."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a user's file may raise
        raise located(module, error) from error


def located(module: str, error: Exception) -> NearstateError:
    """Return the error that says in which line of a user's file, by its module, `error` came up, and what it says."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    reason = str(error) if isinstance(error, NearstateError) else f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, reason = [error.lineno], f"{type(error).__name__}: {error.msg}"
    place = ":".join(map(str, [path.relative_to(ROOT), *lines[-1:]]))
    return NearstateError(f"{place}: {' '.join(reason.split())}")
