"""Do the rules send both directions of a flow to one instance, by port or, without ports, by address?"""

import pytest

from topologies.controller import steering
from topologies.controller.steering import ARP, IPV4, TCP, UDP, Ports, Rule

PORTS = Ports(client=1, server=2, instances={"nf1": (3, 4), "nf2": (6, 7)},
              storage={5: "02:00:00:00:04:01", 8: "02:00:00:00:07:01", 9: "02:00:00:00:08:01"})  # fmt: skip


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


def output(rules: list[Rule], packet: dict) -> int | None:
    """Return where a switch with these rules sends a packet; two rules of one priority must not both match."""
    hits = [rule for rule in rules if matches(rule, packet)]
    highest = max(rule.priority for rule in hits)
    best = [rule for rule in hits if rule.priority == highest]
    assert len(best) == 1, [str(rule) for rule in best]
    return best[0].output


def ip(in_port: int, client: int, server: int, protocol: int, client_port: int = 0, fragment: int = 0) -> dict:
    """Return the fields a switch sees of an IPv4 packet, from the client when it comes in at the client's port.

    fragment: as Open vSwitch says it: 0 none, 1 a first one, 3 a later one.
    """
    source, target = ("src", "dst") if in_port == PORTS.client else ("dst", "src")
    packet = {"in_port": in_port, "eth_type": IPV4, "ip_proto": protocol, "ip_frag": fragment,
              f"ipv4_{source}": client, f"ipv4_{target}": server}  # fmt: skip
    if protocol in (TCP, UDP):
        name = "tcp" if protocol == TCP else "udp"
        packet[f"{name}_{source}"] = 0 if fragment == 3 else client_port
        packet[f"{name}_{target}"] = 0 if fragment == 3 else 80
    return packet


@pytest.fixture(scope="module")
def rules() -> list[Rule]:
    instances = steering.evenly(PORTS.instances)
    return steering.all_rules(PORTS, instances, instances)


def test_every_partition_meets_one_instance_in_both_directions(rules: list[Rule]) -> None:
    instances = steering.evenly(PORTS.instances)
    for partition in range(steering.PARTITIONS):
        inside, outside = PORTS.instances[instances[partition]]
        for protocol in (TCP, UDP):
            for low_bit in (0, 1):
                port = 0xC000 | partition << 1 | low_bit
                assert output(rules, ip(1, 0x0A000001, 0x0A800001, protocol, port)) == inside
                assert output(rules, ip(2, 0x0A000001, 0x0A800001, protocol, port)) == outside
        client = 0x0A000000 | partition
        for protocol, fragment in ((1, 0), (47, 0), (TCP, 1), (TCP, 3), (UDP, 1), (UDP, 3)):
            assert output(rules, ip(1, client, 0x0A800001, protocol, 5, fragment)) == inside
            assert output(rules, ip(2, client, 0x0A800001, protocol, 5, fragment)) == outside


def test_what_leaves_an_instance_goes_straight_on(rules: list[Rule]) -> None:
    for inside, outside in PORTS.instances.values():
        assert output(rules, {"in_port": outside, "eth_type": IPV4}) == PORTS.server
        assert output(rules, {"in_port": inside, "eth_type": IPV4}) == PORTS.client


def test_arp_passes_between_client_and_server_only(rules: list[Rule]) -> None:
    assert output(rules, {"in_port": 1, "eth_type": ARP}) == 2
    assert output(rules, {"in_port": 2, "eth_type": ARP}) == 1
    assert output(rules, {"in_port": 3, "eth_type": ARP}) is None


def test_storage_frames_go_to_their_address_and_nothing_else_passes(rules: list[Rule]) -> None:
    for here in PORTS.storage:
        for there, mac in PORTS.storage.items():
            assert output(rules, {"in_port": here, "eth_type": IPV4, "eth_dst": mac}) == (None if here == there else there)
    assert output(rules, {"in_port": 5, "eth_type": IPV4, "eth_dst": "ff:ff:ff:ff:ff:ff"}) is None
    assert output(rules, {"in_port": 1, "eth_type": 0x86DD}) is None


def test_a_move_replaces_exactly_the_rules_of_its_partition() -> None:
    before, after = (steering.partition_rules(PORTS, 13, name, name) for name in ("nf1", "nf2"))
    assert [(rule.priority, rule.match) for rule in before] == [(rule.priority, rule.match) for rule in after]
    assert all(old.output != new.output for old, new in zip(before, after, strict=True))
    others = {rule.match for p in range(256) if p != 13 for rule in steering.partition_rules(PORTS, p, "nf1", "nf1")}
    assert others.isdisjoint(rule.match for rule in after)


def test_answers_may_meet_another_instance() -> None:
    forward = steering.evenly(PORTS.instances)
    back = ["nf2" if name == "nf1" else "nf1" for name in forward]
    rules = steering.all_rules(PORTS, forward, back)
    for partition in range(steering.PARTITIONS):
        (inside, _), (_, outside) = PORTS.instances[forward[partition]], PORTS.instances[back[partition]]
        for protocol in (TCP, UDP):
            assert output(rules, ip(1, 0x0A000001, 0x0A800001, protocol, 0xC000 | partition << 1)) == inside
            assert output(rules, ip(2, 0x0A000001, 0x0A800001, protocol, 0xC000 | partition << 1)) == outside
        for protocol, later in ((1, False), (TCP, True)):
            assert output(rules, ip(1, 0x0A000000 | partition, 0x0A800001, protocol, 5, later)) == inside
            assert output(rules, ip(2, 0x0A000000 | partition, 0x0A800001, protocol, 5, later)) == outside


def test_asymmetric_rules_replace_symmetric_ones_and_only_for_answers() -> None:
    before, after = (steering.partition_rules(PORTS, 13, "nf1", back) for back in ("nf1", "nf2"))
    assert [(rule.priority, rule.match) for rule in before] == [(rule.priority, rule.match) for rule in after]
    changed = {dict(old.match)["in_port"] for old, new in zip(before, after, strict=True) if old.output != new.output}
    assert changed == {PORTS.server}


def test_steered_changes_what_it_names_and_not_its_argument() -> None:
    before = steering.evenly(PORTS.instances)
    after = steering.steered(before, [0, 2], "nf2", PORTS.instances)
    assert before[0] == before[2] == "nf1"
    assert after[0] == after[2] == "nf2"
    assert [a == b for a, b in zip(before, after, strict=True)].count(False) == 2


@pytest.mark.parametrize(
    ("partitions", "instance", "reason"),
    [([1], "nf9", "unknown instance 'nf9'; valid are nf1, nf2"), ([], "nf1", "not empty"), (None, "nf1", "must be a list"),
     ([256], "nf1", "partition 256 is not one of 0 to 255"), (["1"], "nf1", "'1'"), ([True], "nf1", "True")],
)  # fmt: skip
def test_a_wrong_command_says_why(partitions: object, instance: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        steering.steered(steering.evenly(PORTS.instances), partitions, instance, PORTS.instances)
