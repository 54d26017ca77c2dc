"""Packet in, verdict out: every network function, compiled and as plain Python, by the same assertions."""

from __future__ import annotations

import pytest

from nfs.dataplane import declaration
from nfs.dataplane.declaration import DROP, FORWARD
from nfs.firewall import CLOSING_S, ESTABLISHED_S, ICMP_S, OPENING_S, REFUSED_S, RESET_S, TIME_WAIT_S, UDP_S
from tests import packets
from tests.packets import Instance, echo, icmp_error, tcp, udp

pytestmark = pytest.mark.python_mode


@pytest.fixture
def firewall() -> Instance:
    return Instance.of("firewall")


def opened(firewall: Instance) -> Instance:
    """Return the firewall after a handshake, each step checked with its time-out."""
    steps = ((firewall, tcp("S"), OPENING_S), (firewall.outside, tcp("SA", inside=False), OPENING_S),
             (firewall, tcp("A"), ESTABLISHED_S))  # fmt: skip
    for side, segment, timeout_s in steps:
        assert side(segment) == FORWARD
        assert firewall.idle_timeout_s == timeout_s
    return firewall


def test_a_connection_opened_from_inside_carries_data_both_ways(firewall: Instance) -> None:
    opened(firewall)
    assert firewall(tcp("PA", payload=b"GET /")) == FORWARD
    assert firewall.outside(tcp("PA", inside=False, payload=b"200 OK")) == FORWARD
    assert firewall.idle_timeout_s == ESTABLISHED_S


@pytest.mark.parametrize("flags", ["S", "SA", "A", "PA", "FA", "R", "RA", "", "FSRPAU"])
def test_nothing_from_outside_opens(firewall: Instance, flags: str) -> None:
    assert firewall.outside(tcp(flags, inside=False)) == DROP
    assert firewall.records == {}


@pytest.mark.parametrize("flags", ["SA", "A", "PA", "FA", "R", "", "SF", "SR", "FSRPAU"])
def test_from_inside_only_a_syn_opens(firewall: Instance, flags: str) -> None:
    assert firewall(tcp(flags)) == DROP
    assert firewall.records == {}


def test_another_connection_of_the_same_hosts_is_another(firewall: Instance) -> None:
    opened(firewall)
    assert firewall.outside(tcp("PA", inside=False, client_port=packets.CLIENT_PORT + 2)) == DROP


@pytest.mark.parametrize("closer", ["inside", "outside"])
def test_a_connection_that_takes_the_place_of_one_being_closed_has_closed_nothing(firewall: Instance, closer: str) -> None:
    """The server forgot the old one (RFC 9293, section 3.5.1): the new one has all of its time, and a close of its own."""
    opened(firewall)
    assert (firewall if closer == "inside" else firewall.outside)(tcp("FA", inside=closer == "inside")) == FORWARD
    assert firewall(tcp("S")) == FORWARD
    assert firewall.idle_timeout_s == CLOSING_S
    assert firewall.outside(tcp("SA", inside=False)) == FORWARD
    assert firewall.idle_timeout_s == OPENING_S
    assert firewall(tcp("A")) == FORWARD
    assert firewall.idle_timeout_s == ESTABLISHED_S
    assert firewall.outside(tcp("FA", inside=False)) == FORWARD
    assert firewall.idle_timeout_s == CLOSING_S, "inside has not closed"
    assert firewall(tcp("FA")) == FORWARD
    assert firewall.idle_timeout_s == TIME_WAIT_S


def test_before_the_answer_outside_may_only_answer(firewall: Instance) -> None:
    assert firewall(tcp("S")) == FORWARD
    assert firewall.outside(tcp("PA", inside=False)) == DROP
    assert firewall.outside(tcp("A", inside=False, payload=b"data")) == DROP
    assert firewall.outside(tcp("FA", inside=False)) == DROP
    assert firewall(tcp("S")) == FORWARD, "a SYN may be sent again"
    assert firewall(tcp("PA")) == DROP, "no data before the handshake"
    assert firewall.outside(tcp("SA", inside=False)) == FORWARD


def test_a_server_that_knows_an_earlier_connection_is_reset(firewall: Instance) -> None:
    """RFC 9293, section 3.5.1: it answers a SYN with an acknowledgment, and the client resets it."""
    assert firewall(tcp("S")) == FORWARD
    assert firewall.outside(tcp("A", inside=False)) == FORWARD
    assert firewall.outside(tcp("PA", inside=False)) == DROP, "that answer opens nothing"
    assert firewall(tcp("R")) == FORWARD
    opened(firewall)


@pytest.mark.parametrize("flags", ["", "P", "F", "U", "SF", "SFA", "SR", "SRA", "RF", "FSRPAU"])
@pytest.mark.parametrize("inside", [True, False])
def test_flags_that_mean_nothing_never_pass(firewall: Instance, flags: str, inside: bool) -> None:
    opened(firewall)
    assert (firewall(tcp(flags)) if inside else firewall.outside(tcp(flags, inside=False))) == DROP
    assert firewall.outside(tcp("PA", inside=False)) == FORWARD, "and change nothing"


def test_who_opened_does_not_answer_and_who_answered_does_not_open(firewall: Instance) -> None:
    opened(firewall)
    assert firewall.outside(tcp("S", inside=False)) == DROP
    assert firewall(tcp("SA")) == DROP
    assert firewall.outside(tcp("SA", inside=False)) == FORWARD, "the answer may be sent again"
    assert firewall(tcp("S")) == FORWARD, "the client may have forgotten: the server tells it"


def test_simultaneous_open(firewall: Instance) -> None:
    """RFC 9293, figure 8; RFC 5382, REQ-2: both SYNs cross, each is answered by SYN ACK."""
    assert firewall(tcp("S")) == FORWARD
    assert firewall.outside(tcp("S", inside=False)) == FORWARD
    assert firewall(tcp("SA")) == FORWARD
    assert firewall.outside(tcp("SA", inside=False)) == FORWARD
    assert firewall.idle_timeout_s == OPENING_S
    assert firewall(tcp("A")) == FORWARD
    assert firewall.idle_timeout_s == ESTABLISHED_S


def test_a_syn_that_also_closes_answers_nothing(firewall: Instance) -> None:
    assert firewall(tcp("S")) == FORWARD
    assert firewall.outside(tcp("SFA", inside=False)) == DROP
    assert firewall.outside(tcp("PA", inside=False)) == DROP


@pytest.mark.parametrize("first_inside", [True, False])
def test_both_sides_close(firewall: Instance, first_inside: bool) -> None:
    opened(firewall)

    def send(inside: bool, flags: str) -> int:
        return firewall(tcp(flags)) if inside else firewall.outside(tcp(flags, inside=False))

    assert send(first_inside, "FA") == FORWARD
    assert firewall.idle_timeout_s == CLOSING_S
    assert send(not first_inside, "A") == FORWARD
    assert send(not first_inside, "PA") == FORWARD, "the other half stays open"
    assert send(first_inside, "A") == FORWARD
    assert firewall.idle_timeout_s == CLOSING_S
    assert send(not first_inside, "FA") == FORWARD
    assert firewall.idle_timeout_s == TIME_WAIT_S
    assert send(first_inside, "A") == FORWARD, "the last acknowledgement"
    assert send(first_inside, "FA") == FORWARD, "a FIN may be sent again"
    assert firewall.outside(tcp("S", inside=False)) == DROP


def test_the_same_fin_twice_closes_one_side_only(firewall: Instance) -> None:
    opened(firewall)
    for _ in range(2):
        assert firewall(tcp("FA")) == FORWARD
    assert firewall.idle_timeout_s == CLOSING_S
    assert firewall.outside(tcp("PA", inside=False)) == FORWARD


def test_time_wait_reopens_from_inside_only(firewall: Instance) -> None:
    opened(firewall)
    firewall(tcp("FA"))
    firewall.outside(tcp("FA", inside=False))
    assert firewall.outside(tcp("S", inside=False)) == DROP
    assert firewall.outside(tcp("SA", inside=False)) == DROP
    opened(firewall)
    assert firewall(tcp("FA")) == FORWARD
    assert firewall.idle_timeout_s == CLOSING_S, "the earlier connection's FINs are forgotten"


@pytest.mark.parametrize("inside", [True, False])
def test_a_reset_shortens_and_what_follows_takes_it_back(firewall: Instance, inside: bool) -> None:
    """RFC 5961, section 3.2: its receiver may refuse it. RFC 6146, section 3.5.2.2; RFC 7857, section 2."""
    opened(firewall)
    assert (firewall(tcp("R")) if inside else firewall.outside(tcp("R", inside=False))) == FORWARD
    assert firewall.idle_timeout_s == RESET_S
    assert (firewall.outside(tcp("A", inside=False)) if inside else firewall(tcp("A"))) == FORWARD, "a challenge ACK"
    assert firewall.idle_timeout_s == ESTABLISHED_S
    firewall.now_s += ESTABLISHED_S - 1
    assert firewall(tcp("PA")) == FORWARD
    assert firewall.outside(tcp("PA", inside=False)) == FORWARD
    assert firewall(tcp("R")) == FORWARD
    opened(firewall)
    firewall(tcp("R"))
    firewall.now_s += RESET_S + 1
    assert firewall.outside(tcp("PA", inside=False)) == DROP, "nothing took it back"


def test_a_refused_connection_may_be_tried_again(firewall: Instance) -> None:
    assert firewall(tcp("S")) == FORWARD
    refusal = bytes(packets.inward() / packets.TCP(sport=packets.SERVER_PORT, dport=packets.CLIENT_PORT, flags="RA", ack=1))
    assert firewall.outside(refusal) == FORWARD, "connection refused reaches the client"
    assert firewall.idle_timeout_s == REFUSED_S
    assert firewall.outside(tcp("SA", inside=False)) == DROP
    opened(firewall)


@pytest.mark.parametrize(
    ("segments", "timeout_s"), [("S", OPENING_S), ("S SA A", ESTABLISHED_S), ("S SA A FA", CLOSING_S), ("S SA A R", RESET_S)]
)
def test_an_idle_connection_is_forgotten(firewall: Instance, segments: str, timeout_s: int) -> None:
    for flags in segments.split():
        assert (firewall.outside(tcp(flags, inside=False)) if flags == "SA" else firewall(tcp(flags))) == FORWARD
    assert firewall.idle_timeout_s == timeout_s
    firewall.now_s += timeout_s + 1
    assert firewall.outside(tcp("PA", inside=False)) == DROP
    assert firewall.outside(tcp("SA", inside=False)) == DROP


def test_an_idle_connection_just_before_its_time_out_lives_on(firewall: Instance) -> None:
    opened(firewall)
    for _ in range(3):
        firewall.now_s += ESTABLISHED_S - 1
        assert firewall.outside(tcp("A", inside=False)) == FORWARD


def test_udp_answers_pass_while_the_question_is_fresh(firewall: Instance) -> None:
    assert firewall.outside(udp(inside=False)) == DROP
    assert firewall(udp()) == FORWARD
    assert firewall.idle_timeout_s == UDP_S
    assert firewall.outside(udp(inside=False)) == FORWARD
    assert firewall.outside(udp(inside=False, server_port=54)) == DROP
    assert firewall.outside(udp(inside=False, client_port=1)) == DROP
    firewall.now_s += UDP_S + 1
    assert firewall.outside(udp(inside=False)) == DROP


def test_ping_from_inside_is_answered_and_from_outside_is_not(firewall: Instance) -> None:
    assert firewall.outside(echo(inside=False)) == DROP
    assert firewall(echo()) == FORWARD
    assert firewall.idle_timeout_s == ICMP_S
    assert firewall.outside(echo(inside=False)) == FORWARD
    assert firewall.outside(echo(inside=False, identifier=78)) == DROP


@pytest.mark.parametrize(("asks", "answers"), [(8, 0), (13, 14), (15, 16), (17, 18)])
def test_icmp_is_asked_from_inside_and_answered_from_outside(firewall: Instance, asks: int, answers: int) -> None:
    def query(kind: int, inside: bool) -> bytes:
        return bytes((packets.outward() if inside else packets.inward()) / packets.ICMP(type=kind, id=5) / bytes(12))

    assert firewall(query(answers, True)) == DROP, "nobody has asked"
    assert firewall(query(asks, True)) == FORWARD
    assert firewall.outside(query(answers, False)) == FORWARD
    assert firewall.outside(query(asks, False)) == DROP
    assert firewall(query(9, True)) == firewall.outside(query(10, False)) == firewall(query(8 + 64, True)) == DROP


@pytest.mark.parametrize("about", [udp(), tcp("S"), echo()], ids=["udp", "tcp", "echo"])
def test_an_icmp_error_passes_when_its_connection_exists(firewall: Instance, about: bytes) -> None:
    error = icmp_error(about, router="10.99.0.1")
    assert firewall.outside(error) == DROP
    assert firewall(about) == FORWARD
    before = dict(firewall.expires_s)
    assert firewall.outside(error) == FORWARD
    assert (firewall.idle_timeout_s, firewall.expires_s) == (0, before), "errors keep nothing alive"


def test_an_icmp_error_from_inside_about_an_answer_passes(firewall: Instance) -> None:
    assert firewall(udp()) == FORWARD
    assert firewall(icmp_error(udp(inside=False), inside=True)) == FORWARD
    assert firewall(icmp_error(udp(inside=False, client_port=9), inside=True)) == DROP


def test_every_kind_of_frame_has_a_verdict_from_either_side() -> None:
    for name in declaration.names():
        function = Instance.of(name)
        for frame in packets.well_formed().values():
            for side in (function, function.outside):
                assert side(frame) in (DROP, FORWARD)
                assert side(frame[:40]) in (DROP, FORWARD)


def test_frames_without_a_flow_pass_the_firewall_only_if_they_are_not_ip(firewall: Instance) -> None:
    frames = packets.well_formed()
    assert firewall.outside(frames["arp"]) == FORWARD
    assert firewall.outside(frames["udp later fragment"]) == DROP
    assert firewall.outside(frames["tcp syn"][:50]) == DROP


def test_passthrough_forwards_everything() -> None:
    passthrough = Instance.of("passthrough")
    for frame in packets.well_formed().values():
        assert passthrough(frame) == passthrough.outside(frame) == passthrough(frame[:20]) == FORWARD
    assert passthrough.records == {}


def test_traffic_counter_counts_packets_and_bytes_both_ways() -> None:
    counter = Instance.of("traffic_counter")
    out, back = [udp(payload=bytes(n)) for n in (1, 100, 1400)], [udp(inside=False, payload=bytes(n)) for n in (7, 9)]
    assert [counter(frame) for frame in out] + [counter.outside(frame) for frame in back] == [FORWARD] * 5
    record = counter.record()
    assert (record["packets_out"], record["bytes_out"]) == (3, sum(map(len, out)))
    assert (record["packets_in"], record["bytes_in"]) == (2, sum(map(len, back)))
    assert counter.idle_timeout_s == 600
    assert counter(tcp("S")) == FORWARD
    assert len(counter.records) == 2, "each connection has counters of its own"
