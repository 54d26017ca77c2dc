"""Which port does a packet leave the switch by? A pure function from the steering state to OpenFlow rules.

One packet and its answer, partition 13 in the charge of nf2 (the client's port, or where there are no ports the client's
address, names the partition in both directions, so both meet the same instance):

    10.0.0.1:26 -> 10.128.0.1:80    in at client        tcp_src & 0x1fe = 26   out at nf2.inside
                                    in at nf2.outside                          out at server
    10.128.0.1:80 -> 10.0.0.1:26    in at server        tcp_dst & 0x1fe = 26   out at nf2.outside
                                    in at nf2.inside                           out at client

Where the return path differs (asymmetric paths), only the two outputs of the answer change: in at server, out at nf1.outside,
in at nf1.inside, out at client.

Rules match whole frames of header bits only, so every later packet of a partition is decided without the controller. A later
fragment carries no ports, so the port rules ask for "not a fragment" and everything else goes by the address: all fragments of a
datagram alike (the instance that saw the first one knows whose the later ones are), ICMP, any other IP protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PARTITIONS = 256
PORT_MASK = 0x1FE
"""Bit 0 of the port is left out: Linux hands out even ports first."""
ADDRESS_MASK = 0xFF
IPV4, ARP = 0x0800, 0x0806
TCP, UDP = 6, 17
ANY_FRAGMENT = 0x01
"""NXM_NX_IP_FRAG: bit 0 says fragment, bit 1 says not the first one (ovs-fields(7), nw_frag)."""
BY_PORT, BY_ADDRESS, DIRECT, REFUSED = 400, 300, 200, 0
"""Priorities. REFUSED is the table-miss rule: what nothing else matched is dropped and counted there."""


@dataclass(frozen=True)
class Rule:
    """match: OpenFlow match fields by their OXM names, (value, mask) where masked. output: port number, None drops."""

    priority: int
    match: tuple[tuple[str, Any], ...]
    output: int | None

    def __str__(self) -> str:
        fields = ",".join(f"{name}={'/'.join(map(str, value)) if isinstance(value, tuple) else value}"
                          for name, value in self.match)  # fmt: skip
        return f"priority={self.priority},{fields} -> {'drop' if self.output is None else self.output}"


@dataclass(frozen=True)
class Ports:
    """The switch's ports by what is plugged in. instances: name -> (inside, outside). storage: port -> MAC address."""

    client: int
    server: int
    instances: Mapping[str, tuple[int, int]]
    storage: Mapping[int, str]

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Ports:
        """Return the ports a topology file names."""
        return Ports(
            int(data["client"]),
            int(data["server"]),
            {name: (int(inside), int(outside)) for name, (inside, outside) in data["instances"].items()},
            {int(port): str(mac) for port, mac in data["storage"].items()},
        )


def partition_rules(ports: Ports, partition: int, forward: str, back: str) -> list[Rule]:
    """Return the 6 rules that steer one partition: what the client sends to instance `forward`, the answers to `back`.

    Rules for other instances have equal matches: they replace.
    """
    inside, outside = ports.instances[forward][0], ports.instances[back][1]
    rules = []
    for port, side, address, output in ((ports.client, "src", "ipv4_src", inside), (ports.server, "dst", "ipv4_dst", outside)):
        for protocol, name in ((TCP, "tcp"), (UDP, "udp")):
            match = (("in_port", port), ("eth_type", IPV4), ("ip_proto", protocol), ("ip_frag", (0, ANY_FRAGMENT)),
                     (f"{name}_{side}", (partition << 1, PORT_MASK)))  # fmt: skip
            rules.append(Rule(BY_PORT, match, output))
        rules.append(Rule(BY_ADDRESS, (("in_port", port), ("eth_type", IPV4), (address, (partition, ADDRESS_MASK))), output))
    return rules


def fixed_rules(ports: Ports) -> list[Rule]:
    """Return the rules that do not depend on the steering: leaving an instance, ARP, the storage network, the rest dropped."""
    rules = []
    for inside, outside in ports.instances.values():
        rules.append(Rule(DIRECT, (("in_port", outside), ("eth_type", IPV4)), ports.server))
        rules.append(Rule(DIRECT, (("in_port", inside), ("eth_type", IPV4)), ports.client))
    for here, there in ((ports.client, ports.server), (ports.server, ports.client)):
        rules.append(Rule(DIRECT, (("in_port", here), ("eth_type", ARP)), there))
    for here in ports.storage:
        for there, mac in ports.storage.items():
            if here != there:
                rules.append(Rule(DIRECT, (("in_port", here), ("eth_dst", mac)), there))
    rules.append(Rule(REFUSED, (), None))
    return rules


def all_rules(ports: Ports, forward: Sequence[str], back: Sequence[str]) -> list[Rule]:
    """Return every rule of a switch that steers partition p to `forward[p]`, and its answers to `back[p]`."""
    rules = fixed_rules(ports)
    for partition, (out, home) in enumerate(zip(forward, back, strict=True)):
        rules += partition_rules(ports, partition, out, home)
    return rules


def evenly(names: Iterable[str]) -> list[str]:
    """Return the steering at the start: partitions dealt to the instances in turn."""
    dealt = sorted(names)
    return [dealt[partition % len(dealt)] for partition in range(PARTITIONS)]


def steered(instances: Sequence[str], partitions: Any, instance: Any, known: Iterable[str]) -> list[str]:
    """Return the steering after a command. Raises ValueError with the reason when the command is wrong."""
    valid = sorted(known)
    if instance not in valid:
        raise ValueError(f"unknown instance {instance!r}; valid are {', '.join(valid)}")
    if not isinstance(partitions, list) or not partitions:
        raise ValueError("partitions must be a list of numbers, not empty")
    for partition in partitions:
        if isinstance(partition, bool) or not isinstance(partition, int) or not 0 <= partition < PARTITIONS:
            raise ValueError(f"partition {partition!r} is not one of 0 to {PARTITIONS - 1}")
    changed = list(instances)
    for partition in partitions:
        changed[partition] = instance
    return changed
