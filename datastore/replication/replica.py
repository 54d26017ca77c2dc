"""What does a store host make of the maps and leases it is given?

Pure, like the coordinator: it is told the time and what arrived. It writes roles into the table, where compiled code and the
network functions on this host see them, and tells `shipping` whom to feed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datastore.native.errors import NearstateError
from datastore.replication import shipping as ship
from datastore.replication.coordinator import Grant, Heartbeat, Timing
from datastore.replication.maps import ClusterMap, Group
from datastore.replication.shipping import Shipping
from datastore.store import locking
from datastore.store.layout import LEASE_NS, NO_ROLE, PRIMARY, RETIRING, ROLE
from datastore.store.locking import role_word
from datastore.store.statuses import NAMES, OK


class Replica:
    """The decisions of one store host. peers: every other host of the cluster, in the order of `shipping.links`."""

    def __init__(
        self, host: str, peers: Sequence[str], words: np.ndarray, shipping: Shipping, owner: int, cluster: int, incarnation: int,
        timing: Timing | None = None,
    ) -> None:  # fmt: skip
        """incarnation: a number that no earlier process of this host had; not 0."""
        self.host, self.peers, self.words, self.shipping, self.owner = host, list(peers), words, shipping, owner
        self.cluster, self.incarnation, self.timing = cluster, incarnation, timing or Timing()
        self.map = ClusterMap(0, ())
        self.words[LEASE_NS] = 1
        self.refusal = ""

    def hear(self, grant: Grant) -> bool:
        """Take what the coordinator says; tell whether the map changed."""
        changed = False
        if grant.incarnation != self.incarnation:
            return changed
        self.refusal = grant.refusal
        if grant.map is not None and grant.map.epoch > self.map.epoch:
            self.adopt(grant.map)
            changed = True
        if grant.lease_ns and grant.epoch == self.map.epoch:
            self.words[LEASE_NS] = max(int(self.words[LEASE_NS]), grant.sent_ns + grant.lease_ns)
        return changed

    def has_lease(self, now_ns: int) -> bool:
        """Tell whether this host may answer."""
        return now_ns < int(self.words[LEASE_NS])

    def beat(self, now_ns: int) -> Heartbeat:
        """Return what to tell the coordinator now."""
        synchronised, released = [], []
        for partition, group in enumerate(self.map.groups):
            if group.primary != self.host:
                continue
            for host in group.learners:
                if ship.is_synchronised(self.shipping, self.peers.index(host), partition):
                    synchronised.append((partition, host))
            if group.successor and self.is_drained(partition):
                released.append(partition)
        return Heartbeat(self.host, self.cluster, self.incarnation, self.map.epoch, now_ns, tuple(synchronised), tuple(released),
                         tuple(self._unreachable(now_ns)))  # fmt: skip

    def is_drained(self, partition: int) -> bool:
        """Tell whether all that this host did as a partition's primary is committed, and it does nothing more."""
        words = self.words
        all_committed = ship.committed(words, partition) >= ship.changes(words, partition)
        return bool(ship.role(words, partition) == RETIRING and all_committed)

    def _unreachable(self, now_ns: int) -> list[str]:
        """Return the peers that owe an acknowledgment for too long."""
        found = []
        for peer, host in enumerate(self.peers):
            links = self.shipping.links[peer]
            owing = (links[:, ship.MODE] != ship.OUT) & (links[:, ship.OWING_NS] != 0)
            if np.any(now_ns - links[owing, ship.OWING_NS] > self.timing.unreachable_ns):
                found.append(host)
        return found

    # ---- maps ---------------------------------------------------------------------------------------------------------

    def adopt(self, new: ClusterMap) -> None:
        """Follow a newer map. Raises NearstateError when it is for another number of partitions."""
        partitions = self.shipping.done_end.size
        if len(new.groups) != partitions:
            raise NearstateError(f"map {new.epoch} has {len(new.groups)} partitions, this table {partitions}")
        for partition, group in enumerate(new.groups):
            if not self.map.groups or group != self.map.groups[partition]:
                if group.primary == self.host:
                    self._rule(partition, group)
                else:
                    self._follow(partition, group)
        self.map = new

    def _rule(self, partition: int, group: Group) -> None:
        """This host is primary: ship to everybody who counts."""
        words, shipping = self.words, self.shipping
        fresh = ship.reign(words, partition) != group.reign or not ship.rules(ship.role(words, partition))
        if fresh:
            shipping.followed[partition] = (-1, 0, 0, 0)
            for peer in range(len(self.peers)):
                ship.starve(shipping, words, peer, partition)
        self._set_role(partition, RETIRING if group.successor else PRIMARY, group.reign)
        for peer, host in enumerate(self.peers):
            link = shipping.links[peer, partition]
            if host not in group.replicas():
                if link[ship.MODE] != ship.OUT:
                    ship.starve(shipping, words, peer, partition)
            elif link[ship.MODE] == ship.OUT or link[ship.LINK_JOINED] != group.joined[host]:
                mode = ship.LEARNING if host in group.learners else ship.COUNTED
                ship.feed(shipping, words, peer, partition, mode, group.joined[host])

    def _follow(self, partition: int, group: Group) -> None:
        """This host is a backup, is learning, or has nothing to do with the partition."""
        words, shipping = self.words, self.shipping
        if ship.rules(ship.role(words, partition)):
            for peer in range(len(self.peers)):
                ship.starve(shipping, words, peer, partition)
            shipping.followed[partition, ship.EPOCH] = -1
        joined = group.joined[self.host] if self.host in group.members + group.learners else 0
        followed = shipping.followed[partition]
        if followed[ship.JOINED] != joined:
            followed[:3] = (-1, 0, joined)
        role = ship.role(words, partition)
        if ship.reign(words, partition) != group.reign or joined == 0 or ship.rules(role) or followed[ship.EPOCH] == -1:
            self._set_role(partition, NO_ROLE, max(group.reign, ship.reign(words, partition)))

    def _set_role(self, partition: int, role: int, reign: int) -> None:
        base = int(locking.partition_at(self.words, partition))
        status = locking.lock_now(self.words, self.owner, base)
        if status != OK:
            raise NearstateError(f"partition {partition}: {NAMES[status]}, its role cannot be changed")
        self.words[base + ROLE] = role_word(reign, role)
        locking.release_now(self.words, base)
