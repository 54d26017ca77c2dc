"""On the live switch: does every partition's forward and return traffic reach the same instance, before and after a move?"""

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from datastore.base.errors import NearstateError
from topologies.controller.steering import ICMPV6, IPV6, PARTITIONS, TCP, UDP
from topologies.emulation import system
from topologies.emulation.journal import Journal
from topologies.emulation.network import Network
from topologies.emulation.processes import Launcher

ICMP = 1
CLIENT_NET, SERVER = 0x0A010200, 0x0A800007
KINDS = {"tcp": (TCP, False), "udp": (UDP, False), "icmp": (ICMP, False), "later tcp fragment": (TCP, True),
         "later udp fragment": (UDP, True), "ipv6 tcp": (TCP, False), "ipv6 icmp": (ICMPV6, False),
         "ipv6 later udp fragment": (UDP, True)}  # fmt: skip


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    logs = tmp_path_factory.mktemp("logs")
    run_id, parameters = "test-steering-live", {"nf_hosts": 3}
    with Journal(run_id) as journal, Launcher(journal, logs) as launcher, Network(
        "rack", parameters, run_id, launcher, journal
    ) as network:  # fmt: skip
        yield network


def packet(kind: str, partition: int, from_client: bool, macs: tuple[str, str]) -> bytes:
    """Return a frame of the partition: by its client port, or where it has no ports by its client address."""
    protocol, later = KINDS[kind]
    has_ports = protocol in (TCP, UDP) and not later
    client = CLIENT_NET | (0x55 if has_ports else partition)  # what must not matter is set to something else
    port = 0xC000 | partition << 1 | 1
    ends = ((client, port), (SERVER, 80)) if from_client else ((SERVER, 80), (client, port))
    tag = struct.pack(">4sBBH", b"nstt", list(KINDS).index(kind), from_client, partition)
    if protocol == TCP and not later:
        payload = struct.pack(">HHIIBBHHH", ends[0][1], ends[1][1], 0, 0, 0x50, 0x10, 1024, 0, 0) + tag
    elif protocol == UDP and not later:
        payload = struct.pack(">HHHH", ends[0][1], ends[1][1], 8 + len(tag), 0) + tag
    elif protocol in (ICMP, ICMPV6):
        payload = struct.pack(">BBHHH", 8 if protocol == ICMP else 128, 0, 0, 1, 1) + tag
    else:  # where ports would be, a later fragment has data: it must not be taken for ports
        payload = b"\xff\x5a" * 10 + tag
    if kind.startswith("ipv6"):
        return packet6(protocol, later, ends[0][0], ends[1][0], payload, macs)
    fragment = 185 if later else 0
    header = struct.pack(">BBHHHBBHII", 0x45, 0, 20 + len(payload), 1, fragment, 64, protocol, 0, ends[0][0], ends[1][0])
    total = sum(struct.unpack(">10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    header = header[:10] + struct.pack(">H", ~total & 0xFFFF) + header[12:]
    frame = bytes.fromhex("".join(macs).replace(":", "")) + b"\x08\x00" + header + payload
    return frame.ljust(60, b"\0")


def packet6(protocol: int, later: bool, source: int, destination: int, payload: bytes, macs: tuple[str, str]) -> bytes:
    """Return a frame of IPv6 between fd00:: with these low bits."""
    following = protocol
    if later:
        following, payload = 44, struct.pack(">BBHI", protocol, 0, 185 << 3, 1) + payload
    header = struct.pack(">IHBB", 6 << 28, len(payload), following, 64)
    header += b"".join((0xFD << 120 | low).to_bytes(16, "big") for low in (source, destination))
    return bytes.fromhex("".join(macs).replace(":", "")) + struct.pack(">H", IPV6) + header + payload


class Taps:
    """Packet sockets on interfaces of hosts: who sees which test frame."""

    def __init__(self, network: Network, ends: list[tuple[str, str]]) -> None:
        self.sockets: dict[tuple[str, str], socket.socket] = {}
        for host, interface in ends:
            with system.network_namespace(network.hosts[host].pid):
                tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
            tap.bind((interface, 0x0003))
            tap.setblocking(False)
            self.sockets[host, interface] = tap

    def collect(self, expected: int) -> dict[bytes, list[tuple[str, str]]]:
        """Return, by tag, where test frames came in; waits until `expected` have, or nothing has for half a second."""
        seen: dict[bytes, list[tuple[str, str]]] = {}
        quiet_since = time.monotonic()
        while time.monotonic() < quiet_since + 0.5 and sum(map(len, seen.values())) < expected:
            for end, tap in self.sockets.items():
                with contextlib.suppress(BlockingIOError):
                    while True:
                        frame, (_, _, kind, *_rest) = tap.recvfrom(2048)
                        if (at := frame.find(b"nstt")) >= 0 and kind != socket.PACKET_OUTGOING:
                            seen.setdefault(frame[at : at + 8], []).append(end)
                            quiet_since = time.monotonic()
        return seen


def assert_steered(network: Network, partitions: list[int]) -> None:
    """Send a packet of every kind and direction for each partition; each must come out once, at its instance's right side."""
    shown = network.show()
    nfs = [host.name for host in network.hosts.values() if host.role == "nf"]
    taps = Taps(network, [(nf, side) for nf in nfs for side in ("inside", "outside")] + [("client", "net"), ("server", "net")])
    client, server = taps.sockets["client", "net"], taps.sockets["server", "net"]
    mac = {name: network.hosts[name].interfaces["net"].mac for name in ("client", "server")}
    for start in range(0, len(partitions), 16):
        expected = {}
        for partition in partitions[start : start + 16]:
            for number, kind in enumerate(KINDS):
                client.send(packet(kind, partition, True, (mac["server"], mac["client"])))
                server.send(packet(kind, partition, False, (mac["client"], mac["server"])))
                for from_client, side, way in ((1, "inside", "instances"), (0, "outside", "returns")):
                    tag = struct.pack(">4sBBH", b"nstt", number, from_client, partition)
                    expected[tag] = [(shown[way][partition], side)]
        assert taps.collect(len(expected)) == expected
    for tap in taps.sockets.values():
        tap.close()


def test_every_partition_meets_its_instance_both_ways(rack: Network) -> None:
    assert_steered(rack, list(range(PARTITIONS)))


def test_moved_partitions_follow_and_the_others_stay(rack: Network) -> None:
    before = rack.steering()
    moved = [partition for partition in range(PARTITIONS) if partition % 5 == 0]
    rack.steer(moved, "nf3")
    after = rack.steering()
    assert [p for p in range(PARTITIONS) if after[p] != before[p]] == [p for p in moved if before[p] != "nf3"]
    assert_steered(rack, [*range(40), *range(216, 256)])


def test_answers_meet_another_instance_when_asked_to_and_the_same_again_afterwards(rack: Network) -> None:
    apart = list(range(100, 116))
    rack.steer(apart, "nf1", returning="nf2")
    shown = rack.show()
    assert {(shown["instances"][p], shown["returns"][p]) for p in apart} == {("nf1", "nf2")}
    assert_steered(rack, [99, *apart, 116])
    rack.steer(apart, "nf3")
    shown = rack.show()
    assert {(shown["instances"][p], shown["returns"][p]) for p in apart} == {("nf3", "nf3")}
    assert_steered(rack, apart)


def test_the_switch_follows_a_map_and_touches_what_differs_only(rack: Network) -> None:
    before = rack.steering()
    wanted = ["nf2" if name == "nf1" else name for name in before]
    rack.steer([3], wanted[3], returning="nf3" if wanted[3] != "nf3" else "nf1")
    differ = {3, *(p for p in range(PARTITIONS) if before[p] != wanted[p])}
    assert rack.follow(wanted) == len(differ)
    assert rack.follow(wanted) == 0
    shown = rack.show()
    assert shown["instances"] == shown["returns"] == wanted
    assert_steered(rack, [*range(24), *range(240, 256)])
    with pytest.raises(NearstateError, match="partition 255: unknown instance 'nf9'"):
        rack.follow([*wanted[:-1], "nf9"])
    assert rack.steering() == wanted


def test_two_followers_at_once_leave_one_of_their_maps_whole(rack: Network) -> None:
    """A coordinator has a connection of its own beside the runner's."""
    maps = [["nf1"] * PARTITIONS, ["nf2"] * PARTITIONS]
    with socket.socket(socket.AF_UNIX) as coordinator:
        coordinator.settimeout(5)
        coordinator.connect(str(rack.commands_path()))
        for _ in range(8):
            coordinator.sendall(json.dumps({"command": "follow", "instances": maps[0]}).encode() + b"\n")
            rack.follow(maps[1])
            assert "steered" in json.loads(coordinator.recv(65536))
    shown = rack.show()
    assert shown["instances"] == shown["returns"]
    assert shown["instances"] in maps
    assert_steered(rack, [0, 1, 2, 127, 128, 255])


def test_a_switch_over_loses_no_packet_and_then_all_go_to_the_new_instance(rack: Network) -> None:
    """A stream runs through the switch-over: the datapath keeps what it looked up until the switch has revalidated it."""
    rack.follow(["nf1"] * PARTITIONS)
    taps = Taps(rack, [("nf1", "inside"), ("nf2", "inside"), ("client", "net")])
    mac = [rack.hosts[name].interfaces["net"].mac for name in ("server", "client")]
    frames = [packet("udp", partition, True, (mac[0], mac[1])) for partition in range(0, PARTITIONS, 8)]
    client = taps.sockets["client", "net"]
    for frame in frames:
        client.send(frame)
    assert set(map(tuple, taps.collect(len(frames)).values())) == {(("nf1", "inside"),)}
    follower = threading.Thread(target=rack.follow, args=(["nf2"] * PARTITIONS,))
    follower.start()
    deadline, ends = time.monotonic() + 5, {("nf1", "inside")}
    while (follower.is_alive() or ends != {("nf2", "inside")}) and time.monotonic() < deadline:
        for frame in frames:
            client.send(frame)
        seen = taps.collect(len(frames))
        assert [len(arrivals) for arrivals in seen.values()] == [1] * len(frames)
        ends = {end for arrivals in seen.values() for end in arrivals}
    follower.join()
    assert ends == {("nf2", "inside")}
    for tap in taps.sockets.values():
        tap.close()


def test_once_settled_no_packet_goes_the_old_way(rack: Network) -> None:
    mac = [rack.hosts[name].interfaces["net"].mac for name in ("server", "client")]
    frames = [packet(kind, p, True, (mac[0], mac[1])) for p in range(PARTITIONS) for kind in ("udp", "tcp")]
    for name in ("nf1", "nf2") * 5:
        taps = Taps(rack, [("nf1", "inside"), ("nf2", "inside"), ("client", "net")])
        for _ in range(3):  # whatever the switch keeps of a flow, it keeps of these
            for frame in frames:
                taps.sockets["client", "net"].send(frame)
        rack.follow([name] * PARTITIONS)
        rack.settle()
        taps.collect(len(frames) * 3)
        for frame in frames[::8]:
            taps.sockets["client", "net"].send(frame)
        assert {end for arrivals in taps.collect(len(frames) // 8).values() for end in arrivals} == {(name, "inside")}
        for tap in taps.sockets.values():
            tap.close()


def test_a_cut_cable_is_seen_at_the_switch(rack: Network) -> None:
    assert rack.ports_down() == []
    for cut, wanted in ((rack.cut, ["nf2.inside"]), (rack.mend, [])):
        cut("nf2", "inside")
        deadline = time.monotonic() + 5
        while rack.ports_down() != wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert rack.ports_down() == wanted


def test_what_leaves_an_instance_reaches_the_other_party(rack: Network) -> None:
    ends = [("nf2", "inside"), ("nf2", "outside"), ("client", "net"), ("server", "net")]
    taps = Taps(rack, ends)
    mac = {name: rack.hosts[name].interfaces["net"].mac for name in ("client", "server")}
    taps.sockets["nf2", "outside"].send(packet("udp", 9, True, (mac["server"], mac["client"])))
    taps.sockets["nf2", "inside"].send(packet("udp", 9, False, (mac["client"], mac["server"])))
    seen = taps.collect(2)
    assert seen == {
        struct.pack(">4sBBH", b"nstt", 1, 1, 9): [("server", "net")],
        struct.pack(">4sBBH", b"nstt", 1, 0, 9): [("client", "net")],
    }


def test_wrong_commands_are_answered_and_change_nothing(rack: Network) -> None:
    before = rack.show()
    with pytest.raises(NearstateError, match="unknown instance 'nf22': did you mean nf2"):
        rack.steer([1], "nf1", returning="nf22")
    with pytest.raises(NearstateError, match="unknown instance 'nf33': did you mean nf3"):
        rack.steer([1], "nf33")
    with pytest.raises(NearstateError, match="partition 256 is not one of 0 to 255"):
        rack.steer([1, 256], "nf1")
    for line, reason in (
        (b"not json", "Expecting value"), (b"[]", "unknown command"), (b'{"command": "steal"}', "unknown command"),
        (b'{"command": "steer"}', "unknown instance None"), (b'{"command": "steer", "instance": "nf1"}', "must be a list"),
        (b'{"command": "steer", "instance": ["nf1"], "partitions": [1]}', "unknown instance"),
        (b'{"command": "steer", "instance": "nf1", "return": "nf9", "partitions": [1]}', "unknown instance 'nf9'"),
        (b'{"command": "steer", "instance": "nf1", "return": null, "partitions": [1]}', "unknown instance None"),
    ):  # fmt: skip
        with socket.socket(socket.AF_UNIX) as commands:
            commands.settimeout(5)
            commands.connect(str(rack.commands_path()))
            commands.sendall(line + b"\n")
            assert reason in json.loads(commands.recv(65536))["error"]
    after = rack.show()
    assert (after["instances"], after["returns"]) == (before["instances"], before["returns"])


def test_a_chain_over_hosts_and_back_leaves_exactly_its_own_rules(rack: Network) -> None:
    """The instances are silent here: what a host would send on is sent by the test."""
    assert rack.switch is not None
    rack.chain([["nf1", "nf2"], ["nf3"]])
    assert set(rack.steering()) == {"nf1|nf3", "nf2|nf3"}
    dump = ["ovs-ofctl", "-O", "OpenFlow13", "dump-flows", rack.switch.bridge]
    assert system.run(dump, rack.journal.environment()).count("priority=") == rack.show()["rules"]
    mac = {name: rack.hosts[name].interfaces["net"].mac for name in ("client", "server")}
    client, server = ("client", "net"), ("server", "net")
    inside, outside = ({n: (f"nf{n}", side) for n in (1, 2, 3)} for side in ("inside", "outside"))
    hops = [(client, inside[2]), (outside[2], inside[3]), (outside[1], inside[3]), (outside[3], server)]
    back = [(server, outside[3]), (inside[3], outside[2]), (inside[2], client)]
    taps = Taps(rack, sorted({end for hop in hops + back for end in hop}))
    for from_client, ways in ((True, hops), (False, back)):
        for start, end in ways:
            taps.sockets[start].send(packet("udp", 9, from_client, (mac["server"], mac["client"])))
            assert taps.collect(1) == {struct.pack(">4sBBH", b"nstt", 1, from_client, 9): [end]}, (start, end)
    for tap in taps.sockets.values():
        tap.close()
    with pytest.raises(NearstateError, match="follow: a map names one instance a partition; this chain has 2 stages"):
        rack.follow(["nf1"] * PARTITIONS)
    with pytest.raises(NearstateError, match="chain: instance 'nf1' is in 2 places"):
        rack.chain([["nf1"], ["nf1"]])
    rack.chain([["nf1", "nf2", "nf3"]])
    assert_steered(rack, [0, 1, 2, 255])


def test_frames_nobody_may_have_are_dropped_and_counted(rack: Network) -> None:
    before = rack.show()["refused_packets"]
    taps = Taps(rack, [(host.name, name) for host in rack.hosts.values() for name in host.interfaces])
    ours = bytes.fromhex("33330000000202000000000188b5") + b"nstt ours".ljust(60, b"\0")
    lldp = bytes.fromhex("0180c200000e02000000000188cc") + b"nstt lldp".ljust(60, b"\0")
    for frame in (ours, lldp):
        taps.sockets["client", "net"].send(frame)
    assert taps.collect(1) == {}
    deadline = time.monotonic() + 3  # the switch moves its datapath's counters to the rules about once a second
    while (counted := rack.show()["refused_packets"] - before) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert counted == 2


def test_a_restarted_connection_keeps_the_steering(rack: Network, tmp_path: Path) -> None:
    """The switch drops its controller connection and comes back: all rules are installed again, moves included."""
    assert rack.switch is not None
    before = rack.show()
    environment = rack.journal.environment()
    system.run(["ovs-ofctl", "-O", "OpenFlow13", "del-flows", rack.switch.bridge], environment)
    uuid = system.run(["ovs-vsctl", "get", "bridge", rack.switch.bridge, "controller"], environment).strip("[]\n ")
    target = system.run(["ovs-vsctl", "get", "controller", uuid, "target"], environment).strip('"\n')
    system.run(["ovs-vsctl", "set-controller", rack.switch.bridge, "tcp:127.0.0.1:1"], environment)
    system.run(["ovs-vsctl", "set-controller", rack.switch.bridge, target], environment)
    deadline = time.monotonic() + 10
    flows = 0
    while flows != before["rules"] and time.monotonic() < deadline:
        listed = system.run(["ovs-ofctl", "-O", "OpenFlow13", "dump-flows", rack.switch.bridge], environment)
        flows = listed.count("priority=")
        time.sleep(0.1)
    assert flows == before["rules"]
    assert rack.steering() == before["instances"]
    assert_steered(rack, [0, 1, 2, 3, 4, 5])
