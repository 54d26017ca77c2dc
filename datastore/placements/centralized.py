"""Centralized: all state on store hosts of their own; NF hosts keep none (StatelessNF; Figure 1 of the poster)."""

from __future__ import annotations

from datastore.placements import Cluster

STORES = "store"


def spread(partition: int, cluster: Cluster) -> list[str]:
    """Partitions round robin over the store hosts, backups on the next ones."""
    hosts = cluster.store_hosts
    return [hosts[(partition + replica) % len(hosts)] for replica in range(min(cluster.replicas, len(hosts)))]


POLICIES = {"spread": spread}
