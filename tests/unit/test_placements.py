"""Does every placement put each partition where it says, and refuse what it cannot place?"""

from __future__ import annotations

from collections import Counter

import pytest

from datastore import placements
from datastore.base.errors import NearstateError
from datastore.base.partitioning import PARTITIONS
from datastore.placements import Cluster, Placement
from datastore.store.partitions import PartitionMap


def cluster(nf_hosts: int = 2, store_hosts: int = 1, replicas: int = 1) -> Cluster:
    names = tuple(f"nf{n + 1}" for n in range(nf_hosts))
    stores = tuple(f"store{n + 1}" for n in range(store_hosts))
    return Cluster(names, stores, tuple(names[partition % nf_hosts] for partition in range(PARTITIONS)), replicas)


def primaries(name: str, of: Cluster) -> list[str]:
    return [group[0] for group in placements.load(name).map(of).replicas]


def test_aligned_keeps_state_where_its_packets_go() -> None:
    for hosts in (1, 2, 3, 7):
        of = cluster(hosts)
        assert primaries("integrated", of) == list(of.steering) == primaries("integrated:aligned", of)


def test_hashed_spreads_evenly_and_knows_nothing_of_steering() -> None:
    of = cluster(4)
    counts = Counter(primaries("integrated:hashed", of))
    assert set(counts) == set(of.nf_hosts)
    assert max(counts.values()) <= 1.4 * PARTITIONS / 4
    here = sum(primary == steered for primary, steered in zip(primaries("integrated:hashed", of), of.steering, strict=True))
    assert here / PARTITIONS == pytest.approx(1 / 4, abs=0.12)
    other = Cluster(of.nf_hosts, of.store_hosts, tuple(reversed(of.steering)))
    assert primaries("integrated:hashed", other) == primaries("integrated:hashed", of)


def test_centralized_uses_store_hosts_alike_and_no_nf_host() -> None:
    assert set(primaries("centralized", cluster())) == {"store1"}
    assert Counter(primaries("centralized", cluster(2, 4))) == {f"store{n}": PARTITIONS // 4 for n in (1, 2, 3, 4)}


@pytest.mark.parametrize("name", ["integrated", "integrated:hashed", "centralized"])
def test_replicas_are_different_hosts(name: str) -> None:
    for replicas in (1, 2, 3, 9):
        for group in placements.load(name).map(cluster(3, 3, replicas)).replicas:
            assert len(set(group)) == len(group) == min(replicas, 3)


def test_where_store_processes_run() -> None:
    of = cluster(3, 2)
    assert placements.load("local").store_hosts(of) == ()
    assert placements.load("centralized").store_hosts(of) == ("store1", "store2")
    assert placements.load("integrated:hashed").store_hosts(of) == ("nf1", "nf2", "nf3")
    assert of.stores == ("nf1", "nf2", "nf3", "store1", "store2")


def test_a_map_survives_json() -> None:
    partition_map = placements.load("integrated:hashed").map(cluster(3), epoch=7)
    assert PartitionMap.from_json(partition_map.to_json()) == partition_map
    assert partition_map.epoch == 7


def test_names_and_policies() -> None:
    assert {"local", "centralized", "integrated", "integrated:hashed"} <= set(placements.names())
    for name in placements.names():
        assert placements.load(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("centralised", "unknown placement 'centralised': did you mean centralized"),
        ("integrated:hased", "unknown policy of placement 'integrated' 'hased': did you mean hashed"),
        ("local:aligned", "unknown policy of placement 'local' 'aligned'"),
        ("", "unknown placement ''"),
        ("../integrated", "unknown placement"),
        ("__init__", "unknown placement"),
    ],
)
def test_unknown_placements_are_refused(name: str, message: str) -> None:
    with pytest.raises(NearstateError, match=message):
        placements.load(name)


@pytest.mark.parametrize(
    ("group", "said"),
    [(["nf9"], r"\('nf9',\)"), (["nf1", "nf1"], r"\('nf1', 'nf1'\)"), ([], "no host"), (["store1"], r"\('store1',\)")],
)
def test_a_policy_that_places_wrongly_is_named(group: list[str], said: str) -> None:
    wrong = Placement("mine", "nf", lambda partition, of: group if partition == 3 else ["nf1"])
    with pytest.raises(NearstateError, match=f"placement 'mine' puts partition 3 on {said}.*hosts with a store are nf1, nf2"):
        wrong.map(cluster())


def test_centralized_without_a_store_host_says_so() -> None:
    with pytest.raises(NearstateError, match=r"placement 'centralized' puts partition 0 on no host; hosts with a store are none"):
        placements.load("centralized").map(cluster(2, 0))
