"""Who is primary, who is backup, who may answer, and what happens when a host is gone?

Pure: it is told the time and what arrived, and returns what to send. Nothing it decides is sent before the state it decided on
is saved (`dirty`, then `save`): after a crash it goes on from there, and since it then knows of no lease it grants nothing new
for as long as an old one could last.

Leases. A host may answer until its lease runs out, counted on its own clock from when it *asked*; the coordinator counts from
when it *granted*, and adds a margin for clocks that drift. So the host is always the first to think that it is over.
(C. Gray, D. Cheriton: Leases, SOSP 1989.)

Whatever takes a right away from a host happens in two steps:

    revoke   the new map says so; the host hears of it, and says so with its next heartbeat, or its lease runs out
    act      only then does a map give the right to somebody else

    failure   the lease of a primary ran out        -> the next member is primary, alone or with the rest (one map)
    removal   a backup's lease ran out, or its       -> it is `leaving`; heard or run out -> it is gone
              primary cannot reach it
    filling   too few members                        -> a learner; its primary says it has all -> it is a member
    move      a command                              -> target learns, is a member; the primary hands over: `successor`;
                                                        it has stopped -> the target is primary; packets have followed
                                                        (`switchover.py`) -> the old one leaves
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from datastore.base.errors import NearstateError, unknown
from datastore.coordination.heartbeats import MILLISECOND_NS, Grant, Heartbeat, Timing
from datastore.coordination.maps import ClusterMap, Group

LOG_LINES = 100
GATHER_NS = 25 * MILLISECOND_NS
"""So often at most some of a primary's learners become members before the others."""


@dataclass
class HostState:
    """What the coordinator knows of a host. granted_until_ns: on its own clock, margin included. lag: as in its heartbeat. rival:
    another process of its name, that asked since `rival_since_ns`, and last at `rival_ns` while this one was still there."""

    granted_until_ns: int
    incarnation: int = 0
    epoch: int = 0
    heard_ns: int = 0
    lag: int = 0
    rival: int = 0
    rival_since_ns: int = 0
    rival_ns: int = 0


@dataclass(frozen=True)
class Failover:
    """That a host was given up, and why: "silent" or "ended" (its store process), "unreachable" for the primary `by`; "instance
    silent", "instance ended" or "link down" (its NF process, `switchover.py`)."""

    at_ns: int
    host: str
    why: str
    by: str = ""


@dataclass
class Coordinator:
    """The decisions. hosts: who may have a store. replicas: how many members each group should have."""

    map: ClusterMap
    cluster: int
    replicas: int
    hosts: dict[str, HostState]
    timing: Timing = field(default_factory=Timing)
    moves: dict[int, str] = field(default_factory=dict)
    suspects: dict[tuple[str, str], int] = field(default_factory=dict)
    dirty: bool = False
    log: list[str] = field(default_factory=list)
    failovers: list[Failover] = field(default_factory=list)
    given_up: set[str] = field(default_factory=set)
    """The hosts with a failover since they were heard last: one host that is lost is one, whoever misses it."""
    judges_ns: int = 0
    """Before that nobody is taken for dead, see `was_stopped`."""
    _promoted_ns: int = 0
    may_hand_over: set[int] | None = None
    """The moves whose primary may retire (`switchover.py`); None: all."""
    may_end: set[int] | None = None
    """The moves whose packets have followed, or need not; None: all."""

    @classmethod
    def start(cls, document: dict[str, Any], now_ns: int, timing: Timing | None = None) -> Coordinator:
        """Begin, or go on after a crash, from what `save` returned."""
        timing = timing or Timing()
        until = now_ns + timing.lease_ns + timing.margin_ns
        hosts = {name: HostState(until, int(state["incarnation"]))
                 for name, state in document["hosts"].items()}  # fmt: skip
        moves = {int(partition): str(target) for partition, target in document["moves"].items()}
        return cls(ClusterMap.from_json(document["map"]), document["cluster"], document["replicas"], hosts, timing, moves)

    def save(self) -> dict[str, Any]:
        """Return all that must outlive a crash, as a JSON object."""
        return {"map": self.map.to_json(), "cluster": self.cluster, "replicas": self.replicas,
                "moves": {str(partition): target for partition, target in self.moves.items()},
                "hosts": {name: {"incarnation": state.incarnation}
                          for name, state in self.hosts.items()}}  # fmt: skip

    def restore(self, document: dict[str, Any]) -> None:
        """Take back what was decided since `save` returned `document`: it could not be saved."""
        self.map = ClusterMap.from_json(document["map"])
        self.moves = {int(partition): str(target) for partition, target in document["moves"].items()}
        for name, state in document["hosts"].items():
            self.hosts[name].incarnation = int(state["incarnation"])
        self.dirty = False

    # ---- what arrives -------------------------------------------------------------------------------------------------

    def hear(self, now_ns: int, beat: Heartbeat) -> Grant:
        """Take a heartbeat; return the answer, to be sent once `dirty` state is saved."""
        refusal = self._refusal(beat)
        if refusal:
            return Grant(beat.incarnation, beat.sent_ns, 0, self.map.epoch, None, refusal)
        state = self.hosts[beat.host]
        if state.incarnation != beat.incarnation and not self._admit(now_ns, beat):
            return Grant(beat.incarnation, beat.sent_ns, 0, self.map.epoch, None, self._too_early(now_ns, beat))
        state.epoch, state.heard_ns, state.lag = max(state.epoch, beat.epoch), now_ns, beat.lag
        if beat.host in self.given_up and any(beat.host in group.members for group in self.map.groups):
            self.given_up.discard(beat.host)  # it is a member again
        self._listen(now_ns, beat)
        self._go_on(now_ns)
        if beat.epoch == self.map.epoch:
            state.granted_until_ns = max(state.granted_until_ns, now_ns + self.timing.lease_ns + self.timing.margin_ns)
            return Grant(beat.incarnation, beat.sent_ns, self.timing.lease_ns, self.map.epoch)
        return Grant(beat.incarnation, beat.sent_ns, 0, self.map.epoch, self.map)

    def renew(self, now_ns: int, beat: Heartbeat, epoch: int) -> Grant | None:
        """Return a lease for the map of `epoch`, which all were told, while the next one is being saved; None: not for this one.

        Only a host that has a lease is given more of it. It acts by that map until the lease is over, and `granted_until_ns` says
        when that is: no right is taken from it before. The rest of the heartbeat is heard later.
        """
        state = self.hosts.get(beat.host)
        if state is None or (beat.cluster, beat.incarnation, beat.epoch) != (self.cluster, state.incarnation, epoch):
            return None
        if now_ns >= state.granted_until_ns or self._has_ended(beat.host):
            return None
        state.granted_until_ns = max(state.granted_until_ns, now_ns + self.timing.lease_ns + self.timing.margin_ns)
        return Grant(beat.incarnation, beat.sent_ns, self.timing.lease_ns, epoch)

    def news(self, host: str) -> Grant:
        """Return the newest map, to be sent to a host when there is one, without waiting for its heartbeat."""
        return Grant(self.hosts[host].incarnation, 0, 0, self.map.epoch, self.map)

    def _refusal(self, beat: Heartbeat) -> str:
        if beat.cluster != self.cluster:
            return f"{beat.host} belongs to cluster {beat.cluster:x}, this is the coordinator of {self.cluster:x}"
        if beat.host not in self.hosts:
            return f"{beat.host} is no host of this cluster: {', '.join(self.hosts)} are"
        if beat.incarnation == self.map.ended.get(beat.host):
            return f"this process of {beat.host} is known to have ended: start the store process anew"
        if beat.epoch > self.map.epoch:
            return f"{beat.host} follows map {beat.epoch}, the coordinator's is {self.map.epoch}: it has lost its state"
        return ""

    def _admit(self, now_ns: int, beat: Heartbeat) -> bool:
        """Take in a host that began anew, empty. What it held is lost; nobody acts on that before its old lease is over."""
        state = self.hosts[beat.host]
        if state.incarnation and now_ns < state.granted_until_ns:
            return False
        if state.incarnation:
            self._bury(beat.host)
        state.incarnation, state.epoch = beat.incarnation, 0
        self.dirty = True
        self._note(f"{beat.host} joins")
        return True

    def _too_early(self, now_ns: int, beat: Heartbeat) -> str:
        """Say why a process is not taken for its host: another one has a lease, and may be dead, or not."""
        state = self.hosts[beat.host]
        if state.rival != beat.incarnation:
            state.rival, state.rival_since_ns = beat.incarnation, now_ns
        if state.heard_ns <= state.rival_since_ns + 2 * self.timing.heartbeat_ns:
            return f"{beat.host} restarted: waiting for its old lease to end"
        if state.rival_ns < state.rival_since_ns:
            self._note(f"two processes call themselves {beat.host}: the later one is refused")
        state.rival_ns = now_ns
        return f"two processes call themselves {beat.host}: the later one is refused; give each host its own name"

    def _bury(self, host: str) -> None:
        """The copies of `host` are gone, and it has no rights any more."""
        groups: dict[int, Group] = {}
        for partition, group in enumerate(self.map.groups):
            if host in group.replicas():
                groups[partition] = self._without(group, host)
        self._new_map(groups)

    def _listen(self, now_ns: int, beat: Heartbeat) -> None:
        """Act on what a primary says of its partitions."""
        if beat.epoch != self.map.epoch:
            return  # it speaks of groups as they were
        groups: dict[int, Group] = {}
        handed_over: dict[int, Group] = {}
        for partition, host in self._due_members(now_ns, beat):
            group = groups.get(partition) or self.map.groups[partition]
            if group.primary == beat.host and host in group.learners:
                self._let_lapse_first(now_ns, group, host)
                learners = tuple(learner for learner in group.learners if learner != host)
                groups[partition] = replace(group, members=(*group.members, host), learners=learners)
        for partition in beat.released:
            group = groups.get(partition) or self.map.groups[partition]
            if group.primary == beat.host and group.successor in group.members:
                if id(group) not in handed_over:  # partitions with one group before have one after
                    handed_over[id(group)] = self._handed_over(group)
                groups[partition] = handed_over[id(group)]
        for host in beat.unreachable:
            for partition in self.map.ruled.get(beat.host, ()):
                group = groups.get(partition) or self.map.groups[partition]
                if group.primary == beat.host and host in group.members + group.learners and host != beat.host:
                    groups[partition] = self._leave(group, host)
                    self._give_up(now_ns, host, "unreachable", beat.host)
                    self.suspects[beat.host, host] = now_ns + self.timing.suspect_ns
        self._new_map(groups)

    def _due_members(self, now_ns: int, beat: Heartbeat) -> tuple[tuple[int, str], ...]:
        """Return the learners of a primary that are to be members now: when all have their copies, or many of them may.

        Every map costs each host some milliseconds. One for every four copies made a move of 128 partitions with one copy take
        90 maps, and kept two cores from the packets meanwhile.
        """
        learners = (self.map.groups[p].learners for p in self.map.unsettled if self.map.groups[p].primary == beat.host)
        if len(beat.synchronised) < sum(map(len, learners)) and now_ns - self._promoted_ns < GATHER_NS:
            return ()
        self._promoted_ns = now_ns if beat.synchronised else self._promoted_ns
        return beat.synchronised

    def _let_lapse_first(self, now_ns: int, group: Group, member: str) -> None:
        """Before `member` counts: whoever does not know that it is a replica may still answer by promises of those that are.

        The new one gave none, and would not wait for them. They gave their last before they heard of it, so before now.
        """
        for other in group.replicas():
            state = self.hosts[other]
            if state.epoch < group.joined[member]:
                state.granted_until_ns = max(state.granted_until_ns, now_ns + self.timing.lease_ns + self.timing.margin_ns)

    def _handed_over(self, group: Group) -> Group:
        """The primary has stopped: its successor reigns from the next epoch on, and it stays a member."""
        assert group.successor
        members = (group.successor, *(host for host in group.members if host != group.successor))
        return replace(group, members=members, successor=None, reign=self.map.epoch + 1)

    @staticmethod
    def _leave(group: Group, host: str) -> Group:
        """`host` is to be no replica any more: first it must know."""
        return replace(
            group,
            members=tuple(member for member in group.members if member != host),
            learners=tuple(learner for learner in group.learners if learner != host),
            leaving=tuple(dict.fromkeys((*group.leaving, host))),
            successor=None if group.successor == host else group.successor,
        )

    def _without(self, group: Group, host: str) -> Group:
        """The group without a host that has no rights any more; if it was primary, the next member is."""
        members = tuple(member for member in group.members if member != host)
        was_primary = group.primary == host
        rest = Group(
            members,
            self.map.epoch + 1 if was_primary else group.reign,
            tuple(learner for learner in group.learners if learner != host and not (was_primary and not members)),
            tuple(other for other in group.leaving if other != host),
            None if was_primary or group.successor == host else group.successor,
            {name: epoch for name, epoch in group.joined.items() if name != host},
        )
        return self._pruned(rest)

    @staticmethod
    def _pruned(group: Group) -> Group:
        return replace(group, joined={host: epoch for host, epoch in group.joined.items() if host in group.replicas()})

    # ---- what time brings ---------------------------------------------------------------------------------------------

    def advance(self, now_ns: int) -> None:
        """Do what is due: failures, removals that are known, moves, fillings. Call it often, when all that arrived is heard."""
        self._fail(now_ns)
        self._go_on(now_ns)

    def _go_on(self, now_ns: int) -> None:
        self._finish_leaving(now_ns)
        self._move(now_ns)
        self._fill(now_ns)

    def next_lapse_ns(self, now_ns: int) -> int:
        """Return when the next lease will be over, if nobody asks for a new one; a heartbeat from now if that is earlier."""
        due = [self.judges_ns, *(max(state.granted_until_ns, state.heard_ns + self.timing.lease_ns)
                                 for state in self.hosts.values())]  # fmt: skip
        return min([now_ns + self.timing.heartbeat_ns, *(at_ns for at_ns in due if at_ns > now_ns)])

    def was_stopped(self, now_ns: int) -> None:
        """This process did not run for a while, nor did the machine perhaps, with hosts that have not spoken since. They get
        two heartbeats to do so before they are judged.

        (A. Dadgar, J. Phillips, J. Currey: Lifeguard: Local health awareness for more accurate failure detection, 2018.)
        """
        self.judges_ns = now_ns + 2 * self.timing.heartbeat_ns

    def alive(self, now_ns: int) -> list[str]:
        """Return the hosts that are there: heard of within a lease and its margin, and not failed.

        A host that `_fail` takes out of its groups must not be given to them again by the same look at the clock.
        """
        span = self.timing.lease_ns + self.timing.margin_ns
        return [name for name, state in self.hosts.items()
                if state.incarnation and state.heard_ns and now_ns - state.heard_ns < span
                and not self._is_gone(name, now_ns)]  # fmt: skip

    def _is_gone(self, host: str, now_ns: int) -> bool:
        """Tell whether groups go on without a host: its store process has ended, or its lease is over and it is silent."""
        lapsed = self._lapsed(host, now_ns) and self._silent(host, now_ns)
        return bool(self.hosts[host].incarnation) and (self._has_ended(host) or lapsed)

    def _lapsed(self, host: str, now_ns: int) -> bool:
        state = self.hosts.get(host)
        return state is None or now_ns >= state.granted_until_ns

    def end(self, now_ns: int, host: str, incarnation: int) -> None:
        """Take that a host's store process has ended, and that nothing on the host acts by its lease any more.

        Requires proof: the kernel closed its connection, and an NF process that works on the same table says so too, or is gone.
        The map stays what it is but for this; what `_fail` makes of it is the next one. After a crash before that is saved, the
        lease runs out.
        """
        state = self.hosts.get(host)
        if state is None or state.incarnation != incarnation or self._has_ended(host):
            return
        self.map = replace(self.map, ended={**self.map.ended, host: incarnation})
        state.granted_until_ns = now_ns
        self._note(f"the store process of {host} has ended")

    def _give_up(self, now_ns: int, host: str, why: str, by: str = "") -> None:
        """Note that groups go on without a host, once until it is heard again by all."""
        if host not in self.given_up:
            self.given_up.add(host)
            self.failovers.append(Failover(now_ns, host, why, by))

    def _has_ended(self, host: str) -> bool:
        state = self.hosts[host]
        return bool(state.incarnation) and self.map.ended.get(host) == state.incarnation

    def _fail(self, now_ns: int) -> None:
        """Let groups go on without the hosts whose lease is over, unless that would leave no copy: one may come back with it."""
        judges = now_ns >= self.judges_ns
        gone = [host for host in self.hosts if self._has_ended(host) or (judges and self._is_gone(host, now_ns))]
        if not gone:
            return
        groups: dict[int, Group] = {}
        for partition, group in enumerate(self.map.groups):
            if set(group.members) <= set(gone):
                continue
            for host in gone:
                if host in group.members + group.learners:
                    groups[partition] = self._without(groups.get(partition, group), host)
        for host in gone:
            if any(host in self.map.groups[p].members + self.map.groups[p].learners for p in groups):
                self._give_up(now_ns, host, "ended" if self._has_ended(host) else "silent")
        if groups:
            self._note(f"without {', '.join(gone)}, whose leases are over: {len(groups)} partitions")
        self._new_map(groups)

    def _silent(self, host: str, now_ns: int) -> bool:
        return now_ns - self.hosts[host].heard_ns >= self.timing.lease_ns

    def _finish_leaving(self, now_ns: int) -> None:
        groups: dict[int, Group] = {}
        for partition in self.map.leaving:
            group = self.map.groups[partition]
            left = tuple(host for host in group.leaving if self._knows(host) or self._lapsed(host, now_ns))
            if left:
                groups[partition] = self._pruned(replace(group, leaving=tuple(h for h in group.leaving if h not in left)))
        self._new_map(groups)

    def _knows(self, host: str) -> bool:
        """Tell whether a host follows the newest map: then it claims no right that this one took away."""
        return host in self.hosts and self.hosts[host].epoch >= self.map.epoch

    def _fill(self, now_ns: int) -> None:
        """Give groups that are too small learners, on the hosts that hold least."""
        alive = self.alive(now_ns)
        small = [partition for size in range(1, self.replicas) for partition in self.map.sizes.get(size, ())]
        if len(alive) < 2 or not small:
            return
        load = {host: sum(host in group.members + group.learners for group in self.map.groups) for host in alive}
        groups: dict[int, Group] = {}
        for partition in sorted(small):
            group = self.map.groups[partition]
            if not group.members or group.leaving:
                continue
            fit = [host for host in alive if host not in group.replicas() and not self._suspected(group, host, now_ns)]
            if fit and group.primary in alive:
                chosen = min(fit, key=lambda host: (load[host], host))
                load[chosen] += 1
                groups[partition] = self._with_learner(group, chosen)
        self._new_map(groups)

    def _suspected(self, group: Group, host: str, now_ns: int) -> bool:
        return bool(group.primary and now_ns < self.suspects.get((group.primary, host), 0))

    def _with_learner(self, group: Group, host: str) -> Group:
        return replace(group, learners=(*group.learners, host), joined={**group.joined, host: self.map.epoch + 1})

    def _move(self, now_ns: int) -> None:
        """Bring every move one step further, and let go of members beyond the number asked for."""
        groups: dict[int, Group] = {}
        alive, succeeded = self.alive(now_ns), dict[tuple[int, str], Group]()
        for partition, target in list(self.moves.items()):
            group = self.map.groups[partition]
            if group.primary == target:
                if self.may_end is None or partition in self.may_end:
                    del self.moves[partition]  # whoever finds it after a crash ends it again: nothing waits until that is saved
            elif group.leaving or target not in alive:
                continue
            elif target not in group.members + group.learners:
                groups[partition] = self._with_learner(group, target)
            elif target in group.members and group.successor != target and self._may_hand_over(partition):
                if (id(group), target) not in succeeded:
                    succeeded[id(group), target] = replace(group, successor=target)
                groups[partition] = succeeded[id(group), target]
        large = [partition for size, those in self.map.sizes.items() if size > self.replicas for partition in those]
        for partition in sorted(large):
            group = self.map.groups[partition]
            if len(group.members) > self.replicas and not group.leaving and partition not in self.moves and not group.successor:
                groups[partition] = self._leave(group, group.members[-1])
        self._new_map(groups)

    def _may_hand_over(self, partition: int) -> bool:
        return self.may_hand_over is None or partition in self.may_hand_over

    # ---- what people ask ----------------------------------------------------------------------------------------------

    def move(self, partitions: Iterable[int], target: str) -> None:
        """Make `target` the primary of partitions, without losing anything. Raises NearstateError for unknown ones."""
        if target not in self.hosts:
            raise unknown("store host", target, self.hosts)
        for partition in partitions:
            if not 0 <= partition < len(self.map.groups):
                raise NearstateError(f"partition {partition} cannot be moved: there are 0 to {len(self.map.groups) - 1}")
            self.moves[partition] = target
        self.dirty = True

    def give_up(self, target: str) -> None:
        """Let all that was to move to a host stay where it is, because packets cannot follow."""
        given_up = [partition for partition, wanted in self.moves.items() if wanted == target]
        for partition in given_up:
            del self.moves[partition]
        self.dirty = True
        stay = sum(self.map.groups[partition].primary != target for partition in given_up)
        self._note(f"{stay} partitions stay where they are: packets cannot reach {target}")

    # ---- inside -------------------------------------------------------------------------------------------------------

    def _new_map(self, groups: dict[int, Group]) -> None:
        """Make the next map, with these groups changed."""
        changed = {partition: group for partition, group in groups.items() if group != self.map.groups[partition]}
        if changed:
            every = tuple(changed.get(partition, group) for partition, group in enumerate(self.map.groups))
            self.map = ClusterMap(self.map.epoch + 1, every, self.map.ended)
            self.dirty = True

    def _note(self, line: str) -> None:
        self.log.append(f"map {self.map.epoch}: {line}")
        del self.log[:-LOG_LINES]
