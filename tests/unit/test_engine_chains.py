"""Does the packet loop do what network functions ask for: chains, claims, counters, rewritten headers, turned packets?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from datastore.base.errors import NearstateError
from datastore.compiled import INTERPRETED
from datastore.store.partitions import key_low
from nfs.dataplane import (
    DROP,
    ENDPOINT,
    FLOW,
    FORWARD,
    INSIDE,
    NONE,
    OUTSIDE,
    PORTS_EXHAUSTED,
    TURN,
    NetworkFunction,
    add,
    claim,
    kind_of,
    load,
    network_function,
    record,
)
from nfs.dataplane.engine import HERE
from nfs.dataplane.keys import endpoint_key
from nfs.dataplane.steps import load_chain
from tests.packets import CLIENT, CLIENT_PORT, SERVER, checksums_hold, ethernet, expected, fragments6, tcp, tcp6, udp
from tests.rig import Rig

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the packet loop runs compiled")

PUBLIC, TRIES = 0x0A7F0001, 3
MAPPING = record(address="u4", port="u2", used="u2", packets="u8")
SHADOW = kind_of("shadow")


@network_function(key=ENDPOINT, state=MAPPING, rewrites=True, settings={"public": ("u4", "10.127.0.1"), "tries": ("u4", TRIES)})
def little_nat(packet: Any, mapping: Any, env: Any) -> int:
    """Claims PUBLIC:port for every inside endpoint; each attempt takes the port 512 further, in the same partition."""
    if packet.arrived_from == OUTSIDE:
        if mapping.used == 0:
            return DROP
        packet.destination_address = mapping.address
        packet.destination_port = mapping.port
        return FORWARD
    if mapping.used == 0:
        if env.attempt >= env.tries:
            env.cause = PORTS_EXHAUSTED
            return DROP
        mapping.address = env.public
        mapping.port = 1024 + packet.source_port % 512 + 512 * env.attempt
        mapping.used = 1
        high, low = endpoint_key(env.public, mapping.port, packet.protocol, OUTSIDE, 77, packet.partition)
        mine = np.uint64(packet.source_address) | np.uint64(packet.source_port) << np.uint64(32) | np.uint64(1) << np.uint64(48)
        claim(env, high, low, mine, 0, 600)
        env.idle_timeout_s = 300
    mapping.packets += 1
    packet.source_address = mapping.address
    packet.source_port = mapping.port
    return TURN if packet.destination_address == env.public else FORWARD


@network_function(key=FLOW, state=record(number="u4", claimed="u4"))
def ticket(packet: Any, holder: Any, env: Any) -> int:
    """Claims a number of its own for each flow in the neighbouring partition: what ICMP does to a NAT."""
    if holder.claimed == 0:
        holder.number, holder.claimed = env.attempt, 1
        partition = packet.partition ^ 1
        mine = np.uint64(packet.source_address) << np.uint64(16) | np.uint64(packet.source_port)
        claim(env, 5, key_low(holder.number, 0, 0, 44, partition), mine, 0, 600)
        env.idle_timeout_s = 300
    return FORWARD


COUNTER_HIGH, COUNTER_WORD = 99, 2


@network_function(key=NONE)
def tally(packet: Any, nothing: Any, env: Any) -> int:
    """Counts packets by destination port in a record all instances share."""
    add(env, COUNTER_HIGH, key_low(0, packet.destination_port, 0, 55, 7), COUNTER_WORD, 1)
    return FORWARD


@pytest.fixture(autouse=True)
def kind_of_little_nat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function above writes kind 77 into its claims; its own records must have it too."""
    monkeypatch.setattr(
        "nfs.dataplane.steps.kind_of", lambda name, *layouts: 77 if name == "little_nat" else kind_of(name, *layouts)
    )


def source(frame: bytes) -> tuple[int, int]:
    fields = expected(frame)
    return fields["source_address"], fields["source_port"]


def answer_to(frame: bytes) -> bytes:
    """Return a UDP packet that goes back to where the frame seems to come from."""
    from scapy.layers.inet import IP, UDP
    from scapy.layers.l2 import Ether

    asked = Ether(frame)
    return bytes(Ether(src=asked.dst, dst=asked.src) / IP(src=asked[IP].dst, dst=asked[IP].src)
                 / UDP(sport=asked[UDP].dport, dport=asked[UDP].sport) / b"answer")  # fmt: skip


def test_a_claim_is_committed_with_the_record_and_both_directions_are_rewritten(where: dict[str, Any]) -> None:
    rig = Rig([little_nat], **where)
    [(side, out)] = rig(udp())
    assert side == OUTSIDE
    assert source(out) == (PUBLIC, 1024 + CLIENT_PORT % 512)
    assert checksums_hold(out)
    assert len(rig.records()) == (0 if where and where["primary"][CLIENT_PORT >> 1 & 0xFF] != HERE else 2)
    [(side, back)] = rig.outside(answer_to(out))
    assert side == INSIDE
    assert checksums_hold(back)
    fields = expected(back)
    assert (fields["destination_address"], fields["destination_port"]) == (source(udp())[0], CLIENT_PORT)


def test_a_claim_that_another_has_is_tried_again_until_the_function_gives_up(where: dict[str, Any]) -> None:
    rig = Rig([little_nat], **where)
    ports = []
    for n in range(TRIES):
        [(_, out)] = rig(udp(client_port=CLIENT_PORT + 512 * n))
        ports.append(source(out)[1] - 1024)
    assert ports == [CLIENT_PORT % 512 + 512 * n for n in range(TRIES)]
    before = rig.records()
    assert rig(udp(client_port=CLIENT_PORT + 512 * TRIES)) == []
    assert rig.counts()["ports_exhausted"] == 1
    assert {key: words.tolist() for key, words in rig.records().items()} == {key: w.tolist() for key, w in before.items()}


def test_a_turned_packet_comes_back_from_the_other_side(where: dict[str, Any]) -> None:
    rig = Rig([little_nat], **where)
    [(_, out)] = rig(udp())
    address, port = source(out)
    from scapy.layers.inet import IP, UDP
    from scapy.layers.l2 import Ether

    hairpin = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / IP(src="10.0.1.9", dst=str_of(address))
    frame = bytes(hairpin / UDP(sport=CLIENT_PORT + 2, dport=port) / b"neighbour")
    [(side, turned)] = rig(frame)
    assert side == INSIDE
    assert checksums_hold(turned)
    fields = expected(turned)
    assert fields["source_address"] == PUBLIC
    assert (fields["destination_address"], fields["destination_port"]) == (source(udp())[0], CLIENT_PORT)
    assert Ether(turned).dst == "02:00:00:00:00:01"


def str_of(address: int) -> str:
    return ".".join(str(address >> shift & 255) for shift in (24, 16, 8, 0))


def test_a_chain_meets_outside_packets_in_the_opposite_order(where: dict[str, Any]) -> None:
    rig = Rig([load("firewall"), load("traffic_counter"), little_nat], **where)
    assert len(rig.chain.steps) == 2
    [(_, out)] = rig(tcp("S"))
    assert source(out)[0] == PUBLIC
    assert rig.outside(tcp("SA", inside=False)) == [], "not translated back: nobody has that address"
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether

    asked = Ether(out)
    reply = bytes(Ether(src=asked.dst, dst=asked.src) / IP(src=asked[IP].dst, dst=asked[IP].src)
                  / TCP(sport=asked[TCP].dport, dport=asked[TCP].sport, flags="SA"))  # fmt: skip
    [(side, back)] = rig.outside(reply)
    assert (side, checksums_hold(back)) == (INSIDE, True)
    assert expected(back)["destination_port"] == CLIENT_PORT
    assert rig(tcp("A"))
    if not where:
        assert any(words[1] > 0 for words in rig.records().values()), "one record holds the connection and its counters"
    assert rig.counts()["dropped_by_verdict"] == 1


def test_neighbours_with_one_key_share_one_record() -> None:
    chain = load_chain(["firewall", "traffic_counter"], {}, 64)
    assert len(chain.steps) == 1
    assert chain.members[:, 1].tolist() == [0, 4]
    assert len(load_chain(["firewall", "traffic_counter"], {}, 32).steps) == 2, "64 bytes do not fit in 32"


def test_counters_of_all_instances() -> None:
    rig = Rig([tally])
    for n in range(5):
        assert rig(udp(server_port=53 + n % 2))
    values = [int(words[COUNTER_WORD]) for _, words in sorted(rig.records().items())]
    assert sorted(values) == [2, 3]


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ([], {}, "name one or more"),
        (["firewall", "firewall"], {}, "each once"),
        (["firewal"], {}, "did you mean firewall"),
        (["firewall"], {"nat": {}}, "unknown network function with settings 'nat'"),
        (["passthrough"], {"passthrough": {"speed": 1}}, "unknown setting of network function 'passthrough' 'speed'"),
    ],
)
def test_a_wrong_chain_is_refused(names: list[str], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NearstateError, match=message):
        load_chain(names, settings, 32)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2**32, "0 to 4294967295 are possible"),
        ("10.0.0", "setting public='10.0.0'"),
        ([1, 2], "setting public"),
        (-1, "possible"),
    ],
)
def test_a_wrong_setting_is_refused(value: Any, message: str) -> None:
    function: NetworkFunction = little_nat
    with pytest.raises(NearstateError, match=message):
        function.make_env({"public": value})


def test_settings_change_while_it_runs() -> None:
    rig = Rig([little_nat])
    rig(udp())
    rig.chain.change_settings({"little_nat": {"public": "10.127.0.2"}})
    [(_, out)] = rig(udp(client_port=CLIENT_PORT + 2))
    assert source(out)[0] == PUBLIC + 1
    [(_, out)] = rig(udp())
    assert source(out)[0] == PUBLIC, "who has a mapping keeps it"


def test_packets_of_a_burst_share_one_mapping_whatever_the_claims_do(where: dict[str, Any]) -> None:
    """All first packets of 40 endpoints, three of each, at once: in order, each endpoint one port, no port twice."""
    rig = Rig([little_nat], **where)
    endpoints = [CLIENT_PORT + 2 * n for n in range(40)]
    out = rig.burst([udp(client_port=port, payload=bytes([n])) for n in range(3) for port in endpoints])
    assert len(out) == 120
    ports: dict[int, list[int]] = {}
    for _, frame in out:
        ports.setdefault(source(frame)[1], []).append(frame[-1])
    assert len(ports) == 40
    assert all(order == [0, 1, 2] for order in ports.values())


def test_counters_are_added_to_once_wherever_they_are(where: dict[str, Any]) -> None:
    rig = Rig([tally], **where)
    for n in range(30):
        rig.burst([udp(server_port=53 + k % 3) for k in range(n % 7)])
    totals = sum(n % 7 for n in range(30))
    if not where:
        assert sum(int(words[COUNTER_WORD]) for words in rig.records().values()) == totals
        return
    client = where["client"]
    rig.burst([])
    found = [client.get(int(key_low(0, 53 + k, 0, 55, 7)), COUNTER_HIGH) for k in range(3)]
    assert sum(int(np.frombuffer(answer.value, np.uint64)[COUNTER_WORD]) for answer in found) == totals


def test_claims_in_another_partition_are_unique_too(where: dict[str, Any]) -> None:
    """Flows of two neighbouring partitions, several packets each, at once; in "half" one partition is here, the other there."""
    rig = Rig([ticket], **where)
    flows = [CLIENT_PORT + 2 * (n % 2) + 512 * (n // 2) for n in range(10)]
    out = rig.burst([udp(client_port=port, payload=bytes([n])) for n in range(3) for port in flows])
    assert len(out) == 30
    for port in flows:
        assert [frame[-1] for _, frame in out if source(frame)[1] == port] == [0, 1, 2]
    if not where:
        claims = [key for key in rig.records() if key[0] == 5]
        assert sorted(low >> 48 for _, low in claims) == sorted([*range(5), *range(5)])
    assert rig.counts()["forwarded"] == 30
    assert rig.burst([udp(client_port=port) for port in flows]), "the mappings stay"


def fragments_of(identification: int, size: int = 3000) -> list[bytes]:
    """Return the fragments of a UDP datagram of the client, and a copy of it that was never opened by its first one."""
    from scapy.layers.inet import IP, UDP, fragment
    from scapy.layers.l2 import Ether

    whole = Ether(udp(payload=bytes(range(250)) * (size // 250)))
    whole[IP].id = identification
    del whole[IP].chksum, whole[IP].len, whole[UDP].chksum
    return [bytes(Ether(src=whole.src, dst=whole.dst) / part) for part in fragment(IP(bytes(whole[IP])), fragsize=1480)]


def test_later_fragments_belong_to_the_flow_of_their_first() -> None:
    rig = Rig([load("firewall"), little_nat])
    first, *later = fragments_of(7)
    assert rig(later[0]) == [], "its first fragment was not seen yet"
    assert rig.counts()["fragment"] == 1
    out = [frame for part in (first, *later) for _, frame in rig(part)]
    assert len(out) == 3
    from scapy.layers.inet import IP, UDP, defragment
    from scapy.layers.l2 import Ether

    [joined] = defragment([Ether(frame)[IP] for frame in out])
    assert joined[IP].src == "10.127.0.1"
    assert bytes(joined[UDP].payload) == bytes(range(250)) * 12
    sent, again = IP(bytes(joined)), IP(bytes(joined))
    del again[UDP].chksum
    assert IP(bytes(again))[UDP].chksum == sent[UDP].chksum, "the checksum of the whole is right"
    assert rig(fragments_of(8)[1]) == [], "another datagram's fragment is not of that flow"


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", ["tcp", "udp", "echo"])
def test_datagrams_in_fragments_pass_the_firewall_whole_and_open_nothing_without_their_first(version: int, kind: str) -> None:
    """They have neither TCP flags nor ICMP types."""
    from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
    from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest

    ask = {4: ICMP(id=9) / bytes(3000), 6: ICMPv6EchoRequest(id=9, data=bytes(3000))}[version]
    answer = {4: ICMP(type=0, id=9) / bytes(3000), 6: ICMPv6EchoReply(id=9, data=bytes(3000))}[version]
    segment = TCP(sport=CLIENT_PORT, dport=80, flags="PA") / bytes(3000)
    upper = {"tcp": segment, "udp": UDP(sport=CLIENT_PORT, dport=53) / bytes(3000), "echo": ask}[kind]

    def parts(payload: Any) -> list[bytes]:
        if version == 6:
            return fragments6(payload)
        return [bytes(ethernet() / part) for part in fragment(IP(src=CLIENT, dst=SERVER, id=77) / payload, fragsize=1480)]

    rig = Rig([load("firewall")])
    if kind == "tcp":
        opening = tcp6 if version == 6 else tcp
        assert rig(opening("S")) and rig.outside(opening("SA", inside=False)) and rig(opening("A"))  # noqa: PT018
    first, *later = parts(upper)
    assert rig.burst(later) == []
    assert rig.burst([first, *later]) == [(OUTSIDE, part) for part in (first, *later)]
    if kind == "echo":
        refused = Rig([load("firewall")])
        assert refused.burst(parts(answer)) == [], "an answer nobody asked for, and its later fragments"
        assert len(refused.records()) == 0 or not any(words.any() for words in refused.records().values())
