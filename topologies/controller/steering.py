"""Which port does a packet leave the switch by? A pure function from the steering state to OpenFlow rules.

One packet and its answer, partition 13 in the charge of nf2 (the client's port, or where there are no ports the client's
address, names the partition in both directions, so both meet the same instance):

    10.0.0.1:26 -> 10.128.0.1:80    in at client        tcp_src & 0x1fe = 26   out at nf2.inside
                                    in at nf2.outside                          out at server
    10.128.0.1:80 -> 10.0.0.1:26    in at server        tcp_dst & 0x1fe = 26   out at nf2.outside
                                    in at nf2.inside                           out at client

Where the return path differs (asymmetric paths), only the two outputs of the answer change: in at server, out at nf1.outside,
in at nf1.inside, out at client.

A chain spread over hosts has a stage for each: what leaves an instance of one stage is steered, by the same bits, to an instance
of the next, and answers through the stages in the opposite order. The bits are looked at anew at every hop, so functions that
translate ports within their partition (as `nat` does) get their answers back; a stage may have several instances.

    client -> nf1.inside    nf1.outside -> nf2.inside    nf2.outside -> server
    client <- nf1.inside    nf1.outside <- nf2.inside    nf2.outside <- server

Of several servers, a frame that has left the last stage gets to the one whose MAC address it has, and to the first if to none.

A hop's rules for one partition name a *group*, and the group says where packets go: a move changes two groups of a stage, not
twelve rules. (Half of the partitions: 256 changes in 2 ms, in place of 1,536 in 10.)

Rules match whole frames of header bits only, so every later packet of a partition is decided without the controller. A later
fragment carries no ports, so the port rules ask for "not a fragment" and everything else goes by the address: all fragments of a
datagram alike (the instance that saw the first one knows whose the later ones are), ICMP, any other IP protocol. IPv6 has rules
of its own that say the same. What finds neighbours (ARP, IPv6's neighbour discovery) passes between client and server directly.
An NF process' echoes go back to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datastore.base.partitioning import PARTITIONS, PORT_MASK

ADDRESS_MASK = 0xFF
IPV4, ARP, IPV6, ECHO = 0x0800, 0x0806, 0x86DD, 0x88B5
"""ECHO: what an NF process sends to know what is under way (`nfs/dataplane/echo.py`); it goes back where it came from."""
IN_PORT = 0xFFFFFFF8
"""OFPP_IN_PORT: a packet leaves by its own port only when told so."""
TCP, UDP, ICMPV6 = 6, 17, 58
ON_LINK_TYPES = (130, 131, 132, 133, 134, 135, 136, 137, 143)
"""ICMPv6 types of neighbour discovery (RFC 4861) and of multicast listeners (RFC 2710, RFC 3810)."""
ANY_FRAGMENT = 0x01
"""NXM_NX_IP_FRAG: bit 0 says fragment, bit 1 says not the first one (ovs-fields(7), nw_frag)."""
ON_LINK, BY_PORT, BY_ADDRESS, BY_MAC, DIRECT, REFUSED = 500, 400, 300, 250, 200, 0
"""Priorities. REFUSED is the table-miss rule: what nothing else matched is dropped and counted there."""


@dataclass(frozen=True)
class Rule:
    """match: OpenFlow match fields by their OXM names, (value, mask) where masked. output: port number, None drops. group: which
    says so, None: the rule itself does."""

    priority: int
    match: tuple[tuple[str, Any], ...]
    output: int | None
    group: int | None = None

    def __str__(self) -> str:
        fields = ",".join(f"{name}={'/'.join(map(str, value)) if isinstance(value, tuple) else value}"
                          for name, value in self.match)  # fmt: skip
        return f"priority={self.priority},{fields} -> {'drop' if self.output is None else self.output}"


@dataclass(frozen=True)
class Ports:
    """The switch's ports by what is plugged in. instances: name -> (inside, outside). storage, others: port -> MAC address.

    others: servers besides the first.
    """

    client: int
    server: int
    instances: Mapping[str, tuple[int, int]]
    storage: Mapping[int, str]
    others: Mapping[int, str] = field(default_factory=dict)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Ports:
        """Return the ports a topology file names."""
        return Ports(
            int(data["client"]),
            int(data["server"]),
            {name: (int(inside), int(outside)) for name, (inside, outside) in data["instances"].items()},
            *({int(port): str(mac) for port, mac in data[name].items()} for name in ("storage", "others")),
        )


Stages = Sequence[Sequence[str]]
"""The instances of each stage, the innermost stage first; every instance is in one."""
Way = tuple[str, ...]
"""The instances, one of each stage from inside to outside, that a partition's packets meet."""


@dataclass(frozen=True)
class Hop:
    """Where packets of one partition are steered: those that come in at `inputs`, from the client or to it, leave at `output`."""

    group: int
    inputs: Sequence[int]
    from_client: bool
    output: int


def hops(ports: Ports, stages: Stages, partition: int, forward: Way, back: Way) -> list[Hop]:
    """Return the hops of a partition whose packets go way `forward`, and the answers way `back`."""
    found: list[Hop] = []
    first = 1 + partition * 2 * len(stages)
    outward, inward = [ports.client], [ports.server, *ports.others]
    for stage, instance in zip(stages, forward, strict=True):
        found.append(Hop(first + len(found), outward, True, ports.instances[instance][0]))
        outward = [ports.instances[name][1] for name in stage]
    for stage, instance in zip(reversed(stages), reversed(back), strict=True):
        found.append(Hop(first + len(found), inward, False, ports.instances[instance][1]))
        inward = [ports.instances[name][0] for name in stage]
    return found


def partition_rules(ports: Ports, stages: Stages, partition: int, forward: Way, back: Way) -> list[Rule]:
    """Return the rules that steer one partition, 6 for each input of a hop (`hops`).

    Rules for other ways through the same stages have equal matches and groups: those alone lead elsewhere.
    """
    rules = []
    for hop in hops(ports, stages, partition, forward, back):
        side = "src" if hop.from_client else "dst"
        for port, version in itertools.product(hop.inputs, (IPV4, IPV6)):
            packets = (("in_port", port), ("eth_type", version))
            for protocol, name in ((TCP, "tcp"), (UDP, "udp")):
                match = (*packets, ("ip_proto", protocol), ("ip_frag", (0, ANY_FRAGMENT)),
                         (f"{name}_{side}", (partition << 1, PORT_MASK)))  # fmt: skip
                rules.append(Rule(BY_PORT, match, hop.output, hop.group))
            address = f"ipv4_{side}" if version == IPV4 else f"ipv6_{side}"
            rules.append(Rule(BY_ADDRESS, (*packets, (address, (partition, ADDRESS_MASK))), hop.output, hop.group))
    return rules


def fixed_rules(ports: Ports, stages: Stages) -> list[Rule]:
    """Return the rules that do not depend on the steering: leaving the last stage, finding neighbours, the storage network, and
    that the rest is dropped."""
    rules = []
    for version in (IPV4, IPV6):
        for _, outside in (ports.instances[name] for name in stages[-1]):
            rules.append(Rule(DIRECT, (("in_port", outside), ("eth_type", version)), ports.server))
            for server, mac in ports.others.items():
                rules.append(Rule(BY_MAC, (("in_port", outside), ("eth_dst", mac), ("eth_type", version)), server))
        for inside, _ in (ports.instances[name] for name in stages[0]):
            rules.append(Rule(DIRECT, (("in_port", inside), ("eth_type", version)), ports.client))
    for here, there in ((ports.client, ports.server), (ports.server, ports.client)):
        rules.append(Rule(DIRECT, (("in_port", here), ("eth_type", ARP)), there))
        for kind in ON_LINK_TYPES:
            match = (("in_port", here), ("eth_type", IPV6), ("ip_proto", ICMPV6), ("icmpv6_type", kind))
            rules.append(Rule(ON_LINK, match, there))
    for port in itertools.chain.from_iterable(ports.instances.values()):
        rules.append(Rule(DIRECT, (("in_port", port), ("eth_type", ECHO)), IN_PORT))
    for here in ports.storage:
        for there, mac in ports.storage.items():
            if here != there:
                rules.append(Rule(DIRECT, (("in_port", here), ("eth_dst", mac)), there))
    rules.append(Rule(REFUSED, (), None))
    return rules


def all_rules(ports: Ports, stages: Stages, forward: Sequence[Way], back: Sequence[Way]) -> list[Rule]:
    """Return every rule of a switch that steers partition p the way `forward[p]`, and its answers `back[p]`."""
    rules = fixed_rules(ports, stages)
    for partition, (out, home) in enumerate(zip(forward, back, strict=True)):
        rules += partition_rules(ports, stages, partition, out, home)
    return rules


def evenly(stages: Stages) -> list[Way]:
    """Return the steering at the start: partitions dealt to the instances of each stage in turn."""
    dealt = [sorted(stage) for stage in stages]
    return [tuple(stage[partition % len(stage)] for stage in dealt) for partition in range(PARTITIONS)]


def checked_stages(stages: Any, known: Iterable[str]) -> list[list[str]]:
    """Return stages as a command names them. Raises ValueError unless each has an instance and none is in two."""
    right = isinstance(stages, list) and stages and all(isinstance(stage, list) and stage for stage in stages)
    if not right:
        raise ValueError(f"stages={stages!r}: a list of the instances of each stage, none empty, is wanted")
    names = [name for stage in stages for name in stage]
    for name in names:
        _check_instance(name, known)
        if names.count(name) > 1:
            raise ValueError(f"instance {name!r} is in {names.count(name)} places of the chain; it has one pair of ports")
    return [list(stage) for stage in stages]


def _check_instance(instance: Any, known: Iterable[str]) -> None:
    valid = sorted(known)
    if instance not in valid:
        raise ValueError(f"unknown instance {instance!r}; valid are {', '.join(valid)}")


def followed(stages: Stages, instances: Any) -> list[Way]:
    """Return the ways of a map as a command gives it, the instance of each partition. Raises ValueError when it is wrong."""
    if len(stages) != 1:
        raise ValueError(f"a map names one instance a partition; this chain has {len(stages)} stages")
    if not isinstance(instances, list) or len(instances) != PARTITIONS:
        raise ValueError(f"instances must be a list of {PARTITIONS} names, one a partition")
    for number, instance in enumerate(instances):
        if instance not in stages[0]:
            raise ValueError(f"partition {number}: unknown instance {instance!r}; valid are {', '.join(sorted(stages[0]))}")
    return [(instance,) for instance in instances]


def steered(ways: Sequence[Way], stages: Stages, partitions: Any, instance: Any) -> list[Way]:
    """Return the ways after a command: those of `partitions` by `instance` in its stage.

    Raises ValueError with the reason when the command is wrong.
    """
    _check_instance(instance, (name for stage in stages for name in stage))
    if not isinstance(partitions, list) or not partitions:
        raise ValueError("partitions must be a list of numbers, not empty")
    for partition in partitions:
        if isinstance(partition, bool) or not isinstance(partition, int) or not 0 <= partition < PARTITIONS:
            raise ValueError(f"partition {partition!r} is not one of 0 to {PARTITIONS - 1}")
    at = next(number for number, stage in enumerate(stages) if instance in stage)
    changed = list(ways)
    for partition in partitions:
        changed[partition] = (*changed[partition][:at], instance, *changed[partition][at + 1 :])
    return changed
