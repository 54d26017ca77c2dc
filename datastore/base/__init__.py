"""The ground floor, without Numba: the repository's folder, users' errors, surroundings, threads, the number of partitions.

Whoever imports any of it has its environment put right, also for Numba, should that be imported next.
"""

import os
import sys
from pathlib import Path

from datastore.base.surroundings import prepare

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
CHECKED = os.environ.get("NUMBA_BOUNDSCHECK") == "1"
"""True when array accesses, also the unaligned ones of `compiled.memory`, are checked against the array's length."""

prepare(ROOT, f"python{sys.version_info[0]}.{sys.version_info[1]}{'-checked' * CHECKED}")
