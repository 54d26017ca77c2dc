"""Compile everything once, with progress, so that no experiment waits for the compiler: part of the set-up.

Every module with compiled functions has a `warm()` that calls its entry points on nothing; every network function is compiled
on its own. What is compiled already loads in milliseconds.

    python -m experiments.harness.warm
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import Any

from datastore.base import ROOT
from datastore.base.errors import NearstateError
from nfs.dataplane import declaration

PATTERNS = ("datastore/*/*.py", "nfs/dataplane/*.py", "experiments/workloads/*.py", "topologies/emulation/*.py")
"""Where compiled code lives, apart from the network functions."""
LONGEST = ("nfs.dataplane.loop", "datastore.process.server")
"""The steps that take longest go first, so that no process is left with one of them when the other is done."""
WORKERS = 2
"""A compiling process takes about half a gigabyte."""


def compiled_modules() -> Iterator[Any]:
    """Yield every module that has compiled functions and says how to compile them."""
    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            if not path.stem.startswith("_") and "\ndef warm(" in path.read_text():
                yield importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def steps() -> list[tuple[str, Callable[[], Any]]]:
    """Return (name, what compiles it) for everything there is to compile."""
    found = [(module.__name__, module.warm) for module in compiled_modules()]
    return found + [(f"nfs.{name}", lambda name=name: declaration.load(name).compiled) for name in declaration.names()]


def compiled(compile_it: Callable[[], Any]) -> str:
    """Compile one of the steps; returns what is to be told of it.

    A network function that cannot be compiled is told here, and refused where it is asked for: it stops nothing else.
    """
    started = time.monotonic()
    try:
        compile_it()
    except NearstateError as error:
        return f"cannot be compiled: {error}"
    return f"{time.monotonic() - started:.1f} s"


def _compiled(name: str) -> tuple[str, str]:
    return name, compiled(dict(steps())[name])


def main() -> None:
    """Compile everything, two steps at a time, a line each when it ends; what both need, whoever is first has compiled."""
    argparse.ArgumentParser(prog="python -m experiments.harness.warm", description=main.__doc__).parse_args()
    names = list(dict.fromkeys((*LONGEST, *(name for name, _ in steps()))))
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        for number, (name, told) in enumerate(pool.imap_unordered(_compiled, names), 1):
            print(f"[{number}/{len(names)}] {name} {told}", flush=True)


if __name__ == "__main__":
    main()
