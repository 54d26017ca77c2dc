"""How a move brings packets and state together: park, steer, then drain and hand over side by side, go."""

from __future__ import annotations

import json
import select
import socket
from pathlib import Path
from typing import Any

import pytest

from datastore.base.errors import NearstateError
from datastore.coordination.attendance import Attendance
from datastore.coordination.coordinator import Coordinator, HostState
from datastore.coordination.heartbeats import Heartbeat, Timing
from datastore.coordination.maps import ClusterMap
from datastore.coordination.switch import Switch
from datastore.coordination.switchover import BATCH, Instance, Switchover, check_steering

HOSTS = ("nf1", "nf2")
TIMING = Timing()
SPAN_NS = TIMING.lease_ns + TIMING.margin_ns


class Cluster:
    """A coordinator and its switchover; stores and instances that say what they are told to."""

    def __init__(
        self, replicas: int = 2, partitions: int = 4, moves: dict[int, str] | None = None, handed_over: bool = False,
        heard: bool = True,
    ) -> None:  # fmt: skip
        """moves: under way since an earlier coordinator. handed_over: partition 0 is nf2's by now, and so are its packets.
        heard: everybody has spoken already."""
        placement = [[HOSTS[(p + r) % 2] for r in range(replicas)] for p in range(partitions)]
        if handed_over:
            placement[0].reverse()
        self.now_ns = 10**12
        self.coordinator = Coordinator(ClusterMap.first(placement), 1, replicas, {host: HostState(self.now_ns) for host in HOSTS})
        self.coordinator.moves |= moves or {}
        self.switchover = Switchover.of(list(HOSTS), [group[0] for group in placement], True)
        self.switchover.take_charge(self.coordinator)
        if heard:
            self.beat()

    def beat(self, silent: str = "", **said: Any) -> None:
        """Let every store follow the newest map, and every instance report; `silent` does not."""
        self.now_ns += 1_000_000
        for number, host in enumerate(HOSTS):
            if host != silent:
                beat = Heartbeat(host, 1, number + 1, self.coordinator.map.epoch, self.now_ns, **said.get(host, {}))
                self.coordinator.hear(self.now_ns, beat)
                self.report(host)
        self.plan()

    def report(self, host: str, parked: tuple[int, ...] = (), quiet: tuple[int, ...] = ()) -> None:
        epoch = self.coordinator.map.epoch
        self.switchover.hear(self.now_ns, {"host": host, "epoch": epoch, "parked": parked, "quiet": quiet})

    def plan(self) -> None:
        self.switchover.plan(self.now_ns, self.coordinator)
        self.coordinator.advance(self.now_ns)

    def hand_over(self, partition: int) -> None:
        """Let nf1's store say that it has stopped."""
        epoch = self.coordinator.map.epoch
        self.coordinator.hear(self.now_ns, Heartbeat("nf1", 1, 1, epoch, self.now_ns, released=(partition,)))
        self.plan()

    def drain(self, host: str) -> None:
        """Have the switch do what it was told, packets settle, and an instance say that none of partition 0 is there."""
        self.switchover.confirmed = list(self.switchover.steering)
        self.plan()
        self.switchover.see(self.now_ns, frozenset(), self.now_ns + 1)
        self.report(host, quiet=(0,))
        self.plan()

    def orders(self, host: str) -> dict[str, Any]:
        return self.switchover.orders(host, self.coordinator)

    def successor(self, partition: int) -> str | None:
        return self.coordinator.map.groups[partition].successor


def steered() -> Cluster:
    """Return a cluster whose partition 0 goes from nf1 to nf2, which gets its packets by now."""
    cluster = Cluster()
    cluster.coordinator.move([0], "nf2")
    cluster.plan()
    cluster.report("nf2", parked=(0,))
    cluster.plan()
    cluster.switchover.confirmed = list(cluster.switchover.steering)
    cluster.plan()
    return cluster


def test_a_move_takes_its_steps_in_order():
    cluster = Cluster()
    switchover = cluster.switchover
    cluster.coordinator.move([0], "nf2")
    cluster.plan()
    assert cluster.orders("nf2")["park"] == [0]
    assert cluster.orders("nf1") == {"map": None, "park": [], "watch": []}
    assert switchover.steering[0] == "nf1"  # not before nf2 keeps what comes
    cluster.report("nf2", parked=(0,))
    cluster.report("nf1", quiet=(0,))  # of before: it does not count
    cluster.plan()
    assert switchover.steering[0] == "nf2"
    assert cluster.orders("nf1")["watch"] == []
    switchover.confirmed = list(switchover.steering)
    cluster.plan()
    assert switchover.unsettled()
    assert cluster.successor(0) == "nf2"  # the state goes while packets may still come the old way
    assert cluster.orders("nf1")["watch"] == []
    cluster.hand_over(0)
    assert cluster.coordinator.map.groups[0].primary == "nf2"
    assert cluster.orders("nf2")["park"] == [0]  # nf1 may still be at those before
    switchover.see(cluster.now_ns, frozenset(), cluster.now_ns + 1)
    cluster.plan()
    assert not switchover.unsettled()
    assert cluster.orders("nf1")["watch"] == [0]
    assert cluster.coordinator.moves == {0: "nf2"}
    cluster.report("nf1", quiet=(0,))
    cluster.plan()
    assert cluster.orders("nf2")["park"] == []
    assert cluster.coordinator.moves == {}


def test_state_that_arrives_after_the_packets_is_waited_for():
    cluster = steered()
    cluster.switchover.see(cluster.now_ns, frozenset(), cluster.now_ns + 1)
    cluster.plan()
    cluster.report("nf1", quiet=(0,))
    cluster.plan()
    assert cluster.orders("nf2")["park"] == [0]
    cluster.hand_over(0)
    assert cluster.orders("nf2")["park"] == []
    assert cluster.coordinator.moves == {}


def test_a_coordinator_that_ends_within_a_move_is_followed_by_one_that_ends_it():
    before = steered()
    before.hand_over(0)
    cluster = Cluster(moves=dict(before.coordinator.moves), handed_over=True)
    cluster.report("nf2", parked=(0,))
    cluster.plan()
    assert cluster.orders("nf2")["park"] == [0]  # packets of before may be at nf1
    cluster.drain("nf1")
    assert cluster.orders("nf2")["park"] == []
    assert cluster.coordinator.moves == {}


def test_a_coordinator_that_begins_anew_steers_to_the_primaries_not_to_where_packets_began():
    cluster = Cluster(handed_over=True, heard=False)
    cluster.switchover.steering[0] = "nf1"  # as configured
    cluster.switchover.resume(cluster.coordinator)
    cluster.plan()  # nobody was heard yet
    assert cluster.switchover.steering == ["nf2", "nf2", "nf1", "nf2"]


def after_a_crash(steering: list[str], **cluster: Any) -> Cluster:
    """Return a cluster whose coordinator began after another one, and has heard of nobody; the switch says `steering`."""
    begun = Cluster(heard=False, **cluster)
    begun.switchover.resume(begun.coordinator)
    begun.plan()
    begun.switchover.learn(steering)
    return begun


def test_packets_that_an_earlier_coordinator_steered_ahead_stay_there():
    """They wait at the target: back at the source, later ones would overtake them."""
    cluster = after_a_crash(["nf2", "nf2", "nf1", "nf2"], moves={0: "nf2"})
    cluster.plan()
    assert cluster.switchover.steering[0] == "nf2"
    cluster.report("nf2", parked=(0,))
    assert cluster.orders("nf2")["park"] == [0]  # before any plan knows of it, too
    cluster.report("nf1")
    cluster.plan()
    assert cluster.orders("nf2")["park"] == [0]
    assert cluster.switchover.steering[0] == "nf2"


def test_a_failover_of_an_earlier_coordinator_is_followed_in_order():
    """The switch sends packets to nf1, whose store is gone; nf1 lives, and has some."""
    cluster = after_a_crash(["nf1", "nf2", "nf1", "nf2"], handed_over=True)
    cluster.plan()
    assert cluster.switchover.steering[0] == "nf1"
    for host in HOSTS:
        cluster.report(host)
    cluster.plan()
    assert cluster.switchover.following == {0: "nf2"}
    assert cluster.orders("nf2")["park"] == [0]


def test_who_parks_after_a_failover_goes_on_until_the_others_are_drained():
    """An earlier coordinator has steered the packets to nf2 by now; nf1 may have some."""
    cluster = after_a_crash(["nf2", "nf2", "nf1", "nf2"], handed_over=True)
    cluster.report("nf2", parked=(0,))
    cluster.report("nf1")
    cluster.plan()
    assert cluster.orders("nf2")["park"] == [0]
    cluster.drain("nf1")
    assert cluster.orders("nf2")["park"] == []


def test_who_parks_after_a_failover_does_so_before_a_move_away_from_there_begins():
    """The move was ordered before the failover. Packets that nf2 let go on would overtake those that are at nf1."""
    cluster = after_a_crash(["nf2", "nf2", "nf1", "nf2"], handed_over=True, moves={0: "nf1"})
    cluster.report("nf2", parked=(0,))
    cluster.report("nf1")
    cluster.plan()
    assert cluster.orders("nf2")["park"] == [0]
    assert cluster.orders("nf1")["park"] == []
    cluster.drain("nf1")
    cluster.report("nf2")
    cluster.plan()
    assert cluster.orders("nf2")["park"] == []
    assert cluster.orders("nf1")["park"] == [0]


class SilentSwitch:
    """A switch that says nothing until it is given something to say, and notes what it is told."""

    def __init__(self) -> None:
        self.found: list[str] | None = None
        self.confirmed: list[str] | None = None
        self.settled_ns, self.down = 0, frozenset[str]()
        self.said: list[Any] = []

    def hear(self) -> None:
        pass

    def ask(self) -> None:
        self.said.append("where")

    def tell(self, steering: list[str], unsettled: bool) -> None:
        self.said.append(list(steering))


def test_nothing_is_steered_before_the_switch_has_said_what_it_does():
    cluster, switch = Cluster(moves={0: "nf2"}, heard=False), SilentSwitch()
    cluster.switchover.resume(cluster.coordinator)
    attendance: Attendance[Any] = Attendance(
        cluster.coordinator, cluster.switchover, switch, lambda line, message: None, cluster.now_ns
    )
    cluster.report("nf2", parked=(0,))
    attendance.advance(cluster.now_ns)
    assert switch.said == ["where"]
    switch.found = ["nf2", "nf2", "nf1", "nf2"]
    attendance.advance(cluster.now_ns)
    assert switch.said == ["where", switch.found]


def test_the_controller_says_what_the_switch_does(tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "controller"))
        door.listen()
        switch = Switch(tmp_path / "controller")
        switch.ask()
        controller, _ = door.accept()
        with controller:
            assert json.loads(controller.recv(1000)) == {"command": "where"}
            controller.sendall(b'{"instances": ["nf1", "nf2"], "returns": ["nf1", "nf2"]}\n')
            select.select([*switch.filenos()], [], [], 5)
            switch.hear()
        switch.close()
    assert (switch.found, switch.confirmed) == (["nf1", "nf2"], None)


def test_who_dies_within_a_move_is_not_waited_for():
    cluster = steered()
    for _ in range(SPAN_NS // 1_000_000 + 1):
        cluster.beat(silent="nf1")
        cluster.report("nf2", parked=(0,))
    cluster.plan()
    assert cluster.coordinator.map.groups[0].primary == "nf2"
    assert cluster.orders("nf2")["park"] == []
    assert cluster.coordinator.moves == {}


def test_an_instance_whose_store_is_gone_is_waited_for():
    """What it holds of its store's reign it drops, but what it parked it asks others for."""
    cluster = steered()
    cluster.hand_over(0)
    cluster.switchover.see(cluster.now_ns, frozenset(), cluster.now_ns + 1)
    live_without_a_store(cluster, "nf1", parked=(0,))
    assert cluster.orders("nf2")["park"] == [0, 2]  # 2 has failed over with its store
    cluster.report("nf1", quiet=(0,))
    cluster.plan()
    assert cluster.orders("nf2")["park"] == [2]
    assert cluster.coordinator.moves == {}


def live_without_a_store(cluster: Cluster, host: str, parked: tuple[int, ...] = ()) -> None:
    """Let a host's store be silent for two leases while its instance reports; the other one says that it parks `parked`."""
    other = HOSTS[1 - HOSTS.index(host)]
    for _ in range(2 * SPAN_NS // 1_000_000):
        cluster.now_ns += 1_000_000
        epoch = cluster.coordinator.map.epoch
        cluster.coordinator.hear(cluster.now_ns, Heartbeat(other, 1, 1 + HOSTS.index(other), epoch, cluster.now_ns))
        cluster.report(host)
        cluster.report(other, parked=parked)
        cluster.plan()


def test_after_a_failover_packets_follow_as_they_follow_a_move():
    """The NF process of the lost store lives: it has packets, and those that are sent elsewhere must not overtake them."""
    cluster = Cluster()
    switchover = cluster.switchover
    live_without_a_store(cluster, "nf1")
    assert cluster.coordinator.map.groups[0].members == ("nf2",)
    assert cluster.orders("nf2")["park"] == [0, 2]
    assert switchover.steering[0] == "nf1"  # not before nf2 keeps what comes
    cluster.report("nf2", parked=(0, 2))
    cluster.plan()
    assert switchover.steering[0] == "nf2"
    switchover.confirmed = list(switchover.steering)
    cluster.plan()
    assert switchover.unsettled()
    assert cluster.orders("nf1")["watch"] == []  # the switch may still send it some
    switchover.see(cluster.now_ns, frozenset(), cluster.now_ns + 1)
    cluster.plan()
    assert cluster.orders("nf1")["watch"] == [0, 2]
    assert cluster.orders("nf2")["park"] == [0, 2]
    cluster.report("nf1", quiet=(0, 2))
    cluster.plan()
    assert cluster.orders("nf2")["park"] == []
    assert cluster.orders("nf1")["watch"] == []
    assert cluster.coordinator.moves == {}


def test_a_move_of_what_has_failed_over_begins_when_its_packets_have_followed():
    cluster = Cluster()
    live_without_a_store(cluster, "nf1")
    cluster.coordinator.move([0], "nf1")
    cluster.plan()
    assert cluster.successor(0) is None
    assert 0 not in (cluster.coordinator.may_hand_over or ())


def test_packets_go_where_they_can_be_served_when_the_targets_store_is_gone():
    """What had come to the source before goes first, then what the target kept, then what comes to the source from now on."""
    cluster = steered()
    live_without_a_store(cluster, "nf2")
    assert cluster.coordinator.map.groups[0].members == ("nf1",)
    assert cluster.orders("nf2")["park"] == [0]
    assert cluster.orders("nf1")["park"] == [1, 3]  # of 0 it has some from before
    cluster.report("nf2", parked=(0,))
    cluster.report("nf1", parked=(1, 3))
    cluster.switchover.see(cluster.now_ns, frozenset(), cluster.now_ns + 1)
    cluster.plan()
    assert cluster.switchover.steering[0] == "nf2"
    assert cluster.orders("nf1")["watch"] == [0]
    cluster.report("nf1", parked=(1, 3), quiet=(0,))
    cluster.plan()
    assert cluster.orders("nf2")["park"] == []
    assert cluster.orders("nf1")["park"] == [0, 1, 3]
    cluster.report("nf1", parked=(0, 1, 3))
    cluster.plan()
    assert cluster.switchover.steering[0] == "nf1"


def test_a_target_that_dies_after_its_store_keeps_nothing_back():
    cluster = steered()
    live_without_a_store(cluster, "nf2")
    cluster.switchover.instances["nf2"].has_ended = True
    cluster.plan()
    assert cluster.switchover.draining == {}
    assert cluster.switchover.steering[0] == "nf1"


def test_who_was_not_heard_yet_is_waited_for_in_a_move_of_an_earlier_coordinator():
    cluster = Cluster(moves={0: "nf2"}, handed_over=True, heard=False)
    cluster.report("nf2", parked=(0,))
    for _ in range(3):
        cluster.switchover.confirmed = list(cluster.switchover.steering)
        cluster.plan()
        cluster.now_ns += 1_000_000
        cluster.switchover.see(cluster.now_ns, frozenset(), cluster.now_ns)
    assert cluster.orders("nf2")["park"] == [0]  # nf1 may have packets from before
    cluster.now_ns += SPAN_NS
    cluster.coordinator.hear(cluster.now_ns, Heartbeat("nf2", 1, 2, cluster.coordinator.map.epoch, cluster.now_ns))
    cluster.report("nf2", parked=(0,))
    cluster.plan()
    assert cluster.orders("nf2")["park"] == []


def test_no_more_than_a_batch_parks_at_a_time():
    cluster = Cluster(partitions=4 * BATCH)
    cluster.coordinator.move(range(0, 4 * BATCH, 2), "nf2")
    cluster.plan()
    assert len(cluster.orders("nf2")["park"]) == BATCH


def test_a_dead_instance_loses_its_packets_at_once_and_its_partitions_after():
    cluster = Cluster()
    for _ in range(SPAN_NS // 1_000_000 + 1):
        cluster.now_ns += 1_000_000
        for number, host in enumerate(HOSTS):
            cluster.coordinator.hear(
                cluster.now_ns, Heartbeat(host, 1, number + 1, cluster.coordinator.map.epoch, cluster.now_ns)
            )
        cluster.report("nf2")
        cluster.plan()
    assert cluster.switchover.steering == ["nf2"] * 4
    assert {cluster.successor(p) for p in (0, 2)} == {"nf2"}  # without waiting for the dead to drain


def test_who_was_stopped_judges_nobody_before_all_had_time_to_speak():
    cluster = Cluster()
    cluster.now_ns += 2 * SPAN_NS  # the whole machine stood still
    cluster.coordinator.was_stopped(cluster.now_ns)
    cluster.beat(silent="nf1")
    assert cluster.switchover.steering == ["nf1", "nf2", "nf1", "nf2"]
    assert {group.members for group in cluster.coordinator.map.groups} == {("nf1", "nf2"), ("nf2", "nf1")}
    assert cluster.coordinator.next_lapse_ns(cluster.now_ns) <= cluster.now_ns + 2 * TIMING.heartbeat_ns
    for _ in range(2 * TIMING.heartbeat_ns // 1_000_000 + 1):
        cluster.beat(silent="nf1")
    assert cluster.switchover.steering == ["nf2"] * 4
    assert {group.members for group in cluster.coordinator.map.groups} == {("nf2",)}


def test_an_instance_that_died_before_this_coordinator_began_is_dead_after_a_while():
    cluster = Cluster(heard=False)
    cluster.switchover.resume(cluster.coordinator)
    cluster.beat(silent="nf1")
    for _ in range(9):
        cluster.now_ns += SPAN_NS
        for number, host in enumerate(HOSTS):  # both stores are there, one instance is not
            cluster.coordinator.hear(
                cluster.now_ns, Heartbeat(host, 1, number + 1, cluster.coordinator.map.epoch, cluster.now_ns)
            )
        cluster.report("nf2")
        cluster.plan()
    assert set(cluster.switchover.steering) == {"nf2"}


def test_packets_stay_where_the_only_copy_is():
    cluster = Cluster(replicas=1)
    before = list(cluster.switchover.steering)
    for _ in range(2 * SPAN_NS // 1_000_000):
        cluster.beat(silent="nf1")
    assert cluster.switchover.steering == before  # nf1's store is as silent: nobody could serve its flows better


@pytest.mark.parametrize(("later_ns", "where"), [(TIMING.heartbeat_ns, "nf1"), (TIMING.lease_ns, "nf2")])
def test_a_store_that_falls_silent_with_its_instance_is_not_served_from_elsewhere(later_ns, where):
    """Who is cut off falls silent, store and instance one after the other; a store whose NF process died goes on."""
    cluster = Cluster(replicas=1)
    silent_ns = cluster.now_ns
    cluster.now_ns = silent_ns + later_ns
    cluster.coordinator.hear(cluster.now_ns, Heartbeat("nf1", 1, 1, cluster.coordinator.map.epoch, cluster.now_ns))
    cluster.now_ns = silent_ns + SPAN_NS
    cluster.beat(silent="nf1")
    assert cluster.coordinator.alive(cluster.now_ns) == list(HOSTS)
    assert cluster.switchover.steering[0] == where


def test_a_silent_host_with_copies_elsewhere_is_replaced():
    cluster = Cluster(replicas=2)
    for _ in range(2 * SPAN_NS // 1_000_000):
        cluster.beat(silent="nf1")
    assert cluster.switchover.steering == ["nf2"] * 4
    assert {group.primary for group in cluster.coordinator.map.groups} == {"nf2"}


def test_reports_and_steerings_that_are_wrong_say_why():
    cluster = Cluster()
    with pytest.raises(NearstateError, match="unknown instance 'nf9'"):
        cluster.switchover.hear(1, {"host": "nf9", "epoch": 1, "parked": [], "quiet": []})
    with pytest.raises(NearstateError, match="steering of 3 partitions: the map has 4"):
        check_steering(["nf1"] * 3, list(HOSTS), 4)
    with pytest.raises(NearstateError, match="unknown instance 'nf3'"):
        check_steering(["nf3"] * 4, list(HOSTS), 4)


def test_an_instance_whose_link_is_down_is_left_until_it_is_up_again():
    cluster = Cluster()
    switchover = cluster.switchover
    switchover.see(cluster.now_ns, frozenset({"nf1"}), 0)
    cluster.beat()
    assert switchover.steering == ["nf1", "nf2", "nf1", "nf2"]  # a short interruption is none
    for _ in range(10):
        cluster.now_ns += SPAN_NS // 10
        switchover.see(cluster.now_ns, frozenset({"nf1"}), 0)
        cluster.beat()
    assert switchover.steering == ["nf2"] * 4
    assert cluster.coordinator.moves == {0: "nf2", 2: "nf2"}  # the store lives: its partitions follow, with all that they hold
    switchover.see(cluster.now_ns, frozenset(), 0)
    cluster.beat()
    assert not switchover.dead(cluster.now_ns, TIMING)


def test_packets_of_a_dead_instance_stay_where_they_were_sent_when_others_come_back():
    cluster = Cluster(replicas=1)
    switchover = cluster.switchover
    switchover.instances = {name: Instance() for name in ("nf2", "nf1", "nf3", "nf4")}
    for name in ("nf2", "nf3", "nf4"):
        switchover.instances[name].heard_ns = 1
    switchover.steering = ["nf3"] * 4  # nf1 is dead: of those there then, nf3 was chosen
    assert {switchover._living(p, "nf1", ("nf1",), {"nf1"}) for p in range(4)} == {"nf3"}
    switchover.steering = ["nf1"] * 4
    assert {switchover._living(p, "nf1", ("nf1", "nf4"), {"nf1"}) for p in range(4)} == {"nf4"}


def test_a_move_to_a_dead_instance_is_given_up():
    cluster = Cluster()
    for _ in range(10):
        cluster.now_ns += SPAN_NS // 10
        cluster.switchover.see(cluster.now_ns, frozenset({"nf2"}), 0)
        cluster.beat()
    cluster.coordinator.moves.clear()
    cluster.coordinator.move([0], "nf2")
    cluster.plan()
    assert cluster.coordinator.moves.get(0) != "nf2"
    assert "1 partitions stay where they are: packets cannot reach nf2" in cluster.coordinator.log[-1]
