"""The probe of Redis: the same reads as `state_probe.py` makes, in Redis' own protocol, by code compiled as ours is.

A request is prepared bytes ("*2 $3 GET $16 <key>", RESP2), an answer has a known length ("$32 <value>"), so the client side
costs next to nothing and what is measured is the server and the path.
"""

from __future__ import annotations

import socket
import time
from typing import Any

import numpy as np
import redis

from datastore.base.errors import NearstateError
from datastore.compiled import jit
from datastore.compiled.histogram import encode, make_counts, record_ns, summary_us
from datastore.compiled.libc import EAGAIN, POLLIN, doze, now_ns, poll, pollfd, recv, send

VALUE_BYTES = 32
ANSWER_BYTES = len(b"$32\r\n") + VALUE_BYTES + len(b"\r\n")
CONNECT_S = 10.0


@jit
def send_all(fd: int, data: np.ndarray, start: int, end: int) -> int:
    """Send bytes `start` to `end`; returns 0, or -1 on a broken connection."""
    while start < end:
        sent = send(fd, data, start, end)
        if sent < 0 and sent != -EAGAIN:
            return -1
        start += max(0, sent)
    return 0


@jit
def receive_all(fd: int, answers: np.ndarray, wanted: int, scratch: np.ndarray, waits: np.ndarray) -> int:
    """Take `wanted` bytes of answers; returns 0, or -1 on a broken connection."""
    got = 0
    while got < wanted:
        count = recv(fd, answers, got, wanted)
        if count == 0 or (count < 0 and count != -EAGAIN):
            return -1
        if count < 0:
            waits[0] = pollfd(fd, POLLIN)
            poll(waits, 1, 1_000_000_000, scratch)
        else:
            got += count
    return 0


@jit
def probe(fd: int, requests: np.ndarray, request_bytes: int, keys: int, depth: int, batches: int, count: int,
          answer_bytes: int, gap_ns: int, answers: np.ndarray, counts: np.ndarray, scratch: np.ndarray,
          waits: np.ndarray) -> int:  # fmt: skip
    """Do `count` batches of `depth` operations, up to `batches` of them under way; returns 0, or -1 on a broken connection.

    With one under way, each is timed into `counts` from its sending to its last answer, `gap_ns` apart.
    """
    sent = 0
    for taken in range(count):
        started = now_ns(scratch)
        while sent < count and sent - taken < batches:
            first = sent * depth % (keys - depth + 1)
            if send_all(fd, requests, first * request_bytes, (first + depth) * request_bytes) != 0:
                return -1
            sent += 1
        if receive_all(fd, answers, depth * answer_bytes, scratch, waits) != 0:
            return -1
        record_ns(counts, now_ns(scratch) - started)
        if gap_ns > 0:
            doze(waits, gap_ns, scratch)
    return 0


class Probe:
    """A client of one Redis. config: address, port, keys."""

    def __init__(self, config: dict[str, Any]) -> None:
        names = [f"{number:016d}".encode() for number in range(config["keys"])]
        self._fill(config, names)
        requests = [b"*2\r\n$3\r\nGET\r\n$16\r\n" + name + b"\r\n" for name in names]
        writes = [b"*3\r\n$3\r\nSET\r\n$16\r\n" + name + b"\r\n$32\r\n" + b"v" * VALUE_BYTES + b"\r\n" for name in names]
        self.requests = {"read": self._bytes(requests), "write": self._bytes(writes)}
        self.lengths = {"read": (len(requests[0]), ANSWER_BYTES), "write": (len(writes[0]), len(b"+OK\r\n"))}
        self.keys = len(names)
        self.answers = np.zeros(1 << 16, np.uint8)
        self.scratch, self.waits = np.zeros(8, np.int64), np.zeros(2, np.int64)
        self.connection = socket.create_connection((config["address"], config["port"]), CONNECT_S)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection.setblocking(False)

    @staticmethod
    def _bytes(parts: list[bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(parts), np.uint8).copy()

    @staticmethod
    def _fill(config: dict[str, Any], names: list[bytes]) -> None:
        """Write every key's value, retrying until the server is up."""
        deadline = time.monotonic() + CONNECT_S
        while True:
            try:
                client = redis.Redis(config["address"], config["port"], socket_timeout=CONNECT_S)
                pipeline = client.pipeline(transaction=False)
                for name in names:
                    pipeline.set(name, b"v" * VALUE_BYTES)
                pipeline.execute()
                return
            except redis.ConnectionError as error:
                if time.monotonic() > deadline:
                    raise NearstateError(f"redis at {config['address']}:{config['port']} does not answer: {error}") from error
                time.sleep(0.05)

    def measure(self, message: dict[str, Any]) -> dict[str, Any]:
        """Answer {"operation": "read" or "write", "count", "gap_us"} or {"pipeline": depth, "frames", "count"}."""
        depth, batches = message.get("pipeline", 1), message.get("frames", 1)
        operation = message.get("operation", "read")
        counts, started = make_counts(), time.monotonic()
        request_bytes, answer_bytes = self.lengths[operation]
        gap_ns = int(message.get("gap_us", 0) * 1000)
        code = probe(self.connection.fileno(), self.requests[operation], request_bytes, self.keys, depth, batches,
                     message["count"] // depth, answer_bytes, gap_ns, self.answers, counts, self.scratch, self.waits)  # fmt: skip
        elapsed = time.monotonic() - started
        return {"refused": -code, "latency": summary_us(counts), "histogram": encode(counts),
                "operations_kops": message["count"] // depth * depth / elapsed / 1e3}  # fmt: skip


def main(config: dict[str, Any], control: Any) -> None:
    """Process target: fills the keys, sends {"ready": true}, then answers requests until {"stop": true}."""
    client = Probe(config)
    control.send({"ready": True})
    while (message := control.receive(None)) is not None and not message.get("stop"):
        control.send(client.measure(message))


def warm() -> None:
    """Compile the probe: no exchange at all."""
    empty = np.zeros(8, np.uint8)
    probe(-1, empty, 1, 1, 1, 1, 0, 1, 0, empty, make_counts(), np.zeros(8, np.int64), np.zeros(2, np.int64))
