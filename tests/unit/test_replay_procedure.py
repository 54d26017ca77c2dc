"""Is a replay whose packets hardly arrive told, and is a load balancer's address found?"""

from __future__ import annotations

from typing import Any

import pytest

from experiments.harness.procedures import replay
from nfs.dataplane import declaration


def answers(sent: tuple[int, int], arrived: tuple[int, int]) -> list[dict[str, Any]]:
    """Return what both sides tell: sent by (inside, outside), arrived of what (inside, outside) sent."""
    return [{"sent": {"sent": own}, "arrived": {"received": others}} for own, others in zip(sent, arrived[::-1], strict=True)]


@pytest.mark.parametrize(
    ("sent", "arrived", "doubted"),
    [
        ((3113, 9145), (3113, 9145), []),
        ((3113, 9145), (3113, 0), ["outside"]),
        ((1128, 0), (1, 0), ["inside"]),
        ((100, 100), (10, 9), ["outside"]),
        ((0, 0), (0, 0), []),
    ],
)
def test_a_party_whose_packets_hardly_arrive_is_named(
    sent: tuple[int, int], arrived: tuple[int, int], doubted: list[str]
) -> None:
    found = replay.undelivered(answers(sent, arrived), 0.1, {"received": 5, "forwarded": 1, "dropped_by_verdict": 9145})
    assert [reason.split(" from ")[1].split()[0] for reason in found] == doubted
    assert all("dropped_by_verdict 9,145)" in reason for reason in found)
    assert replay.undelivered(answers(sent, arrived), 0.0, {}) == [], "what one asks for is no doubt"


def test_the_virtual_address_is_the_balancers_own_or_what_is_set() -> None:
    chain = [declaration.load(name) for name in ("firewall", "load_balancer")]
    assert replay.virtual_address(chain, {}) == 10 << 24 | 64 << 16 | 1 << 8 | 1
    assert replay.virtual_address(chain, {"load_balancer": {"virtual_address": "10.128.0.9"}}) == 10 << 24 | 128 << 16 | 9
    assert replay.virtual_address(chain[:1], {}) is None
