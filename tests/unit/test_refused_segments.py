"""Does a segment that its receiver refuses leave a connection as it was, and does a segment of another incarnation pass?

The ends are those of RFC 9293 with RFC 5961: only a RST that is exactly due resets, a SYN on a live connection and a RST that is
not due draw a challenge ACK, and what stands outside the window is dropped. A middlebox sees all of these.
"""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from nfs.dataplane import DROP, FORWARD, OUT_OF_WINDOW
from nfs.firewall import CLOSING_S, ESTABLISHED_S, OPENING_S, REFUSED_S, RESET_S
from tests.packets import CLIENT_PORT, SERVER_PORT, Instance, ethernet, inward, outward

pytestmark = [pytest.mark.python_mode, pytest.mark.bounds]
OURS, THEIRS = 1000, 5000
"""Initial sequence numbers of client and server."""
BOTH_WAYS = pytest.mark.parametrize("track", [False, True])


class Ends:
    """Client and server with absolute sequence numbers, and the firewall between them."""

    def __init__(self, track: bool, outside_opens: bool = False) -> None:
        rules = ["accept in tcp"] if outside_opens else []
        self.firewall = Instance.of("firewall", track_window=track, rules=rules)
        self.opener_is_inside = not outside_opens

    def send(self, opener: bool, flags: str, seq: int, ack: int = 0, size: int = 0) -> int:
        """Send a segment of the side that opens, or of the one that answers; returns the verdict."""
        inside = opener == self.opener_is_inside
        ports = (CLIENT_PORT, SERVER_PORT) if inside else (SERVER_PORT, CLIENT_PORT)
        header = TCP(sport=ports[0], dport=ports[1], flags=flags, seq=seq % 2**32, ack=ack % 2**32, window=65535)
        frame = bytes((outward() if inside else inward()) / header / bytes(size))
        return self.firewall(frame) if inside else self.firewall.outside(frame)

    def out(self, flags: str, seq: int, ack: int = 0, size: int = 0) -> int:
        return self.send(True, flags, seq, ack, size)

    def back(self, flags: str, seq: int, ack: int = 0, size: int = 0) -> int:
        return self.send(False, flags, seq, ack, size)

    def open(self, ours: int = OURS, theirs: int = THEIRS) -> None:
        """Take a handshake through, and a byte each way."""
        assert self.out("S", ours) == FORWARD
        assert self.back("SA", theirs, ours + 1) == FORWARD
        assert self.firewall.idle_timeout_s == OPENING_S
        assert self.out("A", ours + 1, theirs + 1) == FORWARD
        assert self.firewall.idle_timeout_s == ESTABLISHED_S
        assert self.out("PA", ours + 1, theirs + 1, 1) == FORWARD
        assert self.back("PA", theirs + 1, ours + 2, 1) == FORWARD

    def goes_on(self, ours: int = OURS + 2, theirs: int = THEIRS + 2) -> None:
        """The connection is alive, and is remembered for long."""
        self.firewall.now_s += 100
        assert self.out("PA", ours, theirs, 10) == FORWARD
        assert self.back("PA", theirs, ours + 10, 20) == FORWARD
        assert self.firewall.idle_timeout_s == ESTABLISHED_S


@pytest.fixture(params=["inside", "outside"])
def opener(request: Any) -> bool:
    return bool(request.param == "outside")


@BOTH_WAYS
@pytest.mark.parametrize("by_opener", [True, False])
@pytest.mark.parametrize("beyond", [1, 1000, 30_000])
def test_a_reset_in_the_window_that_is_not_due_is_challenged_and_then_due(
    track: bool, by_opener: bool, beyond: int, opener: bool
) -> None:
    ends = Ends(track, opener)
    ends.open()
    due, other = (OURS + 2, THEIRS + 2) if by_opener else (THEIRS + 2, OURS + 2)
    assert ends.send(by_opener, "R", due + beyond) == FORWARD
    assert ends.firewall.idle_timeout_s == RESET_S
    assert ends.send(not by_opener, "A", other, due) == FORWARD, "the challenge ACK (RFC 5961, section 9.3)"
    assert ends.firewall.idle_timeout_s == ESTABLISHED_S
    assert ends.send(by_opener, "R", due) == FORWARD, "the exact RST that answers it"
    assert ends.firewall.idle_timeout_s == RESET_S


@BOTH_WAYS
def test_spoofed_resets_end_no_connection(track: bool, opener: bool) -> None:
    ends = Ends(track, opener)
    ends.open()
    for beyond in (1, 30_000, 60_000):
        ends.back("R", THEIRS + 2 + beyond)
        ends.out("R", OURS + 2 + beyond)
    ends.goes_on()
    ends.firewall.now_s += ESTABLISHED_S - 101
    ends.goes_on(OURS + 12, THEIRS + 22)


@BOTH_WAYS
def test_a_reset_moves_no_window(track: bool) -> None:
    ends = Ends(track)
    ends.open()
    before = ends.firewall.record().copy()
    assert ends.back("R", THEIRS + 60_000) == FORWARD
    assert ends.back("PA", THEIRS + 2, OURS + 2, 5) == FORWARD
    after = ends.firewall.record()
    assert after["answerer_end"] == (THEIRS + 7 if track else before["answerer_end"])
    assert after["marks"] == before["marks"]


@BOTH_WAYS
def test_after_a_reset_that_nothing_takes_back_the_connection_is_forgotten_soon(track: bool) -> None:
    ends = Ends(track)
    ends.open()
    assert ends.out("R", OURS + 2) == FORWARD
    ends.firewall.now_s += RESET_S + 1
    assert ends.back("A", THEIRS + 2, OURS + 2) == DROP
    assert ends.out("A", OURS + 2, THEIRS + 2) == DROP


@BOTH_WAYS
def test_a_refused_syn_leaves_the_connection_as_it_was(track: bool, opener: bool) -> None:
    """RFC 9293, section 3.10.7.4: a live connection answers a SYN by a challenge ACK. The SYN may be an attacker's."""
    ends = Ends(track, opener)
    ends.open()
    for number in (0x10000000, 0x90000000, 0xF0000000):
        assert ends.out("S", number) == FORWARD
        assert ends.back("A", THEIRS + 2, OURS + 2) == FORWARD
    ends.goes_on()


@BOTH_WAYS
def test_a_reset_and_a_syn_both_refused_leave_the_connection_as_it_was(track: bool, opener: bool) -> None:
    ends = Ends(track, opener)
    ends.open()
    assert ends.out("R", OURS + 500) == FORWARD
    assert ends.out("S", 0x90000000) == FORWARD
    ends.goes_on()


@BOTH_WAYS
@pytest.mark.parametrize("number", [0x10000000, 0x90000000, 0xF0000000, OURS - 1, OURS + 3])
def test_recovery_from_a_half_open_connection(track: bool, number: int, opener: bool) -> None:
    """RFC 9293, section 3.5.1: SYN, challenge ACK, RST, and the SYN again."""
    ends = Ends(track, opener)
    ends.open()
    assert ends.out("S", number) == FORWARD
    assert ends.back("A", THEIRS + 2, OURS + 2) == FORWARD
    assert ends.out("R", OURS + 2) == FORWARD
    ends.open(number, 0xC0000000)
    ends.goes_on(number + 2, 0xC0000002)


@BOTH_WAYS
@pytest.mark.parametrize("number", [0x10000000, 0x90000000, 0xF0000000])
@pytest.mark.parametrize("close", [False, True])
def test_an_answerer_that_has_forgotten_accepts_the_next_connection_at_once(
    track: bool, number: int, close: bool, opener: bool
) -> None:
    ends = Ends(track, opener)
    ends.open()
    if close:  # half closed: it was in FIN-WAIT-2 and has given up
        assert ends.back("FA", THEIRS + 2, OURS + 2) == FORWARD
        assert ends.out("A", OURS + 2, THEIRS + 3) == FORWARD
        assert ends.firewall.idle_timeout_s == CLOSING_S
    ends.open(number, 0xC0000000)
    ends.goes_on(number + 2, 0xC0000002)


@BOTH_WAYS
def test_an_answerer_that_has_forgotten_refuses_the_next_connection(track: bool) -> None:
    ends = Ends(track)
    ends.open()
    assert ends.out("S", 0x90000000) == FORWARD
    assert ends.back("RA", 0, 0x90000001) == FORWARD
    assert ends.firewall.idle_timeout_s == REFUSED_S
    ends.open(0xA0000000, 0xC0000000)


def test_an_answer_to_nothing_begins_no_connection_anew() -> None:
    """With window tracking the answer must acknowledge the SYN that waits for it."""
    ends = Ends(True)
    ends.open()
    assert ends.back("SA", 0xC0000000, 0x90000001) == DROP, "no SYN waits"
    assert ends.out("S", 0x90000000) == FORWARD
    assert ends.back("SA", 0xC0000000, 0x90000002) == DROP
    assert ends.firewall.cause == OUT_OF_WINDOW
    ends.goes_on()


@BOTH_WAYS
def test_an_inside_answerer_may_open_the_other_way(track: bool) -> None:
    """Its host has forgotten the connection that outside opened, and opens one itself from the same port."""
    ends = Ends(track, outside_opens=True)
    ends.open()
    ends.firewall.env = Instance.of("firewall", track_window=track).env
    turned = Ends(track)
    turned.firewall = ends.firewall
    turned.open(0x90000000, 0xC0000000)
    turned.goes_on(0x90000002, 0xC0000002)


@BOTH_WAYS
@pytest.mark.parametrize("stranger", [0x20000000, 0xE0000000])
def test_a_reset_that_answers_a_challenge_passes_before_the_handshake(track: bool, stranger: int) -> None:
    """RFC 9293, section 3.10.7.3: SEG.ACK of the challenge is the number of the RST, of a connection never seen here."""
    ends = Ends(track)
    assert ends.out("S", 0x10000000) == FORWARD
    assert ends.back("A", 0x77777777, stranger) == FORWARD
    assert ends.out("R", stranger) == FORWARD
    ends.open(0x10000000, THEIRS)


@BOTH_WAYS
@pytest.mark.parametrize("flags", ["R", "RA"])
def test_a_refusal_that_acknowledges_no_syn_refuses_nothing(track: bool, flags: str) -> None:
    """RFC 9293, section 3.10.7.3; RFC 5961, section 3.2: its receiver drops it, and the true answer follows."""
    ends = Ends(track)
    assert ends.out("S", OURS) == FORWARD
    ends.back(flags, THEIRS, OURS + 2 if "A" in flags else 0)
    ends.open()


@BOTH_WAYS
@pytest.mark.parametrize("step", [-5000, 5000, 2**31])
def test_the_syn_that_is_answered_is_the_one_that_counts(track: bool, step: int) -> None:
    """The client began anew before it was answered; or an old SYN was under way (RFC 9293, section 3.5, figure 8)."""
    for first_answered in (True, False):
        ends = Ends(track)
        assert ends.out("S", OURS) == FORWARD
        assert ends.out("S", OURS + step) == FORWARD
        number = OURS if first_answered else OURS + step
        assert ends.back("SA", THEIRS, number + 1) == FORWARD
        assert ends.out("A", number + 1, THEIRS + 1) == FORWARD
        assert ends.firewall.idle_timeout_s == ESTABLISHED_S
        ends.goes_on(number + 1, THEIRS + 1)


@BOTH_WAYS
def test_an_answerer_may_begin_anew_before_it_is_acknowledged(track: bool) -> None:
    """It gave up the first handshake, and the SYN, sent again, made another."""
    for again in (THEIRS - 4000, THEIRS + 4000, THEIRS + 2**31):
        ends = Ends(track)
        assert ends.out("S", OURS) == FORWARD
        assert ends.back("SA", THEIRS, OURS + 1) == FORWARD
        assert ends.out("S", OURS) == FORWARD
        assert ends.back("SA", again, OURS + 1) == FORWARD
        assert ends.out("A", OURS + 1, again + 1) == FORWARD
        ends.goes_on(OURS + 1, again + 1)


@pytest.mark.parametrize("number", [THEIRS + 3_000_000, THEIRS + 2**31, THEIRS - 100_000_000])
def test_a_fin_that_was_refused_closes_nothing(number: int) -> None:
    """Without window tracking a FIN anywhere passes; what its side sends later shows that it was none."""
    ends = Ends(False)
    ends.open()
    assert ends.back("FA", number, OURS + 2) == FORWARD
    assert ends.firewall.idle_timeout_s == CLOSING_S
    theirs = THEIRS + 2
    for _ in range(3000):
        assert ends.back("PA", theirs, OURS + 2, 1400) == FORWARD
        theirs += 1400
    assert ends.firewall.idle_timeout_s == ESTABLISHED_S
    ends.goes_on(OURS + 2, theirs)


@BOTH_WAYS
def test_a_true_fin_stays_whatever_is_sent_again(track: bool) -> None:
    ends = Ends(track)
    ends.open()
    assert ends.back("PA", THEIRS + 2, OURS + 2, 1000) == FORWARD
    assert ends.back("FA", THEIRS + 1002, OURS + 2) == FORWARD
    assert ends.out("A", OURS + 2, THEIRS + 1003) == FORWARD
    assert ends.back("PA", THEIRS + 2, OURS + 2, 1000) == FORWARD
    assert ends.firewall.idle_timeout_s == CLOSING_S
    assert ends.back("A", THEIRS + 1002, OURS + 2) == FORWARD, "keep-alive"
    assert ends.out("PA", OURS + 2, THEIRS + 1003, 10) == FORWARD
    assert ends.firewall.idle_timeout_s == CLOSING_S


def test_a_half_that_stays_open_outlives_a_fin_that_was_refused() -> None:
    """Inside has closed its half; a FIN in the name of the server must not end what the server still sends."""
    ends = Ends(False)
    ends.open()
    assert ends.out("FA", OURS + 2, THEIRS + 2) == FORWARD
    assert ends.back("FA", THEIRS + 2_000_000, OURS + 3) == FORWARD
    for n in range(40):
        ends.firewall.now_s += 60
        assert ends.back("PA", THEIRS + 2 + 100 * n, OURS + 3, 100) == FORWARD
        assert ends.out("A", OURS + 3, THEIRS + 102 + 100 * n) == FORWARD


@pytest.mark.parametrize("size", [0, 10])
def test_data_outside_the_window_changes_nothing_where_windows_are_tracked(size: int) -> None:
    ends = Ends(True)
    ends.open()
    before = ends.firewall.record().copy()
    for flags in ("PA", "FA", "R"):
        assert ends.back(flags, THEIRS + 2**30, OURS + 2, size) == DROP
        assert ends.firewall.record() == before
    ends.goes_on()


# ---- translators and balancers, which follow what inside sends --------------------------------------------------------

CLIENT, SERVER, VIRTUAL = ("10.0.1.7", 5000), ("10.128.0.1", 80), ("10.64.1.1", 80)
FOLLOWERS: dict[str, tuple[dict[str, Any], tuple[str, int]]] = {
    "nat": ({"external_addresses": ["192.0.2.1"]}, SERVER),
    "nat_symmetric": ({"external_addresses": ["192.0.2.1"]}, SERVER),
    "load_balancer": ({"virtual_address": VIRTUAL[0], "backends": ["10.128.0.1", "10.128.0.2"]}, VIRTUAL),
}


class Client:
    """A client behind a function that follows its side of a connection."""

    def __init__(self, name: str) -> None:
        settings, self.server = FOLLOWERS[name]
        self.instance = Instance.of(name, **settings)

    def __call__(self, flags: str, seq: int, size: int = 0) -> int:
        """Send a segment; returns the time-out that it leaves behind."""
        header = TCP(sport=CLIENT[1], dport=self.server[1], flags=flags, seq=seq % 2**32, ack=7)
        frame = ethernet() / IP(src=CLIENT[0], dst=self.server[0]) / header / bytes(size)
        assert self.instance(bytes(frame)) == FORWARD
        return self.instance.idle_timeout_s

    def open(self, number: int = 100) -> None:
        self("S", number)
        assert self("A", number + 1) == ESTABLISHED_S

    def target(self) -> str:
        return str(Ether(self.instance.sent)[IP].dst)


@pytest.mark.parametrize("name", FOLLOWERS)
@pytest.mark.parametrize("number", [101, 5000, 2**31])
def test_a_reset_from_inside_is_taken_back_by_what_follows(name: str, number: int) -> None:
    client = Client(name)
    client.open()
    assert client("RA", number) == RESET_S
    client.instance.now_s += RESET_S - 1
    assert client("A", 101) == ESTABLISHED_S
    client.instance.now_s += ESTABLISHED_S - 1
    assert client("PA", 101, 10) == ESTABLISHED_S


@pytest.mark.parametrize("name", FOLLOWERS)
@pytest.mark.parametrize("number", [5000, 2**31])
def test_a_fin_from_inside_that_was_refused_is_taken_back(name: str, number: int) -> None:
    client = Client(name)
    client.open()
    assert client("FA", number) == CLOSING_S
    for seq in range(101, 10_000, 1000):
        timeout_s = client("PA", seq, 1000)
    assert timeout_s == ESTABLISHED_S


@pytest.mark.parametrize("name", FOLLOWERS)
def test_a_true_fin_from_inside_stays(name: str) -> None:
    client = Client(name)
    client.open()
    assert client("FA", 101, 10) == CLOSING_S
    assert client("A", 112) == CLOSING_S
    assert client("PA", 101, 10) == CLOSING_S, "sent again"
    assert client("R", 112) == RESET_S
    assert client("A", 112) == CLOSING_S, "that RST was refused: the half that is open goes on"


def test_the_load_of_a_backend_is_right_after_a_reset_that_was_refused() -> None:
    client = Client("load_balancer")
    client.open()
    for _ in range(3):
        client("R", 5000)
        client("A", 101)
    opened, closed = (sum(count for (_, _, place), count in client.instance.counters.items() if place == word) for word in (0, 1))
    assert (opened, closed) == (4, 3)


def test_a_syn_that_is_refused_does_not_move_a_balanced_connection() -> None:
    client = Client("load_balancer")
    client.open()
    backend = client.target()
    for number in (5, 2**31, 100):
        assert client("S", number) == ESTABLISHED_S
        assert client.target() == backend
    assert client("PA", 101, 10) == ESTABLISHED_S
