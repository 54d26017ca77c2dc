"""Replication, failover and moves under everything that can go wrong, in imagined time.

A failing seed names itself: `python -m datastore simulate --seed N` replays it with its log.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from datastore.native import INTERPRETED
from datastore.verification.simulator import CALM, Violation, World, simulate

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiled here; uncompiled runs have test_simulation_mutants.py")
LONG = os.environ.get("NEARSTATE_LONG") == "1"
SEEDS = 10_000 if LONG else 300
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
    assert set(happened) == {"crash", "pause", "cut", "move", "coordinator crash"}
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
