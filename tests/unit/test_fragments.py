"""Do fragments that overtake their first one follow it, bounded in number and time, and is every one of them accounted for?"""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP, UDP, fragment
from scapy.layers.l2 import Ether

from datastore.base.partitioning import PARTITIONS
from datastore.store.layout import PRIMARY
from datastore.store.table import Table
from nfs.dataplane import load
from nfs.dataplane.fragments import HOLD_NS, MOST_HELD, make_room
from nfs.dataplane.headers import INSIDE, OUTSIDE
from tests.packets import CLIENT, CLIENT_PORT, SERVER, ethernet, fragments6, tcp
from tests.rig import VALUE_BYTES, Rig

pytestmark = pytest.mark.bounds
PLACES = 4
"""Of the rig's room: 512 frames."""
NFS: dict[str, dict[str, Any]] = {
    "firewall": {}, "nat": {"external_addresses": ["192.0.2.1"]}, "nat_symmetric": {"external_addresses": ["192.0.2.1"]},
    "load_balancer": {"virtual_address": SERVER, "backends": ["10.128.0.9"]},
}  # fmt: skip


def parts_of(identification: int, pieces: int = 3, source: str = CLIENT, upper: Any = None) -> list[bytes]:
    """Return the fragments of a datagram from the client to the server, in order."""
    header: Any = IP(src=source, dst=SERVER, id=identification)
    whole = header / (upper or UDP(sport=CLIENT_PORT, dport=4789)) / bytes(800 * pieces - 8)
    found = [bytes(ethernet() / part) for part in fragment(whole, 800)]
    assert len(found) == pieces
    return found


def rig_of(name: str, **more: Any) -> Rig:
    return Rig([load(name)], {name: NFS[name]}, **more)


def offsets(left: list[tuple[int, bytes]]) -> list[int]:
    return [Ether(frame)[IP].frag for _, frame in left]


def in_order_of_release(order: tuple[int, ...]) -> list[int]:
    """Return which fragments leave, one behind the other: the first, what came before it, what comes after it."""
    first = order.index(0)
    return [0, *order[:first], *order[first + 1 :]]


@pytest.mark.parametrize("name", NFS)
def test_fragments_in_any_order_follow_their_first(name: str) -> None:
    """RFC 4787, REQ-14."""
    rig = rig_of(name)
    for number, order in enumerate(itertools.permutations(range(3))):
        parts = parts_of(100 + number)
        left = rig.burst([parts[n] for n in order])
        assert offsets(left) == [100 * n for n in in_order_of_release(order)]
        assert rig.counts()["waiting"] == 0
    assert rig.counts()["forwarded"] == rig.counts()["received"]


def test_fragments_that_wait_are_translated_as_their_first() -> None:
    rig = rig_of("nat")
    rig.burst([parts_of(1, source="10.0.1.8")[0]])  # another client has the port
    rig.burst(parts_of(2)[::-1])
    left = rig.burst(parts_of(3)[::-1])
    assert {Ether(frame)[IP].src for _, frame in left} == {"192.0.2.1"}
    assert Ether(left[0][1])[UDP].sport != CLIENT_PORT


def test_ipv6_fragments_follow_their_first_too() -> None:
    parts = fragments6(UDP(sport=4000, dport=53) / bytes(3000))
    rig = rig_of("firewall")
    assert rig.burst(parts[::-1]) == [(OUTSIDE, frame) for frame in [parts[0], *parts[:0:-1]]]


def test_fragments_that_come_one_by_one_follow_their_first(where: dict[str, Any]) -> None:
    """Also where the flow's record is on another host: they wait in its flight, in order."""
    rig = rig_of("firewall", **where)
    parts = parts_of(7)
    assert rig.burst([parts[2]], turns=2) == []
    assert rig.burst([parts[1]], turns=2) == []
    assert rig.counts()["waiting"] == 2
    assert offsets(rig.burst([parts[0]])) == [0, 200, 100]


def test_only_the_fragments_of_the_datagram_go_on() -> None:
    rig = rig_of("firewall")
    assert rig.burst([parts_of(7)[1], parts_of(8)[1]], turns=2) == []
    assert rig.burst([parts_of(7)[0]], OUTSIDE, turns=2) == [], "that is another datagram, from the other side"
    assert offsets(rig.burst([parts_of(8)[0]], turns=2)) == [0, 100]
    assert rig.burst([], turns=100) == []
    assert rig.counts()["fragment"] == 1


def test_a_fragment_whose_first_does_not_come_is_dropped_in_time() -> None:
    rig = rig_of("firewall")
    assert rig.burst([parts_of(7)[1]], turns=2) == []
    time.sleep(HOLD_NS / 1e9)
    assert rig.burst([], turns=2) == []
    assert (rig.counts()["fragment"], rig.counts()["waiting"]) == (1, 0)
    assert offsets(rig.burst(parts_of(7))) == [0, 100, 200]


def test_fragments_without_a_first_take_no_more_than_the_room() -> None:
    """An attacker's are dropped for newer ones, each of them accounted for; the frame pool stays free."""
    rig = rig_of("firewall")
    flood = [parts_of(1000 + number)[1] for number in range(200)]
    for at in range(0, len(flood), 50):
        assert rig.burst(flood[at : at + 50], turns=1) == []
        assert rig.counts()["waiting"] <= PLACES
    counts = rig.counts()
    assert counts["fragment_room_full"] + counts["fragment"] + counts["waiting"] == 200
    assert counts["fragment_room_full"] > 0
    assert offsets(rig.burst(parts_of(7)[::-1])) == [0, 200, 100], "newer ones still find their first"


def test_a_room_is_a_small_part_of_the_frames() -> None:
    assert [make_room(frames).frames.size for frames in (64, 128, 8192, 1 << 20)] == [0, 1, 64, MOST_HELD]


def test_a_function_that_passes_fragments_lets_none_wait() -> None:
    rig = Rig([load("traffic_counter")])
    parts = parts_of(7)[::-1]
    assert rig.burst(parts, turns=1) == [(OUTSIDE, part) for part in parts]


def test_fragments_that_wait_are_parked_with_their_flow() -> None:
    """Their partition is known with their first one: it may be on its way to another host by then."""
    table = Table.anonymous("held", 4096, VALUE_BYTES, replication_secret=3)
    for partition in range(PARTITIONS):
        table.set_role(partition, PRIMARY, 1)
    table.words[int(table.words[_committed()]) : int(table.words[_committed()]) + PARTITIONS] = 1 << 40
    rig = rig_of("firewall", table=table)
    parts = parts_of(7)
    assert rig.burst(parts[1:], turns=1) == []
    rig.engine.held.parking[(CLIENT_PORT & 0x1FE) >> 1] = 1
    assert rig.burst([parts[0]], turns=2) == []
    assert rig.counts()["waiting"] == 3
    rig.engine.held.parking[:] = 0
    assert offsets(rig.burst([], turns=20)) == [0, 100, 200]
    table.close()


def _committed() -> int:
    from datastore.store.layout import COMMITTED_AT

    return COMMITTED_AT


@pytest.mark.parametrize("late", [False, True])
def test_a_fragment_that_overlaps_its_first_is_refused(late: bool) -> None:
    """RFC 3128, RFC 5722: it would overwrite the header that was let through."""
    rig = rig_of("firewall")
    first, second, third = parts_of(7)
    overlapping = ethernet() / IP(src=CLIENT, dst=SERVER, id=7, frag=3, flags="MF", proto=17) / bytes(800)
    frames = [bytes(overlapping), first] if late else [first, bytes(overlapping)]
    assert offsets(rig.burst([*frames, second, third])) == [0, 100, 200]
    assert rig.counts()["malformed"] == 1


def test_a_fragment_within_the_tcp_header_is_refused_with_or_without_its_first() -> None:
    rig = rig_of("firewall")
    assert rig(tcp("S")) and rig.outside(tcp("SA", inside=False)) and rig(tcp("A"))  # noqa: PT018
    header: Any = IP(src=SERVER, dst=CLIENT, id=9, flags="MF")
    answer = header / TCP(sport=80, dport=CLIENT_PORT, flags="A") / bytes(4)
    over = bytes(ethernet() / IP(src=SERVER, dst=CLIENT, id=9, frag=1, proto=6) / bytes.fromhex("000000005002ffff00000000"))
    assert rig.outside(over) == []
    assert rig.outside(bytes(ethernet() / answer)) != []
    assert rig.outside(over) == []
    assert rig.counts()["malformed"] == 2


def test_later_fragments_count_for_their_sender() -> None:
    """Where records are kept by address, a fragment needs no ports, and hides from no limit."""
    rig = Rig([load("rate_limiter")], {"rate_limiter": {"packets_per_s": 1, "burst_packets": 2}})
    parts = [parts_of(50 + number)[2] for number in range(5)]
    assert len(rig.burst(parts)) == 2
    assert rig.counts()["rate_exceeded"] == 3
    assert [side for side, _ in rig.burst([parts_of(60, source="10.0.1.99")[1]], INSIDE)] == [OUTSIDE]
