"""Local: every NF instance keeps its own state in its own memory and nobody else sees it.

The traditional NF: the upper bound on speed. An instance that dies, or a flow that comes to another one, has no state.
"""

from __future__ import annotations

from datastore.placements import Cluster

STORES = None


def private(partition: int, cluster: Cluster) -> list[str]:
    """No store: whichever instance gets the packet uses its own record."""
    return []


POLICIES = {"private": private}
