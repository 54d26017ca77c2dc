"""Failover and moves with packets under way, and everything that can go wrong, in imagined time.

The packet loop, its client, the orders and the coordinator's switchover are the product's; see `nfs/verification/`. A failing
seed names itself: `python -m datastore simulate --packets --seed N` replays it with its log.
"""

from __future__ import annotations

import os

import pytest

from datastore.compiled import INTERPRETED
from datastore.coordination.heartbeats import MILLISECOND_NS, Timing
from datastore.coordination.switchover import Switchover
from datastore.store import lives
from datastore.store.layout import INCARNATION, SERVER_LIFE
from datastore.store.table import Table
from datastore.verification.imagined import CALM, Violation
from nfs.dataplane.orders import Orders
from nfs.verification.packets import PAYLOAD, PAYLOAD_AT, Flow, checksum
from nfs.verification.simulator import PATIENCE_NS, lose_one, simulate

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the packet loop runs compiled")
LONG = os.environ.get("NEARSTATE_LONG") == "1"
SEEDS = 10_000 if LONG else 40
LOSSES = 100 if LONG else 2
ONCE_FAILED = (37, 545, 873)
"""Seeds that found something: packets overtaken where a move broke off, and where one was ordered of what had just failed over
when the coordinator crashed; a check that held packets to more than can be had."""
KNOWN_NS = 50 * MILLISECOND_NS
"""No packet waits longer for what is known to have ended: well below a lease."""


def test_nothing_promised_of_packets_is_broken_in_any_seed():
    happened: dict[str, int] = {}
    left = 0
    for seed in range(SEEDS):
        world = simulate(seed, keep_trace=False)
        left += sum(len(flow.passed) for flow in world.packets.flows)
        for what, times in world.happened.items():
            happened[what] = happened.get(what, 0) + times
    assert left > 200 * SEEDS
    assert set(happened) == {
        "host crash", "store crash", "nf crash", "pause", "cut", "move", "coordinator crash", "line", "busy",
    }  # fmt: skip


@pytest.mark.parametrize("seed", ONCE_FAILED)
def test_what_once_failed_passes(seed):
    simulate(seed, keep_trace=False)


@pytest.mark.parametrize(("how", "longest_ns"), [("close", KNOWN_NS), ("", PATIENCE_NS)])
@pytest.mark.parametrize("what", ["store", "nf", "host"])
def test_a_loss_alone_delays_packets_by_a_failover_at_most(what, how, longest_ns):
    """The store process of a host dies while its NF process lives, and the other losses: no packet is overtaken, and none waits
    for a lease where the end of the process is known."""
    for seed in range(LOSSES):
        world = lose_one(seed, what, how)
        gaps = [after - before for flow in world.packets.flows for before, after in world.packets.gaps(flow)]
        assert max(gaps) <= longest_ns


@pytest.mark.parametrize("what", ["move", "store"])
def test_a_coordinator_that_crashes_while_packets_follow_lets_none_be_overtaken(what):
    for seed in (1, 7) if what == "move" and not LONG else range(LOSSES):
        lose_one(seed, what, "close" if what == "store" else "", coordinator=True)


def test_a_name_that_two_flows_have_and_one_that_changes_are_noticed():
    world = lose_one(2, "nf", "close")
    first, second = world.packets.flows[:2]
    assert first.name != second.name
    for flow, name in ((first, second.name), (first, 99)):
        with pytest.raises(Violation, match="leaves as"):
            world.packets.named(flow, name)
    first.name = second.name
    with pytest.raises(Violation, match="have claimed"):
        world.check_claim(first)


def test_without_faults_every_packet_leaves():
    world = simulate(1, 0.3, faults=CALM, replicas=2)
    assert all(flow.sent == flow.came == len(flow.passed) for flow in world.packets.flows)
    assert all([number for number, _, _ in flow.passed] == list(range(1, flow.sent + 1)) for flow in world.packets.flows)


def test_a_seed_is_a_run_byte_for_byte():
    first, again, other = (simulate(seed, 0.2, faults=CALM, replicas=2) for seed in (3, 3, 4))
    assert first.digest.hexdigest() == again.digest.hexdigest() != other.digest.hexdigest()


# ---- is the checker any good? ---------------------------------------------------------------------------------------------


def ignores_park(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance says that it parks, and does not."""
    sound = Orders.carry_out

    def carry_out(self, orders, now_ns, leave):
        sound(self, orders | {"park": []}, now_ns, leave)
        self.said = orders["park"]

    monkeypatch.setattr(Orders, "carry_out", carry_out)
    monkeypatch.setattr(Orders, "parked", lambda self: getattr(self, "said", []))


def ends_before_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance says that a partition is quiet as soon as it is asked."""

    def look(self, now_ns):
        news, self.quiet = set(self._drains) - set(self.quiet), list(self._drains)
        return bool(news)

    monkeypatch.setattr(Orders, "look", look)


def does_not_wait_for_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the switch has confirmed counts as settled, and nobody is asked to drain."""
    monkeypatch.setattr(Switchover, "_is_settled", lambda self, partition: partition in self.watched)
    monkeypatch.setattr(
        Switchover,
        "_has_followed",
        lambda self, p, target, c, dead, unknown: c.map.groups[p].primary == target and p in self.watched,
    )


def steers_before_it_is_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets go to the target at once, which need not keep them."""
    sound = Switchover.hear

    def hear(self, now_ns, report):
        return sound(self, now_ns, report | {"parked": list(range(len(self.steering)))})

    monkeypatch.setattr(Switchover, "hear", hear)
    monkeypatch.setattr(Orders, "carry_out", without_park(Orders.carry_out))


def without_park(sound):
    return lambda self, orders, now_ns, leave: sound(self, orders | {"park": []}, now_ns, leave)


def fails_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets of a failed partition are sent to the new primary at once, though the old instance has some (as it was once)."""
    monkeypatch.setattr(Switchover, "_find_followers", lambda self, coordinator, dead, unknown: None)


def holds_for_a_dead_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets that wait for commits of a store that is gone go on waiting (as it was once)."""
    sound = Orders._adopt

    def adopt(self, new, leave):
        sound(self, new, leave)
        self.engine.held.deposed[:] = 0

    monkeypatch.setattr(Orders, "_adopt", adopt)


def leaves_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NF process says that the store process of its host has ended, and goes on by its lease."""

    def end_lease(self: Table) -> int | None:
        return None if lives.is_held(self.words, SERVER_LIFE) else int(self.words[INCARNATION])

    monkeypatch.setattr(Table, "end_lease", end_lease)


def steers_to_the_primaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that goes on after another one sends packets to the primaries of the map, as it did once."""
    monkeypatch.setattr(Switchover, "learn", lambda self, found: setattr(self, "is_blind", False))
    monkeypatch.setattr(Switchover, "_may_be_under_way", lambda self, partition, coordinator, unknown: False)


MUTANTS = {
    "goes on by the lease of a store that has ended": (leaves_the_lease, "store"),
    "steers to the primaries after a crash of the coordinator": (steers_to_the_primaries, "move"),
    "ignores an order to park": (ignores_park, "move"),
    "says that it is quiet before it is": (ends_before_drained, "move"),
    "does not wait for the switch to settle": (does_not_wait_for_the_switch, "move"),
    "steers before the target parks": (steers_before_it_is_parked, "move"),
    "lets a failover overtake": (fails_over_at_once, "store"),
    "holds packets for a dead store": (holds_for_a_dead_store, "store"),
}


FIRST_SEED = {
    "steers to the primaries after a crash of the coordinator": 1,
    "lets a failover overtake": 10,
    "holds packets for a dead store": 1,
}
"""Seeds known to catch a mutant, tried first to save time."""


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mutant_is_caught(mutant, monkeypatch):
    patch, what = MUTANTS[mutant]
    patch(monkeypatch)
    for seed in (FIRST_SEED.get(mutant, 0), *range(20)):
        try:
            lose_one(seed, what, "close" if what == "store" else "", coordinator=patch is steers_to_the_primaries)
        except Violation:
            return
    pytest.fail(f"nobody noticed a system that {mutant}")


def test_moves_alone_pass():
    for seed in range(2):
        world = lose_one(seed, "move")
        assert all(flow.sent == len(flow.passed) for flow in world.packets.flows)


def test_frames_are_right():
    frame = Flow(3, 1, 4098).frame()
    assert checksum(frame[14:34]) == 0
    assert PAYLOAD.unpack_from(frame, PAYLOAD_AT) == (3, 1)
    assert Timing().lease_ns < PATIENCE_NS
