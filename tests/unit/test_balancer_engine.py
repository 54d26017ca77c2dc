"""The load balancer in the packet loop itself, its state here, in a store process, or half there: claims, counters, health."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from datastore.compiled import INTERPRETED
from nfs.dataplane import load
from nfs.dataplane.engine import HERE
from nfs.dataplane.headers import INSIDE, OUTSIDE
from nfs.dataplane.housekeeping import Reader
from nfs.load_balancer import ANSWERED, CLOSED, NAME_BITS, OPENED, SYNS, counter_key
from tests.packets import ethernet
from tests.rig import Rig

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the packet loop runs compiled")
VIRTUAL, POOL = ("10.64.1.1", 80), ["10.128.0.1:8080", "10.128.0.2:8080 weight 2", "10.128.0.3"]
CLIENTS = [("10.0.1.7", 5000 + 2 * n) for n in range(40)]
End = tuple[str, int]


def balancer(where: dict[str, Any], **given: Any) -> Rig:
    return Rig([load("load_balancer")], {"load_balancer": {"virtual_address": VIRTUAL[0], "backends": POOL, **given}}, **where)


def segment(source: End, target: End, flags: str, payload: bytes = b"") -> bytes:
    sent = ethernet() / IP(src=source[0], dst=target[0]) / TCP(sport=source[1], dport=target[1], flags=flags)
    return bytes(sent / payload)


def target(frame: bytes) -> End:
    return Ether(frame)[IP].dst, Ether(frame)[TCP].dport


def opened(rig: Rig, clients: list[End] = CLIENTS) -> dict[End, End]:
    """Open all connections at once, three packets of each in one burst; return who went to which backend."""
    out = rig.burst([segment(client, VIRTUAL, flags) for flags in ("S", "A", "PA") for client in clients])
    went: dict[End, list[bytes]] = {client: [] for client in clients}
    for side, frame in out:
        assert side == OUTSIDE
        went[Ether(frame)[IP].src, Ether(frame)[TCP].sport].append(frame)
    backends = {}
    for client, frames in went.items():
        backends[client] = target(frames[0])
        assert frames == [segment(client, backends[client], flags) for flags in ("S", "A", "PA")], "in order, to one backend"
    return backends


def reader(rig: Rig) -> Reader:
    """Return a reader of the shared counters, wherever they are."""
    return Reader(rig.table, rig.client, rig.primary, rig.engine.control)


def counted(rig: Rig, backend: int) -> list[int]:
    """Return a backend's counters: SYNs, answers, connections opened and closed."""
    name = np.uint64(rig.chain.env_of(0)["backends"][0][2 * backend]) & np.uint64(NAME_BITS)
    words = reader(rig)(*map(int, counter_key(name)))
    return [int(words[word]) for word in (SYNS, ANSWERED, OPENED, CLOSED)]


def test_connections_stay_with_their_backend_when_the_pool_changes(where: dict[str, Any]) -> None:
    rig = balancer(where)
    went = opened(rig)
    assert set(went.values()) == {("10.128.0.1", 8080), ("10.128.0.2", 8080), ("10.128.0.3", 80)}
    rig.chain.change_settings({"load_balancer": {"virtual_address": VIRTUAL[0], "backends": ["10.128.0.9"]}})
    answers = rig.burst([segment(backend, client, "PA", b"answer") for client, backend in went.items()], OUTSIDE)
    assert sorted(answers) == sorted((INSIDE, segment(VIRTUAL, client, "PA", b"answer")) for client in went)
    again = rig.burst([segment(client, VIRTUAL, "PA", b"more") for client in went])
    assert sorted(again) == sorted((OUTSIDE, segment(client, backend, "PA", b"more")) for client, backend in went.items())
    assert target(rig(segment(("10.0.1.8", 5000), VIRTUAL, "S"))[0][1]) == ("10.128.0.9", 80)
    if where and all(where["primary"] != HERE):
        assert rig.records() == {}, "nothing of it is here"


def test_load_is_counted_once_wherever_the_counters_are(where: dict[str, Any]) -> None:
    rig = balancer(where)
    went = opened(rig)
    rig.burst([segment(backend, client, "SA") for client, backend in went.items()], OUTSIDE)
    closed = CLIENTS[:15]
    rig.burst([segment(client, VIRTUAL, "FA") for client in closed])
    rig.burst([])
    for number, address in enumerate(("10.128.0.1", "10.128.0.2", "10.128.0.3")):
        own = [client for client, backend in went.items() if backend[0] == address]
        assert counted(rig, number) == [len(own)] * 3 + [len(set(own) & set(closed))]


def test_two_connections_that_a_backend_could_not_tell_apart_go_to_two(where: dict[str, Any]) -> None:
    """One client port, two virtual ports, backends with a port of their own: the claim of the second fails."""
    rig = balancer(where, backends=["10.128.0.1:8080", "10.128.0.2:8080"])
    client = CLIENTS[0]
    sent = rig.burst([segment(client, (VIRTUAL[0], port), "S") for port in (80, 443, 8443)])
    assert sorted(target(frame) for _, frame in sent) == [("10.128.0.1", 8080), ("10.128.0.2", 8080)]
    assert rig.counts()["no_backend"] == 1
    for (_, frame), port in zip(sent, (80, 443), strict=True):
        assert rig.outside(segment(target(frame), client, "SA")) == [(INSIDE, segment((VIRTUAL[0], port), client, "SA"))]


def test_a_silent_backend_is_left_out_and_comes_back_after_a_trial(where: dict[str, Any]) -> None:
    """Judged by counters that are where all instances find them."""
    rig = balancer(where, backends=["10.128.0.1", "10.128.0.2"], failure_s=0.1, trial_s=0.2)
    function, read, now_s = load("load_balancer"), reader(rig), time.monotonic()
    silent = ("10.128.0.2", 80)
    ports = iter(range(6000, 60000, 2))

    def new(count: int) -> list[End]:
        """Open connections, of which the silent backend answers none; return where each went."""
        clients = [("10.0.1.7", next(ports)) for _ in range(count)]
        went = [target(frame) for _, frame in rig.burst([segment(client, VIRTUAL, "S") for client in clients])]
        rig.burst([segment(end, client, "SA") for client, end in zip(clients, went, strict=True) if end != silent], OUTSIDE)
        return went

    def wait(seconds: float) -> None:
        nonlocal now_s
        for _ in range(round(seconds / 0.05)):
            now_s += 0.05
            rig.burst([])
            assert function.housekeep
            function.housekeep(rig.chain.env_of(0), read, now_s)

    wait(0.1)
    assert new(30).count(silent) > 3
    wait(0.2)
    assert silent not in new(30), "it is down"
    wait(0.25)
    trial = new(30)
    assert trial.count(silent) == 1, "one connection tries it"
    wait(0.25)
    clients = [("10.0.1.9", 5000 + 2 * n) for n in range(30)]
    [tried] = [client for client in clients if target(rig(segment(client, VIRTUAL, "S"))[0][1]) == silent]
    rig.outside(segment(silent, tried, "SA"))
    wait(0.1)
    assert new(30).count(silent) > 3, "it answered its trial, so it is up"
