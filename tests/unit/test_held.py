"""Packets on replicated state in the packet loop: held until it is committed, parked while it moves, dropped when it is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from datastore.base.partitioning import PARTITIONS
from datastore.store.layout import BACKUP, CHANGES_AT, COMMITTED_AT, ENDED_AT, LEASE_NS, NO_ROLE, PRIMARY
from datastore.store.roles import changes
from datastore.store.table import Table
from nfs.dataplane import load
from nfs.dataplane.engine import DOWN, EPOCH, HERE, NEVER, QUEUES
from nfs.dataplane.headers import OUTSIDE
from nfs.dataplane.held import HEAD, PARKED_COUNT, SINCE_NS, put_back, take_first
from nfs.dataplane.passage import note_oldest
from tests.packets import SERVER, ethernet
from tests.rig import VALUE_BYTES, Rig

pytestmark = pytest.mark.bounds
PORT = 5000
PARTITION = (PORT & 0x1FE) >> 1
SHORT = 3
"""Turns of the loop in which what may leave does."""


class Replicated(Rig):
    """A rig on a table that replicates, whose commits, lease and role the test says."""

    def __init__(self, name: str, **settings: object) -> None:
        table = Table.anonymous("held", 4096, VALUE_BYTES, replication_secret=3)
        for partition in range(PARTITIONS):
            table.set_role(partition, PRIMARY, 1)
        super().__init__([load(name)], {name: settings} if settings else None, table=table)

    def commit(self, upto: int) -> None:
        """Let so many changes of the partition be committed."""
        self.table.words[int(self.table.words[COMMITTED_AT]) + PARTITION] = upto

    def changed(self) -> int:
        return int(self.table.words[int(self.table.words[CHANGES_AT]) + PARTITION])

    def send(self, *payloads: bytes) -> list[bytes]:
        """Take packets of one flow through and return the payloads of what left."""
        packet = ethernet() / IP(src="10.0.1.7", dst=SERVER) / UDP(sport=PORT, dport=80)
        frames = [bytes(packet / payload) for payload in payloads]
        left = self.burst(frames, turns=SHORT)
        assert all(side == OUTSIDE for side, _ in left)
        return [bytes(Ether(frame)[UDP].payload)[:1] for _, frame in left]


@pytest.fixture
def rig() -> Iterator[Replicated]:
    made = Replicated("traffic_counter")
    yield made
    assert made.counts()["waiting"] == 0
    made.table.verify()
    made.table.close()


def test_a_packet_leaves_when_what_it_changed_is_committed(rig):
    assert rig.send(b"a") == [b"a"]  # no backups: everything is
    rig.commit(1)
    assert rig.send(b"b", b"c") == []
    assert rig.changed() == changes(rig.table.words, PARTITION) == 3
    rig.commit(2)
    assert rig.send() == [b"b"]
    rig.commit(3)
    assert rig.send(b"d") == [b"c"]
    rig.commit(4)
    assert rig.send() == [b"d"]


def test_without_a_lease_nothing_leaves(rig):
    rig.table.words[LEASE_NS] = 1
    assert rig.send(b"a") == []
    rig.table.words[LEASE_NS] = time.monotonic_ns() + 10**12
    assert rig.send(b"b") == [b"a", b"b"]


def test_who_has_lost_its_store_holds_nothing_for_ever(rig):
    rig.commit(0)
    assert rig.send(b"a") == []
    rig.engine.held.packets[:, SINCE_NS] -= 3_000_000_000  # as if it had waited so long
    assert rig.send() == []
    assert rig.counts()["waiting"] == 1  # with a lease it will be known
    rig.table.words[LEASE_NS] = 1
    assert rig.send() == []
    assert rig.counts()["uncommitted"] == 1


def test_a_store_process_that_is_gone_is_not_worked_for(rig):
    """Its table still says PRIMARY, and nothing that is changed there will ever be committed."""
    rig.engine.remote[PARTITION], rig.engine.control[DOWN] = 0, 1
    assert rig.send(b"a", b"b") == []
    assert rig.records() == {}
    rig.engine.control[DOWN] = 0
    assert rig.send(b"c") == [b"a", b"b", b"c"]


def test_who_is_deposed_without_its_store_drops_what_it_holds(rig):
    rig.commit(0)
    assert rig.send(b"a") == []
    rig.engine.held.deposed[PARTITION] = 2  # by a map, since the reign 2 of another host
    assert rig.send() == []
    assert rig.counts()["waiting"] == 1  # the store process has its lease, and may say that all was committed
    rig.table.words[LEASE_NS] = 1
    assert rig.send() == []
    assert (rig.counts()["waiting"], rig.counts()["uncommitted"]) == (0, 1)


def test_what_ran_in_a_later_reign_is_not_dropped_for_an_earlier_one(rig):
    rig.engine.held.deposed[PARTITION] = 2
    rig.table.set_role(PARTITION, PRIMARY, 3)
    rig.engine.control[EPOCH] = 3
    rig.commit(0)
    assert rig.send(b"a") == []
    rig.table.words[LEASE_NS] = 1
    assert rig.send() == []
    assert rig.counts()["waiting"] == 1
    rig.table.words[LEASE_NS] = 0
    rig.commit(1)
    assert rig.send() == [b"a"]


def test_nobody_overtakes_a_held_packet_by_asking_elsewhere(rig):
    rig.commit(0)
    assert rig.send(b"a") == []
    rig.engine.primary[PARTITION] = 0  # its map says so already
    assert rig.send(b"b") == []
    assert rig.engine.held.queues[PARTITION, PARKED_COUNT] == 1
    rig.engine.primary[PARTITION] = HERE
    rig.commit(1)
    assert rig.send() == [b"a"]
    rig.commit(2)
    assert rig.send() == [b"b"]


def test_what_was_not_committed_goes_with_the_role(rig):
    rig.commit(0)
    assert rig.send(b"a") == []
    rig.table.set_role(PARTITION, BACKUP, 2)
    assert rig.send() == []
    assert rig.counts()["uncommitted"] == 1
    rig.table.set_role(PARTITION, PRIMARY, 3)
    rig.engine.control[EPOCH] = 3
    rig.commit(0)
    assert rig.send(b"b") == []
    rig.table.set_role(PARTITION, PRIMARY, 4)  # primary again, but of another reign
    rig.commit(100)
    assert rig.send() == []
    assert rig.counts()["uncommitted"] == 2


def test_what_was_handed_over_was_committed(rig):
    rig.commit(0)
    assert rig.send(b"a") == []
    words = rig.table.words
    words[int(words[ENDED_AT]) + PARTITION] = 1  # the reign in which it ran
    words[LEASE_NS] = 1
    rig.table.set_role(PARTITION, BACKUP, 2)
    assert rig.send() == [b"a"]
    words[LEASE_NS] = 0
    rig.table.set_role(PARTITION, PRIMARY, 3)
    rig.engine.control[EPOCH] = 3
    rig.commit(0)
    assert rig.send(b"b") == []
    rig.table.set_role(PARTITION, BACKUP, 4)  # and this one ended otherwise
    assert rig.send() == []
    assert rig.counts()["uncommitted"] == 1


def test_packets_wait_for_their_partition_in_order(rig):
    rig.table.set_role(PARTITION, NO_ROLE, 2)
    assert rig.send(b"a", b"b") == []
    assert rig.send(b"c") == []
    assert rig.records() == {}  # nothing ran
    rig.table.set_role(PARTITION, PRIMARY, 2)
    assert rig.send() == []  # the map here is older
    rig.engine.control[EPOCH] = 2
    assert rig.send(b"d") == [b"a", b"b", b"c", b"d"]


def test_parked_by_order_behind_what_is_held(rig):
    rig.commit(0)
    assert rig.send(b"a") == []
    rig.engine.held.parking[PARTITION] = 1
    assert rig.send(b"b") == []
    assert rig.changed() == 1
    rig.commit(1)
    assert rig.send() == [b"a"]
    rig.engine.held.parking[PARTITION] = 0
    assert rig.send(b"c") == []  # ran, and waits for its change
    rig.commit(3)
    assert rig.send() == [b"b", b"c"]


def test_who_could_not_go_on_after_all_stays_the_first(rig):
    """The loop sees that it may before it takes the lock; the partition may go to another host in between."""
    rig.engine.held.parking[PARTITION] = 1
    assert rig.send(b"a", b"b") == []
    held, following = rig.engine.held, rig.engine.next_packet
    first = int(held.queues[PARTITION, HEAD])
    take_first(held, following, PARTITION)
    rig.engine.control[QUEUES] = put_back(held, following, rig.engine.control[QUEUES], PARTITION, first)
    held.parking[PARTITION] = 0
    assert rig.send(b"c") == [b"a", b"b", b"c"]


def test_the_age_of_what_waits_is_known(rig):
    oldest = np.zeros(PARTITIONS, np.int64)
    note_oldest(rig.engine, oldest)  # and is compiled by now: no packet waits for that
    assert (oldest == NEVER).all()
    began_ns = time.monotonic_ns()
    rig.commit(0)
    assert rig.send(b"a") == []
    first_ns = time.monotonic_ns()
    rig.engine.held.parking[PARTITION] = 1
    assert rig.send(b"b") == []
    note_oldest(rig.engine, oldest)
    assert began_ns < oldest[PARTITION] < first_ns
    assert (np.delete(oldest, PARTITION) == NEVER).all()
    rig.commit(1)
    assert rig.send() == [b"a"]
    note_oldest(rig.engine, oldest)
    assert first_ns < oldest[PARTITION] < time.monotonic_ns()
    rig.engine.held.parking[PARTITION] = 0
    rig.commit(2)
    assert rig.send() == [b"b"]
    note_oldest(rig.engine, oldest)
    assert (oldest == NEVER).all()


def test_nobody_waits_for_ever(rig, monkeypatch):
    rig.table.set_role(PARTITION, NO_ROLE, 2)
    assert rig.send(b"a") == []
    rig.engine.held.packets[:, 5] -= 3_000_000_000  # as if it had waited so long
    assert rig.send() == []
    assert rig.counts()["state_unreachable"] == 1


def test_a_young_expiry_is_not_renewed_for_every_packet():
    rig = Replicated("firewall")
    assert rig.send(b"a") == [b"a"]
    first = rig.changed()
    rig.send(b"b")
    settled = rig.changed()
    for _ in range(3):
        assert rig.send(b"c") == [b"c"]
    assert rig.changed() <= settled + 1  # the second may turn meanwhile, the time-out's eighth does not
    assert first >= 1
    rig.table.close()


def test_a_nat_waits_for_its_mapping_and_its_port(rig):
    nat = Replicated("nat", external_addresses=["192.0.2.1"])
    nat.table.words[int(nat.table.words[COMMITTED_AT]) : int(nat.table.words[COMMITTED_AT]) + PARTITIONS] = 0
    assert nat.send(b"a") == []
    assert len(list(nat.table.records())) == 2
    committed = slice(int(nat.table.words[COMMITTED_AT]), int(nat.table.words[COMMITTED_AT]) + PARTITIONS)
    nat.table.words[committed] = np.uint64(9)
    assert nat.send() == [b"a"]
    nat.table.close()
