"""Does a store keep what it promised others: to act on no map that takes a right from them while they cannot know?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from datastore.replication import shipping as ship
from datastore.replication.coordinator import Grant, Timing
from datastore.replication.maps import ClusterMap, Group
from datastore.replication.replica import Ping, Replica
from datastore.store.table import Table

CLUSTER, TIMING = 5, Timing()
WAIT_NS = TIMING.lease_ns + TIMING.margin_ns
PROMISED_NS = 1_000_000_000
"""When the promise was given."""


@pytest.fixture
def primary() -> Iterator[Replica]:
    """nf1, primary of the one partition since map 3 with nf2 as backup, which has a promise since PROMISED_NS."""
    table = Table.anonymous("promises", 60, 16, 1, epoch=0, cluster=CLUSTER, clients=4, window=8, replication_secret=9)
    shipping = ship.make_shipping(table.words, 2, np.zeros(4, np.uint8))
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
    return bool(replica.shipping.links[0, 0, ship.MODE] == ship.COUNTED)


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


@pytest.mark.parametrize("new", WITHOUT.values(), ids=WITHOUT)
def test_who_knows_the_map_is_not_waited_for(primary: Replica, new: Group) -> None:
    follow(primary, 4, new, PROMISED_NS + 10)
    primary.pinged(PROMISED_NS + 20, Ping("nf2", CLUSTER, 1, 4, 0))
    primary.advance(PROMISED_NS + 20)
    assert not counts(primary)


def test_what_a_former_backup_had_is_not_taken_for_the_copy_that_it_is_to_get(primary: Replica) -> None:
    assert ship.is_synchronised(primary.shipping, 0, 0)
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
    assert not ship.rules(ship.role(primary.words, 0))
    primary.advance(PROMISED_NS + WAIT_NS + 5)
    assert ship.rules(ship.role(primary.words, 0))
