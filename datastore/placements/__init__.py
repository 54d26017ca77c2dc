"""Which host has which partition: a placement is a map from partition to replica group, and that is all it is.

One file a placement; each declares

    STORES      the role of the hosts that run a store process: "store", "nf", or None when nobody does
    POLICIES    {policy name: place}, the default first; place(partition, cluster) returns the hosts of the partition's
                replicas, primary first

A placement is named `file` or `file:policy`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datastore.base.errors import NearstateError, import_file, unknown
from datastore.base.partitioning import PARTITIONS
from datastore.store.partitions import PartitionMap


@dataclass(frozen=True)
class Cluster:
    """What a policy may know: the hosts, and to which NF host each partition's packets are steered."""

    nf_hosts: tuple[str, ...]
    store_hosts: tuple[str, ...]
    steering: tuple[str, ...]
    replicas: int = 1

    @property
    def stores(self) -> tuple[str, ...]:
        """All hosts that could run a store process."""
        return self.nf_hosts + self.store_hosts


Policy = Callable[[int, Cluster], list[str]]


@dataclass(frozen=True)
class Placement:
    """A loaded placement. `store_role`: role of the hosts with a store process, None: every NF keeps its own state."""

    name: str
    store_role: str | None
    policy: Policy

    def store_hosts(self, cluster: Cluster) -> tuple[str, ...]:
        """Return the hosts that run a store process."""
        return {"nf": cluster.nf_hosts, "store": cluster.store_hosts, None: ()}[self.store_role]

    def map(self, cluster: Cluster, epoch: int = 1) -> PartitionMap:
        """Return the partition map for `cluster`. Raises NearstateError when a partition gets no host or an unknown one."""
        groups = tuple(tuple(self.policy(partition, cluster)) for partition in range(PARTITIONS))
        stores = self.store_hosts(cluster)
        for partition, group in enumerate(groups):
            if not group or not set(group) <= set(stores) or len(group) != len(set(group)):
                raise NearstateError(f"placement {self.name!r} puts partition {partition} on {group or 'no host'}; "
                                     f"hosts with a store are {', '.join(stores) or 'none'}")  # fmt: skip
        return PartitionMap(epoch, groups)


def names() -> list[str]:
    """Return every placement and policy by name, the default policies by the file's name alone."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not path.stem.startswith("_"):
            policies = list(import_file(f"{__name__}.{path.stem}").POLICIES)
            found += [path.stem] + [f"{path.stem}:{policy}" for policy in policies[1:]]
    return found


def load(name: str) -> Placement:
    """Return the placement called `file` or `file:policy`. Raises NearstateError for unknown names, with the nearest ones."""
    stem, _, policy = name.partition(":")
    if name not in names() and stem not in names():
        raise unknown("placement", name, names())
    module = import_file(f"{__name__}.{stem}")
    policies: dict[str, Policy] = module.POLICIES
    policy = policy or next(iter(policies))
    if policy not in policies:
        raise unknown(f"policy of placement {stem!r}", policy, policies)
    return Placement(name, module.STORES, policies[policy])
