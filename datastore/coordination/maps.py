"""Who holds which partition: the map that the coordinator writes and everybody else follows.

A map is data with an epoch; the coordinator alone makes new ones. Each partition has a group:

    members    hosts with a full copy, primary first
    learners   hosts that are being given one
    leaving    hosts that were replicas and may not know yet that they are none: the primary goes on waiting for them
    successor  the member that the primary is to hand over to, or nobody
    reign      the epoch since which the primary is primary
    joined     for each of these hosts the epoch at which it became a replica

`ended` tells of hosts which store process (by its incarnation) is known to have ended: its lease, and promises to it, are over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from datastore.base.errors import NearstateError
from datastore.security import strict
from datastore.security.strict import LARGEST_EPOCH, LARGEST_TIME, whole


@dataclass(frozen=True)
class Group:
    """The replicas of a partition; see the module's text."""

    members: tuple[str, ...]
    reign: int
    learners: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    successor: str | None = None
    joined: dict[str, int] = field(default_factory=dict)

    @property
    def primary(self) -> str | None:
        return self.members[0] if self.members else None

    def to_json(self) -> dict[str, Any]:
        """Return the group as a JSON object."""
        return {"members": list(self.members), "reign": self.reign, "learners": list(self.learners),
                "leaving": list(self.leaving), "successor": self.successor, "joined": self.joined}  # fmt: skip

    def replicas(self) -> tuple[str, ...]:
        """Everybody who gets the partition's changes."""
        return self.members + self.learners + self.leaving


@dataclass(frozen=True)
class ClusterMap:
    """All groups, by partition, under one epoch."""

    epoch: int
    groups: tuple[Group, ...]
    ended: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def first(cls, placement: Sequence[Sequence[str]], epoch: int = 1) -> ClusterMap:
        """Return the map that a placement begins with. Its backups learn first: a primary alone knows that all are empty."""
        alike = {hosts: Group(hosts, epoch, joined=dict.fromkeys(hosts, epoch)) for hosts in map(tuple, placement)}
        return cls(epoch, tuple(alike[tuple(hosts)] for hosts in placement))

    @cached_property
    def leaving(self) -> tuple[int, ...]:
        """Partitions with a host that is leaving."""
        return tuple(partition for partition, group in enumerate(self.groups) if group.leaving)

    @cached_property
    def unsettled(self) -> tuple[int, ...]:
        """Partitions whose primary has something to tell: somebody learns, or it is to hand over."""
        return tuple(partition for partition, group in enumerate(self.groups) if group.learners or group.successor)

    @cached_property
    def sizes(self) -> dict[int, tuple[int, ...]]:
        """Partitions with so many members and learners, by that number."""
        found: dict[int, list[int]] = {}
        for partition, group in enumerate(self.groups):
            found.setdefault(len(group.members) + len(group.learners), []).append(partition)
        return {size: tuple(partitions) for size, partitions in found.items()}

    @cached_property
    def ruled(self) -> dict[str, tuple[int, ...]]:
        """Partitions by their primary; those without one are left out."""
        found: dict[str, list[int]] = {}
        for partition, group in enumerate(self.groups):
            if group.primary:
                found.setdefault(group.primary, []).append(partition)
        return {host: tuple(partitions) for host, partitions in found.items()}

    def sharing(self, host: str) -> frozenset[str]:
        """Return the other hosts that are replicas of a partition together with `host`."""
        return self._sharing.get(host, frozenset()) - {host}

    @cached_property
    def _sharing(self) -> dict[str, frozenset[str]]:
        found: dict[str, set[str]] = {}
        for replicas in {group.replicas() for group in self.groups}:
            for host in replicas:
                found.setdefault(host, set()).update(replicas)
        return {host: frozenset(others) for host, others in found.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the map as a JSON object: what groups there are, and which one each partition has.

        Most partitions' groups are alike: 2 kB in place of 30 for 256 partitions, of which a failover writes five copies.
        """
        return self._json

    @cached_property
    def _json(self) -> dict[str, Any]:
        numbers: dict[int, int] = {}
        numbers_of: dict[str, int] = {}
        kinds: list[dict[str, Any]] = []
        for group in self.groups:
            if id(group) not in numbers:
                described = group.to_json()
                number = numbers_of.setdefault(repr(described), len(kinds))
                if number == len(kinds):
                    kinds.append(described)
                numbers[id(group)] = number
        return {"epoch": self.epoch, "kinds": kinds, "groups": [numbers[id(group)] for group in self.groups],
                "ended": dict(self.ended)}  # fmt: skip

    @classmethod
    def from_json(cls, document: dict[str, Any] | str) -> ClusterMap:
        """Read what `to_json` returned; raises NearstateError when it is none."""
        try:
            fields = json.loads(document) if isinstance(document, str) else document
            kinds = [
                Group(_names(g["members"]), whole(g["reign"], LARGEST_EPOCH), _names(g["learners"]), _names(g["leaving"]),
                      None if g["successor"] is None else strict.name(g["successor"]),
                      {strict.name(host): whole(epoch, LARGEST_EPOCH) for host, epoch in g["joined"].items()})
                for g in fields["kinds"]]  # fmt: skip
            ended = {strict.name(host): whole(incarnation, LARGEST_TIME)
                     for host, incarnation in fields.get("ended", {}).items()}  # fmt: skip
            return cls(whole(fields["epoch"], LARGEST_EPOCH),
                       tuple(kinds[whole(kind, len(kinds))] for kind in fields["groups"]), ended)  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise NearstateError(f"not a cluster map: {error!r}") from error


def _names(given: Sequence[Any]) -> tuple[str, ...]:
    return tuple(map(strict.name, given))
