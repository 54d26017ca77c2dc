"""Where are packets steered, and how does a partition change hosts without a packet lost or overtaken?

Pure, like the coordinator beside which it runs. Packets of a partition are steered to the instance of a network function; where
the stores are on those instances' hosts (*aligned*), that is the host of the partition's primary. A move then takes these steps,
each begun when the one before is known to be done, the two in a line side by side (S. Gember-Jacobson et al.: OpenNF, SIGCOMM
2014, loss-free and order-preserving):

    learn     the target gets a full copy                                                  `coordinator.py`
    park      the target's instance keeps what comes of the partition
    steer     the switch sends its packets there
    drain     the switch says that none go the old way any more,  | hand over   the source retires, the target is primary
              and all other instances that none come or wait      |             `coordinator.py`
    go        the target's instance goes on with what it kept

So each packet is processed by one instance, and those of the source before those of the target. What comes the old way after the
state has gone waits at the source for the new map, and is then processed there on the state at the target: any instance can
process any packet. That is why nobody waits for the two one after the other. An instance that is silent for a
lease, or one of whose links the switch sees down for two heartbeats, is dead: its packets go to another one at once, and its
host's partitions move after them.

A failover takes the same way from `park` on where the instance that had the packets lives (its store process alone is gone):
that instance drops what waits for commits of its store, and asks the new primary for the rest, in order.

A move that breaks off when the switch sends packets to the target already (the target's store is gone) turns back. First what had
come the old way goes: the target keeps what it parked until the others are drained. Then packets follow to the primary.

A coordinator that goes on after another one knows of moves only that they were asked for. So it changes nothing before the switch
has said what it does, and the instances of a partition what they park; then it takes the way from where it was left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datastore.base.errors import NearstateError, unknown
from datastore.coordination.coordinator import Coordinator, Failover
from datastore.coordination.heartbeats import Timing
from datastore.security.strict import LARGEST_EPOCH, LARGEST_TIME, members, whole

BATCH = 128
"""Moves between `park` and `go` at a time: a parked packet waits until its whole batch has been steered and drained.

What a batch waits for (a command to the switch, its second look at every flow, an answer of each packet loop) takes as long for
one partition as for many: half of 256 partitions moved in 42 ms in one batch, in 130 ms in four, and no packet waited longer.
"""

LINK_HEARTBEATS = 2
"""So many heartbeats a link may be down. That it is down is known, unlike why a host is silent: this spares what flaps."""
UNHEARD_SPANS = 8
"""For so many leases with their margins a coordinator that went on after another one waits for instances that it never heard.
They leave a silent coordinator after five leases, and must find this one."""


@dataclass
class Instance:
    """What is known of an NF process: when it was heard, the map it follows, what it parks, what it says is drained."""

    heard_ns: int = 0
    cut_ns: int = 0
    """Since when one of its links is down; 0: none is."""
    number: int = 0
    """Which process of its host it is."""
    ended: int = 0
    """The process that the store of its host saw end."""
    has_ended: bool = False
    """Its process is gone for certain."""
    store_ended: int = 0
    """The incarnation of the store process whose table it works on, once that process has ended; 0: it has not."""

    def may_work_on(self, incarnation: int) -> bool:
        """Tell whether the instance may work on the table of a store process of its host."""
        return not self.has_ended and self.store_ended in (0, incarnation)

    epoch: int = 0
    parked: frozenset[int] = frozenset()
    quiet: frozenset[int] = frozenset()


@dataclass
class Switchover:
    """steering: the instance wanted for each partition; confirmed: what the switch does. aligned: see the module's text."""

    steering: list[str]
    aligned: bool
    instances: dict[str, Instance]
    confirmed: list[str] = field(default_factory=list)
    under_way: dict[int, str] = field(default_factory=dict)
    following: dict[int, str] = field(default_factory=dict)
    """Partitions that have failed over to another host while the instance that had their packets lives: where they are to go."""
    draining: dict[int, str] = field(default_factory=dict)
    """Partitions of moves that broke off when their packets went to the target already: the target, which keeps them until what
    had come the old way is gone."""
    watched: dict[int, int] = field(default_factory=dict)
    """Partitions whose packets go to their new place: since when."""
    settled_ns: int = 0
    """Packets of partitions that are watched since before do not go the old way any more."""
    _planned: tuple[int, frozenset[str], frozenset[str], frozenset[str]] = (0, frozenset(), frozenset(), frozenset())
    """The map, dead instances, stores that are there, and unknown instances, for which the last plan was made."""
    _began_ns: int = 0
    _has_resumed: bool = False
    """Whether instances were there before this coordinator: one that does not report to it is dead, too."""
    is_blind: bool = False
    """Whether the switch was told by another coordinator, and has not said yet what it does."""
    _unknown: set[str] = field(default_factory=set)
    """The instances that may be there and were not heard when the last plan was made."""

    @classmethod
    def of(cls, instances: list[str], steering: list[str], aligned: bool) -> Switchover:
        """Return the state at the start, when the switch does as `steering` says."""
        return cls(list(steering), aligned, {name: Instance() for name in instances}, list(steering))

    def take_charge(self, coordinator: Coordinator) -> None:
        """Let no move go on, from now on, before its packets can."""
        if self.aligned:
            coordinator.may_hand_over, coordinator.may_end = set(), set()

    def resume(self, coordinator: Coordinator) -> None:
        """Go on after an earlier coordinator. Until `learn`, packets are taken to go to the primaries."""
        self._has_resumed = self.is_blind = True
        self._unknown = set(self.instances)
        self.confirmed = [""] * len(self.steering)  # until the switch has said what it does
        for partition, group in enumerate(coordinator.map.groups):
            if self.aligned and group.primary in self.instances:
                self.steering[partition] = group.primary

    def learn(self, found: list[str]) -> None:
        """Take what the switch does, as an earlier coordinator told it."""
        self.is_blind = False
        for partition, name in enumerate(found[: len(self.steering)]):
            if self.aligned and name in self.instances:
                self.steering[partition] = name

    def hear(self, now_ns: int, report: dict[str, Any]) -> str | None:
        """Take what an instance says of itself (`nfs/dataplane/process.py`) and return its name; None: these are its last words.

        Raises NearstateError for an unknown instance, ValueError for a report that is none.
        """
        name = str(report["host"])
        if name not in self.instances:
            raise unknown("instance", name, self.instances)
        instance, number = self.instances[name], whole(report.get("number", 0), LARGEST_TIME)
        if number and number == instance.ended:
            return None
        epoch, most = whole(report["epoch"], LARGEST_EPOCH), len(self.steering)
        parked, quiet = (frozenset(whole(partition, most - 1) for partition in members(report[kind], most))
                         for kind in ("parked", "quiet"))  # fmt: skip
        instance.heard_ns, instance.epoch, instance.number, instance.has_ended = now_ns, epoch, number, False
        instance.parked, instance.quiet = parked, quiet & self.watched.keys()
        instance.store_ended = whole(report.get("store_ended", 0), LARGEST_TIME)
        return name

    def end(self, host: str, number: int) -> None:
        """Take that the store of a host saw its NF process `number` end."""
        instance = self.instances.get(host)
        if instance:
            instance.ended = number
            instance.has_ended |= instance.number == number

    def see(self, now_ns: int, down: frozenset[str], settled_ns: int) -> None:
        """Take from the switch which instances have a link that is down, and by when what was confirmed has come true."""
        self.settled_ns = settled_ns
        for name, instance in self.instances.items():
            instance.cut_ns = (instance.cut_ns or now_ns) if name in down else 0

    def dead(self, now_ns: int, timing: Timing) -> set[str]:
        """Return the instances that ended, were heard once and then not for a lease and its margin, or had a link down for longer
        than one that is set up anew."""
        span_ns = timing.lease_ns + timing.margin_ns
        since, cut_since = now_ns - span_ns, now_ns - LINK_HEARTBEATS * timing.heartbeat_ns
        missed = self._has_resumed and self._began_ns and now_ns - self._began_ns > UNHEARD_SPANS * span_ns
        return {name for name, instance in self.instances.items()
                if instance.has_ended or 0 < instance.heard_ns <= since or 0 < instance.cut_ns <= cut_since
                or (missed and not instance.heard_ns)}  # fmt: skip

    def _why_dead(self, name: str) -> str:
        instance = self.instances[name]
        return "instance ended" if instance.has_ended else "link down" if instance.cut_ns else "instance silent"

    def next_lapse_ns(self, now_ns: int, timing: Timing) -> int:
        """Return when the next instance will be dead, if nothing is heard of it; a heartbeat from now if that is earlier."""
        span_ns, cut_span_ns = timing.lease_ns + timing.margin_ns, LINK_HEARTBEATS * timing.heartbeat_ns
        due = [at_ns for instance in self.instances.values()
               for at_ns in (instance.heard_ns + span_ns, instance.cut_ns + cut_span_ns)]  # fmt: skip
        return min([now_ns + timing.heartbeat_ns, *(at_ns for at_ns in due if at_ns > now_ns)])

    def plan(self, now_ns: int, coordinator: Coordinator) -> None:
        """Bring every move one step further and work out the steering; tells the coordinator which primaries may hand over."""
        self._began_ns = self._began_ns or now_ns
        dead = self.dead(now_ns, coordinator.timing)
        if now_ns < coordinator.judges_ns:
            dead &= self._planned[1] | {name for name in dead if self.instances[name].has_ended}
        coordinator.failovers.extend(Failover(now_ns, name, self._why_dead(name)) for name in sorted(dead - self._planned[1]))
        stores = frozenset(name for name in coordinator.alive(now_ns) if name not in dead or self._outlived(name, coordinator))
        unknown = self._unheard(now_ns, coordinator.timing)
        planned = (coordinator.map.epoch, frozenset(dead), stores, frozenset(unknown))
        busy = coordinator.moves or self.under_way or self.following or self.draining
        if planned == self._planned and not busy:
            return
        everything, before = planned != self._planned, self.under_way.keys() | self.draining
        self._planned = planned
        if self.aligned:
            self._end(coordinator, dead)
            if everything:
                self._find_followers(coordinator, dead, unknown)
            self._begin(coordinator, dead)
        for partition in range(len(coordinator.map.groups)) if everything else sorted(before | self.under_way.keys()):
            group, here = coordinator.map.groups[partition], self.steering[partition]
            if partition in self.under_way:
                target = self.under_way[partition]
                wanted = target if partition in self.instances[target].parked else here
            elif (
                partition in self.following
                or partition in self.draining
                or self._may_be_under_way(partition, coordinator, unknown)
            ):
                wanted = here  # until it is under way
            else:
                wanted = group.primary if self.aligned and group.primary in self.instances else here
            if not self.aligned or any(member in stores for member in group.members):  # else nobody could serve them better
                self.steering[partition] = self._living(partition, str(wanted), group.members, dead)
        if self.aligned:
            self._watch(now_ns)
            self._follow_packets(coordinator, dead)
            followed = [p for p in self.following if self._has_followed(p, self.following[p], coordinator, dead, unknown)]
            for partition in followed:
                for those in (self.following, self.under_way, self.watched):
                    those.pop(partition, None)
            coordinator.may_hand_over = {p for p in coordinator.moves if self._may_hand_over(p, coordinator, dead, unknown)}
            coordinator.may_end = {p for p, target in coordinator.moves.items()
                                   if self._has_followed(p, target, coordinator, dead, unknown)}  # fmt: skip
        self._unknown = unknown

    def _unheard(self, now_ns: int, timing: Timing) -> set[str]:
        """Return the instances that may be there and were not heard yet, since this coordinator has only begun.

        While the switch has not said what it does, none is known: to which partitions an instance matters depends on it.
        """
        spans = UNHEARD_SPANS if self._has_resumed else 1
        is_young = now_ns < self._began_ns + spans * (timing.lease_ns + timing.margin_ns)
        return {name for name, instance in self.instances.items() if self.is_blind or (is_young and not instance.heard_ns)}

    def _may_be_under_way(self, partition: int, coordinator: Coordinator, unknown: set[str]) -> bool:
        """Tell whether an earlier coordinator may have had a partition's packets on their way."""
        here, primary = self.steering[partition], coordinator.map.groups[partition].primary
        return self._has_resumed and (bool(unknown & {here, str(primary)}) or coordinator.moves.get(partition) == here)

    def _outlived(self, name: str, coordinator: Coordinator) -> bool:
        """Tell whether the store of a dead instance's host is there without it.

        When the host is cut off both fall silent, the one up to a heartbeat after the other: then the store is not there, and
        packets stay with the only copy.
        """
        instance, span_ns = self.instances[name], 2 * coordinator.timing.heartbeat_ns
        return instance.has_ended or instance.cut_ns > 0 or coordinator.hosts[name].heard_ns - instance.heard_ns > span_ns

    def _living(self, partition: int, wanted: str, members: tuple[str, ...], dead: set[str]) -> str:
        """Return `wanted`, or in place of a dead instance another one: the one that has the packets now, if it lives, so that
        none are overtaken; else if possible one where a copy of the state is."""
        if wanted not in dead:
            return wanted
        if self._speaks(self.steering[partition], dead):
            return self.steering[partition]
        alive = [name for name, instance in self.instances.items() if name not in dead and instance.heard_ns]
        near = [name for name in members if name in alive]
        return near[0] if near else alive[partition % len(alive)] if alive else wanted

    def _speaks(self, name: str | None, dead: set[str]) -> bool:
        """Tell whether there is an instance of this name that can be asked to park or drain."""
        return name in self.instances and name not in dead and self.instances[name].heard_ns > 0

    def _end(self, coordinator: Coordinator, dead: set[str]) -> None:
        """Give up what cannot come to its end."""
        groups = coordinator.map.groups
        for partition, target in list(self.following.items()):
            if groups[partition].primary != target or target in dead:
                del self.following[partition]
        wanted = coordinator.moves | self.following
        for partition, target in list(self.under_way.items()):
            if wanted.get(partition) != target or target in dead or target not in groups[partition].members:
                del self.under_way[partition]
                if self.steering[partition] == target != groups[partition].primary:
                    self.draining[partition] = target
        for partition, target in list(self.draining.items()):
            others = [name for name in self.instances if name != target and self._speaks(name, dead)]
            if not self._speaks(target, dead) or self._is_drained(partition, others):
                del self.draining[partition]
        for target in dead & set(coordinator.moves.values()):
            coordinator.give_up(target)

    def _find_followers(self, coordinator: Coordinator, dead: set[str], unknown: set[str]) -> None:
        """Let packets follow a partition that has failed over as they follow a move, where the instance that has them lives: it
        holds some, and packets that the switch sends elsewhere at once would overtake them.

        After another coordinator they may have followed already, up to the target, which parks them until the others are drained;
        a move away from there begins after that.
        """
        for partition, group in enumerate(coordinator.map.groups):
            source, target = self.steering[partition], group.primary
            if target is None or partition in self.under_way or unknown & {source, target}:
                continue
            moves_on = coordinator.moves.get(partition) == source and source in group.members
            is_elsewhere = source != target and not moves_on
            is_parked = target in self._unknown and coordinator.moves.get(partition) != target and (
                partition in self.instances[target].parked)  # fmt: skip
            if (is_elsewhere or is_parked) and self._speaks(source, dead) and self._speaks(target, dead):
                self.following[partition] = target

    def _begin(self, coordinator: Coordinator, dead: set[str]) -> None:
        groups = coordinator.map.groups
        for partition, target in (coordinator.moves | self.following).items():
            if len(self.under_way) >= BATCH:
                return
            if self._speaks(target, dead) and target in groups[partition].members and partition not in self.draining:
                self.under_way.setdefault(partition, target)

    def _watch(self, now_ns: int) -> None:
        """Watch the partitions whose packets go to their new place: what others said of them before does not count."""
        self.watched = {p: self.watched.get(p, now_ns) for p, target in self._turning().items() if self.confirmed[p] == target}
        for instance in self.instances.values():
            instance.quiet &= self.watched.keys()

    def _turning(self) -> dict[int, str]:
        """Return the partitions whose packets are on their way to another instance, with that."""
        return self.under_way | self.draining

    def unsettled(self) -> bool:
        """Tell whether anybody waits for packets to go their new way."""
        return any(since >= self.settled_ns for since in self.watched.values())

    def _may_hand_over(self, partition: int, coordinator: Coordinator, dead: set[str], unknown: set[str]) -> bool:
        """Tell whether a partition's primary may retire: its packets go to the next one, and wait there.

        unknown: instances that were not heard yet and may be there, since this coordinator has only begun.
        """
        source, target = coordinator.map.groups[partition].primary, coordinator.moves[partition]
        if unknown & {source, target} or partition in self.following:
            return False
        if not source or not self._speaks(source, dead) or not self._speaks(target, dead):
            return True
        return partition in self.watched

    def _has_followed(self, partition: int, target: str, coordinator: Coordinator, dead: set[str], unknown: set[str]) -> bool:
        """Tell whether state and packets of a partition are where they were to go: nothing of it comes or waits elsewhere.

        An instance whose host's store is gone is waited for, too: it drops what it holds and asks others for what it parked.
        """
        if coordinator.map.groups[partition].primary != target or target in unknown:
            return False
        if not self._speaks(target, dead):
            return True
        others = [name for name in self.instances
                  if name != target and (name in unknown or self._speaks(name, dead))]  # fmt: skip
        return partition in self.under_way and (not others or self._is_drained(partition, others))

    def _is_drained(self, partition: int, others: list[str]) -> bool:
        """Tell whether no packet of a partition goes to any of these instances, or is there."""
        return self._is_settled(partition) and all(partition in self.instances[name].quiet for name in others)

    def _is_settled(self, partition: int) -> bool:
        """Tell whether the switch sends no packet of a partition to its old place any more."""
        return partition in self.watched and self.watched[partition] < self.settled_ns

    def _follow_packets(self, coordinator: Coordinator, dead: set[str]) -> None:
        """Move the partitions of stores whose instance is dead to where their packets went."""
        if not dead:
            return
        for partition, group in enumerate(coordinator.map.groups):
            target = self.steering[partition]
            if group.primary in dead and target in group.members[1:] and partition not in coordinator.moves:
                coordinator.move([partition], target)

    def orders(self, name: str, coordinator: Coordinator) -> dict[str, Any]:
        """Return what an instance is to do."""
        ended = coordinator.may_end or ()
        turning = self._turning()
        park = {p for p, target in turning.items() if target == name and p not in ended}
        if name in self._unknown:  # it goes on with what an earlier coordinator ordered until a plan knows of that
            park |= self.instances[name].parked
        watch = [p for p in self.watched if turning[p] != name and self._is_settled(p) and p not in ended]
        newest = coordinator.map if self.instances[name].epoch != coordinator.map.epoch else None
        return {"map": newest.to_json() if newest else None, "park": sorted(park), "watch": sorted(watch)}


def check_steering(steering: list[str], instances: list[str], partitions: int) -> None:
    """Raise NearstateError unless `steering` names an instance for each partition."""
    if len(steering) != partitions:
        raise NearstateError(f"steering of {len(steering)} partitions: the map has {partitions}")
    for name in steering:
        if name not in instances:
            raise unknown("instance", name, instances)
