"""The probe of the store: what one read, one write, and one read-modify-write of a record take, seen from an NF host.

    in place    the record lies in this host's store: open, work, commit, in shared memory
    remote      the record lies on another host: one request frame, one answer (two of each for read-modify-write)

Every access is timed on its own, from just before to just after, by the clock everything reads; an access in place includes
one reading of that clock, about 25 ns. Keys are visited in a seeded random order.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from datastore.base.partitioning import PARTITIONS
from datastore.compiled import jit
from datastore.compiled.histogram import encode, make_counts, record_ns, summary_us
from datastore.compiled.libc import POLLIN, doze, now_ns, poll, pollfd
from datastore.security.secret import CLIENT, Credential
from datastore.store import operations, statuses
from datastore.store.client import (
    DESCRIPTOR,
    Client,
    ClientState,
    answer_stamp,
    answer_status,
    flush,
    next_answer,
    receive,
    request,
)
from datastore.store.layout import VALUE
from datastore.store.partitions import PARTITION_BITS, PartitionMap
from datastore.store.records import abort_record, commit_record, open_record
from datastore.store.table import Table

READ, WRITE, READ_MODIFY_WRITE = range(3)
OPERATIONS = {"read": READ, "write": WRITE, "read_modify_write": READ_MODIFY_WRITE}
KIND = 255
"""Record type of the probe's keys: network functions have 1 to 254."""
PROBE_ADDRESS = 0xCB007100
"""203.0.113.0, an address of documentation (RFC 5737): no packet has it, so no NF touches these records."""


def make_keys(count: int, partitions: list[int], seed: int) -> np.ndarray:
    """Return uint64[count, 2] keys (high, low) in random order, spread over the given partitions."""
    numbers = np.random.default_rng(seed).permutation(count).astype(np.uint64)
    chosen = np.array(partitions, np.uint64)[numbers.astype(np.int64) % len(partitions)]
    keys = np.empty((count, 2), np.uint64)
    keys[:, 0] = np.uint64(PROBE_ADDRESS) << np.uint64(32) | numbers
    keys[:, 1] = np.uint64(17) << np.uint64(24) | np.uint64(KIND) << np.uint64(16) | chosen
    return keys


@jit
def access(words: np.ndarray, owner: int, epoch: int, low: int, high: int, operation: int, number: int, now_s: int) -> int:
    """Do one operation in place; returns 0, or the status that refused it."""
    slot = open_record(words, owner, low, high, epoch, now_s)
    if slot < 0:
        return -slot
    if operation == READ:
        seen = words[slot + VALUE]
        abort_record(words, owner, slot)
        return 0 if seen != np.uint64(0) else statuses.ABSENT
    if operation == WRITE:
        words[slot + VALUE] = np.uint64(number + 1)
    else:
        words[slot + VALUE] += np.uint64(1)
    commit_record(words, owner, slot, 0)
    return 0


@jit
def probe_here(words: np.ndarray, owner: int, epoch: int, keys: np.ndarray, operation: int, count: int, gap_ns: int,
               counts: np.ndarray, scratch: np.ndarray, idle: np.ndarray) -> int:  # fmt: skip
    """Time `count` accesses in place, `gap_ns` apart (0: back to back); returns how many were refused."""
    refused = 0
    now = now_ns(scratch)
    for i in range(count):
        at = i % keys.shape[0]
        now_s = now // 1_000_000_000
        started = now_ns(scratch)
        status = access(words, owner, epoch, keys[at, 1], keys[at, 0], operation, i, now_s)
        now = now_ns(scratch)
        record_ns(counts, now - started)
        refused += status != 0
        if gap_ns > 0:
            doze(idle, gap_ns, scratch)
    return refused


@jit
def answer_of(client: ClientState, host: int, scratch: np.ndarray, waits: np.ndarray) -> int:
    """Wait for one answer and return its window slot; -1 when the connection broke."""
    while True:
        slot = next_answer(client, host)
        if slot >= 0:
            return slot
        ready = receive(client, host)
        if ready < 0:
            return -1
        if ready > 0:
            continue
        flush(client, host)
        waits[0] = pollfd(client.control[host, DESCRIPTOR], POLLIN)
        poll(waits, 1, 1_000_000_000, scratch)


@jit
def ask(client: ClientState, host: int, opcode: int, low: int, high: int, stamp: int, values: np.ndarray, scratch: np.ndarray,
        waits: np.ndarray) -> int:  # fmt: skip
    """Do one remote operation; returns its window slot, -1 when the connection broke."""
    request(client, host, opcode, low, high, stamp, values, 0, 0)
    flush(client, host)
    return answer_of(client, host, scratch, waits)


@jit
def probe_there(client: ClientState, hosts: np.ndarray, keys: np.ndarray, stamps: np.ndarray, operation: int, count: int,
                gap_ns: int, values: np.ndarray, counts: np.ndarray, scratch: np.ndarray, waits: np.ndarray) -> int:  # fmt: skip
    """Time `count` remote accesses, one after the other; returns how many were refused, -1 when a connection broke.

    hosts: int64[keys], who has each key. stamps: uint64[keys], each record's stamp as last seen; kept up to date.
    A write is a conditional put with the stamp known; a read-modify-write gets first, then puts.
    """
    refused = 0
    for i in range(count):
        at = i % keys.shape[0]
        host, low, high = hosts[at], keys[at, 1], keys[at, 0]
        started = now_ns(scratch)
        if operation != WRITE:
            slot = ask(client, host, operations.GET, low, high, np.uint64(0), values, scratch, waits)
            if slot < 0:
                return -1
            refused += answer_status(client, host, slot) != statuses.OK
            stamps[at] = answer_stamp(client, host, slot)
        if operation != READ:
            values[0] = np.uint64(i + 1)
            slot = ask(client, host, operations.PUT, low, high, stamps[at], values, scratch, waits)
            if slot < 0:
                return -1
            refused += answer_status(client, host, slot) != statuses.OK
            stamps[at] = answer_stamp(client, host, slot)
        record_ns(counts, now_ns(scratch) - started)
        if gap_ns > 0:
            doze(waits, gap_ns, scratch)
    return refused


@jit
def pipeline_there(client: ClientState, hosts: np.ndarray, keys: np.ndarray, depth: int, frames: int, count: int,
                   values: np.ndarray, scratch: np.ndarray, waits: np.ndarray) -> int:  # fmt: skip
    """Get `count` records of one host, `depth` in a frame and up to `frames` frames under way.

    Returns how many answers were not OK, or -1 when the connection broke. count: a multiple of depth.
    """
    refused = sent = taken = 0
    host = hosts[0]
    while taken < count:
        while sent < count and sent - taken <= depth * (frames - 1):
            for i in range(sent, sent + depth):
                at = i % keys.shape[0]
                request(client, host, operations.GET, keys[at, 1], keys[at, 0], np.uint64(0), values, 0, i)
            flush(client, host)
            sent += depth
        slot = answer_of(client, host, scratch, waits)
        if slot < 0:
            return -1
        refused += answer_status(client, host, slot) != statuses.OK
        taken += 1
    return refused


class Probe:
    """One host's view of the store. config: host, map, table (shared memory name or None), stores, cluster, client_id, secret
    (descriptor of the key of that client), value_bytes, keys, seed."""

    def __init__(self, config: dict[str, Any]) -> None:
        partition_map = PartitionMap.from_json(config["map"])
        self.epoch = partition_map.epoch
        self.scratch, self.waits = np.zeros(8, np.int64), np.zeros(2, np.int64)
        self.values = np.zeros(config["value_bytes"] // 8, np.uint64)
        self.table = Table.attach(config["table"]) if config["table"] else None
        if self.table:
            self.owner = self.table.register_owner()
            self.keys = make_keys(config["keys"], partition_map.kept_by(config["host"]), config["seed"])
        else:
            self.keys = make_keys(config["keys"], list(range(PARTITIONS)), config["seed"])
            self._connect(config, partition_map)

    def _connect(self, config: dict[str, Any], partition_map: PartitionMap) -> None:
        stores = config["stores"]
        self.client = Client([(store["address"], store["port"]) for store in stores], config["client_id"],
                             config["value_bytes"], config["cluster"], self.epoch,
                             credential=Credential.received(config["secret"], CLIENT, config["host"],
                                                            config["client_id"]))  # fmt: skip
        for host in range(len(stores)):
            self.client.connect(host)
        primaries = partition_map.primaries([store["host"] for store in stores])
        self.hosts = primaries[(self.keys[:, 1] & PARTITION_BITS).astype(np.int64)].astype(np.int64)
        self.stamps = np.zeros(len(self.keys), np.uint64)

    def fill(self) -> int:
        """Make every key's record; returns how many were refused."""
        if self.table:
            return self.run(WRITE, len(self.keys), 0, make_counts())
        refused = 0
        for at in range(len(self.keys)):
            self.values[0] = 1
            slot = ask(self.client.state, int(self.hosts[at]), operations.INSERT, self.keys[at, 1], self.keys[at, 0],
                       np.uint64(0), self.values, self.scratch, self.waits)  # fmt: skip
            refused += int(answer_status(self.client.state, int(self.hosts[at]), slot)) != statuses.OK
            self.stamps[at] = answer_stamp(self.client.state, int(self.hosts[at]), slot)
        return refused

    def run(self, operation: int, count: int, gap_ns: int, counts: np.ndarray) -> int:
        """Time accesses into `counts`; returns how many were refused."""
        if self.table:
            return int(probe_here(self.table.words, self.owner, self.epoch, self.keys, operation, count, gap_ns, counts,
                                  self.scratch, self.waits))  # fmt: skip
        return int(probe_there(self.client.state, self.hosts, self.keys, self.stamps, operation, count, gap_ns, self.values,
                               counts, self.scratch, self.waits))  # fmt: skip

    def measure(self, message: dict[str, Any]) -> dict[str, Any]:
        """Answer one request: {"operation", "count", "gap_us"} or {"pipeline": depth, "frames", "count"}."""
        started = time.monotonic()
        if "pipeline" in message:
            depth = message["pipeline"]
            count = message["count"] // depth * depth
            refused = int(pipeline_there(self.client.state, self.hosts, self.keys, depth, message["frames"], count,
                                         self.values, self.scratch, self.waits))  # fmt: skip
            return {"refused": refused, "operations_kops": count / (time.monotonic() - started) / 1e3}
        counts = make_counts()
        refused = self.run(OPERATIONS[message["operation"]], message["count"], int(message["gap_us"] * 1000), counts)
        elapsed = time.monotonic() - started
        return {"refused": refused, "latency": summary_us(counts), "histogram": encode(counts),
                "operations_kops": message["count"] / elapsed / 1e3}  # fmt: skip


def main(config: dict[str, Any], control: Any) -> None:
    """Process target: fills its keys, sends {"ready": true}, then answers requests until {"stop": true}."""
    probe = Probe(config)
    refused = probe.fill()
    control.send({"ready": refused == 0, "refused": refused})
    while (message := control.receive(None)) is not None and not message.get("stop"):
        control.send(probe.measure(message))


def warm() -> None:
    """Compile the probe: no access at all."""
    table = Table.private(PARTITIONS * 8, 8)
    scratch, waits, counts = np.zeros(8, np.int64), np.zeros(2, np.int64), make_counts()
    keys, hosts, values = make_keys(1, [0], 1), np.zeros(1, np.int64), np.zeros(1, np.uint64)
    state = Client([("127.0.0.1", 1)], 1, 8, 1, 1).state
    probe_here(table.words, 0, 1, keys, READ, 0, 0, counts, scratch, waits)
    probe_there(state, hosts, keys, values.copy(), READ, 0, 0, values, counts, scratch, waits)
    pipeline_there(state, hosts, keys, 1, 1, 0, values, scratch, waits)
    ask(state, 0, operations.GET, np.uint64(0), np.uint64(0), np.uint64(0), values, scratch, waits)
