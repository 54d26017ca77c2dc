"""Which packets were sent, which have left, and what must hold of them.

    order         no packet of a flow leaves after a later one
    once          each number that `counted` gave is given once; a packet that had left before another came has the lower one
    conservation  a flow's record has counted at least every packet that left, and at most every packet that came
    claims        where flows have names (`claimed.py`): no two flows have the same, and a flow keeps its own

A chain of fetch-and-add on one word is linearizable exactly if the second holds: sorted by number, no later one may have been
over before an earlier one began (M. Herlihy, J. Wing: Linearizability, TOPLAS 1990). So it is checked without a search.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

CLIENT, SERVER = 0x0A000107, 0x0A800001
IP_AT, SOURCE_AT, DESTINATION_AT, PAYLOAD_AT = 14, 26, 30, 42
PAYLOAD = struct.Struct(">HI")
FIRST_PORT, ANOTHER_FLOW = 4096, 512
"""Source ports: bits 1 to 8 name the partition (`datastore/store/partitions.py`); flows of one differ in higher bits."""


def checksum(header: bytes) -> int:
    """Return the checksum of an IPv4 header whose own is zero (RFC 1071)."""
    total = sum(struct.unpack(f">{len(header) // 2}H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


@dataclass
class Flow:
    """What is known of one flow. passed: number given, when the packet came, when it left."""

    number: int
    partition: int
    port: int
    sent: int = 0
    came: int = 0
    last_left: int = 0
    last_way: str = ""
    name: int = 0
    passed: list[tuple[int, int, int]] = field(default_factory=list)
    came_ns: dict[int, int] = field(default_factory=dict)

    def frame(self) -> bytes:
        """Return the next packet: UDP without a checksum, its flow and number in the payload."""
        self.sent += 1
        payload = PAYLOAD.pack(self.number, self.sent)
        header = struct.pack(">BBHHHBBHII", 0x45, 0, 28 + len(payload), 0, 0, 64, 17, 0, CLIENT, SERVER)
        header = header[:10] + struct.pack(">H", checksum(header)) + header[12:]
        return b"\x02" * 12 + b"\x08\x00" + header + struct.pack(">HHHH", self.port, 80, 8 + len(payload), 0) + payload


class Packets:
    """All flows of a world."""

    def __init__(self, world: Any, partitions: int, flows: int) -> None:
        self.world = world
        self.flows = [Flow(n, n % partitions, FIRST_PORT + 2 * (n % partitions) + ANOTHER_FLOW * (n // partitions))
                      for n in range(flows)]  # fmt: skip

    def entered(self, instance: Any, frame: bytes) -> None:
        """A packet is in an instance's ring."""
        number, sequence = PAYLOAD.unpack_from(frame, PAYLOAD_AT)
        flow = self.flows[number]
        flow.came += 1
        flow.came_ns[sequence] = self.world.now

    def left(self, instance: Any, frame: bytes) -> None:
        """A packet has left an instance. Raises Violation when a later one of its flow was faster."""
        number, sequence = PAYLOAD.unpack_from(frame, PAYLOAD_AT)
        flow, came_ns = self.flows[number], self.flows[number].came_ns.pop(sequence, None)
        if came_ns is None:
            self.world.violated(f"packet {sequence} of flow {number} left twice, now from {instance.name}")
            return
        flow.passed.append((struct.unpack_from(">I", frame, DESTINATION_AT)[0], came_ns, self.world.now))
        self.world.log(f"{instance.name} lets flow {number} packet {sequence} go as number {flow.passed[-1][0]}")
        if self.world.has_claims:
            self.named(flow, struct.unpack_from(">I", frame, SOURCE_AT)[0])
        if sequence < flow.last_left and not instance.was_troubled(came_ns):
            self.world.violated(f"packet {sequence} of flow {number} (partition {flow.partition}) left {instance.name} "
                                f"{(self.world.now - came_ns) / 1e6:.1f} ms after it came, overtaken by packet "
                                f"{flow.last_left}, which left {flow.last_way}")  # fmt: skip
        if sequence > flow.last_left:
            flow.last_left, flow.last_way = sequence, instance.name

    def named(self, flow: Flow, name: int) -> None:
        """A packet has left with a name. Raises Violation when it is another flow's, or not the one that the flow had."""
        others = [other.number for other in self.flows if other is not flow and other.name == name]
        if others or flow.name not in (0, name):
            self.world.violated(
                f"flow {flow.number}, which had name {flow.name}, leaves as {name}; others of that name: {others}"
            )
        flow.name = name

    def gaps(self, flow: Flow) -> list[tuple[int, int]]:
        """Return when each packet of a flow left, and when the next one did, in nanoseconds."""
        return list(pairwise(sorted(left_ns for _, _, left_ns in flow.passed)))

    def check(self, flow: Flow, counted: int | None) -> None:
        """Raise Violation unless a flow's packets were counted once each. counted: by the record, None: it is lost."""
        passed = sorted(flow.passed)
        numbers = [number for number, _, _ in passed]
        if len(set(numbers)) != len(numbers):
            twice = next(number for number, after in pairwise(numbers) if number == after)
            self.world.violated(f"flow {flow.number}: number {twice} was given twice")
        latest_ns = 0
        for number, came_ns, left_ns in passed:
            if latest_ns > left_ns:
                self.world.violated(f"flow {flow.number}: number {number} had left before a packet came that got a lower one")
            latest_ns = max(latest_ns, came_ns)
        highest = numbers[-1] if numbers else 0
        if counted is not None and not highest <= counted <= flow.came:
            self.world.violated(f"flow {flow.number}: its record has counted {counted} packets; {flow.came} came, the highest "
                                f"number that left is {highest}")  # fmt: skip
