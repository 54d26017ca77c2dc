"""Which compiled function on disk is still that of the source? One whose own file and all it imports from here are the same.

Numba's own stamp is the hash of the function's file only, so a changed *imported* function would be missed. This locator's
stamp covers the file and, transitively, every module of this repository that it imports; so a change compiles what it
touches, and nothing else.
"""

from __future__ import annotations

import ast
import hashlib
import pickle
from collections.abc import Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any

from numba.core.caching import IndexDataCacheFile, UserProvidedCacheLocator

from datastore.base import ROOT


def _module_file(name: str) -> Path | None:
    """Return the file of module `name` when it is one of this repository's."""
    path = ROOT.joinpath(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def _imports(path: Path) -> tuple[Path, ...]:
    """Return this repository's files that the module in `path` imports at its top, in order."""

    def names() -> Iterator[str]:
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    found = (_module_file(name) for name in names())
    return tuple(dict.fromkeys(file for file in found if file is not None))


@cache
def stamp(path: Path) -> str:
    """Return the hash of a module's file and of all it imports from this repository, transitively."""
    seen, waiting = {path}, [path]
    while waiting:
        for file in _imports(waiting.pop()):
            if file not in seen:
                seen.add(file)
                waiting.append(file)
    digest = hashlib.sha256()
    for file in sorted(seen):
        digest.update(str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


class ImportsLocator(UserProvidedCacheLocator):
    """Files in NUMBA_CACHE_DIR, valid while the source and its imports are unchanged."""

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        """Return the folder of a source's functions: by its path in the repository, so that a copy of the checkout, `.venv` and
        all, finds what it brought along."""
        path = Path(py_file).resolve()
        return (
            ".".join(path.relative_to(ROOT).parent.parts)
            if path.is_relative_to(ROOT)
            else Path(path).parent.name + ("-" + hashlib.sha256(str(path.parent).encode()).hexdigest()[:16])
        )

    def get_source_stamp(self) -> str:
        """Return what Numba compares with the stamp it stored."""
        return stamp(Path(self._py_file))


def forget_what_cannot_be_read() -> None:
    """Let Numba take an index for empty that names modules or classes that are gone since it was written, or is damaged.

    Otherwise a checkout in which a module was renamed can load nothing until its compiled functions are removed by hand.
    """
    load = IndexDataCacheFile._load_index

    @wraps(load)
    def load_index(self: IndexDataCacheFile) -> dict[Any, str]:
        try:
            overloads: dict[Any, str] = load(self)
        except (ImportError, AttributeError, EOFError, pickle.UnpicklingError):
            return {}
        return overloads

    IndexDataCacheFile._load_index = load_index
