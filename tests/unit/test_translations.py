"""Does each side of a replay aim its packets at what it saw of their flow, with headers that a host would accept?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from experiments.workloads import replay as replays
from experiments.workloads.capture import Prepared, prepare
from experiments.workloads.replay import Player, make_player
from experiments.workloads.traffic import Replay
from nfs.dataplane.headers import INSIDE, OUTSIDE
from tests.unit.test_capture import ALICE, BOB, CAROL, ETHERNET, MACS, WEB, frames_of, right_checksums, save
from tests.unit.test_replay import arrive, counted, sent_frames

EXTERNAL, EXTERNAL_PORT, BACKEND = "10.64.0.3", 61_000, "10.128.0.77"


def prepared_of(path: Path, frames: Sequence[Packet], **parameters: Any) -> Prepared:
    return prepare(Replay.of(pcap=save(path, frames), **parameters), *MACS)


def seen(frame: bytes, source: tuple[str, int] | None = None, destination: tuple[str, int] | None = None) -> bytes:
    """Return a frame as it leaves a function that gives it another source or destination."""
    packet = Ether(frame)
    for end, address, port in ((source, "src", "sport"), (destination, "dst", "dport")):
        if end:
            setattr(packet[IP], address, end[0])
            for layer in (TCP, UDP):
                if layer in packet:
                    setattr(packet[layer], port, end[1])
            if ICMP in packet:
                packet[ICMP].id = end[1]
    return right_checksums(packet)


def ends(frame: bytes) -> tuple[Any, ...]:
    packet = Ether(frame)
    layer = next((packet[layer] for layer in (TCP, UDP) if layer in packet), None)
    if layer is not None:
        return packet[IP].src, layer.sport, packet[IP].dst, layer.dport
    return packet[IP].src, packet[IP].dst, *([packet[ICMP].id] if ICMP in packet else [])


def accepted(frames: Sequence[bytes]) -> bool:
    """Tell whether checksums are right, of fragments when they are whole again."""
    whole = [frame for frame in frames if not (Ether(frame)[IP].frag or Ether(frame)[IP].flags.MF)]
    return all(right_checksums(Ether(frame)) == frame for frame in whole)


def through(player: Player, prepared: Prepared, **changes: Any) -> list[bytes]:
    """Let all that the other side sends arrive, changed so; return what this side sends then."""
    for frame, side in zip(frames_of(prepared), prepared.side, strict=True):
        if side != player.control[replays.SIDE]:
            arrive(player, seen(frame, **changes))
    return sent_frames(player, 0.0, now=1_000_000)


def question(layer: Any, client: str = ALICE, server: str = WEB, number: int = 1) -> Packet:
    return ETHERNET / IP(src=client, dst=server, id=number) / layer


def answer(layer: Any, client: str = ALICE, server: str = WEB, number: int = 2) -> Packet:
    return ETHERNET / IP(src=server, dst=client, id=number) / layer


CONNECTION = [
    question(TCP(sport=51000, dport=443, flags="S", seq=5)),
    answer(TCP(sport=443, dport=51000, flags="SA", seq=9, ack=6)),
    answer(TCP(sport=443, dport=51000, flags="PA", seq=10, ack=6) / b"odd", number=3),
]


def test_answers_go_to_the_nats_port(tmp_path: Path) -> None:
    prepared = prepared_of(tmp_path / "a.pcap", CONNECTION)
    sent = through(make_player(prepared, OUTSIDE, True), prepared, source=(EXTERNAL, EXTERNAL_PORT))
    server = Ether(frames_of(prepared)[0])[IP].dst
    assert [ends(frame) for frame in sent] == [(server, 443, EXTERNAL, EXTERNAL_PORT)] * 2
    assert accepted(sent)
    assert [Ether(frame)[TCP].seq for frame in sent] == [9, 10], "all else stays"


def test_answers_come_from_the_backend_that_was_chosen(tmp_path: Path) -> None:
    prepared = prepared_of(tmp_path / "a.pcap", CONNECTION)
    sent = through(make_player(prepared, OUTSIDE, True), prepared, destination=(BACKEND, 8080))
    client = Ether(frames_of(prepared)[0])[IP].src
    assert [ends(frame) for frame in sent] == [(BACKEND, 8080, client, 51000)] * 2
    assert accepted(sent)


def test_without_a_translator_frames_leave_as_the_file_has_them(tmp_path: Path) -> None:
    prepared = prepared_of(tmp_path / "a.pcap", CONNECTION)
    sent = through(make_player(prepared, OUTSIDE), prepared, source=(EXTERNAL, EXTERNAL_PORT))
    assert sent == frames_of(prepared)[1:]


def test_a_ping_is_answered_with_the_identifier_that_came(tmp_path: Path) -> None:
    frames = [question(ICMP(type=8, id=9, seq=1) / b"ping"), question(ICMP(type=8, id=10, seq=1) / b"ping", number=3),
              answer(ICMP(type=0, id=9, seq=1) / b"ping"), answer(ICMP(type=0, id=10, seq=1) / b"ping")]  # fmt: skip
    prepared = prepared_of(tmp_path / "a.pcap", frames)
    player = make_player(prepared, OUTSIDE, True)
    for frame, identifier in zip(frames_of(prepared)[:2], (700, 701), strict=True):
        arrive(player, seen(frame, source=(EXTERNAL, identifier)))
    sent = sent_frames(player, 0.0, now=1_000_000)
    assert [ends(frame)[1:] for frame in sent] == [(EXTERNAL, 700), (EXTERNAL, 701)]
    assert accepted(sent)


def test_an_error_quotes_what_the_router_saw(tmp_path: Path) -> None:
    segment = question(TCP(sport=51000, dport=443, flags="PA", seq=5) / b"payload")
    error = ETHERNET / IP(src=CAROL, dst=ALICE) / ICMP(type=3, code=4) / Raw(bytes(segment[IP])[:28])
    prepared = prepared_of(tmp_path / "a.pcap", [segment, error])
    (sent,) = through(make_player(prepared, OUTSIDE, True), prepared, source=(EXTERNAL, EXTERNAL_PORT))
    packet = Ether(sent)
    quoted = packet[ICMP].payload
    assert (packet[IP].dst, quoted.src, quoted.sport) == (EXTERNAL, EXTERNAL, EXTERNAL_PORT)
    assert (quoted.dst, quoted.dport) == (Ether(frames_of(prepared)[0])[IP].dst, 443)
    assert accepted([sent])
    assert quoted.chksum == IP(right_checksums(IP(bytes(quoted)[:20]))).chksum


def test_all_fragments_of_an_answer_go_the_same_way(tmp_path: Path) -> None:
    big: Any = IP(src=WEB, dst=ALICE, id=77) / UDP(sport=53, dport=4000) / Raw(bytes(range(256)) * 8)
    frames = [question(UDP(sport=4000, dport=53) / b"?"), *(ETHERNET / part for part in fragment(big, fragsize=800))]
    prepared = prepared_of(tmp_path / "a.pcap", frames)
    sent = [Ether(frame)[IP] for frame in through(make_player(prepared, OUTSIDE, True), prepared, source=(EXTERNAL, 5000))]
    assert {packet.dst for packet in sent} == {EXTERNAL}
    assert len(sent) == 3
    whole = IP(bytes(IP(src=sent[0].src, dst=EXTERNAL, proto=17) / b"".join(bytes(part.payload) for part in sent)))
    assert whole[UDP].dport == 5000
    assert bytes(whole) == right_checksums(whole)


def test_a_translation_that_changes_is_followed(tmp_path: Path) -> None:
    again = question(TCP(sport=51000, dport=443, flags="A", seq=6, ack=10), number=4)
    prepared = prepared_of(tmp_path / "a.pcap", [*CONNECTION[:2], again, CONNECTION[2]])
    player, frames = make_player(prepared, OUTSIDE, True), frames_of(prepared)
    arrive(player, seen(frames[0], source=(EXTERNAL, EXTERNAL_PORT)))
    arrive(player, seen(frames[2], source=("10.64.0.4", 61_002)))
    sent = sent_frames(player, 0.0, now=1_000_000)
    assert {ends(frame)[2:] for frame in sent} == {("10.64.0.4", 61_002)}


def test_of_questions_alike_each_is_answered_to_its_own_client(tmp_path: Path) -> None:
    """Two clients send the same datagram to two servers. It arrives translated, in the other order."""
    frames = [
        question(UDP(sport=4000, dport=53) / b"same", ALICE, WEB),
        question(UDP(sport=4000, dport=53) / b"same", BOB, CAROL),
        answer(UDP(sport=53, dport=4000) / b"one", ALICE, WEB),
        answer(UDP(sport=53, dport=4000) / b"two", BOB, CAROL),
    ]
    prepared = prepared_of(tmp_path / "a.pcap", frames)
    player, file = make_player(prepared, OUTSIDE, True), frames_of(prepared)
    arrive(player, seen(file[1], source=(EXTERNAL, 7001)))
    assert [player.arrived_ns[number] > 0 for number in (0, 1)] == [False, True]
    arrive(player, seen(file[0], source=(EXTERNAL, 7000)))
    sent = {bytes(Ether(frame)[UDP].payload): ends(frame) for frame in sent_frames(player, 0.0, now=1_000_000)}
    assert {payload: found[2:] for payload, found in sent.items()} == {b"one": (EXTERNAL, 7000), b"two": (EXTERNAL, 7001)}
    assert counted(player) == [2, 0, 1, 0, 0]


def test_of_equal_packets_of_translated_flows_each_is_counted_once(tmp_path: Path) -> None:
    frames = [question(UDP(sport=4000 + 2 * (number % 3), dport=53) / b"same") for number in range(300)]
    prepared = prepared_of(tmp_path / "a.pcap", frames)
    player, file = make_player(prepared, OUTSIDE, True), frames_of(prepared)
    for number in np.random.default_rng(1).permutation(300):
        arrive(player, seen(file[number], source=(EXTERNAL, 7000 + int(number) % 3)))
    assert counted(player)[:2] == [300, 0]
    arrive(player, seen(file[0], source=(EXTERNAL, 7000)))
    assert counted(player)[:2] == [300, 1]


@pytest.mark.bounds
def test_a_timed_answer_waits_until_its_question_says_where_to(tmp_path: Path) -> None:
    """Question at 0, answer at 1 ms; the question is late by 3 ms, patience 20 ms."""
    prepared = prepared_of(tmp_path / "a.pcap", CONNECTION)
    player, patience_ns = make_player(prepared, OUTSIDE, True), 20_000_000
    assert sent_frames(player, 1.0, now=2_500_000, patience_ns=patience_ns) == []
    arrive(player, seen(frames_of(prepared)[0], source=(EXTERNAL, EXTERNAL_PORT)), now=3_000_000)
    assert len(sent_frames(player, 1.0, now=3_100_000, patience_ns=patience_ns)) == 2
    assert player.control[replays.IMPATIENT] == 0


@pytest.mark.bounds
def test_a_timed_answer_whose_question_is_lost_is_waited_for_once(tmp_path: Path) -> None:
    later = [
        question(TCP(sport=51000, dport=443, flags="A"), number=5),
        answer(TCP(sport=443, dport=51000, flags="PA") / b"more", number=6),
    ]
    prepared = prepared_of(tmp_path / "a.pcap", [*CONNECTION, *later])
    player, patience_ns, frames = make_player(prepared, OUTSIDE, True), 20_000_000, frames_of(prepared)
    assert sent_frames(player, 1.0, now=19_000_000, patience_ns=patience_ns) == []
    assert sent_frames(player, 1.0, now=21_000_000, patience_ns=patience_ns) == [frames[1], frames[2], frames[4]], (
        "as in the file"
    )
    assert player.control[replays.IMPATIENT] == 1
    assert sent_frames(make_player(prepared, OUTSIDE), 1.0, now=5_000_000, patience_ns=patience_ns) != [], "only where it matters"


@pytest.mark.bounds
def test_at_speed_0_a_flow_without_answers_costs_its_patience_twice_at_most(tmp_path: Path) -> None:
    """A thousand questions, each of which waits for the answer to the one before; no answer comes."""
    frames: list[Packet] = []
    for number in range(1000):
        frames.append(question(UDP(sport=4000, dport=53) / b"?", number=number))
        frames.append(answer(UDP(sport=53, dport=4000) / b"!", number=number))
    player, now, patience_ns, tick_ns = make_player(prepared_of(tmp_path / "a.pcap", frames), INSIDE), 0, 20_000_000, 200_000
    while player.control[replays.SENT] < 1000 and now < 1_000_000_000:
        now += tick_ns
        sent_frames(player, 0.0, now=now, patience_ns=patience_ns)
    assert player.control[replays.SENT] == 1000
    assert now <= 2 * patience_ns + 50 * tick_ns
    assert player.control[replays.IMPATIENT] == 999
