"""Does a capture file become correct packets of the emulated network, each address and port with one of its own?"""

from __future__ import annotations

import contextlib
import gzip
import ipaddress
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, CookedLinux, Dot1Q, Ether
from scapy.packet import Packet, Raw
from scapy.utils import PcapNgWriter, PcapWriter

from datastore.base.errors import NearstateError
from experiments.harness import spec
from experiments.harness.spec import Experiment
from experiments.workloads import capture
from experiments.workloads.capture import Prepared, prepare
from experiments.workloads.parties import NETWORKS, map_addresses, parties, spread_ports
from experiments.workloads.traffic import Replay
from nfs.dataplane.headers import INSIDE, OUTSIDE
from tests import packets
from topologies.emulation import recordings

MACS = ("02:00:00:00:00:01", "02:00:00:00:00:04")
ETHERNET: Any = Ether(src=MACS[0], dst=MACS[1])
ALICE, BOB, CAROL, WEB = "192.0.2.7", "192.0.2.8", "198.51.100.4", "203.0.113.80"


def number_of(address: str) -> int:
    return int(ipaddress.IPv4Address(address))


def save(path: Path, frames: Sequence[Packet | bytes], times: Sequence[float] | None = None, **options: Any) -> str:
    """Write a pcap file and return its name."""
    with PcapWriter(str(path), sync=True, **options) as writer:
        for number, frame in enumerate(frames):
            packet = frame if isinstance(frame, Packet) else Ether(frame)
            packet.time = times[number] if times else 1_700_000_000 + number / 1000
            writer.write(packet)
    return str(path)


def frames_of(prepared: Prepared) -> list[bytes]:
    return [prepared.memory[at : at + length].tobytes() for at, length in zip(prepared.at, prepared.length, strict=True)]


def replayed(path: Path, frames: Sequence[Packet | bytes], **parameters: Any) -> list[Packet]:
    """Return what scapy sees of the frames made from these."""
    return [Ether(frame) for frame in frames_of(prepare(Replay.of(pcap=save(path, frames), **parameters), *MACS))]


def conversation() -> list[Packet]:
    """Return packets of every kind between two clients and two servers, as hosts of their own network see them."""
    options = [("MSS", 1460), ("SAckOK", b""), ("WScale", 7)]
    udp = ETHERNET / IP(src=BOB, dst=CAROL) / UDP(sport=5353, dport=53) / b"odd"
    big: Any = IP(src=ALICE, dst=WEB, id=77) / UDP(sport=4000, dport=4001) / Raw(bytes(range(256)) * 8)
    quoted = IP(src=ALICE, dst=WEB, ttl=1) / TCP(sport=51000, dport=443, seq=5)
    return [
        ETHERNET / IP(src=ALICE, dst=WEB, id=1) / TCP(sport=51000, dport=443, flags="S", seq=5, options=options),
        ETHERNET / IP(src=WEB, dst=ALICE, id=2) / TCP(sport=443, dport=51000, flags="SA", seq=9, ack=6),
        ETHERNET / IP(src=ALICE, dst=WEB, id=3) / TCP(sport=51000, dport=443, flags="PA", seq=6, ack=10) / b"GET /",
        udp,
        ETHERNET / IP(src=CAROL, dst=BOB) / UDP(sport=53, dport=5353, chksum=0) / b"no checksum",
        ETHERNET / Dot1Q(vlan=7) / IP(src=ALICE, dst=WEB) / ICMP(id=9, seq=1) / b"ping",
        *(ETHERNET / part for part in fragment(big, fragsize=1400)),
        ETHERNET / IP(src=CAROL, dst=ALICE) / ICMP(type=11, code=0) / bytes(quoted)[:28],
        ETHERNET / IP(src=BOB, dst=WEB, proto=47) / bytes(24),
    ]


def right_checksums(packet: Packet) -> bytes:
    """Return the packet with all checksums computed by scapy (a UDP checksum of zero stays, RFC 768)."""
    again: Any = packet.copy()
    for layer in (IP, TCP, UDP, ICMP):
        if layer in again and not (layer is UDP and again[UDP].chksum == 0):
            del again[layer].chksum
    return bytes(again)


def test_checksums_are_those_scapy_computes(tmp_path: Path) -> None:
    for packet in replayed(tmp_path / "a.pcap", conversation()):
        if not packet[IP].frag and not packet[IP].flags.MF:
            assert bytes(packet) == right_checksums(packet), packet.summary()
        assert IP(right_checksums(packet[IP])).chksum == packet[IP].chksum


def test_a_fragmented_datagram_has_a_right_checksum_when_it_is_whole_again(tmp_path: Path) -> None:
    parts = [packet[IP] for packet in replayed(tmp_path / "a.pcap", conversation()) if packet[IP].id == 77]
    payload = b"".join(bytes(part.payload) for part in parts)
    whole = IP(bytes(IP(src=parts[0].src, dst=parts[0].dst, proto=17) / payload))
    assert len(parts) == 2
    assert bytes(whole) == right_checksums(whole)


def test_a_quoted_packet_is_mapped_with_the_flow_it_speaks_of(tmp_path: Path) -> None:
    found = replayed(tmp_path / "a.pcap", conversation(), ports="spread")
    error = next(packet for packet in found if ICMP in packet and packet[ICMP].type == 11)
    quoted, opened = error[ICMP].payload, found[0]
    assert (quoted.src, quoted.dst) == (opened[IP].src, opened[IP].dst)
    assert (quoted.sport, quoted.dport) == (opened[TCP].sport, opened[TCP].dport)
    assert quoted.chksum == IP(right_checksums(IP(bytes(quoted)[:20]))).chksum


def test_everything_but_addresses_tags_and_checksums_stays(tmp_path: Path) -> None:
    sent = conversation()
    for before, after in zip(sent, replayed(tmp_path / "a.pcap", sent), strict=True):
        (before, after) = (IP(bytes(packet[IP])) for packet in (before, after))
        for name in ("version", "ihl", "tos", "len", "id", "flags", "frag", "ttl", "proto", "options"):
            assert getattr(before, name) == getattr(after, name)
        for layer in (TCP, UDP):
            if layer in before and not before.frag:
                assert [before[layer].sport, before[layer].dport] == [after[layer].sport, after[layer].dport]
                assert bytes(before[layer].payload) == bytes(after[layer].payload)


def test_parties_leave_at_their_hosts_by_their_macs(tmp_path: Path) -> None:
    prepared = prepare(Replay.of(pcap=save(tmp_path / "a.pcap", conversation())), *MACS)
    for frame, side in zip(frames_of(prepared), prepared.side, strict=True):
        packet = Ether(frame)
        assert (packet.src, packet.dst) == (MACS if side == INSIDE else MACS[::-1])
        ends = [ipaddress.IPv4Address(packet[IP].src), ipaddress.IPv4Address(packet[IP].dst)]
        assert ends[0] in NETWORKS[side]
        assert ends[1] in NETWORKS[1 - side]


@given(st.dictionaries(st.integers(0, 2**32 - 1), st.integers(0, 1), min_size=1, max_size=300))
def test_addresses_are_mapped_one_to_one_into_their_half(sides: dict[int, int]) -> None:
    mapped = map_addresses(sides)
    assert len(set(mapped.values())) == len(sides)
    for address, side in sides.items():
        assert ipaddress.IPv4Address(mapped[address]) in NETWORKS[side]
        if ipaddress.IPv4Address(address) in NETWORKS[side]:
            assert mapped[address] == address, "what is there already stays"


def test_all_ports_of_an_address_are_mapped_one_to_one_even_ones_first() -> None:
    port_of = spread_ports()
    first = [port_of(1, port) for port in range(65536)]
    assert sorted(first) == list(range(65536))
    assert first[:3] == [1024, 1026, 1028]
    assert [port_of(1, port) for port in range(65536)] == first
    assert port_of(2, 50_000) == 1024, "each address has its own"


def test_who_is_inside() -> None:
    alice, bob, carol, web = map(number_of, (ALICE, BOB, CAROL, WEB))
    assert parties([(alice, web), (web, alice), (carol, bob)]) == {alice: 0, web: 1, carol: 0, bob: 1}
    assert parties([(web, alice), (bob, web)], inside=["192.0.2.0/24"]) == {web: 1, alice: 0, bob: 0}


def test_sides_of_our_own_recordings_and_of_networks_that_use_the_same_addresses() -> None:
    client, server, translated, virtual = map(number_of, ("10.0.1.9", "10.128.0.1", "10.64.0.9", "10.64.1.1"))
    assert parties([(server, client)], ours=True) == {server: OUTSIDE, client: INSIDE}
    assert parties([(server, client)]) == {server: INSIDE, client: OUTSIDE}, "of others the opener is inside"
    assert parties([(translated, server)], ours=True) == {translated: INSIDE, server: OUTSIDE}, "beyond a NAT"
    assert parties([(client, virtual)], ours=True) == {client: INSIDE, virtual: OUTSIDE}, "before a load balancer"


SYN_LATE = [
    ETHERNET / IP(src=WEB, dst=ALICE) / TCP(sport=443, dport=51000, flags="PA", seq=9) / b"of a connection before",
    ETHERNET / IP(src=ALICE, dst=WEB) / TCP(sport=51002, dport=443, flags="S"),
]
ANSWERED = [ETHERNET / IP(src=WEB, dst=ALICE) / TCP(sport=8443, dport=51000, flags="SA")]
MIDDLE = [ETHERNET / IP(src=WEB, dst=ALICE) / TCP(sport=443, dport=51000, flags="PA") / b"data"]
DNS = [ETHERNET / IP(src=WEB, dst=ALICE) / UDP(sport=53, dport=51000) / b"answer"]
REPLY = [ETHERNET / IP(src=WEB, dst=ALICE) / ICMP(type=0, id=5)]
UNREACHABLE = [
    ETHERNET / IP(src=CAROL, dst=ALICE) / ICMP(type=3, code=1) / bytes(IP(src=ALICE, dst=WEB) / UDP(sport=9, dport=9))[:28]
]
PEERS = [ETHERNET / IP(src=ALICE, dst=WEB) / UDP(sport=6881, dport=6881) / b"first"]


@pytest.mark.parametrize("frames", [SYN_LATE, ANSWERED, MIDDLE, DNS, REPLY, UNREACHABLE, PEERS])
def test_the_opener_of_a_connection_is_inside_wherever_the_file_begins(tmp_path: Path, frames: list[Packet]) -> None:
    """ALICE has asked in all of them, also where her question is not in the file."""
    prepared = prepare(Replay.of(pcap=save(tmp_path / "a.pcap", frames)), *MACS)
    assert prepared.number.tolist() == list(range(1, len(frames) + 1))
    assert prepared.side.tolist() == [INSIDE if frame[IP].src == ALICE else OUTSIDE for frame in frames]


@pytest.mark.parametrize("addresses", [("10.200.0.5", "10.1.0.9"), ("10.1.2.3", "10.2.0.9"), ("10.200.0.5", "10.201.0.5")])
def test_a_network_within_10_is_no_recording_of_ours(tmp_path: Path, addresses: tuple[str, str]) -> None:
    client, server = addresses
    frames = [ETHERNET / IP(src=client, dst=server) / TCP(sport=51000, dport=443, flags="S"),
              ETHERNET / IP(src=server, dst=client) / TCP(sport=443, dport=51000, flags="SA")]  # fmt: skip
    name = save(tmp_path / "a.pcap", frames)
    assert prepare(Replay.of(pcap=name), *MACS).side.tolist() == [INSIDE, OUTSIDE]
    recordings.mark(tmp_path, ["b.pcap"])
    assert prepare(Replay.of(pcap=name), *MACS).side.tolist() == [INSIDE, OUTSIDE], "the mark names other files"


def test_a_recording_of_ours_is_known_by_its_mark(tmp_path: Path) -> None:
    """The server opens: only the mark tells that it is outside."""
    name = save(tmp_path / "server-net.pcap", [packets.tcp("S", inside=False)])
    assert prepare(Replay.of(pcap=name), *MACS).side.tolist() == [INSIDE]
    recordings.mark(tmp_path, ["server-net.pcap", "client-net.pcap"])
    (tmp_path / "server-net.pcap.gz").write_bytes(gzip.compress(Path(name).read_bytes()))
    for marked in (name, f"{name}.gz"):
        assert prepare(Replay.of(pcap=marked), *MACS).side.tolist() == [OUTSIDE]
    (tmp_path / recordings.MARK).write_text("[]")
    with pytest.raises(NearstateError, match=r"recording\.json does not say which files beside it are recordings"):
        prepare(Replay.of(pcap=name), *MACS)


def test_times_are_kept_to_the_nanosecond_and_never_fall(tmp_path: Path) -> None:
    frames = [packets.udp(client_port=port) for port in (1, 2, 3, 4)]
    times = [1_700_000_000.0, 1_700_000_000.25, 1_700_000_000.125, 1_700_000_001.5]
    for nano in (False, True):
        prepared = prepare(Replay.of(pcap=save(tmp_path / "a.pcap", frames, times, nano=nano)), *MACS)
        assert prepared.time_ns.tolist() == [0, 250_000_000, 250_000_000, 1_500_000_000]
        assert prepared.number.tolist() == [1, 2, 3, 4]


def test_answers_follow_what_they_answer(tmp_path: Path) -> None:
    prepared = prepare(Replay.of(pcap=save(tmp_path / "a.pcap", conversation()[:5])), *MACS)
    assert prepared.after.tolist() == [-1, 0, 1, -1, 3]
    assert prepared.flow.tolist() == [0, 0, 0, 1, 1]
    assert prepared.side.tolist() == [0, 1, 0, 0, 1]


def test_the_client_side_alone(tmp_path: Path) -> None:
    prepared = prepare(Replay.of(pcap=save(tmp_path / "a.pcap", conversation()), sides="client"), *MACS)
    assert set(prepared.side) == {INSIDE}
    assert prepared.skipped == {"server_side": 3}


def test_what_is_not_replayed_is_counted_by_reason(tmp_path: Path) -> None:
    jumbo = ETHERNET / IP(src=ALICE, dst=WEB) / UDP(sport=1, dport=2) / bytes(1473)
    lan = ETHERNET / IP(src=ALICE, dst=BOB) / UDP(sport=1, dport=2)
    frames = [*conversation()[:2], ETHERNET / ARP(), ETHERNET / IPv6() / UDP(), jumbo, ETHERNET / IP(ihl=4) / b"", lan]
    prepared = prepare(Replay.of(pcap=save(tmp_path / "a.pcap", frames), inside=["192.0.2.0/24"]), *MACS)
    assert prepared.skipped == {"not_ipv4": 2, "oversized": 1, "malformed": 1, "between_one_party": 1}
    assert prepared.number.tolist() == [1, 2]


def test_what_a_snap_length_cut_off_is_filled_up(tmp_path: Path) -> None:
    whole = ETHERNET / IP(src=ALICE, dst=WEB) / TCP(sport=51000, dport=443, flags="PA") / bytes(range(200))
    cut = Ether(bytes(whole)[:80])
    cut.wirelen = len(whole)
    (packet,) = replayed(tmp_path / "a.pcap", [cut])
    assert len(packet) == len(whole)
    assert bytes(packet[TCP].payload) == bytes(range(26)) + bytes(174)
    assert bytes(packet) == right_checksums(packet)


def test_other_formats_and_link_types(tmp_path: Path) -> None:
    expected = [bytes(packet) for packet in replayed(tmp_path / "a.pcap", conversation())]
    (tmp_path / "a.pcap.gz").write_bytes(gzip.compress((tmp_path / "a.pcap").read_bytes()))
    with PcapNgWriter(str(tmp_path / "a.pcapng")) as writer:
        writer.write([Ether(bytes(packet)) for packet in conversation()])
    save(tmp_path / "raw.pcap", [IP(bytes(packet[IP])) for packet in conversation()], linktype=101)
    save(tmp_path / "any.pcap", [CookedLinux(proto=0x800) / IP(bytes(p[IP])) for p in conversation()], linktype=113)
    for name in ("a.pcap.gz", "a.pcapng", "raw.pcap", "any.pcap"):
        assert frames_of(prepare(Replay.of(pcap=str(tmp_path / name)), *MACS)) == expected, name


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(NearstateError) as raised:
        capture.read(str(path))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_files_that_are_none_are_one_clear_line(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "x", b"\x1f\x8b no gzip")
    with pytest.raises(NearstateError, match=r"has no IPv4 packet that can be replayed: \{'not_ipv4': 1\}"):
        capture.read(save(tmp_path / "arp.pcap", [ETHERNET / ARP()]))
    with pytest.raises(NearstateError, match=r"has link type 105 IEEE802_11: Ethernet \(1\) or"):
        capture.read(save(tmp_path / "wifi.pcap", [Raw(b"beacon")], linktype=105))


def timed(path: Path, times: Sequence[float], **parameters: Any) -> Prepared:
    """Return a replay of datagrams with these time stamps."""
    frames = [packets.udp(client_port=5000 + number) for number in range(len(times))]
    return prepare(Replay.of(pcap=save(path, frames, times), **parameters), *MACS)


@pytest.mark.parametrize(
    ("times", "parameters", "said"),
    [
        ([0.0, 1.7e9, 1.7e9 + 1], {}, "lasts 1,700,000,001.0 s at speed 1, longer than longest_s=3600: packet 2 comes "
                                      "1,700,000,000.0 s after packet 1"),
        ([1e9, 1e9 + 65_536, 1e9 + 1], {}, "packet 2 comes 65,536.0 s after packet 1"),
        ([1e9, 1e9 + 1, 1e9 + 5000], {}, "packet 3 comes 4,999.0 s after packet 2"),
        ([1e9, 1e9 + 40], {"speed": 0.01}, "lasts 4,000.0 s at speed 0.01"),
        ([1e9, 1e9 + 40], {"longest_s": 30}, "longer than longest_s=30"),
        ([1e9, 1e9 + 40, 1e9 + 5], {}, "packet 3 is 35.0 s earlier than one before it, at most 1 s is made good"),
    ],
)  # fmt: skip
def test_times_that_cannot_be_replayed_are_refused_with_the_packet(
    tmp_path: Path, times: list[float], parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises(NearstateError, match=re.escape(said)) as raised:
        timed(tmp_path / "a.pcap", times, **parameters)
    assert "\n" not in str(raised.value)
    assert len(timed(tmp_path / "a.pcap", times, **{**parameters, "speed": 0.0}).at) == len(times), "without times it can"


def test_a_speed_that_makes_a_file_short_enough(tmp_path: Path) -> None:
    assert timed(tmp_path / "a.pcap", [1e9, 1e9 + 5000], speed=2.0).timing.seconds == 5000
    assert timed(tmp_path / "a.pcap", [1e9, 1e9 + 5000], longest_s=5000).timing.gap_s == 5000


def test_times_that_go_back_a_little_are_made_good_and_told(tmp_path: Path) -> None:
    prepared = timed(tmp_path / "a.pcap", [1e9, 1e9 + 0.5, 1e9 + 0.25, 1e9 + 0.375, 1e9 + 0.75])
    assert prepared.time_ns.tolist() == [0, 500_000_000, 500_000_000, 500_000_000, 750_000_000]
    assert (prepared.timing.back, prepared.timing.most_back_s, prepared.timing.back_at) == (2, 0.25, 3)
    replay = Replay.of(pcap=str(tmp_path / "a.pcap"))
    assert capture.describe(replay, capture.check(replay)) == (
        f"replay of {tmp_path}/a.pcap: 5 packets, 0.750 s at speed 1; 2 time stamps earlier than one before"
    )


def test_a_replay_says_what_it_leaves_out(tmp_path: Path) -> None:
    replay = Replay.of(pcap=save(tmp_path / "a.pcap", [*conversation()[:2], ETHERNET / ARP()]), speed=0.0)
    assert capture.describe(replay, capture.check(replay)).endswith(": 2 packets, as fast as possible; not replayed: not_ipv4 1")


def test_packets_without_time_stamps_are_replayed_at_speed_0_only(tmp_path: Path) -> None:
    untimed = struct.pack("<I", len(packets.udp())) + packets.udp()
    untimed += bytes(-len(untimed) % 4)
    length = struct.pack("<I", len(untimed) + 12)
    with PcapNgWriter(str(tmp_path / "a.pcapng")) as writer:
        writer.write([Ether(packets.udp(client_port=9))])
    path = tmp_path / "b.pcapng"
    path.write_bytes((tmp_path / "a.pcapng").read_bytes() + struct.pack("<I", 3) + length + untimed + length)
    with pytest.raises(
        NearstateError, match="packet 2 is in a Simple Packet Block, which has no time stamp: replay the file with"
    ):
        prepare(Replay.of(pcap=str(path)), *MACS)
    assert len(prepare(Replay.of(pcap=str(path), speed=0.0), *MACS).at) == 2


@pytest.mark.parametrize("kept", range(15, 55))
def test_a_snap_length_within_the_headers_is_told(tmp_path: Path, kept: int) -> None:
    """Nothing of ports and flags is made up. 54 bytes are all headers of this segment."""
    whole = bytes(ETHERNET / IP(src=ALICE, dst=WEB) / TCP(sport=51000, dport=443, flags="PA") / bytes(90))
    cut = Ether(whole[:kept])
    cut.wirelen = len(whole)
    name = save(tmp_path / "a.pcap", [cut, Ether(whole)])
    found = capture.read(name)
    assert [packet.number for packet in found.packets] == ([1, 2] if kept == 54 else [2])
    assert found.skipped.total() == (0 if kept == 54 else 1)


@pytest.mark.parametrize("kind", ["pcap", "pcapng"])
def test_a_file_cut_off_anywhere_is_said_to_be(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "pcap":
        save(path, conversation()[:2])
    else:
        with PcapNgWriter(str(path)) as writer:
            writer.write([Ether(bytes(packet)) for packet in conversation()[:2]])
    content, whole = path.read_bytes(), 0
    for end in range(12 if kind == "pcapng" else 4, len(content)):
        path.write_bytes(content[:end])
        with contextlib.suppress(NearstateError):
            capture.read(str(path))
            whole += 1
            continue
        said = refusal(path, content[:end])
        assert "truncated" in said or "no Interface Description Blocks" in said or "it is empty" in said, f"{end}: {said}"
    assert whole == 1, "only behind the first packet is a whole file"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"speed": -1}, "speed=-1: 0.001 to 1000, or 0, is possible"),
        ({"sides": "server"}, "unknown sides of a replay 'server'"),
        ({"ports": "kep"}, "did you mean keep"),
        ({"inside": ["192.0.2.1/24"]}, "inside="),
        ({"pacp": "x"}, "unknown traffic parameter 'pacp': did you mean pcap"),
        ({"patience_ms": "long"}, "patience_ms='long'"),
    ],
)
def test_wrong_parameters_are_refused_by_name_and_value(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(NearstateError, match=message):
        Replay.of(**{"pcap": "a.pcap", **parameters})


def test_an_experiment_with_a_file_is_checked_before_anything_starts(tmp_path: Path) -> None:
    name = save(tmp_path / "a.pcap", conversation())
    grid: dict[str, Any] = {"topology": ("rack",), "nf": ("firewall",), "placement": ("integrated",)}

    def experiment(procedure: str = "replay", sweep: dict[str, Any] | None = None, **traffic: Any) -> Experiment:
        return Experiment("?", procedure, (sweep or grid,), traffic=traffic)

    spec.check("mine", experiment(pcap=name))
    spec.check("mine", experiment(sweep={**grid, "speed": (1.0, 0.0)}, pcap=name))
    spec.check("mine", experiment(sweep={**grid, "nf": ("nat", "nat_symmetric", "rate_limiter")}, pcap=name, sides="client"))
    datagrams = save(tmp_path / "udp.pcap", [packets.udp(), packets.udp(inside=False)])
    spec.check("mine", experiment(pcap=datagrams, sides="client"))
    lines = spec.replays(experiment(sweep={**grid, "speed": (1.0, 0.0)}, pcap=name))
    assert lines == [f"replay of {name}: 10 packets, 0.009 s at speed 1", f"replay of {name}: 10 packets, as fast as possible"]
    for wrong, message in (
        (experiment(pcap=name + "x"), "cannot be read: No such file"),
        (experiment("packet_latency", pcap=name), "need each other"),
        (experiment(), "need each other"),
        (experiment(sweep={**grid, "placement": ("nftables",)}, pcap=name), "a replay through 'nftables'"),
        (experiment(pcap=name, sides="client"), "sides='client' through 'firewall': it judges TCP by both sides' segments"),
        (experiment(sweep={**grid, "nf": ("nat+firewall",)}, pcap=name, sides="client"), "sides='client' through 'firewall'"),
        (experiment(sweep={**grid, "nf": ("nat|load_balancer",)}, pcap=name, sides="client"), "through 'load_balancer'"),
        (experiment(sweep={**grid, "speed": (1.0, -2.0)}, pcap=name), "speed=-2.0: 0.001 to 1000"),
        (experiment(sweep={**grid, "speed": (1.0, 0.001)}, pcap=name, longest_s=5), "at speed 0.001, longer than longest_s=5"),
        (experiment(sweep={**grid, "settings": {"speed": 0.001}}, pcap=name, longest_s=5), "at speed 0.001, longer than"),
    ):
        with pytest.raises(NearstateError, match=message):
            spec.check("mine", wrong)
