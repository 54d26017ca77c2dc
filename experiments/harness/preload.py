"""Imported by the launcher before its first fork: everything compiled is loaded once, and every process inherits it.

Loading from the compiled cache takes a process about half a second; a fork of a process that has it takes 2 ms.
"""

from experiments.harness import warm

for _, load in warm.steps():
    warm.compiled(load)
