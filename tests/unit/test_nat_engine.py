"""The NAT in the packet loop itself: claims, fragments, bursts, hairpins, and what nftables would be told to do the same."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP, fragment
from scapy.layers.l2 import Ether

from datastore.base.errors import NearstateError
from experiments.peers import nftables
from nfs.dataplane import load
from nfs.dataplane.headers import INSIDE, OUTSIDE
from tests.packets import SERVER, checksums_hold, ethernet, icmp_error
from tests.rig import Rig

EXTERNAL = "192.0.2.1"
ONE, OTHER = ("10.0.1.7", 5000), ("10.0.1.9", 5000)


@pytest.fixture
def rig() -> Rig:
    return Rig([load("nat")], {"nat": {"external_addresses": [EXTERNAL]}})


def udp(source: tuple[str, int], target: tuple[str, int], payload: bytes = b"abc") -> bytes:
    return bytes(ethernet() / IP(src=source[0], dst=target[0], id=7) / UDP(sport=source[1], dport=target[1]) / payload)


def external(left: list[tuple[int, bytes]]) -> tuple[str, int]:
    """Return the source of the one frame that left outward."""
    ((side, frame),) = left
    assert side == OUTSIDE
    assert checksums_hold(frame)
    return Ether(frame)[IP].src, Ether(frame)[UDP].sport


def test_two_clients_with_one_port_get_two_and_their_answers(rig: Rig) -> None:
    given_to = {external(rig(udp(client, (SERVER, 80)))): client for client in (ONE, OTHER)}
    assert len(given_to) == 2
    for end, client in given_to.items():
        assert rig.outside(udp((SERVER, 80), end)) == [(INSIDE, udp((SERVER, 80), client))]
    assert len(rig.records()) == 4


def test_a_burst_of_new_and_old_clients(rig: Rig) -> None:
    frames = [udp((f"10.0.1.{n % 2}", 5000 + n % 20 // 2 * 2), (SERVER, 80)) for n in range(60)]
    left = rig.burst(frames)
    assert len(left) == 60
    found = {(Ether(frame)[IP].src, Ether(frame)[UDP].sport) for _, frame in left}
    assert len(found) == 20


def test_all_fragments_of_a_datagram_are_translated(rig: Rig) -> None:
    rig(udp(OTHER, (SERVER, 80)))
    whole = udp(ONE, (SERVER, 80), bytes(range(256)) * 12)
    parts = [bytes(ethernet() / part) for part in fragment(Ether(whole)[IP], fragsize=1480)]
    assert len(parts) == 3
    left = [frame for part in parts for _, frame in rig(part)]
    end = (EXTERNAL, Ether(left[0])[UDP].sport)
    wanted = fragment(Ether(udp(end, (SERVER, 80), bytes(range(256)) * 12))[IP], fragsize=1480)
    assert left == [bytes(ethernet() / part) for part in wanted]
    answer = fragment(Ether(udp((SERVER, 80), end, bytes(4000)))[IP], fragsize=1480)
    wanted = fragment(Ether(udp((SERVER, 80), ONE, bytes(4000)))[IP], fragsize=1480)
    assert [frame for part in answer for _, frame in rig.outside(bytes(ethernet() / part))] == [
        bytes(ethernet() / part) for part in wanted
    ]


def test_a_hairpin_leaves_where_it_came_from(rig: Rig) -> None:
    ends = {client: external(rig(udp(client, (SERVER, 80)))) for client in (ONE, OTHER)}
    ((side, frame),) = rig(udp(ONE, ends[OTHER]))
    assert side == INSIDE
    assert frame[14:] == udp(ends[ONE], OTHER)[14:]
    assert (frame[:6], frame[6:12]) == (udp(ONE, OTHER)[6:12], udp(ONE, OTHER)[:6]), "back the way it came"
    assert rig(udp(ONE, (EXTERNAL, 9))) == []


def test_rfc5508_req7_an_error_about_a_hairpin_comes_back(rig: Rig) -> None:
    ends = {client: external(rig(udp(client, (SERVER, 80)))) for client in (ONE, OTHER)}
    question = udp(ONE, ends[OTHER])
    ((_, delivered),) = rig(question)
    ((side, frame),) = rig(icmp_error(delivered, inside=True, router=OTHER[0]))
    assert side == INSIDE
    assert frame[14:] == icmp_error(question, inside=True, router=EXTERNAL)[14:], "from the address that was asked"
    assert checksums_hold(frame)


def test_errors_both_ways(rig: Rig) -> None:
    rig(udp(OTHER, (SERVER, 80)))
    frame = udp(ONE, (SERVER, 80))
    ((_, translated),) = rig(frame)
    assert rig.outside(icmp_error(translated, router="10.200.0.1")) == [(INSIDE, icmp_error(frame, router="10.200.0.1"))]
    answer = udp((SERVER, 80), external([(OUTSIDE, translated)]))
    ((_, delivered),) = rig.outside(answer)
    assert rig(icmp_error(delivered, inside=True)) == [(OUTSIDE, icmp_error(answer, inside=True, router=EXTERNAL))]


def test_with_a_full_table_nothing_leaves_untranslated_and_who_has_a_port_goes_on(rig: Rig) -> None:
    """All clients with one port are in one partition, which has a 256th of the table's room."""
    ends = [(f"10.0.1.{n}", 5000) for n in range(40)]
    left = [rig(udp(end, (SERVER, 80))) for end in ends]
    found = [external(frames) for frames in left if frames]
    assert len(set(found)) == len(found) > 5
    assert {address for address, _ in found} == {EXTERNAL}
    assert rig.counts()["table_full"] == 40 - len(found) > 0
    assert external(rig(udp(ends[0], (SERVER, 80)))) == found[0]
    assert external(rig(udp((ends[0][0], 5002), (SERVER, 80))))


@pytest.mark.parametrize("nf", ["", "firewall", "nat", "firewall+nat"])
def test_nftables_is_told_the_job_and_the_addresses(nf: str) -> None:
    settings: dict[str, dict[str, Any]] = {"nat": {"external_addresses": "192.0.2.0/30"}}
    text = nftables.rules(nf, settings)
    assert ("snat to 192.0.2.0-192.0.2.3 persistent" in text) is ("nat" in nf)
    assert ("policy drop" in text) is (nf != "nat")
    assert text.count("{") == text.count("}")
    first, count = load("nat").make_env()["external_addresses"][0]
    assert ("nat" in nf) is (f"{IPv4Address(int(first))}-{IPv4Address(int(first + count - 1))}" in nftables.rules(nf, {}))


def test_nftables_is_told_the_pool_and_its_weights() -> None:
    given: dict[str, dict[str, Any]] = {"load_balancer": {"virtual_address": "10.128.0.1", "ports": "all"}}
    given["load_balancer"]["backends"] = ["10.128.0.2 weight 3", "10.128.0.3 weight 0", "10.128.0.4"]
    text = nftables.rules("load_balancer", given)
    assert "ip daddr 10.128.0.1 " in text
    assert "mod 4 map { 0-2 : 10.128.0.2, 3-3 : 10.128.0.4 }" in text
    for backends, message in ((["10.128.0.2:8080"], "backends without a port"), (["10.128.0.2 weight 0"], "none of")):
        given["load_balancer"]["backends"] = backends
        with pytest.raises(NearstateError, match=message):
            nftables.rules("load_balancer", given)


def test_a_job_that_nftables_cannot_do_is_named() -> None:
    with pytest.raises(NearstateError, match="unknown job of the peer nftables 'traffic_counter'"):
        nftables.rules("traffic_counter", {})
