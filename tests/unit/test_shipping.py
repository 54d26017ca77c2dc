"""Changes on their way from a primary's table to a backup's, frame by frame."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.replication import shipping as ship
from datastore.replication.applying import apply
from datastore.replication.completions import count_completions, note_completion
from datastore.replication.frames import ACK_WORDS, CLAIM, GAP, IMAGE, REPLICATE_WORDS
from datastore.replication.link import (
    ASYNCHRONOUS,
    COUNTED,
    COUNTS,
    DONE_ACKED,
    EPOCH,
    JOINED,
    LEARNING,
    MEMBER,
    MODE,
    STANDING,
    Shipping,
    make_shipping,
)
from datastore.replication.shipping import feed, lose, ship_all, synchronised, take_ack
from datastore.store import layout, roles
from datastore.store.layout import BACKUP, NO_ROLE, PRIMARY, RETIRING, VALUE
from datastore.store.protocol import FRAME_HEADER_WORDS, find_client
from datastore.store.records import commit_record, open_record, sweep
from datastore.store.roles import changes, committed
from datastore.store.statuses import BAD_FRAME, OK, STALE_EPOCH, TOO_MANY_CLIENTS, UNKNOWN_PARTITION
from datastore.store.table import Table

pytestmark = pytest.mark.bounds
PARTITIONS, SECRET = 2, 99
HIGH = np.uint64(7)


class Side(NamedTuple):
    """A host: its table, who works on it, and what its store process remembers."""

    table: Table
    owner: int
    shipping: Shipping

    def write(self, number: int, value: int) -> None:
        """Set the first word of a record of partition 0."""
        slot = int(open_record(self.table.words, self.owner, np.uint64(number << 32), HIGH, 9, 1))
        assert slot > 0
        self.table.words[slot + VALUE] = value
        commit_record(self.table.words, self.owner, slot, 0)

    def records(self) -> dict[int, tuple[int, int]]:
        return {r.low >> 32: (r.version, int.from_bytes(r.value[:8], "little")) for r in self.table.records(0)}

    def frames(self, now_ns: int = 1) -> list[np.ndarray]:
        """Ship all that is due to peer 0; return the frames' bodies."""
        out = np.zeros(1 << 15, np.uint64)
        end = int(ship_all(self.shipping, self.table.words, self.owner, 0, now_ns, out, 0, out.size))
        found, at = [], 0
        while at < end:
            length = int(out[at] >> np.uint64(32)) // 8
            found.append(out[at + FRAME_HEADER_WORDS : at + length].copy())
            at += length
        return found

    def take(self, frame: np.ndarray) -> np.ndarray | None:
        """Apply a frame; return the acknowledgment."""
        ack = np.zeros(ACK_WORDS, np.uint64)
        words = apply(self.shipping, self.table.words, self.owner, 1, frame, 0, frame.size, ack, 0)
        return ack if words else None

    def hear(self, ack: np.ndarray | None) -> int:
        assert ack is not None
        return int(take_ack(self.shipping, self.table.words, 0, ack, 0))


def status_of(ack: np.ndarray | None) -> int:
    assert ack is not None
    return int(ack[0]) >> 16 & 0xFF


def ring_of(side: Side, client_id: int) -> int:
    """Return the word index of a client's first completion record."""
    words = side.table.words
    client = int(find_client(words, np.uint64(client_id), 1, side.shipping.connected))
    return int(words[layout.CLIENTS_AT]) + client * int(words[layout.CLIENT_STRIDE]) + layout.CLIENT_HEADER_WORDS


def make_side(role: int) -> Side:
    table = Table.anonymous("test", 60, 16, PARTITIONS, epoch=1, clients=4, window=8, replication_secret=SECRET)
    table.set_role(0, role, 1)
    connected = np.zeros(4, np.uint8)
    return Side(table, table.register_owner(), make_shipping(table.words, 1, connected))


@pytest.fixture
def pair() -> Iterator[tuple[Side, Side]]:
    """A primary of partition 0 and a host that is to be its backup since map 1."""
    primary, backup = make_side(PRIMARY), make_side(NO_ROLE)
    backup.shipping.followed[0] = (-1, 0, 1, MEMBER)
    feed(primary.shipping, primary.table.words, 0, 0, LEARNING, 1, IMAGE)
    yield primary, backup
    for side in (primary, backup):
        side.table.verify()
        side.table.close()


def exchange(primary: Side, backup: Side) -> None:
    """Ship and acknowledge until nothing is due."""
    for turn in range(10):
        frames = primary.frames((turn + 2) * ship.NEWS_AFTER_NS)
        for frame in frames:
            ack = backup.take(frame)
            if ack is not None:
                assert primary.hear(ack) == OK
        if not frames:
            return
    raise AssertionError("there is always something to ship")


def test_an_image_then_what_changed_then_what_is_committed(pair):
    primary, backup = pair
    for number in range(20):
        primary.write(number, number + 1)
    assert changes(primary.table.words, 0) == 20
    exchange(primary, backup)
    assert primary.shipping.links[0, 0, MODE] == COUNTED
    assert synchronised(primary.shipping)[0, 0]
    assert backup.records() == primary.records()
    assert len(backup.records()) == 20
    primary.write(3, 77)
    assert committed(primary.table.words, 0) == 20 < changes(primary.table.words, 0)
    (frame,) = primary.frames()
    assert frame.size == REPLICATE_WORDS + 2 + 5  # one bucket, one slot
    assert primary.frames() == []  # one at a time
    assert primary.hear(backup.take(frame)) == OK
    assert committed(primary.table.words, 0) == 21
    assert committed(backup.table.words, 0) == 20 < changes(backup.table.words, 0)  # dirty: it cannot know
    exchange(primary, backup)
    assert committed(backup.table.words, 0) == 21  # by the news
    assert roles.role(backup.table.words, 0) == BACKUP


def test_a_backup_learns_that_it_counts_though_nothing_changes(pair):
    primary, backup = pair
    primary.write(1, 5)
    exchange(primary, backup)
    assert roles.role(backup.table.words, 0) == BACKUP
    assert committed(backup.table.words, 0) == changes(backup.table.words, 0) == 1


def test_a_record_that_changes_often_is_shipped_once_a_round_trip(pair):
    primary, backup = pair
    exchange(primary, backup)
    for value in range(100):
        primary.write(1, value + 1)
    (frame,) = primary.frames()
    for value in range(100):
        primary.write(1, value + 1000)
    primary.hear(backup.take(frame))
    assert backup.records()[1] == (100, 100)
    exchange(primary, backup)
    assert backup.records()[1] == (200, 1099)


def test_lost_doubled_and_late_frames_do_no_harm(pair):
    primary, backup = pair
    exchange(primary, backup)
    primary.write(1, 5)
    (lost,) = primary.frames(now_ns=10)
    primary.write(2, 6)
    assert lose(primary.shipping, 0, 5, 5) == 0  # not yet
    assert lose(primary.shipping, 0, 11, 11) == 1
    (again,) = primary.frames(now_ns=20)
    ack = backup.take(again)
    assert status_of(ack) == OK
    assert backup.records() == primary.records()
    assert status_of(backup.take(lost)) == OK  # late: it is acknowledged, and nothing is done
    assert status_of(backup.take(again)) == OK
    assert backup.records() == primary.records()
    primary.hear(ack)
    primary.hear(ack)
    exchange(primary, backup)
    assert committed(primary.table.words, 0) == changes(primary.table.words, 0) == 2


def test_who_missed_something_asks_for_an_image(pair):
    primary, backup = pair
    primary.write(1, 5)
    exchange(primary, backup)
    backup.shipping.followed[0, :2] = (-1, 0)  # as a store process that began anew
    primary.write(2, 6)
    (frame,) = primary.frames()
    ack = backup.take(frame)
    assert status_of(ack) == GAP
    assert 2 not in backup.records()
    assert primary.hear(ack) == GAP
    exchange(primary, backup)
    assert backup.records() == primary.records()


def hand_over(former: Side, heir: Side, epoch: int = 2) -> None:
    """Make the backup primary, as `Replica._rule` does, of a former primary that has heard of it."""
    heir.shipping.claims[0] = heir.shipping.followed[0, EPOCH], changes(heir.table.words, 0)
    heir.shipping.followed[0] = (-1, 0, 0, 0)
    feed(heir.shipping, heir.table.words, 0, 0, COUNTED, 1, CLAIM)
    heir.table.set_role(0, PRIMARY, epoch)
    former.shipping.followed[0] = (1, 0, 1, MEMBER)
    former.table.set_role(0, NO_ROLE, epoch)


def buckets_of(frame: np.ndarray) -> int:
    return int(frame[0]) >> 32


def role_of(side: Side) -> int:
    return int(roles.role(side.table.words, 0))


def test_who_hands_over_needs_no_image(pair):
    former, heir = pair
    for number in range(9):
        former.write(number, number + 1)
    exchange(former, heir)
    hand_over(former, heir)
    heir.write(3, 77)
    (frame,) = heir.frames()
    assert buckets_of(frame) == 1
    assert committed(heir.table.words, 0) == 0  # not before it is acknowledged
    assert heir.hear(former.take(frame)) == OK
    assert former.records() == heir.records()
    assert former.records()[3][1] == 77
    assert committed(heir.table.words, 0) == changes(heir.table.words, 0) == 10
    assert role_of(former) == BACKUP
    heir.write(4, 78)
    exchange(heir, former)
    assert former.records() == heir.records()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_claim_without_changes_makes_a_clean_backup(pair, asynchronous):
    former, heir = pair
    for side in pair:
        side.shipping.control[ASYNCHRONOUS] = asynchronous
    former.write(1, 5)
    exchange(former, heir)
    hand_over(former, heir)
    (frame,) = heir.frames()
    assert buckets_of(frame) == 0
    assert heir.hear(former.take(frame)) == OK
    assert role_of(former) == BACKUP
    exchange(heir, former)  # the news of it
    assert committed(former.table.words, 0) == changes(former.table.words, 0) == 1
    assert former.records() == heir.records() == {1: (1, 5)}


@pytest.mark.parametrize("of_which_reign", [1, 7])
def test_who_has_more_than_is_claimed_or_of_another_reign_gets_an_image(pair, of_which_reign):
    former, heir = pair
    former.write(1, 5)
    exchange(former, heir)
    if of_which_reign == 1:
        former.write(2, 6)  # never committed
    hand_over(former, heir)
    former.shipping.followed[0, EPOCH] = of_which_reign
    (frame,) = heir.frames()
    ack = former.take(frame)
    assert status_of(ack) == GAP
    assert role_of(former) == NO_ROLE
    assert heir.hear(ack) == GAP
    exchange(heir, former)
    assert former.records() == heir.records() == {1: (1, 5)}
    assert role_of(former) == BACKUP


def test_a_lost_claim_is_made_again_with_all_that_changed_since(pair):
    former, heir = pair
    former.write(1, 5)
    exchange(former, heir)
    hand_over(former, heir)
    heir.write(2, 6)
    (lost,) = heir.frames()
    lose(heir.shipping, 0, 1 << 60, 0)
    heir.write(3, 7)
    (again,) = heir.frames()
    assert status_of(former.take(lost)) == OK  # late, but before the other
    assert heir.hear(former.take(again)) == OK
    assert status_of(former.take(lost)) == OK  # known: nothing is done
    assert former.records() == heir.records() == {1: (1, 5), 2: (1, 6), 3: (1, 7)}
    assert committed(heir.table.words, 0) == changes(heir.table.words, 0)


def test_who_rules_takes_no_frames_until_it_has_heard_that_it_does_not(pair):
    former, heir = pair
    former.write(1, 5)
    exchange(former, heir)
    hand_over(former, heir)
    former.table.set_role(0, RETIRING, 1)
    former.shipping.followed[0] = (-1, 0, 0, 0)
    (frame,) = heir.frames()
    assert status_of(former.take(frame)) == STALE_EPOCH
    assert role_of(former) == RETIRING
    former.table.set_role(0, NO_ROLE, 2)
    former.shipping.followed[0] = (1, 0, 1, MEMBER)
    assert status_of(former.take(frame)) == OK
    assert former.records() == heir.records()


def test_an_image_takes_away_what_the_primary_does_not_have(pair):
    primary, backup = pair
    backup.table.set_role(0, PRIMARY, 0)
    for number in range(9):
        backup.write(number, 1)
    backup.table.set_role(0, NO_ROLE, 0)
    primary.write(4, 2)
    exchange(primary, backup)
    assert backup.records() == primary.records() == {4: (1, 2)}


def test_frames_of_a_deposed_primary_or_for_a_former_replica_are_refused(pair):
    primary, backup = pair
    exchange(primary, backup)
    primary.write(1, 5)
    (frame,) = primary.frames()
    backup.table.set_role(0, BACKUP, 2)
    assert status_of(backup.take(frame)) == STALE_EPOCH
    backup.table.set_role(0, BACKUP, 1)
    backup.shipping.followed[0, JOINED] = 4
    assert status_of(backup.take(frame)) == STALE_EPOCH
    backup.shipping.followed[0, JOINED] = 1
    assert status_of(backup.take(frame)) == OK


def test_completion_records_travel_with_their_changes_and_go_with_an_image(pair):
    primary, backup = pair
    done, stale = ring_of(primary, 42), ring_of(backup, 43)
    primary.table.words[done + layout.DONE_SEQUENCE] = 8
    backup.table.words[stale + layout.DONE_SEQUENCE] = 16
    primary.write(1, 5)
    exchange(primary, backup)
    assert backup.table.words[ring_of(backup, 42) + layout.DONE_SEQUENCE] == 8
    assert backup.table.words[stale + layout.DONE_SEQUENCE] == 0


def test_a_partition_without_completion_records_gets_its_first_one_later(pair):
    primary, backup = pair
    primary.write(1, 5)
    exchange(primary, backup)  # an image, which found none: neither side searches for them again until there is one
    done = ring_of(primary, 42)
    primary.table.words[done + layout.DONE_SEQUENCE] = 8
    note_completion(primary.shipping, 0, done)
    primary.write(1, 6)
    exchange(primary, backup)
    for side in (primary, backup):
        assert count_completions(side.shipping, side.table.words, 0) == 1
    assert backup.table.words[ring_of(backup, 42) + layout.DONE_SEQUENCE] == 8


def test_a_frame_carries_no_other_partitions_completion_record(pair):
    """The client went on a whole window, with partition 1, before its record of partition 0 was shipped."""
    primary, backup = pair
    exchange(primary, backup)
    done = ring_of(primary, 42)
    note_completion(primary.shipping, 0, done)
    primary.write(1, 5)
    primary.table.words[done + layout.DONE_SEQUENCE] = 16
    primary.table.words[done + layout.DONE_STATUS] = 1 << 8
    exchange(primary, backup)
    assert backup.table.words[ring_of(backup, 42) + layout.DONE_SEQUENCE] == 0
    assert primary.shipping.links[0, 0, DONE_ACKED] == primary.shipping.done_end[0]


def completion_frame(primary: Side, backup: Side, clients: list[int]) -> np.ndarray:
    """Return a frame with a change and a completion record of each of some clients."""
    exchange(primary, backup)
    for client in clients:
        primary.table.words[ring_of(primary, client) + layout.DONE_SEQUENCE] = 8
        note_completion(primary.shipping, 0, ring_of(primary, client))
    primary.write(9, 9)
    (frame,) = primary.frames(10**9)
    return frame


def test_a_client_busy_at_the_primary_is_busy_at_the_backup(pair):
    primary, backup = pair
    used = int(layout.client_at(backup.table.words, find_client(backup.table.words, np.uint64(42), 1, backup.shipping.connected)))
    frame, ack = completion_frame(primary, backup, [42]), np.zeros(ACK_WORDS, np.uint64)
    apply(backup.shipping, backup.table.words, backup.owner, 500, frame, 0, frame.size, ack, 0)
    assert status_of(ack) == OK
    assert backup.table.words[used + layout.CLIENT_USED_S] == 500


def test_a_frame_whose_clients_find_no_room_changes_nothing(pair):
    primary, backup = pair
    frame = completion_frame(primary, backup, [42])
    before = backup.records()
    backup.shipping.connected[:] = 1
    for client in range(4):
        backup.table.words[int(layout.client_at(backup.table.words, client)) + layout.CLIENT_ID] = 100 + client
    assert status_of(backup.take(frame)) == TOO_MANY_CLIENTS
    assert backup.records() == before
    assert roles.role(backup.table.words, 0) == BACKUP
    backup.shipping.connected[:] = 0
    backup.table.words[int(layout.client_at(backup.table.words, 0)) + layout.CLIENT_ID] = 42
    assert status_of(backup.take(frame)) == OK


def test_who_counts_is_a_backup_only_as_a_member(pair):
    primary, backup = pair
    backup.shipping.followed[0, STANDING] = 0  # its map names it a learner
    exchange(primary, backup)
    assert primary.shipping.links[0, 0, MODE] == COUNTED
    assert roles.role(backup.table.words, 0) == NO_ROLE
    assert backup.shipping.followed[0, STANDING] == COUNTS


def test_the_primary_alone_frees_what_expired(pair):
    """Nine records of one bucket of seven: a copy that freed the eighth by itself would forget that a ninth stands elsewhere."""
    primary, backup = pair
    words, high = primary.table.words, HIGH
    home = [n for n in range(1, 2000) if layout.home_bucket(words, layout.hash32(words, np.uint64(n << 32), high)) == 2]
    for number in home[:9]:
        slot = int(open_record(words, primary.owner, np.uint64(number << 32), high, 9, 1))
        assert slot > 0
        words[slot + VALUE] = number
        commit_record(words, primary.owner, slot, 10 if number == home[7] else 0)
    exchange(primary, backup)
    for side, freed in ((backup, 0), (primary, 1)):
        assert sweep(side.table.words, side.owner, 0, 20, 1000) == freed
    exchange(primary, backup)
    assert len(backup.records()) == len(primary.records()) == 8


def test_deletions_and_overflow_are_shipped_too(pair):
    primary, backup = pair
    exchange(primary, backup)
    rng = np.random.default_rng(3)
    for round_ in range(30):
        for number in rng.integers(0, 30, 10):
            primary.write(int(number), round_ * 100 + int(number))
        now_s = int(rng.integers(0, 3))
        if now_s == 0:
            slot = int(open_record(primary.table.words, primary.owner, np.uint64(int(number) << 32), HIGH, 9, 1))
            commit_record(primary.table.words, primary.owner, slot, 2)  # it expires: the next to come finds it so
            int(open_record(primary.table.words, primary.owner, np.uint64(int(number) << 32), HIGH, 9, 5))
            commit_record(primary.table.words, primary.owner, slot, 0)
        exchange(primary, backup)
        assert backup.records() == primary.records()
        backup.table.verify()


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_frame_can_write_outside_the_partition(data):
    backup = make_side(NO_ROLE)
    try:
        backup.shipping.followed[0] = (-1, 0, 1, MEMBER)
        words = data.draw(st.lists(st.integers(0, 2**64 - 1), max_size=40))
        frame = np.array(words, np.uint64)
        if frame.size >= REPLICATE_WORDS and data.draw(st.booleans()):  # past the first checks
            frame[0] = frame[0] & np.uint64(0x7_0000_0000) | np.uint64(1 << 16)
            frame[1], frame[3] = 1 | 1 << 32, 5
            frame[7] &= np.uint64(3 << 32)
        before = backup.table.words.copy()
        status = status_of(backup.take(frame)) if frame.size else BAD_FRAME
        if status in (BAD_FRAME, UNKNOWN_PARTITION, STALE_EPOCH, GAP):
            assert (backup.table.words == before).all()
        second = int(before[layout.FIRST] + before[layout.STRIDE])
        assert (
            backup.table.words[second : int(before[layout.CLIENTS_AT])] == before[second : int(before[layout.CLIENTS_AT])]
        ).all()
    finally:
        backup.table.close()
