"""Does a store keep what it promised others: to act on no map that takes a right from them while they cannot know?

And what does a packet loop see meanwhile, in the same memory?
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from datastore.coordination.heartbeats import Grant, Ping, Timing
from datastore.coordination.maps import ClusterMap, Group
from datastore.replication import shipping as ship
from datastore.replication.link import ASYNCHRONOUS, CHANGES_ACKED, COUNTED, MODE, OWING_NS, UNDER_WAY, make_shipping
from datastore.replication.replica import Replica
from datastore.store import roles
from datastore.store.layout import BACKUP, CHANGES_AT, COMMITTED_ALWAYS, COMMITTED_AT, PRIMARY, VALUE
from datastore.store.records import commit_record, open_record
from datastore.store.table import Table
from nfs.dataplane.held import ALSO_PARTITION, ALSO_REIGN, GO, NEED, REIGN, STAY, UNCOMMITTED, judge, make_held

CLUSTER, TIMING = 5, Timing()
WAIT_NS = TIMING.lease_ns + TIMING.margin_ns
PROMISED_NS = 1_000_000_000
"""When the promise was given."""


@pytest.fixture
def primary() -> Iterator[Replica]:
    """nf1, primary of the one partition since map 3 with nf2 as backup, which has a promise since PROMISED_NS."""
    table = Table.anonymous("promises", 60, 16, 1, epoch=0, cluster=CLUSTER, clients=4, window=8, replication_secret=9)
    shipping = make_shipping(table.words, 2, np.zeros(4, np.uint8))
    replica = Replica("nf1", ["nf2", "nf3"], table.words, shipping, table.register_owner(), CLUSTER, 77, TIMING)
    follow(replica, 3, Group(("nf1", "nf2"), 3, joined={"nf1": 3, "nf2": 3}), 0)
    pong = replica.pinged(PROMISED_NS, Ping("nf2", CLUSTER, 1, 3, 0))
    assert pong is not None
    assert pong.promise
    yield replica
    table.close()


def follow(replica: Replica, epoch: int, group: Group, now_ns: int) -> None:
    assert replica.hear(now_ns, Grant(77, now_ns, 0, epoch, ClusterMap(epoch, (group,)), ""))


def counts(replica: Replica) -> bool:
    """Tell whether changes wait for nf2."""
    return bool(replica.shipping.links[0, 0, MODE] == COUNTED)


WITHOUT = {"gone": Group(("nf1",), 3, joined={"nf1": 3}),
           "to join anew": Group(("nf1",), 3, learners=("nf2",), joined={"nf1": 3, "nf2": 4}),
           "another one in its place": Group(("nf1", "nf3"), 3, joined={"nf1": 3, "nf3": 4})}  # fmt: skip


@pytest.mark.parametrize("new", WITHOUT.values(), ids=WITHOUT)
def test_changes_wait_for_a_former_backup_as_long_as_it_may_answer(primary: Replica, new: Group) -> None:
    follow(primary, 4, new, PROMISED_NS + 10)
    primary.advance(PROMISED_NS + WAIT_NS - 1)
    assert counts(primary)
    primary.advance(PROMISED_NS + WAIT_NS)
    assert not counts(primary)


@pytest.mark.parametrize(("incarnation", "waits"), [(1, False), (2, True)])
def test_promises_to_a_process_that_has_ended_bind_no_longer(primary: Replica, incarnation: int, waits: bool) -> None:
    new = ClusterMap(4, (WITHOUT["gone"],), {"nf2": incarnation})
    assert primary.hear(PROMISED_NS + 10, Grant(77, 0, 0, 4, new, ""))
    assert counts(primary) == waits
    pong = primary.pinged(PROMISED_NS + 20, Ping("nf2", CLUSTER, 1, 4, 0))
    assert (pong is not None) == waits, "a ping that was on its way when its process ended"


@pytest.mark.parametrize("new", WITHOUT.values(), ids=WITHOUT)
def test_who_knows_the_map_is_not_waited_for(primary: Replica, new: Group) -> None:
    follow(primary, 4, new, PROMISED_NS + 10)
    primary.pinged(PROMISED_NS + 20, Ping("nf2", CLUSTER, 1, 4, 0))
    primary.advance(PROMISED_NS + 20)
    assert not counts(primary)


def test_what_a_former_backup_had_is_not_taken_for_the_copy_that_it_is_to_get(primary: Replica) -> None:
    assert ship.synchronised(primary.shipping)[0, 0]
    follow(primary, 4, WITHOUT["to join anew"], PROMISED_NS + 10)
    assert primary.beat(PROMISED_NS + 20).synchronised == ()


def test_while_it_waits_a_store_promises_nothing_more(primary: Replica) -> None:
    follow(primary, 4, WITHOUT["gone"], PROMISED_NS + 10)
    for epoch in (3, 4):
        pong = primary.pinged(PROMISED_NS + 20, Ping("nf3", CLUSTER, 1, epoch, 0))
        assert pong is not None
        assert not pong.promise


def test_who_is_to_be_primary_waits_for_everybody_who_may_not_know(primary: Replica) -> None:
    primary.pinged(PROMISED_NS + 5, Ping("nf3", CLUSTER, 1, 3, 0))
    follow(primary, 4, Group(("nf1", "nf2"), 4, joined={"nf1": 3, "nf2": 3}), PROMISED_NS + 10)
    primary.pinged(PROMISED_NS + 20, Ping("nf2", CLUSTER, 1, 4, 0))
    primary.advance(PROMISED_NS + WAIT_NS + 4)
    assert not roles.rules(roles.role(primary.words, 0))
    primary.advance(PROMISED_NS + WAIT_NS + 5)
    assert roles.rules(roles.role(primary.words, 0))


def look(replica: Replica, reign: int) -> int:
    """Return what a packet loop would do now with a packet that made the first change of the partition in this reign."""
    held = make_held(1, 1)
    held.packets[0, NEED], held.packets[0, REIGN], held.packets[0, ALSO_PARTITION] = 1, reign, -1
    return int(judge(held, replica.words, 0, 0, True))


def test_no_packet_loop_sees_all_committed_while_roles_change(primary: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packet loop may look at any moment: here, right before and right after each role is written."""
    owner = primary.owner
    slot = int(open_record(primary.words, owner, np.uint64(1 << 32), np.uint64(5), 3, 1))
    commit_record(primary.words, owner, slot, 0)
    assert look(primary, 3) == STAY
    seen, sound = [], Replica._set_role

    def set_role(self: Replica, partition: int, role: int, reign: int) -> None:
        seen.append([look(self, each) for each in (3, 5)])
        sound(self, partition, role, reign)
        seen.append([look(self, each) for each in (3, 5)])

    monkeypatch.setattr(Replica, "_set_role", set_role)
    follow(primary, 4, Group(("nf2", "nf1"), 4, joined={"nf1": 3, "nf2": 3}), PROMISED_NS)
    assert seen == [[STAY, UNCOMMITTED], [UNCOMMITTED, UNCOMMITTED]]
    assert look(primary, 3) == UNCOMMITTED
    del seen[:]
    follow(primary, 5, Group(("nf1", "nf2"), 5, joined={"nf1": 3, "nf2": 3}), PROMISED_NS + 2 * WAIT_NS)
    assert seen == [[UNCOMMITTED, UNCOMMITTED], [UNCOMMITTED, STAY]]


def test_who_was_stopped_gives_peers_their_time_anew(primary: Replica) -> None:
    owing, patience_ns = primary.shipping.links[0, 0], TIMING.unreachable_ns
    owing[OWING_NS] = PROMISED_NS
    late_ns = PROMISED_NS + patience_ns + 1
    assert primary.beat(late_ns).unreachable == ("nf2",)
    primary.was_stopped(late_ns)
    assert primary.beat(late_ns + patience_ns).unreachable == ()
    assert primary.beat(late_ns + patience_ns + 1).unreachable == ("nf2",)


HANDED_OVER = Group(("nf2", "nf1"), 5, joined={"nf1": 3, "nf2": 3})


@pytest.mark.parametrize(
    ("new", "committed", "outcome"),
    [
        (HANDED_OVER, True, GO),
        (HANDED_OVER, False, UNCOMMITTED),  # it did not say so: the coordinator took it for dead
        (Group(("nf2",), 5, learners=("nf1",), joined={"nf1": 5, "nf2": 3}), True, UNCOMMITTED),
        (Group(("nf3", "nf1"), 5, joined={"nf1": 3, "nf3": 3}), True, UNCOMMITTED),
    ],
    ids=["handed over", "not all committed", "joins anew", "somebody else rules"],
)
def test_what_ran_before_a_partition_was_handed_over_leaves(primary, new, committed, outcome) -> None:
    slot = int(open_record(primary.words, primary.owner, np.uint64(1 << 32), np.uint64(5), 3, 1))
    primary.words[slot + VALUE] = 7
    commit_record(primary.words, primary.owner, slot, 0)
    assert roles.changes(primary.words, 0) == 1
    follow(primary, 4, Group(("nf1", "nf2"), 3, successor="nf2", joined={"nf1": 3, "nf2": 3}), PROMISED_NS)
    assert look(primary, 3) == STAY
    if committed:
        primary.words[int(primary.words[COMMITTED_AT])] = roles.changes(primary.words, 0)
    assert primary.beat(PROMISED_NS).released == ((0,) if committed else ())
    primary.words[int(primary.words[COMMITTED_AT])] = 0  # somebody who learned counts from now on, and has less
    assert primary.beat(PROMISED_NS).released == ((0,) if committed else ())
    follow(primary, 5, new, PROMISED_NS + 1)
    assert look(primary, 3) == outcome


def test_who_goes_on_ruling_has_not_stopped(primary: Replica) -> None:
    both = {"nf1": 3, "nf2": 3}
    follow(primary, 4, Group(("nf1", "nf2"), 3, successor="nf2", joined=both), PROMISED_NS)
    assert primary.beat(PROMISED_NS).released == (0,)
    follow(primary, 5, Group(("nf1", "nf2"), 3, joined=both), PROMISED_NS)
    slot = int(open_record(primary.words, primary.owner, np.uint64(1 << 32), np.uint64(5), 5, 1))
    primary.words[slot + VALUE] = 7
    commit_record(primary.words, primary.owner, slot, 0)
    assert roles.changes(primary.words, 0) == 1
    follow(primary, 6, Group(("nf1", "nf2"), 3, successor="nf2", joined=both), PROMISED_NS)
    assert primary.beat(PROMISED_NS).released == ()
    follow(primary, 7, Group(("nf2", "nf1"), 7, joined=both), PROMISED_NS)
    assert look(primary, 3) == UNCOMMITTED


def test_also_what_nothing_waits_for_is_shipped_before_a_partition_is_handed_over(primary: Replica) -> None:
    primary.shipping.control[ASYNCHRONOUS] = 1
    link = primary.shipping.links[0, 0]
    follow(primary, 4, Group(("nf1", "nf2"), 3, successor="nf2", joined={"nf1": 3, "nf2": 3}), PROMISED_NS)
    primary.words[int(primary.words[COMMITTED_AT])] = COMMITTED_ALWAYS
    primary.words[int(primary.words[CHANGES_AT])] = 7
    for link[CHANGES_ACKED], link[UNDER_WAY], is_drained in ((6, 0, False), (7, 1, False), (7, 0, True)):
        assert primary.is_drained(0) == is_drained


def test_a_claim_elsewhere_is_lost_with_that_partitions_role() -> None:
    table = Table.anonymous("claims", 60, 16, 2, epoch=0, cluster=CLUSTER, clients=4, window=8, replication_secret=9)
    held = make_held(1, 2)
    for partition in range(2):
        table.set_role(partition, PRIMARY, 3)
    held.packets[0, [REIGN, ALSO_PARTITION, ALSO_REIGN]] = 3, 1, 3
    assert judge(held, table.words, 0, 0, True) == GO
    assert judge(held, table.words, 0, 0, False) == STAY
    table.set_role(1, BACKUP, 4)
    assert judge(held, table.words, 0, 0, True) == UNCOMMITTED
    table.close()
