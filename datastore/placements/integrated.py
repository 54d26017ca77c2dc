"""Integrated: a store process on every NF host; each partition on one of them (the poster, Figure 2)."""

from __future__ import annotations

from datastore.placements import Cluster

STORES = "nf"


def aligned(partition: int, cluster: Cluster) -> list[str]:
    """On the host its packets are steered to, so that every access is in place; backups on the hosts after it."""
    return _group(cluster.nf_hosts.index(cluster.steering[partition]), cluster)


def hashed(partition: int, cluster: Cluster) -> list[str]:
    """Wherever a hash says, as if the store knew nothing of steering: of n hosts, 1 in n accesses is in place."""
    return _group((partition * 2_654_435_761 >> 16) % len(cluster.nf_hosts), cluster)


def _group(first: int, cluster: Cluster) -> list[str]:
    hosts = cluster.nf_hosts
    return [hosts[(first + replica) % len(hosts)] for replica in range(min(cluster.replicas, len(hosts)))]


POLICIES = {"aligned": aligned, "hashed": hashed}
