"""Replication, failover and moves under everything that can go wrong, in imagined time.

A failing seed names itself: `python -m datastore simulate --seed N` replays it with its log.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from datastore.compiled import INTERPRETED
from datastore.replication.frames import CLAIM
from datastore.replication.link import CHANGES_ACKED, COUNTED, MODE, SENT_FIRST, UNDER_WAY
from datastore.store import roles
from datastore.store.layout import PRIMARY, VALUE
from datastore.store.operations import OPERATION_VALUE, get
from datastore.store.records import commit_record, open_record
from datastore.store.statuses import OK
from datastore.verification.simulator import CALM, Violation, World, simulate

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiled here; uncompiled runs have test_simulation_mutants.py")
LONG = os.environ.get("NEARSTATE_LONG") == "1"
SEEDS = 10_000 if LONG else 260
"""Forty more in `test_packet_simulation.py`, with packets."""
ONCE_FAILED = (606, 5199, 5544)
"""Seeds that found something in the long mode: a promise broken, a former copy taken for the new one."""


def test_nothing_promised_is_broken_in_any_seed():
    happened: dict[str, int] = {}
    operations = 0
    for seed in range(SEEDS):
        world = simulate(seed, 0.8, keep_trace=False)
        operations += len(world.history)
        for what, times in world.happened.items():
            happened[what] = happened.get(what, 0) + times
    assert operations > 100 * SEEDS
    assert set(happened) == {"crash", "pause", "cut", "move", "coordinator crash", "line", "busy"}
    assert min(happened.values()) > SEEDS // 4


@pytest.mark.parametrize("seed", ONCE_FAILED)
def test_what_once_failed_passes(seed):
    simulate(seed, 1.5, keep_trace=False)


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_without_faults_everything_is_answered(replicas):
    world = simulate(1, 0.5, faults=CALM, replicas=replicas)
    assert len(world.history) > 300
    assert all(operation.status != 255 for operation in world.history)
    assert world.actors["control"].coordinator.map.epoch == 1


@pytest.mark.parametrize(("how", "least_leases", "most_leases"), [
    ("close", 0, 0.2), ("part", 0.5, 1.5), ("reset", 0.5, 1.5), ("vanish", 0.5, 1.5),
])  # fmt: skip
@pytest.mark.parametrize("replicas", [2, 3])
def test_an_end_that_is_known_costs_no_lease(replicas, how, least_leases, most_leases):
    """The next primary answers at once when the kernel has closed the connection of the process, and only then."""
    world = World(2, faults=CALM, replicas=replicas)
    assert world.has_lines
    world.run(0.3)
    first, others = world.actors["nf1"], [world.actors[name] for name in ("nf2", "nf3", "nf4")]
    assert world.rules(first, 0)
    first.crash(how)
    began_ns = world.now
    while not any(world.rules(other, 0) for other in others):
        world.run(0.0005)
        assert world.now - began_ns < 10**9
    outage_ns = world.now - began_ns
    assert least_leases <= outage_ns / world.timing.lease_ns <= most_leases
    world.close()


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_while_the_coordinator_is_down_nothing_stops(replicas):
    world = World(3, faults=CALM, replicas=replicas)
    world.run(0.3)
    world.actors["control"].crash()
    world.run(0.3)
    before = len(world.history)
    world.run(1.0)
    assert len(world.history) - before > before
    world.actors["control"].restart()
    world.run(0.3)
    world.settle(2.0)
    world.check()
    world.close()


def test_a_seed_is_a_run_byte_for_byte():
    first, again, other = simulate(11, 0.5), simulate(11, 0.5), simulate(12, 0.5)
    assert first.digest.hexdigest() == again.digest.hexdigest() != other.digest.hexdigest()
    assert first.trace == again.trace


def test_a_seed_is_the_same_run_in_another_process():
    """Python orders sets of names differently in every process: nothing may depend on that."""
    runs = {subprocess.run([sys.executable, "-m", "datastore", "simulate", "--seed", "7", "--only", ""], check=True, text=True,
                           capture_output=True, env=os.environ | {"PYTHONHASHSEED": hash_seed}).stdout
            for hash_seed in ("1", "2", "3")}  # fmt: skip
    assert len(runs) == 1


def test_a_violation_names_its_seed_and_shows_the_operations(monkeypatch):
    monkeypatch.setattr(World, "contents", lambda self, name, partition: name)
    with pytest.raises(Violation, match="seed 5: replicas of partition 0 differ"):
        simulate(5, 0.3, faults=CALM)


class Stage:
    """A calm world without clients, in which a test says who is cut off, and writes and reads one record of partition 0."""

    KEY = (np.uint64(1 << 32), np.uint64(5))

    def __init__(self, replicas: int) -> None:
        self.world = World(1, faults=CALM, replicas=replicas, clients=0)
        self.world.keys = [(1 | 1 << 32, 5)]  # the network functions stay away from it
        self.actors = self.world.actors
        self.world.run(0.5)

    def cut(self, one: str, other: str) -> None:
        self.world.cuts |= {(one, other), (other, one)}

    def write(self, name: str, value: int) -> int:
        """Return up to which change partition 0 must be committed."""
        host = self.actors[name]
        slot = int(open_record(host.words, host.function.owner, *self.KEY, host.replica.map.epoch, 1))
        assert slot > 0
        host.words[slot + VALUE] = value
        commit_record(host.words, host.function.owner, slot, 0)
        host.pump()
        return int(roles.changes(host.words, 0))

    def read(self, name: str) -> int | None:
        """Return what a host answers, None when it refuses."""
        host, out = self.actors[name], np.zeros(16, np.uint64)
        status = get(host.words, host.owner, host.replica.map.epoch, 1, *self.KEY, out, 0)
        return int(out[OPERATION_VALUE]) if status == OK and host.replica.has_lease(host.now()) else None

    def write_when_it_rules(self, name: str, value: int) -> None:
        """Wait until a host is primary and may answer, write, and wait until that is committed."""
        host = self.actors[name]
        for _ in range(2000):
            self.world.run(0.0002)
            if roles.role(host.words, 0) == PRIMARY and host.replica.has_lease(host.now()):
                break
        upto = self.write(name, value)
        for _ in range(2000):
            if roles.committed(host.words, 0) >= upto:
                return
            self.world.run(0.0002)
        raise AssertionError("never committed")


@pytest.mark.parametrize("after_s", [0.05, 0.062])
def test_a_new_member_waits_for_promises_that_it_did_not_give(after_s):
    """nf2 is cut off from all but nf1 and lives by its promise, while the partition moves to nf4, which gave none."""
    stage = Stage(2)
    stage.write("nf1", 111)
    stage.world.run(0.05)
    assert stage.read("nf2") == 111
    stage.cut("nf2", "nf4")
    stage.world.run(0.1)
    stage.cut("nf2", "control")
    stage.world.run(after_s)
    stage.actors["control"].coordinator.move([0], "nf4")
    stage.write_when_it_rules("nf4", 222)
    assert stage.read("nf2") is None
    stage.world.close()


def test_a_learner_that_counts_is_not_read():
    """nf4 learns and counts; then nf1 dies, and nf2, which is primary next, does not wait for a learner."""
    stage = Stage(3)
    stage.write("nf1", 111)
    stage.world.run(0.05)
    stage.cut("nf2", "nf4")
    stage.cut("nf3", "nf4")
    stage.world.run(0.1)
    stage.actors["control"].coordinator.move([0], "nf4")
    first = stage.actors["nf1"]
    link = first.shipping.links[first.replica.peers.index("nf4"), 0]
    for _ in range(400):
        stage.world.run(0.00005)
        if link[MODE] == COUNTED:
            break
    stage.write("nf1", 112)
    stage.cut("nf1", "control")  # its last word, that nf4 is synchronised, is lost
    stage.world.run(0.003)
    assert link[CHANGES_ACKED] == roles.changes(first.words, 0)
    assert stage.read("nf4") is None
    first.crash()
    stage.world.run(0.07)
    stage.cut("nf4", "control")
    stage.write_when_it_rules("nf2", 222)
    assert stage.read("nf4") is None
    stage.world.close()


@pytest.mark.parametrize("happens", ["hand-over", "failover"])
def test_who_is_level_with_the_next_primary_gets_no_image(happens):
    stage = Stage(3)
    stage.write("nf1", 111)
    stage.world.run(0.05)
    if happens == "failover":
        stage.actors["nf1"].crash()
    else:
        stage.actors["control"].coordinator.move([0], "nf2")
    stage.world.run(0.3)
    group, heir = stage.actors["control"].coordinator.map.groups[0], stage.actors["nf2"]
    assert group.primary == "nf2"
    level = {"nf3"} if happens == "failover" else {"nf1", "nf3"}
    links = {host: heir.shipping.links[heir.replica.peers.index(host), 0] for host in group.members[1:]}
    assert {host for host, link in links.items() if link[SENT_FIRST] == CLAIM} == level
    assert all(link[MODE] == COUNTED and link[UNDER_WAY] == 0 for link in links.values())
    assert stage.read("nf3") == 111
    stage.write("nf2", 222)
    stage.world.run(0.05)
    assert [stage.read(host) for host in group.members] == [222] * 3
    stage.world.close()
