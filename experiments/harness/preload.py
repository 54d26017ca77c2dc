"""Imported by the launcher before its first fork: everything compiled is loaded once, and every process inherits it.

Loading from the compiled cache takes a process about half a second; a fork of a process that has it takes 2 ms. What had to be
compiled is in the cache then, and the launcher starts anew: the compiler leaves 200 MB behind, which every process would inherit.
"""

import os
import sys

from numba.core import event

from experiments.harness import warm

AGAIN = "NEARSTATE_PRELOADED"

with event.install_recorder("numba:compile") as compilations:
    for _, load in warm.steps():
        warm.compiled(load)
if os.environ.pop(AGAIN, None) is None and compilations.buffer:
    os.execve(sys.executable, sys.orig_argv, {**os.environ, AGAIN: "1"})
