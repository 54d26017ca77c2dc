"""Do rule lists decide new connections, and only these, and do windows keep out what no sender can mean?"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.base.errors import NearstateError
from nfs.dataplane import DROP, FORWARD, OUT_OF_WINDOW, REFUSED_BY_RULE
from nfs.firewall import RESET_S
from tests.packets import CLIENT, CLIENT_PORT, SERVER, SERVER_PORT, TCP, Instance, echo, icmp_error, inward, outward, tcp, udp

pytestmark = [pytest.mark.python_mode, pytest.mark.bounds]


def ruled(*rules: str) -> Instance:
    return Instance.of("firewall", rules=list(rules))


# ---- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        ("drop", True), ("drop any", True), ("drop tcp", True), ("drop 6", True), ("drop udp", False), ("drop icmp", False),
        ("drop out tcp", True), ("drop in tcp", False),
        (f"drop tcp from {CLIENT} to {SERVER}", True), (f"drop tcp from {SERVER} to {CLIENT}", False),
        ("drop from 10.0.1.0/24", True), ("drop from 10.0.2.0/24", False), ("drop to 10.128.0.0/9", True),
        ("drop to 10.0.0.0/9", False), ("drop from 0.0.0.0/0 to any", True), ("drop from 10.0.1.6/31", True),
        ("drop from 10.0.1.4/31", False), ("drop tcp from any port 40002 to any port 80", True),
        ("drop tcp to any port 80-443", True), ("drop tcp to any port 81-443", False), ("drop tcp to any port 1-79", False),
        ("DROP TCP FROM any PORT 40002", True), ("drop tcp from any port 80", False),
    ],
)  # fmt: skip
def test_a_rule_matches_what_it_says(rule: str, matches: bool) -> None:
    firewall = ruled(rule)
    assert firewall(tcp("S")) == (DROP if matches else FORWARD)
    assert firewall.cause == (REFUSED_BY_RULE if matches else 0)
    assert len(firewall.records) == (not matches)


def test_the_first_rule_that_matches_decides() -> None:
    rules = ["accept tcp to any port 80", "drop tcp", "accept tcp"]
    firewall = ruled(*rules)
    assert firewall(tcp("S")) == FORWARD
    assert ruled(*rules[1:])(tcp("S")) == DROP
    assert ruled(*["drop udp"] * 31, "drop tcp")(tcp("S")) == DROP, "the last of 32"


def test_a_rule_may_let_outside_open_and_then_outside_is_who_opened() -> None:
    firewall = ruled(f"accept in tcp to {CLIENT} port {CLIENT_PORT}")
    assert firewall.outside(tcp("S", inside=False, client_port=CLIENT_PORT + 2)) == DROP
    assert firewall.cause == 0, "no rule matches: as without rules"
    assert firewall.outside(tcp("A", inside=False)) == DROP, "only a SYN opens"
    assert firewall.records == {}
    assert firewall.outside(tcp("S", inside=False)) == FORWARD
    assert firewall(tcp("PA")) == DROP
    assert firewall(tcp("SA")) == FORWARD
    assert firewall.outside(tcp("A", inside=False)) == FORWARD
    assert [firewall(tcp("PA")), firewall.outside(tcp("PA", inside=False))] == [FORWARD] * 2


def test_only_new_connections_are_asked_about() -> None:
    firewall = ruled()
    assert [firewall(udp()), firewall(tcp("S")), firewall(echo())] == [FORWARD] * 3
    firewall.env = ruled("drop").env
    assert [firewall(udp()), firewall.outside(udp(inside=False)), firewall.outside(tcp("SA", inside=False))] == [FORWARD] * 3
    assert firewall.outside(icmp_error(udp(), router="10.99.0.1")) == FORWARD
    assert [firewall(udp(client_port=7)), firewall(echo(identifier=9))] == [DROP] * 2


def test_a_connection_that_is_over_is_asked_about_again() -> None:
    firewall = ruled()
    assert [firewall(tcp("S")), firewall(tcp("R"))] == [FORWARD] * 2
    firewall.env = ruled("drop").env
    assert (firewall(tcp("S")), firewall.cause) == (DROP, REFUSED_BY_RULE)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("allow tcp", "begins with accept or drop"),
        ("", "begins with accept or drop"),
        ("accept tpc", "'tpc' is not understood here"),
        ("accept 256", "protocols are 0 to 255"),
        ("accept tcp from 10.0.0.1/8", "from '10.0.0.1/8' is no network .*has host bits set"),
        ("accept tcp from", "from '' is no network"),
        ("accept tcp to any port 80-", "port '80-' is no port"),
        ("accept tcp to any port http", "port 'http' is no port"),
        ("accept tcp to any port 443-80", "the lower one first"),
        ("accept tcp to any port 65536", "ports are 0 to 65535"),
        ("accept to any port 80", "only tcp and udp have ports"),
        ("accept to any from any", "'from' is not understood here"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(rule: str, message: str) -> None:
    with pytest.raises(NearstateError, match=message) as raised:
        ruled(rule)
    assert "a rule looks like" in str(raised.value)


def test_too_many_rules_are_refused() -> None:
    with pytest.raises(NearstateError, match="33 firewall rules: 32 are possible"):
        ruled(*["drop"] * 33)


# ---- windows ----------------------------------------------------------------------------------------------------------

OURS, THEIRS = 1000, 2**32 - 5
"""Initial sequence numbers; the server's wrap around at once."""


def segment(flags: str, inside: bool, sequence: int, acknowledgment: int = 0, size: int = 0, window: int = 1000,
            options: Any = ()) -> bytes:  # fmt: skip
    """Return a segment; sequence numbers count from each side's initial one."""
    mine, other = (OURS, THEIRS) if inside else (THEIRS, OURS)
    ports = (CLIENT_PORT, SERVER_PORT) if inside else (SERVER_PORT, CLIENT_PORT)
    ack = (other + acknowledgment) % 2**32 if "A" in flags else 0
    header = TCP(sport=ports[0], dport=ports[1], flags=flags, seq=(mine + sequence) % 2**32, ack=ack, window=window,
                 options=list(options))  # fmt: skip
    return bytes((outward() if inside else inward()) / header / bytes(size))


class Peers:
    """Both ends of one connection through a firewall that tracks windows."""

    def __init__(self, window: int = 1000, shifts: tuple[int | None, int | None] = (None, None), **given: Any) -> None:
        self.firewall = Instance.of("firewall", track_window=True, **given)
        options = [[("WScale", shift)] if shift is not None else [] for shift in shifts]
        assert self.firewall(segment("S", True, 0, window=window, options=options[0])) == FORWARD
        assert self.inside_answers(segment("SA", False, 0, 1, window=window, options=options[1])) == FORWARD
        assert self.out("A", 1, 1, window=window) == FORWARD

    def inside_answers(self, frame: bytes) -> int:
        return self.firewall.outside(frame)

    def out(self, flags: str, sequence: int, acknowledgment: int, size: int = 0, window: int = 1000) -> int:
        return self.firewall(segment(flags, True, sequence, acknowledgment, size, window))

    def back(self, flags: str, sequence: int, acknowledgment: int, size: int = 0, window: int = 1000) -> int:
        return self.firewall.outside(segment(flags, False, sequence, acknowledgment, size, window))


def test_what_is_within_passes_both_ways() -> None:
    peers = Peers()
    assert peers.out("PA", 1, 1, 500) == FORWARD
    assert peers.back("A", 1, 501) == FORWARD
    assert peers.back("PA", 1, 501, 1000) == FORWARD
    assert peers.out("A", 501, 1001) == FORWARD
    assert peers.out("PA", 1, 1001, 500) == FORWARD, "sent again"


@pytest.mark.parametrize(
    ("sequence", "acknowledgment", "size", "bound"),
    [(1002, 1, 1, "I: beyond what the server offered"), (2**31, 1, 0, "I: half the space away"), (-1100, 1, 10, "II: too old"),
     (1, 2, 0, "III: acknowledges what was not sent"), (1, -66_100, 0, "IV: acknowledges what is long past")],
)  # fmt: skip
def test_each_bound_of_the_paper_drops(sequence: int, acknowledgment: int, size: int, bound: str) -> None:
    peers = Peers()
    before = peers.firewall.record().copy()
    assert peers.out("PA", sequence, acknowledgment, size) == DROP, bound
    assert peers.firewall.cause == OUT_OF_WINDOW
    assert peers.firewall.record() == before, "and leaves no trace"
    assert peers.out("PA", 1, 1, 10) == FORWARD


def test_a_blind_reset_is_kept_out_and_a_true_one_is_not() -> None:
    """RFC 5961, section 1.2: whoever does not see the connection has to guess a sequence number in the window."""
    peers = Peers()
    for guess in range(5000, 2**32 - 5000, 2**28):
        assert peers.back("R", guess, 0) == DROP
    assert peers.out("PA", 1, 1, 10) == FORWARD
    assert peers.back("R", 1, 0) == FORWARD
    assert peers.firewall.idle_timeout_s == RESET_S, "it is over unless its receiver goes on"


def test_a_refusal_must_acknowledge_the_syn() -> None:
    """RFC 9293, section 3.10.7.3."""
    for acknowledgment, verdict in ((1, FORWARD), (2, DROP), (-5, DROP)):
        firewall = Instance.of("firewall", track_window=True)
        assert firewall(segment("S", True, 0)) == FORWARD
        assert firewall.outside(segment("RA", False, -THEIRS, acknowledgment)) == verdict


def test_scaled_windows() -> None:
    """RFC 7323, section 2.2: shifts apply when both SYNs had the option, and never to a SYN's own window."""
    for shifts, allowed in (((7, 3), 1000 << 3), ((7, None), 1000), ((None, 3), 1000), ((14, 15), 1000 << 14)):
        peers = Peers(shifts=shifts)
        assert peers.back("A", 1, 1) == FORWARD
        assert peers.out("PA", 1 + allowed, 1) == FORWARD, shifts
        assert peers.out("PA", 2 + allowed, 1, 1) == DROP, shifts


def test_the_window_moves_with_acknowledgments() -> None:
    peers = Peers()
    sent = 1
    for _ in range(2000):  # 2 MB: the server's sequence numbers wrapped long ago, the client's bounds move on
        assert peers.out("PA", sent, 1, 1000) == FORWARD
        assert peers.out("PA", sent + 1001, 1, 1) == DROP
        sent += 1000
        assert peers.back("A", 1, sent) == FORWARD
    assert peers.out("PA", 1, 1, 10) == DROP, "the beginning is long past"


def test_a_probe_of_a_closed_window_passes() -> None:
    """RFC 9293, section 3.8.6.1."""
    peers = Peers()
    assert peers.out("PA", 1, 1, 1000) == FORWARD
    assert peers.back("A", 1, 1001, window=0) == FORWARD
    assert peers.out("A", 1001, 1, 1) == FORWARD
    assert peers.out("A", 1003, 1, 1) == DROP


def test_the_close_counts_one_number_for_each_fin() -> None:
    peers = Peers()
    assert peers.out("FA", 1, 1) == FORWARD
    assert peers.back("A", 1, 3) == DROP
    assert peers.back("A", 1, 2) == FORWARD
    assert peers.back("FA", 1, 2) == FORWARD
    assert peers.out("A", 2, 2) == FORWARD


def test_a_new_connection_begins_anew() -> None:
    peers = Peers()
    assert peers.out("R", 1, 0) == FORWARD
    firewall = peers.firewall
    assert firewall(segment("S", True, 2**31)) == FORWARD
    assert firewall.outside(segment("SA", False, 2**30, 2**31 + 1)) == FORWARD
    assert firewall(segment("A", True, 2**31 + 1, 2**30 + 1)) == FORWARD
    assert firewall(segment("A", True, 1, 1)) == DROP


def test_without_the_setting_nothing_is_tracked() -> None:
    firewall = Instance.of("firewall")
    assert firewall(segment("S", True, 0)) == FORWARD
    assert firewall.outside(segment("SA", False, 0, 77)) == FORWARD
    assert firewall(segment("PA", True, 2**31, 99, 100)) == FORWARD
    assert firewall.record()["opener_window"] == firewall.record()["answerer_limit"] == 0


def test_windows_are_tracked_for_who_opened_from_outside_too() -> None:
    firewall = Instance.of("firewall", track_window=True, rules=["accept in tcp"])
    assert firewall.outside(segment("S", False, 0)) == FORWARD
    assert firewall(segment("SA", True, 0, 1)) == FORWARD
    assert firewall.outside(segment("A", False, 1, 1)) == FORWARD
    assert firewall(segment("PA", True, 1002, 1, 5)) == DROP
    assert firewall(segment("PA", True, 1, 1, 5)) == FORWARD


sendings = st.tuples(st.booleans(), st.integers(1, 1400), st.integers(0, 65535), st.booleans())


@settings(max_examples=60)
@given(st.lists(sendings, max_size=40), st.integers(0, 14))
def test_two_correct_peers_are_never_disturbed(steps: list[tuple[bool, int, int, bool]], shift: int) -> None:
    """Each sends as much as the other has offered, retransmits what is not acknowledged, and acknowledges all or nothing."""
    peers = Peers(window=65535, shifts=(shift, shift))
    sent, acknowledged, right = [1, 1], [1, 1], [1 + 65535, 1 + 65535]
    for outward_step, size, window, again in steps:
        side = 0 if outward_step else 1
        send = peers.out if outward_step else peers.back
        size = max(0, min(size, right[side] - sent[side]))
        first = acknowledged[side] if again else sent[side]
        acknowledged[1 - side] = sent[1 - side]
        window = max(window, -(-max(0, right[1 - side] - sent[1 - side]) >> shift))  # a window does not shrink
        window = min(window, 65535)
        assert send("PA", first, sent[1 - side], size, window) == FORWARD
        sent[side] = max(sent[side], first + size)
        right[1 - side] = max(right[1 - side], sent[1 - side] + (window << shift))
