"""What does a store host make of the maps and leases it is given?

Pure, like the coordinator: it is told the time and what arrived. It writes roles into the table, where compiled code and the
network functions on this host see them, and tells `shipping` whom to feed.

A coordinator that is down must stop nothing but changes of the map. So stores also promise each other, with every ping: "for so
long I will act on no map that takes a right from you, unless you say that you have it". With the promises of all hosts that
share partitions with it, a host may answer without the coordinator's lease. A host that is to be primary, or that need not wait
for a former backup any more, first lets its promises to those run out who may not know. Both waits begin with the last sign of
life, so a failover takes no longer for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datastore.base.errors import NearstateError
from datastore.coordination.heartbeats import Grant, Heartbeat, Ping, Pong, Timing
from datastore.coordination.maps import ClusterMap, Group
from datastore.replication import shipping as ship
from datastore.replication.frames import CLAIM, IMAGE
from datastore.replication.link import (
    ASYNCHRONOUS,
    CHANGES_ACKED,
    COUNTED,
    COUNTS,
    EPOCH,
    JOINED,
    LEARNING,
    LINK_JOINED,
    MEMBER,
    MODE,
    OUT,
    OWING_NS,
    STANDING,
    UNDER_WAY,
    Shipping,
    make_shipping,
)
from datastore.store import locking, roles
from datastore.store.layout import (
    BACKUP,
    CHANGES_AT,
    COMMITTED_AT,
    ENDED_AT,
    INCARNATION,
    LEASE_NS,
    NO_ROLE,
    PRIMARY,
    PROMISE_NS,
    RETIRING,
    lease_holds,
)
from datastore.store.statuses import NAMES, OK
from datastore.store.table import Table

FOR_EVER_NS = 1 << 62
LEARNERS_PATIENCE = 5
"""By how much longer than a member a learner may owe an acknowledgment: no packet waits for it."""


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
        self.words[LEASE_NS], self.words[INCARNATION] = 1, incarnation
        self.refusal = ""
        self.promised_until_ns, self.promise_until_ns, self.peer_epoch, self.promised_to = (
            [0] * len(self.peers) for _ in range(4)
        )
        self._deferred: dict[int, Group] = {}
        self._drained: dict[int, int] = {}
        """In which reign this host said of a partition that it has stopped: it changes nothing since, whoever joins meanwhile."""

    def hear(self, now_ns: int, grant: Grant) -> bool:
        """Take what the coordinator says; tell whether the map changed."""
        changed = False
        if grant.incarnation != self.incarnation:
            return changed
        self.refusal = grant.refusal
        if grant.map is not None and grant.map.epoch > self.map.epoch:
            self.adopt(grant.map, now_ns)
            changed = True
        self.take_lease(grant)
        self._renew()
        return changed

    def take_lease(self, grant: Grant) -> None:
        """Take what a grant says of the lease; also from another thread, which alone does so then.

        A map that is followed meanwhile takes nothing from a lease: the coordinator waits for it to end, or for a heartbeat
        that names the newer map.
        """
        if grant.incarnation == self.incarnation and grant.lease_ns and grant.epoch == self.map.epoch:
            self.words[LEASE_NS] = max(int(self.words[LEASE_NS]), grant.sent_ns + grant.lease_ns)

    def _renew(self) -> None:
        """Work out until when the peers' promises let this host answer."""
        if not self.map.epoch:
            return
        sharing = self.map.sharing(self.host)
        promised = [self.promise_until_ns[peer] for peer, host in enumerate(self.peers) if host in sharing]
        self.words[PROMISE_NS] = min(promised, default=FOR_EVER_NS)

    # ---- promises -----------------------------------------------------------------------------------------------------

    def ping(self, now_ns: int) -> Ping:
        """Return what to send every other store now."""
        return Ping(self.host, self.cluster, self.incarnation, self.map.epoch, now_ns)

    def pinged(self, now_ns: int, ping: Ping) -> Pong | None:
        """Take a ping; return the answer. Only who follows the same map gets a promise."""
        if ping.host not in self.peers or ping.cluster != self.cluster or not self.map.epoch:
            return None
        if self.map.ended.get(ping.host) == ping.incarnation:
            return None  # it was on its way when its process ended
        peer = self.peers.index(ping.host)
        self.peer_epoch[peer] = max(self.peer_epoch[peer], ping.epoch)
        promise = ping.epoch == self.map.epoch and not self._deferred
        if promise:
            wait_ns = self.timing.lease_ns + self.timing.margin_ns
            self.promised_until_ns[peer] = max(self.promised_until_ns[peer], now_ns + wait_ns)
            self.promised_to[peer] = ping.incarnation
        return Pong(self.host, self.map.epoch, ping.incarnation, ping.sent_ns, promise)

    def ponged(self, pong: Pong) -> None:
        """Take the answer to a ping of this process."""
        if pong.host not in self.peers or pong.incarnation != self.incarnation:
            return
        peer = self.peers.index(pong.host)
        self.peer_epoch[peer] = max(self.peer_epoch[peer], pong.epoch)
        if pong.promise and pong.epoch == self.map.epoch:
            self.promise_until_ns[peer] = max(self.promise_until_ns[peer], pong.sent_ns + self.timing.lease_ns)
            self._renew()

    def may_not_know(self, peer: int, now_ns: int) -> bool:
        """Tell whether a peer may hold a promise of this host and not know the map that this host follows."""
        return now_ns < self.promised_until_ns[peer] and self.peer_epoch[peer] < self.map.epoch

    def advance(self, now_ns: int) -> None:
        """Do what waited for promises to run out. Call it often."""
        if not self._deferred:
            return
        ignorant = self._ignorant(now_ns)
        for partition, group in list(self._deferred.items()):
            if not self._must_wait(partition, group, ignorant):
                del self._deferred[partition]
                self._rule(partition, group)

    def _ignorant(self, now_ns: int) -> list[int]:
        """Return the peers that may hold a promise of this host and not know the map that it follows."""
        return [peer for peer in range(len(self.peers)) if self.may_not_know(peer, now_ns)]

    def _must_wait(self, partition: int, group: Group, ignorant: Sequence[int]) -> bool:
        """Tell whether becoming primary, or going on without a former replica, must wait for `ignorant` peers.

        A former replica that is to join anew is one too: as long as it knows of nothing it answers from what it has.
        """
        if not ignorant:
            return False
        reigns = roles.reign(self.words, partition) == group.reign and roles.rules(roles.role(self.words, partition))
        return not (reigns and all(self._stays(partition, group, peer) for peer in ignorant))

    def _stays(self, partition: int, group: Group, peer: int) -> bool:
        """Tell whether a peer is to a partition what it was before: nothing, or the same replica."""
        host, link = self.peers[peer], self.shipping.links[peer, partition]
        return bool(link[MODE] == OUT or (host in group.replicas() and link[LINK_JOINED] == group.joined[host]))

    def has_lease(self, now_ns: int) -> bool:
        """Tell whether this host may answer."""
        return bool(lease_holds(self.words, now_ns))

    def beat(self, now_ns: int) -> Heartbeat:
        """Return what to tell the coordinator now."""
        synchronised, released = [], []
        has_all, joined = ship.synchronised(self.shipping).tolist(), self.shipping.links[:, :, LINK_JOINED].tolist()
        for partition in self.map.unsettled:
            group = self.map.groups[partition]
            if group.primary != self.host:
                continue
            for host in group.learners:
                peer = self.peers.index(host)
                if has_all[peer][partition] and joined[peer][partition] == group.joined[host]:  # else it has what it had before
                    synchronised.append((partition, host))
            if group.successor and self.is_drained(partition):
                self._drained[partition] = int(roles.reign(self.words, partition))
            if group.successor and self._has_stopped(partition):
                released.append(partition)
        return Heartbeat(self.host, self.cluster, self.incarnation, self.map.epoch, now_ns, tuple(synchronised), tuple(released),
                         tuple(self._unreachable(now_ns)), self._lag())  # fmt: skip

    def teaches(self, beat: Heartbeat) -> bool:
        """Tell whether learners of this host have not got all yet, as of `beat`."""
        learners = (len(self.map.groups[p].learners) for p in self.map.unsettled if self.map.groups[p].primary == self.host)
        return sum(learners) > len(beat.synchronised)

    def _lag(self) -> int:
        """Return how many changes of the partitions that this host rules are not committed."""
        ruled = list(self.map.ruled.get(self.host, ()))
        changed, committed = (
            self.words[int(self.words[at]) :][: self.shipping.done_end.size].astype(np.int64) for at in (CHANGES_AT, COMMITTED_AT)
        )
        return int(np.maximum(changed - committed, 0)[ruled].sum()) if ruled else 0

    def expected(self) -> bool:
        """Tell whether the coordinator waits for what this host, as a primary, has to say of others who learn, or take over."""
        return any(self.map.groups[partition].primary == self.host for partition in self.map.unsettled)

    def is_drained(self, partition: int) -> bool:
        """Tell whether all that this host did as a partition's primary is committed, and it does nothing more."""
        words = self.words
        all_committed = roles.committed(words, partition) >= roles.changes(words, partition)
        return bool(roles.role(words, partition) == RETIRING and all_committed and self._is_shipped(partition))

    def _is_shipped(self, partition: int) -> bool:
        """Tell whether whoever counts has all of a partition, also where nothing waits for that (asynchronous)."""
        if not self.shipping.control[ASYNCHRONOUS]:
            return True
        links, changes = self.shipping.links[:, partition], roles.changes(self.words, partition)
        return all(link[UNDER_WAY] == 0 and link[CHANGES_ACKED] >= changes
                   for link in links if link[MODE] == COUNTED)  # fmt: skip

    def was_stopped(self, now_ns: int) -> None:
        """This process did not run for a while: what peers owe it may be on its way. They get their time anew."""
        owing_ns = self.shipping.links[:, :, OWING_NS]
        owing_ns[owing_ns != 0] = now_ns

    def _unreachable(self, now_ns: int) -> list[str]:
        """Return the peers that owe an acknowledgment for too long."""
        patience_ns = self.timing.unreachable_ns
        before_ns = now_ns - patience_ns, now_ns - LEARNERS_PATIENCE * patience_ns
        return [host for peer, host in enumerate(self.peers) if ship.owes_since(self.shipping, peer, *before_ns)]

    # ---- maps ---------------------------------------------------------------------------------------------------------

    def adopt(self, new: ClusterMap, now_ns: int) -> None:
        """Follow a newer map, as far as promises allow now. Raises NearstateError when it is for another number of partitions."""
        partitions = self.shipping.done_end.size
        if len(new.groups) != partitions:
            raise NearstateError(f"map {new.epoch} has {len(new.groups)} partitions, this table {partitions}")
        old, self.map = self.map, new
        self._release_promises()
        ignorant = self._ignorant(now_ns)
        for partition, group in enumerate(new.groups):
            if old.groups and group == old.groups[partition] and partition not in self._deferred:
                continue
            self._deferred.pop(partition, None)
            if group.primary != self.host:
                self._follow(partition, group, old.groups[partition] if old.groups else group)
            elif not self._must_wait(partition, group, ignorant):
                self._rule(partition, group)
            else:
                self._deferred[partition] = group
                if roles.reign(self.words, partition) < group.reign:
                    self._set_role(partition, NO_ROLE, group.reign)

    def _release_promises(self) -> None:
        """Be bound no longer by promises to processes that the map says have ended."""
        for peer, host in enumerate(self.peers):
            if self.promised_to[peer] and self.map.ended.get(host) == self.promised_to[peer]:
                self.promised_until_ns[peer] = 0

    def _rule(self, partition: int, group: Group) -> None:
        """This host is primary: ship to everybody who counts.

        The role comes last: a network function that sees it lets packets go when COMMITTED says so, of this reign.
        """
        words, shipping = self.words, self.shipping
        if roles.reign(words, partition) > group.reign:
            return  # a later primary has been here: the map that says so is on its way
        fresh = roles.reign(words, partition) != group.reign or not roles.rules(roles.role(words, partition))
        if fresh:
            shipping.claims[partition] = max(int(shipping.followed[partition, EPOCH]), 0), roles.changes(words, partition)
            shipping.followed[partition] = (-1, 0, 0, 0)
            ship.leave_all(shipping, words, partition)
        for peer, host in enumerate(self.peers):
            link = shipping.links[peer, partition]
            if host not in group.replicas():
                if link[MODE] != OUT:
                    ship.starve(shipping, words, peer, partition)
            elif link[MODE] == OUT or link[LINK_JOINED] != group.joined[host]:
                mode = LEARNING if host in group.learners else COUNTED
                has_claim = fresh and mode == COUNTED and shipping.claims[partition, 0] > 0
                ship.feed(shipping, words, peer, partition, mode, group.joined[host], CLAIM if has_claim else IMAGE)
        if fresh:
            ship.recommit(shipping, words, partition)
        if not group.successor:
            self._drained.pop(partition, None)
        self._set_role(partition, RETIRING if group.successor else PRIMARY, group.reign)

    def _follow(self, partition: int, group: Group, before: Group) -> None:
        """This host is a backup, is learning, or has nothing to do with the partition. before: the group until now."""
        words, followed = self.words, self.shipping.followed[partition]
        ruled, reign = roles.rules(roles.role(words, partition)), int(roles.reign(words, partition))
        has_handed_over = ruled and self._has_handed_over(partition, group, before)
        joined = group.joined[self.host] if self.host in group.members + group.learners else 0
        if has_handed_over:  # written down before the role, see `nfs/dataplane/held.py`
            words[int(words[ENDED_AT]) + partition] = reign
        anew = ruled or followed[JOINED] != joined
        standing = (MEMBER if self.host in group.members else 0) | int(followed[STANDING]) & COUNTS
        if anew or joined == 0 or reign != group.reign or followed[EPOCH] == -1:
            self._set_role(partition, NO_ROLE, max(group.reign, reign))
        elif standing == MEMBER | COUNTS and followed[EPOCH] == reign:
            self._set_role(partition, BACKUP, reign)
        if ruled:  # after the role: a network function must not take for committed what nobody waits for any more
            ship.leave_all(self.shipping, words, partition)
        followed[STANDING] = standing
        if anew:
            followed[:] = (reign if has_handed_over else -1, 0, joined, standing & MEMBER)

    def _has_handed_over(self, partition: int, group: Group, before: Group) -> bool:
        """Tell whether the successor rules because this host said that all it had done is committed.

        Whose lease was over is taken out of the group, or joins it anew: then others may have ruled before this host stopped.
        """
        stays = self.host in group.members and group.joined[self.host] == before.joined.get(self.host)
        return stays and group.primary == before.successor and self._has_stopped(partition)

    def _has_stopped(self, partition: int) -> bool:
        """Tell whether this host said in its present reign that it changes nothing of a partition any more."""
        return self._drained.get(partition) == int(roles.reign(self.words, partition))

    def _set_role(self, partition: int, role: int, reign: int) -> None:
        status = locking.set_role(self.words, self.owner, partition, role, reign)
        if status != OK:
            raise NearstateError(f"partition {partition}: {NAMES[status]}, its role cannot be changed")


def warm() -> None:
    """Load what Python calls of compiled code when maps change: a backup joins, learns, leaves, and the primary hands over.

    Loaded by each store process instead, it took 60 ms of the first map's 80 ms lease, and hosts were replaced for it.
    """
    table = Table.anonymous("nearstate-warm", 64, 8, 1, epoch=0, cluster=1, clients=1, window=1, replication_secret=1)
    shipping = make_shipping(table.words, 1, np.zeros(1, np.uint8))
    replica = Replica("here", ["there"], table.words, shipping, table.register_owner(), 1, 1)
    here, both = ("here",), ("here", "there")
    for epoch, group in enumerate([
        Group(both, 1, joined=dict.fromkeys(both, 1)),
        Group(here, 1, ("there",), joined={"here": 1, "there": 2}),
        Group(here, 1, joined={"here": 1}),
        Group(both, 1, successor="there", joined={"here": 1, "there": 4}),
        Group(both[::-1], 5, joined={"here": 1, "there": 4}),
    ], 1):  # fmt: skip
        replica.adopt(ClusterMap(epoch, (group,)), 0)
        replica.beat(0)
    ship.lose(shipping, 0, 0, 0)
    table.close()
