"""Does a connection stay with its backend, whatever becomes of the pool? Does each backend get its share, and no dead one any?"""

from __future__ import annotations

import math
import os
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import Ether

from datastore.base.errors import NearstateError
from datastore.compiled import INTERPRETED
from nfs.dataplane import DROP, FORWARD, NO_BACKEND, REFUSED_BY_RULE, load
from nfs.dataplane.headers import INSIDE, OUTSIDE
from nfs.load_balancer import ANSWERED, CLOSED, MOST, NAME_BITS, ON_TRIAL, OPENED, SYNS, chosen, counter_key
from tests.packets import Instance, checksums_hold, ethernet, icmp_error
from tests.rig import Rig

pytestmark = [pytest.mark.python_mode, pytest.mark.bounds]
LONG = os.environ.get("NEARSTATE_LONG") == "1"
VIRTUAL = "10.64.1.1"
POOL = ["10.128.0.1:8080", "10.128.0.2:8080 weight 2", "10.128.0.3"]
ROUTER = "10.200.0.1"
KINDS = ("tcp", "udp", "icmp")
ESTABLISHED_S, CLOSING_S, RESET_S, OPENING_S, UDP_S, ICMP_S = 7440, 240, 240, 120, 300, 60
End = tuple[str, int]


def balancer(backends: Any = POOL, **given: Any) -> Instance:
    return Instance.of("load_balancer", virtual_address=VIRTUAL, backends=backends, **given)


def packet(kind: str, source: End, target: End, flags: str = "S", sequence: int = 0, payload: bytes = b"abc") -> bytes:
    """Return a frame; of ICMP a query with the identifier of the source, or a reply with the target's where that is 0."""
    ip = ethernet() / IP(src=source[0], dst=target[0])
    if kind == "tcp":
        return bytes(ip / TCP(sport=source[1], dport=target[1], flags=flags, seq=sequence) / payload)
    if kind == "udp":
        return bytes(ip / UDP(sport=source[1], dport=target[1]) / payload)
    return bytes(ip / ICMP(type=8 if source[1] else 0, id=source[1] or target[1]) / payload)


def virtual(kind: str = "tcp", port: int = 80) -> End:
    return VIRTUAL, 0 if kind == "icmp" else port


def target_of(frame: bytes) -> End:
    found = Ether(frame)
    return found[IP].dst, 0 if ICMP in found else found[IP].payload.dport


def out(instance: Instance, client: End, kind: str = "tcp", port: int = 80, **more: Any) -> End:
    """Send a client's packet to the virtual address and return the backend it went to; all else must be as it was."""
    assert instance(packet(kind, client, virtual(kind, port), **more)) == FORWARD
    backend = target_of(instance.sent)
    assert checksums_hold(instance.sent)
    assert instance.sent == packet(kind, client, backend, **more)
    return backend


def back(instance: Instance, client: End, backend: End, kind: str = "tcp", port: int = 80, flags: str = "SA") -> None:
    """Answer from a backend; the client must hear it from the virtual address, and nothing else changed."""
    assert instance.outside(packet(kind, backend, client, flags)) == FORWARD
    assert checksums_hold(instance.sent)
    assert instance.sent == packet(kind, virtual(kind, port), client, flags)


def establish(instance: Instance, client: End, sequence: int = 1) -> End:
    backend = out(instance, client, sequence=sequence)
    back(instance, client, backend)
    assert out(instance, client, flags="A", sequence=sequence + 1) == backend
    return backend


def counts(instance: Instance, backend: str, port: int = 0) -> list[int]:
    """Return a backend's shared counters: opened, closed, SYNs, answers."""
    high, low = map(int, counter_key(np.uint64(int.from_bytes(bytes(map(int, backend.split("."))), "big") << 16 | port)))
    return [instance.counters.get((high, low, word), 0) for word in (OPENED, CLOSED, SYNS, ANSWERED)]


def down(instance: Instance) -> int:
    return int(np.count_nonzero(instance.env["_down"][0]))


def wait(instance: Instance, seconds: float) -> None:
    """Let time pass, with housekeeping as often as it is."""
    for _ in range(round(seconds * 10)):
        instance.now_s += 0.1
        instance.housekeep()


clients = st.tuples(st.sampled_from([f"10.0.1.{n}" for n in range(1, 9)]), st.integers(1, 65535))
pools = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), max_size=8, unique_by=lambda backend: backend[0])


def texts(pool: list[tuple[int, int]]) -> list[str]:
    return [f"10.128.0.{number} weight {weight}" for number, weight in pool]


# consistency


@settings(max_examples=300 if LONG else 20, deadline=None)
@given(st.lists(st.one_of(st.tuples(st.sampled_from(KINDS), clients), pools), max_size=25))
def test_no_change_of_the_pool_moves_a_connection(steps: list[Any]) -> None:
    """Not even one of a backend that was removed: it ends where it began. New ones go only where there is weight."""
    instance = balancer()
    pool = {"10.128.0.1", "10.128.0.2", "10.128.0.3"}
    live: dict[tuple[str, End], End] = {}
    for step in steps:
        if isinstance(step, list):
            instance.change_settings(virtual_address=VIRTUAL, backends=texts(step))
            pool = {f"10.128.0.{number}" for number, weight in step if weight}
            instance.housekeep()
        elif step not in live:
            kind, client = step
            if not pool:
                assert instance(packet(kind, client, virtual(kind))) == DROP
                assert instance.cause == NO_BACKEND
                continue
            live[step] = establish(instance, client) if kind == "tcp" else out(instance, client, kind)
            assert live[step][0] in pool
        for (kind, client), backend in live.items():
            assert out(instance, client, kind, flags="PA", sequence=9) == backend
            answers = (backend[0], 0 if kind == "icmp" else backend[1])
            back(instance, client, answers, kind, flags="PA")


def test_a_removed_backends_connections_go_on_and_end_there() -> None:
    instance = balancer(["10.128.0.1"])
    backend = establish(instance, ("10.0.1.7", 5000))
    opening = out(instance, ("10.0.1.7", 6000), sequence=5)
    instance.change_settings(virtual_address=VIRTUAL, backends=["10.128.0.2"])
    assert out(instance, ("10.0.1.7", 5000), flags="PA", sequence=2) == backend
    back(instance, ("10.0.1.7", 5000), backend, flags="PA")
    assert out(instance, ("10.0.1.7", 6000), flags="A", sequence=6) == opening, "it had answered"
    assert out(instance, ("10.0.1.7", 5000), flags="FA", sequence=2) == backend
    assert out(instance, ("10.0.1.7", 5000), sequence=70_000)[0] == "10.128.0.2", "the next one of that port"


def test_a_syn_that_a_removed_backend_never_answered_goes_to_another_when_it_is_sent_again() -> None:
    instance = balancer(["10.128.0.1"])
    out(instance, ("10.0.1.7", 5000), sequence=5)
    instance.change_settings(virtual_address=VIRTUAL, backends=["10.128.0.1 weight 0", "10.128.0.2"])
    assert out(instance, ("10.0.1.7", 5000), sequence=5)[0] == "10.128.0.1", "draining: its answer may be on its way"
    instance.change_settings(virtual_address=VIRTUAL, backends=["10.128.0.2"])
    assert out(instance, ("10.0.1.7", 5000), sequence=5)[0] == "10.128.0.2"


def test_draining_takes_no_new_connections_and_loses_none() -> None:
    instance = balancer(["10.128.0.1", "10.128.0.2"])
    ends = [("10.0.1.7", port) for port in range(5000, 5040)]
    before = {client: establish(instance, client) for client in ends}
    assert {address for address, _ in before.values()} == {"10.128.0.1", "10.128.0.2"}
    instance.change_settings(virtual_address=VIRTUAL, backends=["10.128.0.1 weight 0", "10.128.0.2"])
    assert {client: out(instance, client, flags="PA") for client in ends} == before
    assert {establish(instance, ("10.0.1.8", port))[0] for port in range(5000, 5040)} == {"10.128.0.2"}
    instance.change_settings(virtual_address=VIRTUAL, backends=["10.128.0.1 weight 0", "10.128.0.2 weight 0"])
    assert instance(packet("tcp", ("10.0.1.9", 5000), virtual())) == DROP
    assert instance.cause == NO_BACKEND
    assert {client: out(instance, client, flags="PA") for client in ends} == before


def test_another_mode_or_virtual_address_leaves_connections_as_they_are() -> None:
    instance = balancer()
    client = ("10.0.1.7", 5000)
    backend = establish(instance, client)
    instance.change_settings(virtual_address="10.64.1.2", backends=["10.128.0.9 mac 02:00:00:00:00:09"], mode="direct")
    assert out(instance, client, flags="PA", sequence=2) == backend
    back(instance, client, backend, flags="PA")


# the choice


def choices(pool: list[str], count: int) -> list[int]:
    """Return the backends' last address byte that clients number 0, 1, ... get."""
    env = load("load_balancer").make_env({"backends": pool})
    numbers = [int(word) >> 16 & 255 for word in env["backends"][0, ::2]]
    record = env.view(np.recarray)[0] if INTERPRETED else env[0]
    clients = (np.uint64((0x0A000000 + n // 50) << 24 | (1024 + n % 50 * 2) << 8 | 6) for n in range(count))
    return [numbers[int(chosen(client, record, True, 0))] for client in clients]


COUNT = 600 if INTERPRETED else 6000


@settings(max_examples=100 if LONG else 8, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=MOST))
def test_backends_get_their_share_by_weight(weights: list[int]) -> None:
    """Each within five standard deviations of a binomial distribution."""
    found = choices([f"10.128.0.{n} weight {weight}" for n, weight in enumerate(weights)], COUNT)
    for n, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(found.count(n) - COUNT * share) <= 5 * math.sqrt(COUNT * share * (1 - share)) + 1


@settings(max_examples=100 if LONG else 8, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=MOST), st.data())
def test_removing_a_backend_moves_its_share_only_and_more_weight_only_attracts(weights: list[int], data: Any) -> None:
    pool = [f"10.128.0.{n} weight {weight}" for n, weight in enumerate(weights)]
    gone = data.draw(st.integers(0, len(weights) - 1))
    before = choices(pool, COUNT // 4)
    after = choices(pool[:gone] + pool[gone + 1 :], COUNT // 4)
    heavier = choices([*pool[:gone], f"10.128.0.{gone} weight {weights[gone] + 3}", *pool[gone + 1 :]], COUNT // 4)
    for then, now, with_more in zip(before, after, heavier):
        assert now == then if then != gone else now != gone
        assert with_more in (then, gone)


@settings(max_examples=100 if LONG else 10, deadline=None)
@given(pools, clients, st.sampled_from(KINDS), st.randoms())
def test_all_instances_choose_alike(pool: list[tuple[int, int]], client: End, kind: str, dice: random.Random) -> None:
    """Also one that lists the pool in another order, and one that lost its state."""
    one, other = balancer(texts(pool)), balancer(texts(dice.sample(pool, len(pool))))
    frame = packet(kind, client, virtual(kind))
    assert one(frame) == other(frame) == (FORWARD if any(weight for _, weight in pool) else DROP)
    assert one.sent == other.sent
    one.records.clear()
    one(frame)
    assert one.sent == other.sent


def test_a_segment_whose_state_was_lost_is_picked_up_if_asked_for() -> None:
    client = ("10.0.1.7", 5000)
    for pick_up in (False, True):
        instance = balancer(pick_up=pick_up)
        backend = establish(instance, client)
        instance.records.clear()
        assert instance(packet("tcp", client, virtual(), "PA")) == (FORWARD if pick_up else DROP)
        if pick_up:
            assert target_of(instance.sent) == backend
            back(instance, client, backend, flags="PA")


# both directions, and connections told apart


@settings(max_examples=200 if LONG else 15, deadline=None)
@given(clients, st.sampled_from(KINDS), st.integers(1, 65535), st.integers(0, 200))
def test_there_and_back_is_the_identity(client: End, kind: str, port: int, size: int) -> None:
    """`out` and `back` compare every byte, checksums by scapy."""
    instance = balancer()
    payload = bytes(range(size))
    assert instance(packet(kind, client, virtual(kind, port), payload=payload)) == FORWARD
    backend = target_of(instance.sent)
    assert instance.sent == packet(kind, client, backend, payload=payload)
    assert backend[1] == (0 if kind == "icmp" else 8080 if backend[0] != "10.128.0.3" else port)
    back(instance, client, backend, kind, port)


def test_one_client_port_with_two_virtual_ports_is_two_connections() -> None:
    """Both would be the same at one backend: the second goes to another, and each is answered from its own port."""
    instance = balancer(["10.128.0.1:8080", "10.128.0.2:8080"])
    for number in range(20):
        client = ("10.0.1.7", 5000 + number)
        one, two = out(instance, client, port=80), out(instance, client, port=443)
        assert one != two
        back(instance, client, one, port=80)
        back(instance, client, two, port=443)
        assert instance(packet("tcp", client, virtual(port=8443))) == DROP
        assert instance.cause == NO_BACKEND, "no backend is left for a third"


def test_a_clients_own_connection_with_a_backend_is_not_mixed_up() -> None:
    instance = balancer(["10.128.0.1", "10.128.0.2"])
    backend = out(instance, ("10.0.1.7", 5000))
    straight = packet("tcp", ("10.0.1.7", 5000), backend)
    assert instance(straight) == DROP
    assert instance.cause == REFUSED_BY_RULE
    fresh = balancer(["10.128.0.1", "10.128.0.2"])
    assert fresh(straight) == FORWARD
    assert fresh.sent == straight
    assert out(fresh, ("10.0.1.7", 5000)) != backend, "the connection with the first choice is the client's own"
    answer = packet("tcp", backend, ("10.0.1.7", 5000), "SA")
    assert fresh.outside(answer) == FORWARD
    assert fresh.sent == answer


def test_what_is_not_for_the_virtual_address_passes_untouched_and_unremembered() -> None:
    instance = balancer()
    elsewhere = ("10.128.0.77", 80)
    for kind in KINDS:
        for side, frame in ((INSIDE, packet(kind, ("10.0.1.7", 5000), (elsewhere[0], 0 if kind == "icmp" else 80))),
                            (OUTSIDE, packet(kind, elsewhere, ("10.0.1.7", 5000)))):  # fmt: skip
            assert instance(frame, side) == FORWARD
            assert instance.sent == frame
    assert instance.records == {}
    assert instance.counters == {}


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_outside_is_or_reaches_the_virtual_address(kind: str) -> None:
    instance = balancer()
    client = ("10.0.1.7", 5000)
    out(instance, client, kind)
    assert instance.outside(packet(kind, ("10.128.0.77", 5000), virtual(kind))) == DROP
    assert instance.outside(packet(kind, virtual(kind), client, "SA")) == DROP


def test_ports_that_are_not_balanced_are_refused() -> None:
    instance = balancer(ports=[80, 443])
    client = ("10.0.1.7", 5000)
    for kind in ("tcp", "udp"):
        assert instance(packet(kind, client, virtual(kind, 8443))) == DROP
        assert instance.cause == REFUSED_BY_RULE
        out(instance, client, kind, 443)
    out(instance, client, "icmp")
    assert instance(bytes(ethernet() / IP(src=client[0], dst=VIRTUAL, proto=47) / bytes(24))) == DROP
    assert instance.cause == REFUSED_BY_RULE


@pytest.mark.parametrize("flags", ["A", "SA", "PA", "FA", "R", "", "SF", "FSRPAU"])
def test_only_a_syn_opens(flags: str) -> None:
    instance = balancer()
    assert instance(packet("tcp", ("10.0.1.7", 5000), virtual(), flags)) == DROP
    assert instance.records == {}


# ICMP


@pytest.mark.parametrize("kind", KINDS)
def test_errors_reach_the_other_end(kind: str) -> None:
    """RFC 5508, REQ-4 and 5: translated like the packet they quote, inside and out; they refresh nothing (REQ-6)."""
    instance = balancer()
    client = ("10.0.1.7", 5000)
    frame = packet(kind, client, virtual(kind))
    assert instance(icmp_error(packet(kind, virtual(kind), client), inside=True)) == DROP, "about nothing known"
    backend = out(instance, client, kind)
    forwarded = instance.sent
    assert instance.outside(icmp_error(forwarded, router=ROUTER)) == FORWARD
    assert instance.sent == icmp_error(frame, router=VIRTUAL), "backends are nobody's business"
    assert checksums_hold(instance.sent)
    assert instance.idle_timeout_s == 0
    answer = packet(kind, backend, client, "SA")
    assert instance.outside(answer) == FORWARD
    assert instance(icmp_error(instance.sent, inside=True)) == FORWARD
    assert instance.sent == icmp_error(answer, inside=True)
    assert checksums_hold(instance.sent)
    assert instance.idle_timeout_s == 0


def test_an_error_about_something_else_passes() -> None:
    instance = balancer()
    error = icmp_error(packet("udp", ("10.0.1.7", 5000), ("10.128.0.1", 8080)), router=ROUTER)
    assert instance.outside(error) == FORWARD
    assert instance.sent == error


def test_an_echo_reply_to_the_virtual_address_answers_nothing() -> None:
    instance = balancer()
    reply = packet("icmp", ("10.0.1.7", 0), (VIRTUAL, 77))
    assert instance(reply) == DROP
    out(instance, ("10.0.1.7", 77), "icmp")
    assert instance(reply) == DROP


def test_a_backends_own_ping_with_an_identifier_in_use_passes_both_ways() -> None:
    instance = balancer(["10.128.0.1"])
    out(instance, ("10.0.1.7", 77), "icmp")
    ping = packet("icmp", ("10.128.0.1", 77), ("10.0.1.7", 0))
    reply = packet("icmp", ("10.0.1.7", 0), ("10.128.0.1", 77))
    for side, frame in ((OUTSIDE, ping), (INSIDE, reply)):
        assert instance(frame, side) == FORWARD
        assert instance.sent == frame


# time-outs


def test_time_outs_follow_the_connection() -> None:
    instance = balancer()
    client = ("10.0.1.7", 5000)
    backend = out(instance, client, sequence=7)
    assert instance.idle_timeout_s == OPENING_S
    back(instance, client, backend)
    out(instance, client, flags="A", sequence=8)
    assert instance.idle_timeout_s == ESTABLISHED_S, "RFC 5382, REQ-5"
    instance.now_s += ESTABLISHED_S - 5
    back(instance, client, backend, flags="PA")
    out(instance, client, flags="FA", sequence=8)
    assert instance.idle_timeout_s == CLOSING_S
    back(instance, client, backend, flags="PA")
    out(instance, client, flags="A", sequence=9)
    assert instance.idle_timeout_s == CLOSING_S, "the other half may go on"
    out(instance, client, flags="R", sequence=9)
    assert instance.idle_timeout_s == RESET_S
    out(instance, client, flags="A", sequence=9)
    assert instance.idle_timeout_s == CLOSING_S, "a reset that may not have been taken"
    instance.now_s += CLOSING_S + 1
    assert instance(packet("tcp", client, virtual(), "PA")) == DROP
    for kind, timeout_s in (("udp", UDP_S), ("icmp", ICMP_S)):
        out(instance, client, kind)
        assert instance.idle_timeout_s == timeout_s, "RFC 4787, REQ-5; RFC 5508, REQ-2"


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_rewritten_as_long_as_questions_are(kind: str) -> None:
    """The claim is renewed in time: a packet just before each time-out keeps both records for hours."""
    instance = balancer()
    client = ("10.0.1.7", 5000)
    backend = establish(instance, client) if kind == "tcp" else out(instance, client, kind)
    for _ in range(12):
        instance.now_s += instance.idle_timeout_s - 1
        assert out(instance, client, kind, flags="A", sequence=2) == backend
        timeout_s = instance.idle_timeout_s
        back(instance, client, backend, kind, flags="A")
        instance.now_s += timeout_s / 8
        back(instance, client, backend, kind, flags="A")
        out(instance, client, kind, flags="A", sequence=2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backend_may_be_silent_for_as_long_as_its_client_is_not(kind: str) -> None:
    instance = balancer()
    client = ("10.0.1.7", 5000)
    backend = establish(instance, client) if kind == "tcp" else out(instance, client, kind)
    for _ in range(37):
        instance.now_s += instance.idle_timeout_s // 5
        out(instance, client, kind, flags="PA", sequence=2)
    back(instance, client, backend, kind, flags="PA")


# load and health


def test_load_is_counted() -> None:
    instance = balancer(["10.128.0.1:8080"])
    one, two = ("10.0.1.7", 5000), ("10.0.1.7", 6000)
    establish(instance, one)
    out(instance, two, sequence=4)
    out(instance, two, sequence=4)
    assert counts(instance, "10.128.0.1", 8080) == [1, 0, 3, 1]
    for flags in ("PA", "FA", "A", "R"):
        out(instance, one, flags=flags, sequence=2)
    assert counts(instance, "10.128.0.1", 8080) == [1, 1, 3, 1]
    establish(instance, one, sequence=70_000)
    assert counts(instance, "10.128.0.1", 8080) == [2, 1, 4, 2]
    out(instance, one, "udp")
    assert counts(instance, "10.128.0.1", 8080) == [2, 1, 4, 2]


def dead(instance: Instance, address: str, count: int = 40, alive: bool = True) -> dict[End, str]:
    """Let clients send SYNs, answered by all backends but one; return who went where."""
    found = {}
    for number in range(count):
        client = ("10.0.2.9", random.randrange(1024, 65536))
        if instance(packet("tcp", client, virtual(), sequence=number)) == DROP:
            assert instance.cause == NO_BACKEND
            continue
        backend = target_of(instance.sent)
        found[client] = backend[0]
        if backend[0] != address and alive:
            back(instance, client, backend)
    return found


def test_a_backend_that_does_not_answer_is_left_out_and_comes_back() -> None:
    instance = balancer(["10.128.0.1", "10.128.0.2"], trial_s=5.0)
    instance.housekeep()
    held = {client: backend for client in [("10.0.1.7", port) for port in range(5000, 5030)]
            if (backend := establish(instance, client))[0] == "10.128.0.1"}  # fmt: skip
    instance.housekeep()
    assert set(dead(instance, "10.128.0.1").values()) == {"10.128.0.1", "10.128.0.2"}
    wait(instance, 0.9)
    assert down(instance) == 0, "it has a second"
    wait(instance, 0.3)
    assert down(instance) == 1
    assert set(dead(instance, "10.128.0.1").values()) == {"10.128.0.2"}
    assert all(out(instance, client, flags="PA", sequence=2) == backend for client, backend in held.items()), "they may live"
    wait(instance, 5.0)
    found = dead(instance, "10.128.0.1")
    (trial,) = (client for client, backend in found.items() if backend == "10.128.0.1")
    assert set(dead(instance, "10.128.0.1").values()) == {"10.128.0.2"}, "one connection a trial"
    assert out(instance, trial, sequence=list(found).index(trial))[0] == "10.128.0.2", "sent again, it goes where there is one"
    wait(instance, 5.0)
    found = dead(instance, "nobody")
    assert list(found.values()).count("10.128.0.1") == 1
    wait(instance, 0.1)
    assert down(instance) == 0, "an answer: it is up"
    assert set(dead(instance, "nobody").values()) == {"10.128.0.1", "10.128.0.2"}


def test_all_down_is_named_and_recovers_without_restart() -> None:
    instance = balancer(["10.128.0.1", "10.128.0.2"])
    instance.housekeep()
    dead(instance, "", alive=False)
    wait(instance, 1.3)
    assert down(instance) == 2
    assert dead(instance, "") == {}
    assert instance(packet("udp", ("10.0.1.7", 5000), virtual())) == DROP, "trials are for those who get an answer"
    wait(instance, 5.0)
    assert sorted(dead(instance, "").values()) == ["10.128.0.1", "10.128.0.2"]
    wait(instance, 0.1)
    assert down(instance) == 0


@pytest.mark.parametrize("flags", ["RA", "A", "PA"])
def test_a_refusal_is_no_answer(flags: str) -> None:
    instance = balancer(["10.128.0.1"])
    instance.housekeep()
    for port in range(5000, 5005):
        back(instance, ("10.0.1.7", port), out(instance, ("10.0.1.7", port)), flags=flags)
    wait(instance, 1.3)
    assert down(instance) == 1


def test_a_few_lost_syns_or_none_at_all_take_nobody_down() -> None:
    instance = balancer(["10.128.0.1"])
    instance.housekeep()
    for port in (5000, 5002):
        out(instance, ("10.0.1.7", port))
    wait(instance, 60)
    assert down(instance) == 0
    out(instance, ("10.0.1.7", 5004))
    wait(instance, 0.1)
    assert down(instance) == 1, "the third in a row"
    ignorant = balancer(["10.128.0.1"], failure_syns=0)
    dead(ignorant, "10.128.0.1")
    wait(ignorant, 5)
    assert down(ignorant) == 0


def test_a_change_of_the_pool_does_not_forget_who_is_down() -> None:
    instance = balancer(["10.128.0.1", "10.128.0.2"])
    instance.housekeep()
    dead(instance, "10.128.0.1")
    wait(instance, 1.3)
    instance.change_settings(virtual_address=VIRTUAL, backends=["10.128.0.3", "10.128.0.2", "10.128.0.1"])
    assert set(dead(instance, "").values()) == {"10.128.0.2", "10.128.0.3"}
    instance.housekeep()
    assert set(dead(instance, "").values()) == {"10.128.0.2", "10.128.0.3"}
    instance.change_settings(virtual_address=VIRTUAL, backends=["10.128.0.2"])
    instance.housekeep()
    assert down(instance) == 0


def test_all_instances_come_to_the_same_verdict() -> None:
    """One sees all the SYNs, another the answers, a third nothing: the counters are shared."""
    one, two, three = (balancer(["10.128.0.1", "10.128.0.2"]) for _ in range(3))
    for instance in (two, three):
        instance.counters = one.counters
    for step in range(30):
        if step == 5:
            dead(one, "10.128.0.1")
        for instance in (one, two, three):
            wait(instance, 0.1)
        verdicts = {tuple(int(word) & NAME_BITS for word in instance.env["_down"][0]) for instance in (one, two, three)}
        assert len(verdicts) == 1
    assert down(three) == 1
    assert not any(int(word) & ON_TRIAL for word in three.env["_down"][0])


def test_a_store_that_began_anew_is_no_sign_of_death() -> None:
    instance = balancer(["10.128.0.1"])
    instance.housekeep()
    for port in range(5000, 5010):
        out(instance, ("10.0.1.7", port))
    instance.housekeep()
    instance.counters.clear()
    wait(instance, 3)
    assert down(instance) == 0


# direct return


DIRECT_POOL = [{"address": f"10.128.0.{n}", "mac": f"02:00:00:00:01:0{n}"} for n in (1, 2, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_direct_return_changes_the_next_hop_only(kind: str) -> None:
    instance = balancer(DIRECT_POOL, mode="direct")
    client = ("10.0.1.7", 5000)
    frame = packet(kind, client, virtual(kind))
    assert instance(frame) == FORWARD
    hop = instance.sent[:6]
    assert hop.hex() in {f"02000000010{n}" for n in (1, 2, 3)}
    assert instance.sent == hop + frame[6:]
    assert len(instance.records) == 1, "no record for answers"
    instance.change_settings(virtual_address=VIRTUAL, backends=[b for b in DIRECT_POOL if b["mac"].replace(":", "") != hop.hex()],
                             mode="direct")  # fmt: skip
    again = packet(kind, client, virtual(kind), "A")
    assert instance(again) == FORWARD
    assert instance.sent == hop + again[6:], "it stays"
    answer = packet(kind, virtual(kind), client, "SA")
    assert instance.outside(answer) == FORWARD, "if it comes by here"
    assert instance.sent == answer
    error = icmp_error(again, router=ROUTER)
    assert instance.outside(error) == FORWARD
    assert instance.sent == error


def test_direct_return_takes_the_clients_acknowledgment_for_the_answer() -> None:
    instance = balancer(DIRECT_POOL[:1], mode="direct")
    instance.housekeep()
    for port in range(5000, 5005):
        instance(packet("tcp", ("10.0.1.7", port), virtual()))
    instance(packet("tcp", ("10.0.1.7", 5000), virtual(), "A", 1))
    assert counts(instance, "10.128.0.1") == [1, 0, 5, 1]
    wait(instance, 3)
    assert down(instance) == 0
    for port in range(6000, 6003):
        instance(packet("tcp", ("10.0.1.7", port), virtual()))
    wait(instance, 1.3)
    assert down(instance) == 1


def test_a_mac_is_the_next_hop_of_rewritten_packets_too() -> None:
    instance = balancer(["10.128.0.1:8080 weight 3 mac 02:00:00:00:00:05"])
    frame = packet("tcp", ("10.0.1.7", 5000), virtual())
    assert instance(frame) == FORWARD
    assert instance.sent[:6].hex() == "020000000005"
    assert target_of(instance.sent) == ("10.128.0.1", 8080)


# settings


def test_the_ways_to_name_a_backend() -> None:
    env = [load("load_balancer").make_env({"backends": backends})["backends"][0] for backends in (
        ["10.128.0.1:80 weight 2 mac 02:00:00:00:00:05"], "10.128.0.1:80 weight 2 mac 02-00-00-00-00-05",
        {"address": "10.128.0.1", "port": "80", "weight": 2, "mac": "020000000005"})]  # fmt: skip
    assert {tuple(map(int, words[:3])) for words in env} == {(2 << 48 | 0x0A800001 << 16 | 80, 0x020000000005, 0)}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"backends": ["10.128.0.300"]}, "'10.128.0.300'.*not permitted.*give"),
        ({"backends": ["10.128.0.1:99999"]}, "port of 0 to 65535"),
        ({"backends": ["10.128.0.1 weight 70000"]}, "weight of 0 to 65535"),
        ({"backends": ["10.128.0.1 heavy"]}, "not understood; give"),
        ({"backends": [{"port": 80}]}, "not understood; give"),
        ({"backends": [{"address": "10.128.0.1", "wait": 80}]}, "not understood; give"),
        ({"backends": ["0.0.0.0"]}, "not 0.0.0.0"),
        ({"backends": ["10.128.0.1 mac zz"]}, "invalid literal.*give"),
        ({"backends": ["10.128.0.1", "10.128.0.1 weight 3"]}, "is there twice"),
        ({"backends": [VIRTUAL]}, "has the virtual address"),
        ({"backends": [f"10.128.0.{n}" for n in range(17)]}, "17 backends: 16 are possible"),
        ({"backends": ["10.128.0.1"], "mode": "direct"}, "needs its MAC address"),
        ({"mode": "tunnel"}, "unknown load balancer's mode 'tunnel'"),
        ({"virtual_address": "here"}, "virtual_address='here'"),
        ({"ports": [0]}, r"ports=\[0\]"),
        ({"ports": "http"}, "ports='http'"),
        ({"trial_s": 0}, "trial_s=0"),
        ({"_down": [1]}, "unknown setting of network function 'load_balancer' '_down'"),
    ],
)
def test_wrong_settings_are_told_in_one_line(given: dict[str, Any], says: str) -> None:
    with pytest.raises(NearstateError, match=says):
        load("load_balancer").make_env({"virtual_address": VIRTUAL, **given})


# the packet loop


@pytest.mark.skipif(INTERPRETED, reason="the packet loop is compiled")
def test_in_the_packet_loop_connections_stay_when_the_pool_changes() -> None:
    given = {"virtual_address": VIRTUAL, "backends": POOL}
    rig = Rig([load("load_balancer")], {"load_balancer": given})
    ends = [("10.0.1.7", 5000 + 2 * n) for n in range(40)]
    burst = rig.burst([packet("tcp", client, virtual()) for client in ends])
    assert len(burst) == 40
    went = {client: target_of(next(f for _, f in burst if Ether(f)[TCP].sport == client[1])) for client in ends}
    assert len(set(went.values())) == 3
    assert len(rig.records()) >= 80
    rig.chain.change_settings({"load_balancer": {**given, "backends": ["10.128.0.4"]}})
    for client, backend in went.items():
        assert rig(packet("tcp", client, virtual(), "A", 1)) == [(OUTSIDE, packet("tcp", client, backend, "A", 1))]
        assert rig.outside(packet("tcp", backend, client, "PA")) == [(INSIDE, packet("tcp", virtual(), client, "PA"))]
    one, two = (rig(packet("tcp", ("10.0.1.9", 5000), virtual(port=port))) for port in (80, 443))
    assert [target_of(frame) for _, frame in one + two] == [("10.128.0.4", 80), ("10.128.0.4", 443)]
    rig.chain.env_of(0)["_down"][0, 0] = 0x0A800004 << 16
    rig.chain.change_settings({"load_balancer": {**given, "backends": ["10.128.0.4", "10.128.0.5 weight 0"]}})
    assert rig(packet("tcp", ("10.0.1.10", 5000), virtual())) == [], "who is down is remembered"
    rig.chain.change_settings({"load_balancer": {**given, "backends": []}})
    assert rig(packet("tcp", ("10.0.1.10", 5000), virtual())) == []
    assert rig.counts()["no_backend"] == 2
