"""The ground floor, without Numba: the repository's folder, users' errors, surroundings, threads, the number of partitions."""

from pathlib import Path

from datastore.base.surroundings import find_tools

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""

find_tools()
