"""Clients whose operations are packets: each packet of a flow is one increment of the number that `counted` keeps for it.

    client  --- packet of flow 3, operation 71 --->  some NF host  --- its destination address is 512 now --->  server
            called 71: add 1                                                       answered 71: the counter is 512

The operation is called before the packet is sent, and answered when the packet has arrived at the other side. A packet that
never arrives is an operation without an answer. Packets of one flow are sent by both sides, so they may meet different NF hosts.

The record that an operation answers is the count. Its version is the count, too: where nothing but increments happens to a
record, both grow by one at a time. The checker then knows at once which operation came before. It takes no more for possible.
"""

from __future__ import annotations

import random
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from datastore.store.operations import ADD
from datastore.store.statuses import OK
from datastore.verification.history import HistoryWriter
from experiments.harness.bench import Bench
from nfs.verification.counted import counted
from nfs.verification.packets import CLIENT, DESTINATION_AT, FIRST_PORT, IP_AT, PAYLOAD_AT, SERVER, checksum
from tests.conftest import wait_for
from tests.rack import ARRIVAL_S, open_sockets

NUMBER_BYTES = 8
ONE = (1).to_bytes(NUMBER_BYTES, "little")
PAYLOAD = struct.Struct(">8sI")
MARK = b"counted!"
SERVER_PORT, UDP = 80, 17
MOST_AT_ONCE = 64
"""Packets under way after which none are sent until some arrive, or are late."""
LATE_S = 0.25
"""After so long a packet keeps no other from being sent. Its operation stays open: it may still arrive."""
LONGEST_PAUSE_S = 0.005
LARGEST_VOLLEY = 12
RECEIVE_BUFFER_BYTES = 8 << 20
SO_RCVBUFFORCE = 33


@dataclass(frozen=True)
class Flow:
    """A flow between client and server, and the key of its record. Its partition comes from its port (`store/partitions.py`)."""

    number: int
    partition: int

    @property
    def port(self) -> int:
        """The client's port."""
        return FIRST_PORT | self.partition << 1

    @cached_property
    def low(self) -> int:
        """The low word of the record's key (`nfs/dataplane/keys.py`)."""
        return self.port << 48 | SERVER_PORT << 32 | UDP << 24 | counted.kind << 16 | self.partition

    @property
    def high(self) -> int:
        """The high word of the record's key."""
        return CLIENT << 32 | SERVER

    def frame(self, from_client: bool, macs: Sequence[str], operation: int) -> bytes:
        """Return a packet of this flow: UDP without a checksum. macs: of client and server."""
        payload = PAYLOAD.pack(MARK, operation)
        ends = ((CLIENT, self.port), (SERVER, SERVER_PORT))
        (source, source_port), (target, target_port) = ends if from_client else ends[::-1]
        header = struct.pack(">BBHHHBBHII", 0x45, 0, 28 + len(payload), 0, 0, 64, UDP, 0, source, target)
        header = header[:10] + struct.pack(">H", checksum(header)) + header[12:]
        link = bytes.fromhex((macs[from_client] + macs[not from_client]).replace(":", "")) + b"\x08\x00"
        return link + header + struct.pack(">HHHH", source_port, target_port, 8 + len(payload), 0) + payload


@dataclass
class Sent:
    """An operation: its row in the history of the side that sent its packet."""

    writer: HistoryWriter
    row: int
    sent_s: float
    has_arrived: bool = False


class PacketClients:
    """Both sides of a rack, which send packets of the same flows and write down which numbers those come back with."""

    def __init__(self, bench: Bench, folder: Path, flows: Sequence[Flow], seed: int) -> None:
        """folder: of the history; each side writes a file there, client 1 and server 2."""
        self.flows, self.chance = flows, random.Random(seed)
        self.sockets, self.macs = open_sockets(bench)
        for opened in self.sockets:
            opened.setblocking(False)
            opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        self.writers = [HistoryWriter(folder, number, NUMBER_BYTES) for number in (1, 2)]
        self.operations: list[Sent] = []
        self.under_way: deque[Sent] = deque()
        self.twice: list[int] = []
        """Operations whose packets arrived more than once."""

    def work(self, stop: threading.Event, least: int) -> None:
        """Send volleys with short pauses, and receive, until told to stop and `least` packets are sent."""
        due_s = time.monotonic()
        while not stop.is_set() or len(self.operations) < least:
            now_s = time.monotonic()
            if now_s < due_s or self._is_full(now_s):
                self.receive(max(0.0005, due_s - now_s))
                continue
            self._volley()
            due_s = now_s + self.chance.uniform(0, LONGEST_PAUSE_S)

    def last(self) -> None:
        """Send one packet of each flow from each side. Raises AssertionError unless all of them arrive."""
        for flow in self.flows:
            for side in (0, 1):
                self.send(flow, side)
        sent = self.operations[-2 * len(self.flows) :]

        def arrived() -> bool:
            self.receive(0.01)
            return all(operation.has_arrived for operation in sent)

        wait_for(arrived, "a packet of each flow arrives, from either side", ARRIVAL_S)

    def close(self) -> None:
        """End the recording."""
        for writer in self.writers:
            writer.close()
        for opened in self.sockets:
            opened.close()

    def send(self, flow: Flow, side: int) -> None:
        """Send a packet of a flow. side: 0 is the client, 1 the server. One that the kernel does not take stays open."""
        operation, writer = len(self.operations), self.writers[side]
        frame = flow.frame(side == 0, self.macs, operation)
        row = writer.call(ADD, flow.low, flow.high, operation, ONE)
        self.operations.append(Sent(writer, row, time.monotonic()))
        self.under_way.append(self.operations[-1])
        with suppress(BlockingIOError):
            self.sockets[side].send(frame)

    def receive(self, longest_s: float) -> None:
        """Take what has arrived; wait for it for a while if nothing has."""
        for opened in select.select(self.sockets, [], [], longest_s)[0]:
            with suppress(BlockingIOError):
                while True:
                    frame, (_, _, kind, *_) = opened.recvfrom(2048)
                    if kind != socket.PACKET_OUTGOING and frame[PAYLOAD_AT : PAYLOAD_AT + len(MARK)] == MARK:
                        self._take(frame)

    def _take(self, frame: bytes) -> None:
        """Write down the answer that a packet brings."""
        operation = PAYLOAD.unpack_from(frame, PAYLOAD_AT)[1]
        (number,) = struct.unpack_from(">I", frame, DESTINATION_AT)
        header = frame[IP_AT : IP_AT + 20]
        assert checksum(header) == 0, f"operation {operation} arrives with a wrong checksum: {frame.hex()}"
        sent = self.operations[operation]
        if sent.has_arrived:
            self.twice.append(operation)
            return
        sent.has_arrived = True
        sent.writer.answer(sent.row, OK, number, number.to_bytes(NUMBER_BYTES, "little"))

    def _volley(self) -> None:
        """Send some packets of one flow, or of all, from one side, or from both."""
        flows = [self.chance.choice(self.flows)] if self.chance.random() < 0.7 else self.flows
        for _ in range(self.chance.randint(1, LARGEST_VOLLEY)):
            self.send(self.chance.choice(flows), self.chance.randrange(2))

    def _is_full(self, now_s: float) -> bool:
        """Tell whether too many packets are under way."""
        while self.under_way and (self.under_way[0].has_arrived or now_s - self.under_way[0].sent_s > LATE_S):
            self.under_way.popleft()
        return len(self.under_way) > MOST_AT_ONCE
