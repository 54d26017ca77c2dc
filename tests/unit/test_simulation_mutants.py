"""Is the checker any good? Each of these breaks one rule of the protocol; the simulator must notice every one of them.

Mutants take the place of functions, which compiled callers would not notice: they live in uncompiled runs only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from datastore.compiled import INTERPRETED
from datastore.coordination.attendance import Attendance
from datastore.coordination.coordinator import Coordinator
from datastore.coordination.heartbeats import Grant
from datastore.coordination.maps import Group
from datastore.replication import applying, holds, shipping
from datastore.replication.link import Shipping
from datastore.replication.replica import Replica
from datastore.store import operations, roles
from datastore.store.statuses import OK
from datastore.verification.simulator import ANY_FAULTS, NEVER, Faults, Violation, simulate

pytestmark = pytest.mark.python_mode
if not INTERPRETED:
    pytest.skip("mutants take the place of functions, which compiled callers do not notice", allow_module_level=True)
MOST_SEEDS = 150

Patch = Callable[[pytest.MonkeyPatch], None]


def without(name: str, answer: Any, *modules: Any) -> Patch:
    """Return a mutation that lets a function answer always the same."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        for module in modules:
            monkeypatch.setattr(module, name, lambda *_: answer)

    return patch


def trusts_every_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = applying.judge

    def judge(
        is_first: bool, epoch: int, joined: int, base: int, serial: int, my_epoch: int, my_joined: int, my_serial: int
    ) -> Any:
        return sound(is_first, max(epoch, my_epoch), joined, base, serial, my_epoch, joined, my_serial)

    monkeypatch.setattr(applying, "judge", judge)


def believes_any_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim is believed by whoever followed the same primary, however far. (Of another one: `test_shipping.py`.)"""
    sound = applying.is_right

    def is_right(state: Shipping, words: np.ndarray, frame: np.ndarray, at: int) -> bool:
        claim = frame.copy()
        claim[at + 5] = roles.changes(words, int(frame[at]) & 0xFFFF)
        return bool(sound(state, words, claim, at))

    monkeypatch.setattr(applying, "is_right", is_right)


def reads_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_clean_backup(words: np.ndarray, base: int, partition: int, epoch: int) -> bool:
        return bool(words[base + 1] & np.uint64(3) == np.uint64(2))

    monkeypatch.setattr(operations, "is_clean_backup", is_clean_backup)


def answers_when_deposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holds, "rules", lambda role: True)
    monkeypatch.setattr(holds, "reign", lambda words, partition: 0)


def trusts_old_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry is answered from its completion record also where its change may have been lost."""
    sound = operations.once

    def once(words: np.ndarray, owner: int, client: int, epoch: int, now_s: int, request: np.ndarray, at: int, *rest: Any) -> Any:
        with pytest.MonkeyPatch.context() as blind:
            sequence = request[at + operations.SEQUENCE]
            done = operations.completion_at(words, client, sequence)
            if words[done + operations.DONE_SEQUENCE] == sequence:
                blind.setattr(operations, "is_primary", lambda *_: True)
            return sound(words, owner, client, epoch, now_s, request, at, *rest)

    monkeypatch.setattr(operations, "once", once)


def forgets_lost_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was in a lost frame is not shipped again."""
    sound = shipping.lose

    def lose(state: Shipping, peer: int, before_ns: int, refused_before_ns: int) -> int:
        state.unacked[peer] = 0
        return sound(state, peer, before_ns, refused_before_ns)

    monkeypatch.setattr(shipping, "lose", lose)


def obeys_maps_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that began anew follows a map made for the process before it."""
    sound = Replica.hear

    def hear(self: Replica, now_ns: int, grant: Grant) -> bool:
        return sound(self, now_ns, replace(grant, incarnation=self.incarnation))

    monkeypatch.setattr(Replica, "hear", hear)


def promotes_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a lease to run out: silence is enough."""
    monkeypatch.setattr(Coordinator, "_lapsed", lambda self, host, now_ns: True)
    monkeypatch.setattr(Coordinator, "_silent", lambda self, host, now_ns: now_ns - self.hosts[host].heard_ns > 40_000_000)


def promises_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host promises also those who follow an older map, and they believe it."""
    sound, believed = Replica.pinged, Replica.ponged

    def pinged(self: Replica, now_ns: int, ping: Any) -> Any:
        return sound(self, now_ns, replace(ping, epoch=self.map.epoch))

    def ponged(self: Replica, pong: Any) -> None:
        believed(self, replace(pong, epoch=self.map.epoch))

    monkeypatch.setattr(Replica, "pinged", pinged)
    monkeypatch.setattr(Replica, "ponged", ponged)


def ignores_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup that the map leaves out goes on answering."""
    sound = Replica._follow

    def follow(self: Replica, partition: int, group: Group, before: Group) -> None:
        if self.host in group.members + group.learners or roles.rules(roles.role(self.words, partition)):
            sound(self, partition, group, before)

    monkeypatch.setattr(Replica, "_follow", follow)


def takes_a_reset_for_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Attendance.lose
    monkeypatch.setattr(Attendance, "lose", lambda self, now_ns, line, is_closed: sound(self, now_ns, line, True))


def counts_all_learners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever learns is said to have a copy."""
    monkeypatch.setattr(shipping, "synchronised", lambda state: np.ones(state.links.shape[:2], bool))


def takes_a_parting_for_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that closes its connection by itself is given up at once."""
    monkeypatch.setattr(Attendance, "part", lambda self, line: None)


FIRST_SEED = {
    "believes that everybody knows the newest map": 69,
    "breaks its promises": 9,
    "promises whatever map others follow": 16,
    "applies frames of deposed primaries": 20,
    "ignores that its lease ran out": 6,
    "trusts its own old completion records": 54,
    "answers after it was deposed": 109,
    "promotes before the lease is over": 19,
    "reads dirty backups": 3,
    "forgets completion records at failover": 2,
    "forgets what a lost frame held": 2,
    "believes to have as many changes as it is told": 81,
    "obeys maps for an earlier process": 14,
    "counts learners that know nothing": 0,
    "goes on reading when it is no backup any more": 6,
    "takes a reset for an end": 6,
    "takes a parting for an end": 3,
}
"""Seeds known to catch a mutant, tried first to save time."""
OF_LINES = {"takes a reset for an end", "takes a parting for an end"}
"""Mutants of what connections say. The others are caught sooner where leases and heartbeats are messages like all others."""
ONLY_CUTS = Faults(0.02, 0, 0, 1, NEVER, NEVER, cut_s=0.04, move_s=NEVER, coordinator_s=NEVER, drift=0)
STOPS_AND_CUTS = replace(ONLY_CUTS, pause_s=0.05, cut_s=0.05)
FAULTS = {"believes that everybody knows the newest map": ONLY_CUTS, "ignores that its lease ran out": STOPS_AND_CUTS}
"""What finds mutants that need a rare sequence: a host cut off from its primary and right after from the coordinator; one that is
stopped, and asked for what others changed meanwhile. Every tenth seed of these does."""
MUTANTS: dict[str, Patch] = {
    "takes a reset for an end": takes_a_reset_for_an_end,
    "takes a parting for an end": takes_a_parting_for_an_end,
    "acknowledges before it replicates": without("waits_for", -1, holds),
    "applies frames of deposed primaries": trusts_every_frame,
    "reads dirty backups": reads_anywhere,
    "ignores that its lease ran out": without("lease_holds", True, holds),
    "forgets completion records at failover": without("read_completions", OK, applying),
    "trusts its own old completion records": trusts_old_completions,
    "answers after it was deposed": answers_when_deposed,
    "forgets what a lost frame held": forgets_lost_frames,
    "believes to have as many changes as it is told": believes_any_count,
    "obeys maps for an earlier process": obeys_maps_for_others,
    "promotes before the lease is over": promotes_early,
    "counts learners that know nothing": counts_all_learners,
    "breaks its promises": lambda m: m.setattr(Replica, "may_not_know", lambda self, peer, now_ns: False),
    "promises whatever map others follow": promises_anybody,
    "goes on reading when it is no backup any more": ignores_removal,
    "believes that everybody knows the newest map": lambda m: m.setattr(Coordinator, "_knows", lambda self, host: True),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mutant_is_caught(mutant, monkeypatch):
    MUTANTS[mutant](monkeypatch)
    with np.errstate(over="ignore"):
        for seed in (FIRST_SEED.get(mutant, 0), *range(MOST_SEEDS)):
            try:
                simulate(seed, 1.5, keep_trace=False, faults=FAULTS.get(mutant, ANY_FAULTS), lines=mutant in OF_LINES)
            except Violation:
                return
    pytest.fail(f"nobody noticed a store that {mutant}, in {MOST_SEEDS} seeds")


def test_the_sound_protocol_passes_where_mutants_fail():
    with np.errstate(over="ignore"):
        for seed in range(4):
            simulate(seed, 1.5, keep_trace=False)
        for mutant, faults in FAULTS.items():
            simulate(FIRST_SEED[mutant], 1.5, keep_trace=False, faults=faults, lines=False)
