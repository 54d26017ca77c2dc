"""When there is no room and no port: is the cause named, does what was known go on, and does it end without a restart?

No backend: `test_load_balancer.py`. An older layout: `test_declaration.py`. No store: `tests/emulation/test_engine.py`.
"""

from __future__ import annotations

import pytest

from datastore.compiled import INTERPRETED
from nfs._translation import CLASS_PORTS
from nfs.dataplane.headers import INSIDE
from tests.replay import Replay
from tests.traces import Flow

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the engine runs compiled")
SECOND_NS = 1_000_000_000
UDP_S = 300


def questions(count: int) -> list[bytes]:
    """Return one datagram of each of so many clients, all from the same port, so all in one partition."""
    return [Flow(0x0A000101 + client, 0x0A800001, 40_000, 53).datagram(INSIDE, b"?")[1] for client in range(count)]


def send(replay: Replay, frames: list[bytes]) -> list[bool]:
    """Return which of some frames from inside left."""
    return [left is not None for left in replay(frames, [INSIDE] * len(frames))]


@pytest.mark.parametrize("name", ["firewall", "nat", "nat_symmetric", "load_balancer", "traffic_counter", "rate_limiter"])
def test_a_full_table_is_named_spares_whom_it_knows_and_recovers_when_records_expire(name: str) -> None:
    settings = {"load_balancer": {"virtual_address": "10.128.0.1", "ports": "all", "backends": ["10.128.0.2", "10.128.0.3"]}}
    replay = Replay.of(name, settings=settings if name == "load_balancer" else None, capacity=1 << 10)
    frames = questions(7000 if name == "rate_limiter" else 60)
    passed = send(replay, frames)
    known = [frame for frame, left in zip(frames, passed, strict=True) if left]
    new = [frame for frame, left in zip(frames, passed, strict=True) if not left]
    assert known
    assert len(new) == replay.ledger()["table_full"] > 0
    assert all(send(replay, known))
    assert not any(send(replay, new[:1]))
    replay.now_ns += 2 * 7440 * SECOND_NS
    assert send(replay, new[:1]) == [True]


@pytest.mark.parametrize("name", ["nat", "nat_symmetric"])
def test_no_port_left_is_named_spares_whom_it_knows_and_recovers_when_a_claim_expires(name: str) -> None:
    replay = Replay.of(name, settings={name: {"external_addresses": ["192.0.2.1"]}}, capacity=1 << 18)
    frames = questions(CLASS_PORTS + 2)
    assert send(replay, frames) == [True] * CLASS_PORTS + [False] * 2
    assert replay.ledger()["ports_exhausted"] == 2
    assert all(send(replay, frames[:CLASS_PORTS]))
    replay.now_ns += (UDP_S * 3 // 2 + 1) * SECOND_NS
    assert send(replay, frames[CLASS_PORTS:]) == [True] * 2
    assert replay.ledger()["ports_exhausted"] == 2
