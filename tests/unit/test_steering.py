"""Do the rules send both directions of a flow to one instance, by port or, without ports, by address?"""

from collections.abc import Callable

import pytest

from topologies.controller import steering
from topologies.controller.steering import ARP, ICMPV6, IPV4, IPV6, TCP, UDP, Ports, Rule

PORTS = Ports(client=1, server=2, instances={"nf1": (3, 4), "nf2": (6, 7)},
              storage={5: "02:00:00:00:04:01", 8: "02:00:00:00:07:01", 9: "02:00:00:00:08:01"})  # fmt: skip

ONE_STAGE = [["nf1", "nf2"]]


def matches(rule: Rule, packet: dict) -> bool:
    """Match as the OpenFlow specification says: every field present and equal under its mask."""
    for name, wanted in rule.match:
        if name not in packet:
            return False
        if isinstance(wanted, tuple):
            if packet[name] & wanted[1] != wanted[0]:
                return False
        elif packet[name] != wanted:
            return False
    return True


_indices: dict[int, tuple[list[Rule], dict[tuple, list[Rule]]]] = {}


def candidates(rules: list[Rule], packet: dict) -> list[Rule]:
    """Return the rules that no other port, and no other type of frame at this port, rules out, of thousands."""
    indexed, found = _indices.get(id(rules), ([], {}))
    if indexed is not rules:
        found = {}
        for rule in rules:
            fields = dict(rule.match)
            found.setdefault((fields.get("in_port"), fields.get("eth_type")), []).append(rule)
        _indices[id(rules)] = rules, found
    keys = {(port, kind) for port in (packet["in_port"], None) for kind in (packet["eth_type"], None)}
    return [rule for key in keys for rule in found.get(key, [])]


def output(rules: list[Rule], packet: dict) -> int | None:
    """Return where a switch with these rules sends a packet; two rules of one priority must not both match."""
    hits = [rule for rule in candidates(rules, packet) if matches(rule, packet)]
    highest = max(rule.priority for rule in hits)
    best = [rule for rule in hits if rule.priority == highest]
    assert len(best) == 1, [str(rule) for rule in best]
    return best[0].output


def ip(
    in_port: int, client: int, server: int, protocol: int, client_port: int = 0, fragment: int = 0, version: int = IPV4
) -> dict:
    """Return the fields a switch sees of an IP packet, from the client when it comes in at the client's port.

    fragment: as Open vSwitch says it: 0 none, 1 a first one, 3 a later one.
    """
    source, target = ("src", "dst") if in_port == PORTS.client else ("dst", "src")
    name = "ipv4" if version == IPV4 else "ipv6"
    packet = {"in_port": in_port, "eth_type": version, "ip_proto": protocol, "ip_frag": fragment,
              f"{name}_{source}": client, f"{name}_{target}": server}  # fmt: skip
    if protocol in (TCP, UDP):
        name = "tcp" if protocol == TCP else "udp"
        packet[f"{name}_{source}"] = 0 if fragment == 3 else client_port
        packet[f"{name}_{target}"] = 0 if fragment == 3 else 80
    return packet


@pytest.fixture(scope="module")
def rules() -> list[Rule]:
    ways = steering.evenly(ONE_STAGE)
    return steering.all_rules(PORTS, ONE_STAGE, ways, ways)


@pytest.mark.parametrize(("version", "high"), [(IPV4, 0), (IPV6, 0xFD << 120)])
def test_every_partition_meets_one_instance_in_both_directions(rules: list[Rule], version: int, high: int) -> None:
    server = high | 0x0A800001
    ways = steering.evenly(ONE_STAGE)
    for partition in range(steering.PARTITIONS):
        inside, outside = PORTS.instances[ways[partition][0]]
        for protocol in (TCP, UDP):
            for low_bit in (0, 1):
                port = 0xC000 | partition << 1 | low_bit
                assert output(rules, ip(1, high | 0x0A000001, server, protocol, port, version=version)) == inside
                assert output(rules, ip(2, high | 0x0A000001, server, protocol, port, version=version)) == outside
        client = high | 0x0A000000 | partition
        for protocol, fragment in ((1, 0), (58, 0), (47, 0), (TCP, 1), (TCP, 3), (UDP, 1), (UDP, 3)):
            assert output(rules, ip(1, client, server, protocol, 5, fragment, version)) == inside
            assert output(rules, ip(2, client, server, protocol, 5, fragment, version)) == outside


def test_what_leaves_an_instance_goes_straight_on(rules: list[Rule]) -> None:
    for inside, outside in PORTS.instances.values():
        for version in (IPV4, IPV6):
            assert output(rules, {"in_port": outside, "eth_type": version}) == PORTS.server
            assert output(rules, {"in_port": inside, "eth_type": version}) == PORTS.client


def test_arp_passes_between_client_and_server_only(rules: list[Rule]) -> None:
    assert output(rules, {"in_port": 1, "eth_type": ARP}) == 2
    assert output(rules, {"in_port": 2, "eth_type": ARP}) == 1
    assert output(rules, {"in_port": 3, "eth_type": ARP}) is None


@pytest.mark.parametrize("kind", [133, 134, 135, 136, 137, 143])
def test_neighbour_discovery_passes_between_client_and_server_as_arp_does(rules: list[Rule], kind: int) -> None:
    for here, there in ((1, 2), (2, 1)):
        packet = ip(here, 0xFE80 << 112 | 1, 0xFF02 << 112 | 1, ICMPV6, version=IPV6) | {"icmpv6_type": kind}
        assert output(rules, packet) == there
        assert output(rules, packet | {"icmpv6_type": 128}) in (3, 4, 6, 7), "an echo is steered"


def test_storage_frames_go_to_their_address_and_nothing_else_passes(rules: list[Rule]) -> None:
    for here in PORTS.storage:
        for there, mac in PORTS.storage.items():
            assert output(rules, {"in_port": here, "eth_type": IPV4, "eth_dst": mac}) == (None if here == there else there)
    assert output(rules, {"in_port": 5, "eth_type": IPV4, "eth_dst": "ff:ff:ff:ff:ff:ff"}) is None
    assert output(rules, {"in_port": 1, "eth_type": 0x88CC}) is None
    assert output(rules, {"in_port": 5, "eth_type": IPV6, "eth_dst": "33:33:00:00:00:01"}) is None


def test_a_move_replaces_exactly_the_rules_of_its_partition() -> None:
    before, after = (steering.partition_rules(PORTS, ONE_STAGE, 13, (name,), (name,)) for name in ("nf1", "nf2"))
    assert [(rule.priority, rule.match) for rule in before] == [(rule.priority, rule.match) for rule in after]
    assert all(old.output != new.output for old, new in zip(before, after, strict=True))
    rules = (steering.partition_rules(PORTS, ONE_STAGE, p, ("nf1",), ("nf1",)) for p in range(256) if p != 13)
    assert {rule.match for others in rules for rule in others}.isdisjoint(rule.match for rule in after)


def test_answers_may_meet_another_instance() -> None:
    forward = steering.evenly(ONE_STAGE)
    back = [("nf2",) if way == ("nf1",) else ("nf1",) for way in forward]
    rules = steering.all_rules(PORTS, ONE_STAGE, forward, back)
    for partition in range(steering.PARTITIONS):
        (inside, _), (_, outside) = PORTS.instances[forward[partition][0]], PORTS.instances[back[partition][0]]
        for protocol in (TCP, UDP):
            assert output(rules, ip(1, 0x0A000001, 0x0A800001, protocol, 0xC000 | partition << 1)) == inside
            assert output(rules, ip(2, 0x0A000001, 0x0A800001, protocol, 0xC000 | partition << 1)) == outside
        for protocol, later in ((1, False), (TCP, True)):
            assert output(rules, ip(1, 0x0A000000 | partition, 0x0A800001, protocol, 5, later)) == inside
            assert output(rules, ip(2, 0x0A000000 | partition, 0x0A800001, protocol, 5, later)) == outside


def test_asymmetric_rules_replace_symmetric_ones_and_only_for_answers() -> None:
    before, after = (steering.partition_rules(PORTS, ONE_STAGE, 13, ("nf1",), (back,)) for back in ("nf1", "nf2"))
    assert [(rule.priority, rule.match) for rule in before] == [(rule.priority, rule.match) for rule in after]
    changed = {dict(old.match)["in_port"] for old, new in zip(before, after, strict=True) if old.output != new.output}
    assert changed == {PORTS.server}


def test_steered_changes_what_it_names_and_not_its_argument() -> None:
    before = steering.evenly(ONE_STAGE)
    after = steering.steered(before, ONE_STAGE, [0, 2], "nf2")
    assert before[0] == before[2] == ("nf1",)
    assert after[0] == after[2] == ("nf2",)
    assert [a == b for a, b in zip(before, after, strict=True)].count(False) == 2


@pytest.mark.parametrize(
    ("partitions", "instance", "reason"),
    [([1], "nf9", "unknown instance 'nf9'; valid are nf1, nf2"), ([], "nf1", "not empty"), (None, "nf1", "must be a list"),
     ([256], "nf1", "partition 256 is not one of 0 to 255"), (["1"], "nf1", "'1'"), ([True], "nf1", "True")],
)  # fmt: skip
def test_a_wrong_command_says_why(partitions: object, instance: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        steering.steered(steering.evenly(ONE_STAGE), ONE_STAGE, partitions, instance)


def test_a_map_is_followed_as_it_names_the_instances() -> None:
    names = ["nf2"] * 200 + ["nf1"] * 56
    assert steering.followed(ONE_STAGE, names) == [(name,) for name in names]


@pytest.mark.parametrize(
    ("stages", "instances", "reason"),
    [(ONE_STAGE, None, "list of 256 names"), (ONE_STAGE, ["nf1"] * 255, "list of 256 names"),
     (ONE_STAGE, ["nf1"] * 255 + ["nf9"], "partition 255: unknown instance 'nf9'; valid are nf1, nf2"),
     (ONE_STAGE, [["nf1"]] * 256, "partition 0: unknown instance"), (ONE_STAGE, [None] * 256, "unknown instance None"),
     ([["nf1"], ["nf2"]], ["nf1"] * 256, "has 2 stages")],
)  # fmt: skip
def test_a_wrong_map_says_why(stages: list[list[str]], instances: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        steering.followed(stages, instances)


# chains over hosts

FOUR = Ports(client=1, server=2, instances={f"nf{n}": (10 * n, 10 * n + 1) for n in range(1, 5)}, storage={},
             others={5: "02:00:00:00:02:01"})  # fmt: skip
CHAINS = ([["nf1"], ["nf2"]], [["nf1"], ["nf2"], ["nf3"]], [["nf1", "nf2"], ["nf3", "nf4"]], [["nf1", "nf2", "nf3"], ["nf4"]])


def walk(rules: list[Rule], start: int, seen: Callable[[int], dict]) -> list[int | None]:
    """Return the ports a packet leaves the switch by until it is at an end: an instance sends on what it gets on its other side.

    seen: the packet's fields as it comes in at a port, so that a function may have changed them on the way.
    """
    at: dict[int, list[Rule]] = {}
    for rule in rules:
        at.setdefault(dict(rule.match).get("in_port", 0), []).append(rule)
    other = {port: ends[1 - side] for ends in FOUR.instances.values() for side, port in enumerate(ends)}
    ports: list[int | None] = [start]
    while len(ports) == 1 or ports[-1] in other:
        assert len(ports) < 10, f"a loop: {ports}"
        here = other.get(ports[-1] or 0, start)
        ports.append(output(at[here] + at[0], seen(here)))
    return ports[1:]


def fields(from_client: bool, partition: int, protocol: int, fragment: int = 0) -> Callable[[int], dict]:
    """Return a packet of a partition: by its client's port, or where it has none by its client's address."""
    has_ports = protocol in (TCP, UDP) and not fragment
    client, port = 0x0A000000 | (0x55 if has_ports else partition), 0xC000 | (partition if has_ports else 0x33) << 1
    packet = ip(PORTS.client if from_client else PORTS.server, client, 0x0A800001, protocol, port, fragment)
    return lambda in_port: packet | {"in_port": in_port}


@pytest.mark.parametrize("stages", CHAINS, ids=str)
def test_packets_meet_an_instance_of_each_stage_and_answers_the_same_in_the_opposite_order(stages: list[list[str]]) -> None:
    ways = steering.evenly(stages)
    rules = steering.all_rules(FOUR, stages, ways, ways)
    for partition, way in list(enumerate(ways))[::15]:
        assert [name in stage for name, stage in zip(way, stages, strict=True)] == [True] * len(stages)
        outward = [FOUR.instances[name][0] for name in way]
        inward = [FOUR.instances[name][1] for name in reversed(way)]
        for protocol, fragment in ((TCP, 0), (UDP, 0), (1, 0), (47, 0), (TCP, 1), (UDP, 3)):
            assert walk(rules, FOUR.client, fields(True, partition, protocol, fragment)) == [*outward, FOUR.server]
            for server in (FOUR.server, *FOUR.others):
                assert walk(rules, server, fields(False, partition, protocol, fragment)) == [*inward, FOUR.client]


def test_every_hop_goes_by_the_partition_a_packet_has_there() -> None:
    """A NAT translates pings from 10.x.x.4 to an address of partition 1: between the stages they are of partition 4, the answer
    meets the NAT's other instance first, and comes to the firewall's that asked."""
    stages = [["nf1", "nf2"], ["nf3", "nf4"]]
    ways = steering.evenly(stages)
    rules = steering.all_rules(FOUR, stages, ways, ways)
    before, after = (ip(PORTS.server, 0x0A000000 | partition, 0x0A800001, 1) for partition in (4, 1))

    def answer(in_port: int) -> dict:
        return (after if in_port == FOUR.server else before) | {"in_port": in_port}

    assert walk(rules, FOUR.client, fields(True, 4, 1)) == [10, 30, FOUR.server]
    assert walk(rules, FOUR.server, answer) == [41, 11, FOUR.client]


def test_a_move_in_one_stage_leaves_the_other_alone() -> None:
    stages = [["nf1", "nf2"], ["nf3", "nf4"]]
    before = steering.evenly(stages)
    after = steering.steered(before, stages, [6], "nf4")
    assert (before[6], after[6]) == (("nf1", "nf3"), ("nf1", "nf4"))
    rules = steering.all_rules(FOUR, stages, after, before)
    assert walk(rules, FOUR.client, fields(True, 6, TCP)) == [10, 40, FOUR.server]
    assert walk(rules, FOUR.server, fields(False, 6, TCP)) == [31, 11, FOUR.client]
    old, new = (steering.partition_rules(FOUR, stages, 6, ways[6], ways[6]) for ways in (before, after))
    assert [(rule.priority, rule.match) for rule in old] == [(rule.priority, rule.match) for rule in new]


def test_frames_leave_for_the_server_they_are_addressed_to() -> None:
    stages = [["nf1"], ["nf2"]]
    ways = steering.evenly(stages)
    rules = steering.all_rules(FOUR, stages, ways, ways)
    packet = fields(True, 9, TCP)(21)
    assert output(rules, packet | {"eth_dst": "02:00:00:00:02:01"}) == 5
    assert output(rules, packet | {"eth_dst": "02:00:00:00:01:01"}) == FOUR.server
    assert output(rules, {**packet, "in_port": 11, "eth_dst": "02:00:00:00:02:01"}) == 20, "not before it has met the last stage"


@pytest.mark.parametrize(
    ("stages", "reason"),
    [(None, "stages=None"), ([], "stages="), ([["nf1"], []], "none empty"), (["nf1"], "none empty"),
     ([["nf1"], ["nf9"]], "unknown instance 'nf9'; valid are nf1"), ([["nf1"], ["nf2", "nf1"]], "'nf1' is in 2 places")],
)  # fmt: skip
def test_wrong_stages_are_refused(stages: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        steering.checked_stages(stages, FOUR.instances)
