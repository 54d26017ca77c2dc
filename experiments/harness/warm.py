"""Compile everything once, with progress, so that no experiment waits for the compiler: part of the set-up.

Every module with compiled functions has a `warm()` that calls its entry points on nothing; every network function is compiled
on its own. What is compiled already loads in milliseconds.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from datastore.native import ROOT
from nfs.dataplane import declaration

PATTERNS = ("datastore/*/*.py", "nfs/dataplane/*.py", "experiments/workloads/*.py", "topologies/emulation/*.py")
"""Where compiled code lives, apart from the network functions."""


def compiled_modules() -> Iterator[Any]:
    """Yield every module that has compiled functions and says how to compile them."""
    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            if not path.stem.startswith("_") and "def warm(" in path.read_text():
                yield importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def steps() -> list[tuple[str, Callable[[], Any]]]:
    """Return (name, what compiles it) for everything there is to compile."""
    found = [(module.__name__, module.warm) for module in compiled_modules()]
    return found + [(f"nfs.{name}", lambda name=name: declaration.load(name).compiled) for name in declaration.names()]


def main() -> None:
    """Compile everything, a line a module."""
    total = steps()
    for number, (name, compile_it) in enumerate(total, 1):
        started = time.monotonic()
        compile_it()
        print(f"[{number}/{len(total)}] {name} {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
