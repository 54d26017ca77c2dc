"""Is a trial refused, in one line and before anything starts, that could not be what its line in the results would say?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from datastore import placements
from datastore.base.errors import NearstateError
from experiments.harness.spec import Experiment, check

GRID = {"topology": ("rack",), "nf": ("traffic_counter",), "placement": ("integrated",)}
TWO = {**GRID, "replicas": (2,)}
RIGHT = Experiment("Is this right?", "packet_latency", (TWO,), traffic={"flows": 10})
FAILOVER = {"procedure": "failover"}


def grid(base: Mapping[str, Any] = GRID, **changes: Any) -> dict[str, Any]:
    """Return the change to RIGHT that gives it one grid."""
    return {"sweeps": ({**base, **changes},)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        grid(TWO, replicas=(1, 2, 3), nf_hosts=(3,)),
        grid(TWO, placement=("centralized",), replicas=(3,)),
        grid(placement=("local",), settings={"coordinated": True}),
        grid(TWO, asynchronous=(True,), lease_ms=(80.0, 200.0)),
        grid(nf=("firewall|nat",), settings={"functions": {"nat": {"external_addresses": "10.64.0.0/31"}}}),
        {**FAILOVER, **grid(TWO, lost=("host", "function", "store", "link"))},
        {**FAILOVER, **grid(nf=("nat",), placement=("nftables", "conntrackd", "local"))},
        {"procedure": "state_access", **grid(nf=("",), placement=("redis", "centralized"))},
    ],
)
def test_what_can_be_measured_passes(changes: Mapping[str, Any]) -> None:
    check("mine", replace(RIGHT, **changes))


COPIES = [
    (grid(replicas=(5,)), r"replicas=5 with placement='integrated' and 2 hosts with a store: .* give nf_hosts=5"),
    (grid(replicas=(3,), nf_hosts=(4, 2)), r"replicas=3 with placement='integrated' and 2 hosts"),
    (grid(replicas=(3,), placement=("integrated:hashed",)), r"replicas=3 with placement='integrated:hashed' and 2 hosts"),
    (grid(replicas=(2,), placement=("local",)), r"replicas=2 with placement='local': it keeps no copies"),
    (grid(replicas=(2,), placement=("centralized",), store_hosts=(1,)), r"and 1 host with a store: .* give store_hosts=2"),
    ({**grid(replicas=(2,), placement=("centralized",)), "network": {"store_hosts": 1}}, r"give store_hosts=2"),
    (grid(replicas=(2,), topology=("back_to_back",)), r"replicas=2 with placement='integrated' and 1 host"),
    (grid(replicas=(2,), topology=("back_to_back",), placement=("centralized",)), r"store_hosts=2; one cable"),
    (grid(placement=("centralized",), store_hosts=(0,)), r"replicas=1 with placement='centralized' and 0 hosts"),
    (grid(replicas=(2,), placement=("nftables",), nf=("nat",)), r"replicas=2 with the peer 'nftables'"),
    ({**grid(replicas=(2,), placement=("redis",), nf=("",)), "procedure": "state_access"}, r"replicas=2 with the peer 'redis'"),
    (grid(asynchronous=(True,)), r"asynchronous=True with replicas=1"),
    (grid(settings={"asynchronous": True}, placement=("centralized",)), r"asynchronous=True with replicas=1"),
    (grid(placement=("nftables",), nf=("nat",), settings={"coordinated": True}), r"coordinated=True with the peer 'nftables'"),
    (grid(placement=("nftables",), nf=("nat",), asynchronous=(True,)), r"asynchronous=True with the peer 'nftables'"),
    (grid(TWO, nf=("firewall|nat",), nf_hosts=(4,)), r"a coordinator steers one stage"),
    (grid(topology=("back_to_back",), settings={"coordinated": True}), r"a coordinator needs a host `control`"),
    (grid(lease_ms=(100.0, 200.0)), r"lease_ms=100.0 is swept where nothing has a lease"),
    (grid(TWO, lease_ms=(5.0,)), r"lease of 5.0 ms: 10 to 60000"),
    ({"settings": {"lease_ms": 100_000.0}}, r"lease of 100000.0 ms: 10 to 60000"),
    (grid(TWO, nf_hosts=(9,)), r"with 9 NF hosts and 9 stores: a store would remember 81 clients; 64 are possible"),
]
FUNCTIONS = [
    ({"settings": {"functions": {"traffic_counter": {"limit": -3}}}}, r"setting of network function 'traffic_counter' 'limit'"),
    (grid(nf=("rate_limiter",), settings={"functions": {"rate_limiter": {"packets_per_s": -3}}}), r"packets_per_s=-3, burst"),
    (grid(nf=("rate_limiter",), settings={"functions": {"rate_limiter": {"packets_per_s": "x"}}}), r"'x'}: TypeError: .*"),
    (grid(nf=("nat",), settings={"functions": {"nat": {"external_addresses": "10.64.0.0/99"}}}), r"s='10.64.0.0/99'"),
    ({"settings": {"functions": {"trafic_counter": {}}}}, r"of nf='traffic_counter' 'trafic_counter': did you mean"),
    ({"settings": {"functions": {"nat": {}}}}, r"unknown network function with settings, of nf='traffic_counter' 'nat'"),
    ({"settings": {"functions": {"traffic_counter": 3}}}, r"'traffic_counter': 3 is no mapping"),
    (grid(nf=("nat",), placement=("nftables",), settings={"functions": {"nta": {}}}), r"of nf='nat' 'nta': did you mean nat"),
    (grid(nf=("nat",), placement=("nftables",), settings={"functions": {"nat": {"external_addresses": 5}}}), r"addresses=5"),
    (grid(nf=("heavy_hitters",), placement=("nftables",)), r"unknown job of the peer nftables 'heavy_hitters'"),
    (grid(nf=("firewall+firewall",)), r"each once"),
    ({"settings": {"value_bytes": 16}}, r"records of traffic_counter have \d+ bytes, the store's 16"),
    ({"settings": {"value_bytes": 12}}, r"values of 12 bytes: use a multiple of 8"),
    ({"settings": {"capacity": 0}}, r"table for 0 records"),
    (grid(nf=("",)), r"procedure='packet_latency' without a network function"),
    (grid(nf=("",), placement=("redis",)), r"procedure='packet_latency' with placement='redis': this peer forwards no packets"),
]  # fmt: skip
PROCEDURES = [
    ({**FAILOVER, **grid(TWO, victim=("nf3",))}, r"unknown victim among the NF hosts 'nf3': did you mean nf"),
    ({**FAILOVER, **grid(TWO, victim=("server",))}, r"unknown victim among the NF hosts 'server'"),
    ({**FAILOVER, **grid(nf_hosts=(1,))}, r"procedure='failover' with 1 NF host: another one must take over"),
    ({**FAILOVER, **grid(topology=("back_to_back",))}, r"procedure='failover' with 1 NF host"),
    ({**FAILOVER, **grid(nf=("firewall|nat",))}, r"procedure='failover' with nf='firewall|nat': only hosts of one stage"),
    ({**FAILOVER, **grid(placement=("centralized",), lost=("store",))}, r"lost='store' of nf1 with placement='centralized'"),
    ({**FAILOVER, **grid(placement=("local",), lost=("store",))}, r"lost='store' of nf1 with placement='local'"),
    (
        {**FAILOVER, **grid(nf=("nat",), placement=("nftables",), lost=("function",))},
        r"lost='function' of nf1 with placement='nft",
    ),
    ({**FAILOVER, **grid(nf=("nat",), placement=("conntrackd",), nf_hosts=(3,))}, r"peer conntrackd with 3 NF hosts"),
    ({**FAILOVER, **grid(lost_at_s=(2.0,), seconds=(1.0,))}, r"lost_at_s=2.0, seconds=1.0: each must be later"),
    ({**FAILOVER, **grid(TWO, paths=("asymmetric",))}, r"procedure='failover' with paths='asymmetric'"),
    ({**FAILOVER, "settings": {"shown_ms": (1.0,)}}, r"shown_ms=\(1.0,\): two times"),
    ({**FAILOVER, "settings": {"bin_us": 0.0}}, r"bin_us=0.0: it must be above 0"),
    ({"procedure": "scaling", "settings": {"out_at_s": 1.5}}, r"out_at_s=1.5, in_at_s=1.4, seconds=2.2: each must be later"),
    ({"procedure": "scaling", **grid(nf_hosts=(1,))}, r"procedure='scaling' with 1 NF host"),
    ({"procedure": "rejoin", **grid()}, r"procedure='rejoin' with replicas=1: a backup needs at least 2"),
    ({"procedure": "rejoin", **grid(TWO, placement=("centralized",))}, r"the victim has no store"),
    ({"procedure": "rejoin", "settings": {"back_at_s": 0.1}}, r"lost_at_s=0.6, back_at_s=0.1, seconds=4.0"),
    ({"procedure": "partition_from_peers", "settings": {"victim": "nf9"}}, r"unknown victim among the hosts 'nf9'"),
    ({"procedure": "partition_from_peers", "settings": {"victim": "client"}}, r"victim='client': it has no cable `storage`"),
    ({"procedure": "handshakes", "settings": {"measured_paths": ("both",)}}, r"unknown value of setting paths 'both'"),
    ({"procedure": "handshakes", **grid(nf_hosts=(1,))}, r"paths='asymmetric' with 1 NF host"),
    ({"procedure": "handshakes", "settings": {"measured_paths": ()}}, r"measured_paths=\(\): nothing would be measured"),
    ({"procedure": "real_clients", "settings": {"workloads": ("ftp",)}}, r"unknown workload 'ftp'"),
    ({"procedure": "state_access", **grid(placement=("local",))}, r"placement='local': there is no store to be reached"),
    ({"procedure": "state_access", **grid(nf=("nat",), placement=("nftables",))}, r"'nftables': this peer has no store"),
    ({"procedure": "state_access", "settings": {"operations": ("reed",)}}, r"unknown operation 'reed': did you mean read"),
    ({"procedure": "store_memory", **grid(placement=("local",))}, r"there is no store to be filled"),
    ({"procedure": "store_memory", "settings": {"fill": 0.0}}, r"fill=0.0: a share between 0 and 1"),
    ({"procedure": "table_size", **grid(placement=("integrated",))}, r"use placement='local'"),
    ({"procedure": "throughput", "settings": {"search_high_kpps": 1.0}}, r"search_low_kpps=2.0, search_high_kpps=1.0"),
    ({"procedure": "throughput", "settings": {"ladder_kpps": (0,)}}, r"ladder_kpps=\(0,\): each load must be above 0"),
    ({"procedure": "throughput", "settings": {"tries": 0}}, r"tries=0: it must be above 0"),
    ({"procedure": "throughput", **grid(flows=(20_000_000,))}, r"traffic flows=20000000: 1 to 10,000,000"),
    ({"settings": {"seconds": 0.0}}, r"seconds=0.0: it must be above 0"),
    ({"settings": {"warmup_kpps": 0}}, r"warmup_kpps=0: it must be above 0"),
    (grid(paths=("asymmetric",), nf_hosts=(1,)), r"paths='asymmetric' with 1 NF host"),
    (grid(paths=("asymmetric",), nf=("firewall|nat",)), r"paths='asymmetric' with 1 NF host"),
]
SHAPE = [
    ({"seed": "1"}, r"seed='1' is no whole number from 0"),
    ({"seed": -1}, r"seed=-1 is no whole number from 0"),
    ({"settings": None}, r"settings=None is no mapping"),
    ({"traffic": [1]}, r"traffic=\[1\] is no mapping"),
    ({"question": 5}, r"question=5 is no text"),
    ({"sweeps": ({"topology": ("rack",), "nf": ("nat",)},)}, r"a grid without placement"),
    ({"sweeps": ({**GRID, "chain": ("nat",)},)}, r"a grid has both nf and chain"),
    ({"sweeps": ({**GRID, "settings": 5},)}, r"settings=5 is no mapping"),
    ({"sweeps": ({"topology": ("rack",), "placement": ("local",), "chain": (5,)},)}, r"chain=5 is no text"),
    ({"sweeps": (GRID, GRID)}, r"mine/rack/integrated/traffic_counter/r1/0 is in its grids twice"),
    ({"sweeps": (GRID, {**GRID, "settings": {"seconds": 9.0}})}, r"is in its grids twice"),
    (grid(replicas=(1, 1)), r"is in its grids twice"),
]


@pytest.mark.parametrize(("changes", "message"), [*COPIES, *FUNCTIONS, *PROCEDURES, *SHAPE])
def test_what_could_not_be_measured_as_asked_is_refused(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(NearstateError, match=message) as raised:
        check("mine", replace(RIGHT, **changes))
    assert "\n" not in str(raised.value)


def test_a_placement_that_keeps_fewer_copies_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that was written without a thought of replicas, like README's `halves`."""
    one = placements.Placement("integrated", "nf", lambda partition, cluster: [cluster.nf_hosts[partition % 2]])
    monkeypatch.setattr(placements, "load", lambda name: one)
    check("mine", replace(RIGHT, sweeps=(GRID,)))
    with pytest.raises(NearstateError, match="replicas=2 with placement='integrated': it gives partition 0 1 host, nf1"):
        check("mine", RIGHT)


def test_a_misspelt_profile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import packet_latency
    from experiments.harness import spec

    wrong = replace(packet_latency.EXPERIMENT, profiles={"quik": {"repeats": 2}})
    monkeypatch.setattr(packet_latency, "EXPERIMENT", wrong)
    with pytest.raises(NearstateError, match="unknown profile of experiment 'packet_latency' 'quik': did you mean quick"):
        spec.load("packet_latency")
    monkeypatch.setattr(packet_latency, "EXPERIMENT", replace(wrong, profiles={"quick": {"settings": 5}}))
    with pytest.raises(NearstateError, match="profile 'quick': settings=5 is no mapping"):
        spec.load("packet_latency")
