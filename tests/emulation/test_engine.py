"""Does the packet loop account for every packet, whatever it is given, and keep order and state when its store is elsewhere?"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datastore.base.partitioning import PARTITIONS
from datastore.store.partitions import PartitionMap
from datastore.store.table import Table
from nfs.dataplane import declaration
from nfs.dataplane.ledger import FRAGMENT, MALFORMED, imbalance
from tests import packets
from tests.conftest import Bench, Host, ask, make_bench, received, wait_for
from tests.packets import icmp_error, tcp, udp
from topologies.emulation.processes import RunningProcess

PRELOAD = ("experiments.harness.preload",)
VALUE_BYTES, CLUSTER, STORE_PORT, MTU = 32, 4242, 7077, 1600
CENTRAL = PartitionMap(1, (("store",),) * PARTITIONS).to_json()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from make_bench("test-engine", tmp_path_factory.mktemp("logs"), PRELOAD)


@pytest.fixture(scope="module")
def checked_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The same with every array access checked, in a launcher of its own that compiles the packet loop and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_BOUNDSCHECK", "1")
        patch.delenv("NUMBA_CACHE_DIR", raising=False)  # checked code has a cache of its own
        yield from make_bench("test-engine-checked", tmp_path_factory.mktemp("logs"), ("nfs.dataplane.process",))


@dataclass
class Route:
    """client - NF - server, with raw sockets at both ends and, if wanted, a store on a cable of its own."""

    bench: Bench
    client: Host
    nf: Host
    server: Host
    inside: socket.socket
    outside: socket.socket
    number: int
    store: Host | None = None

    def start(self, name: str, **config: Any) -> RunningProcess:
        """Start an NF process on the path."""
        stores = [{"host": "store", "address": f"192.168.7{self.number}.2", "port": STORE_PORT}] if self.store else []
        return self.bench.spawn(
            f"nf-{name}", self.nf, "nfs.dataplane.process:main",
            {"chain": name.split("+"), "host": self.nf.name, "inside": "inside", "outside": "outside", "value_bytes": VALUE_BYTES,
             "capacity": 4096, "map": CENTRAL if self.store else None, "client_id": self.number + 1, "cluster": CLUSTER,
             "table": None, "stores": stores, **config})  # fmt: skip


def make_route(bench: Bench, number: int = 0, store: Host | None = None, mtu: int = 1500) -> Route:
    client, nf, server = (bench.host(f"{name}{number}") for name in ("client", "nf", "server"))
    bench.cable((client, "net"), (nf, "inside"), mtu)
    bench.cable((server, "net"), (nf, "outside"), mtu)
    if store:
        addresses = (f"192.168.7{number}.1/24", f"192.168.7{number}.2/24")
        bench.cable((nf, "storage"), (store, f"storage{number}"), addresses=addresses)
    return Route(bench, client, nf, server, client.packet_socket("net"), server.packet_socket("net"), number, store)


def start_store(bench: Bench, host: Host, table: str, create: bool = True, **config: Any) -> RunningProcess:
    return bench.spawn("store", host, "datastore.process.store:main",
                       {"host": "store", "table": table, "capacity": 1 << 14, "value_bytes": VALUE_BYTES, "address": "0.0.0.0",
                        "port": STORE_PORT, "cluster": CLUSTER, "epoch": 1, "map": CENTRAL, "create": create, "keep": True,
                        **config})  # fmt: skip


def settled(nf: RunningProcess, at_least: int = 0, timeout_s: float = 10.0) -> dict[str, Any]:
    """Return the NF's statistics once it received so many packets, none waits and two looks agree."""
    deadline, before = time.monotonic() + timeout_s, None
    while True:
        found = ask(nf, {"statistics": True})
        ledger = found["ledger"]
        if ledger == before and ledger["received"] >= at_least and not ledger["waiting"]:
            return found
        assert time.monotonic() < deadline, f"{found} does not settle at {at_least} packets"
        before = ledger
        time.sleep(0.02)


def assert_balanced(statistics: dict[str, Any]) -> None:
    assert imbalance(statistics["ledger"]) == 0
    assert statistics["missing_frames"] == 0
    assert statistics["refused_by_kernel"] == 0


def strange_frames() -> list[bytes]:
    """Return good, truncated, malformed, oversized, fragmented and random frames: about 1,500, always the same."""
    seeded = random.Random(5)
    good = list(packets.well_formed().values())
    frames = [*good, bytes(14), b"\xff" * 60, udp(payload=bytes(1500))[:1600], icmp_error(udp())]
    for frame in good:
        frames += [frame[:length] for length in range(14, min(len(frame), 90), 7)]
    for _ in range(1000):
        mutated = bytearray(seeded.choice(good))
        for _ in range(seeded.randint(1, 5)):
            mutated[seeded.randrange(12, min(len(mutated), 80))] = seeded.choice((0, 255, seeded.randrange(256)))
        frames.append(bytes(mutated[: seeded.randint(14, len(mutated))]))
    return frames + [bytes(12) + b"\x08\x00" + seeded.randbytes(seeded.randint(0, 200)) for _ in range(200)]


def inject(sender: socket.socket, frames: list[bytes]) -> None:
    for number, frame in enumerate(frames):
        sender.send(frame)
        if number % 100 == 99:
            time.sleep(0.005)


ADDRESSES = ("source_high", "source_middle", "source_address", "destination_high", "destination_middle", "destination_address")


def verdicts(name: str, frames: list[bytes], arrived_from: int) -> dict[str, int]:
    """Return the causes the parser and the function's declaration give the frames, leaving out what the function decides.

    A later fragment whose datagram's first one came before is no `fragment`: its flow is known, and it may not overlap it.
    """
    function, counts = declaration.load(name), dict.fromkeys(declaration.EXCEPTIONS, 0)
    causes = {status: cause for cause, status in declaration.EXCEPTIONS.items()}
    first_end: dict[tuple[Any, ...], int] = {}
    for frame in frames:
        packet = packets.parsed(frame, arrived_from)[0]
        status, ip = int(packet["status"]), int(packet["network_offset"])
        header = int(packet["fragment_header"])
        if packet["ip_version"] == 6:
            identity, first = frame[header + 4 : header + 8], header != 0
        else:
            identity, first = frame[ip + 4 : ip + 6] + bytes([packet["protocol"]]), frame[ip + 6] & 0x20 != 0
        datagram = (*(int(packet[name]) for name in ADDRESSES), identity)
        if status == 0 and first and not packet["icmp_error"]:
            begin = header + 8 if packet["ip_version"] == 6 else int(packet["transport_offset"])
            first_end[datagram] = ip + int(packet["ip_bytes"]) - begin
        if status == FRAGMENT and packet["fragment_offset"] and datagram in first_end:
            status = MALFORMED if packet["fragment_offset"] < first_end[datagram] else 0
        if status and not function.passes_mask >> status & 1:
            counts[causes[status]] += 1
    return counts


def bombard(bench: Bench, name: str, kind: str) -> None:
    route = make_route(bench, mtu=MTU)
    nf = route.start(name, port_kind=kind)
    frames = strange_frames()
    if kind == "afpacket":  # the kernel drops a VLAN tag without its EtherType before any packet socket sees it
        frames = [frame for frame in frames if len(frame) >= 20 or frame[12:14] not in (b"\x81\x00", b"\x88\xa8")]
    inject(route.inside, frames)
    inject(route.outside, frames)
    statistics = settled(nf, 2 * len(frames))
    assert_balanced(statistics)
    assert statistics["ledger"]["received"] == 2 * len(frames)
    statistics["ledger"]["fragment"] += statistics["ledger"]["fragment_room_full"]
    expected = [verdicts(name, frames, side) for side in (0, 1)]
    for cause in expected[0]:
        assert statistics["ledger"][cause] == expected[0][cause] + expected[1][cause], cause
    assert nf.poll() is None
    route.inside.send(tcp("S"))
    assert tcp("S") in received(route.outside) or name == "firewall"
    bench.end_processes()


@pytest.mark.parametrize("kind", ["afxdp", "afpacket"])
@pytest.mark.parametrize("name", ["passthrough", "firewall", "traffic_counter"])
def test_the_ledger_balances_whatever_arrives(bench: Bench, name: str, kind: str) -> None:
    bombard(bench, name, kind)


@pytest.mark.parametrize("name", ["firewall", "traffic_counter"])
def test_no_access_is_out_of_bounds_whatever_arrives(checked_bench: Bench, name: str) -> None:
    bombard(checked_bench, name, "afxdp")


@pytest.fixture
def table(bench: Bench) -> Iterator[str]:
    name = f"nearstate-test-engine-{os.getpid()}"
    bench.journal.shared_memory(name)
    yield name
    bench.end_processes()
    Path("/dev/shm", name).unlink(missing_ok=True)


def counters(table: str) -> dict[int, tuple[int, ...]]:
    """Return (packets out, bytes out, packets in, bytes in) by client port."""
    found = {}
    for record in Table.attach(table).records():
        found[record.key.client_port] = tuple(int(n) for n in np.frombuffer(record.value, np.uint64)[:4])
    return found


def test_remote_state_keeps_order_within_flows_and_counts_exactly(bench: Bench, table: str) -> None:
    store = bench.host("store")
    route = make_route(bench, store=store)
    start_store(bench, store, table)
    nf = route.start("traffic_counter")
    sink = bench.spawn("sink", route.server, "experiments.workloads.sink:main", {"interface": "net"})
    macs = {"source_mac": "02:00:00:00:00:01", "next_hop_mac": "02:00:00:00:00:02", "server": packets.SERVER}
    traffic = {"flows": 40, "arrivals": "poisson", "frame_bytes": 128}
    generator = bench.spawn("generator", route.client, "experiments.workloads.generator:main",
                            {"interface": "net", "traffic": traffic, **macs})  # fmt: skip
    ask(sink, {"step": 1, "packets": 100_000})
    sent = ask(generator, {"step": 1, "offered_kpps": 20, "seconds": 1.0})["sent"]
    statistics = settled(nf, sent)
    arrived = ask(sink, {"collect": 1})
    assert_balanced(statistics)
    assert statistics["ledger"]["forwarded"] == sent == arrived["received"]
    assert (arrived["duplicated"], arrived["flow_reordered"]) == (0, 0)
    assert 0 < statistics["fetches"] <= sent
    found = counters(table)
    assert len(found) == 40
    assert [sum(column) for column in zip(*found.values(), strict=True)] == [sent, sent * 124, 0, 0]


def test_two_instances_on_the_same_keys_lose_no_update(bench: Bench, table: str) -> None:
    store = bench.host("store")
    routes = [make_route(bench, number, store) for number in (0, 1)]
    start_store(bench, store, table)
    instances = [route.start("traffic_counter") for route in routes]
    total = 3000
    for number in range(total):
        for route in routes:
            route.inside.send(udp(client_port=40_000 + number % 3))
    found = [settled(nf, total) for nf in instances]
    for statistics in found:
        assert_balanced(statistics)
        assert statistics["ledger"]["forwarded"] == total
    size = len(udp())
    assert counters(table) == {40_000 + n: (2 * total // 3, 2 * total // 3 * size, 0, 0) for n in range(3)}
    assert sum(statistics["conflicts"] for statistics in found) > 0, "the two did write at the same time"


def test_more_flows_at_once_than_the_window_holds_all_get_through(bench: Bench, table: str) -> None:
    """The store stands still until the window is full: every access must still go its two rounds, read and write."""
    store = bench.host("store")
    route = make_route(bench, store=store)
    process = start_store(bench, store, table)
    nf = route.start("traffic_counter")
    os.kill(process.pid, signal.SIGSTOP)
    try:
        inject(route.inside, [udp(client_port=1024 + n) for n in range(3000)])
        time.sleep(0.2)
        stuck = ask(nf, {"statistics": True})["ledger"]
        assert stuck["waiting"] > 900
    finally:
        os.kill(process.pid, signal.SIGCONT)
    statistics = settled(nf, 3000)
    assert_balanced(statistics)
    ledger = statistics["ledger"]
    assert ledger["waiting_room_full"] > 0
    assert ledger["forwarded"] + ledger["waiting_room_full"] == 3000
    assert len(counters(table)) == ledger["forwarded"]


def wait_for_cause(nf: RunningProcess, cause: str, count: int) -> None:
    wait_for(lambda: ask(nf, {"statistics": True})["ledger"][cause] == count, f"{cause} reaches {count}")


def test_a_store_that_dies_and_comes_back_is_a_named_cause_and_no_restart(bench: Bench, table: str) -> None:
    """Packets sent while it is away are dropped as `state_unreachable`; what was in flight is done exactly once."""
    store = bench.host("store")
    route = make_route(bench, store=store)
    process = start_store(bench, store, table)
    nf = route.start("traffic_counter")
    frames = [udp(client_port=2000 + 2 * (n % 50)) for n in range(500)]
    for _ in range(3):
        inject(route.inside, frames)
        os.kill(process.pid, signal.SIGSTOP)
        route.inside.send(udp(client_port=9000))  # in flight when the store dies
        time.sleep(0.05)
        process.kill()
        wait_for(lambda: ask(nf, {"statistics": True})["down"] == 1, "the NF notices that the store is gone")
        refused = ask(nf, {"statistics": True})["ledger"]["state_unreachable"] + 100
        inject(route.inside, [udp(client_port=20_000 + n) for n in range(100)])
        wait_for_cause(nf, "state_unreachable", refused)
        process = start_store(bench, store, table, create=False)
        wait_for(lambda: ask(nf, {"statistics": True})["down"] == 0, "the NF finds the store again")
        inject(route.inside, frames)
        statistics = settled(nf)
        assert_balanced(statistics)
        assert sum(out for out, *_ in counters(table).values()) == statistics["ledger"]["forwarded"]
    assert statistics["ledger"]["forwarded"] + statistics["ledger"]["state_unreachable"] == 3 * (2 * len(frames) + 101)
    assert nf.poll() is None


def test_a_store_that_was_never_there_is_reported_and_found_later(bench: Bench, table: str) -> None:
    store = bench.host("store")
    route = make_route(bench, store=store)
    nf = route.start("traffic_counter")
    inject(route.inside, [udp()] * 50)
    statistics = settled(nf, 50)
    assert_balanced(statistics)
    assert statistics["ledger"]["state_unreachable"] == 50
    start_store(bench, store, table)
    wait_for(lambda: ask(nf, {"statistics": True})["down"] == 0, "the NF finds the store")
    inject(route.inside, [udp()] * 50)
    assert settled(nf, 100)["ledger"]["forwarded"] == 50


def test_a_full_table_is_a_named_cause(bench: Bench, table: str) -> None:
    store = bench.host("store")
    route = make_route(bench, store=store)
    start_store(bench, store, table, capacity=PARTITIONS)  # one bucket of 7 records in each partition
    nf = route.start("traffic_counter")
    inject(route.inside, [udp(client_port=40_000, server_port=1000 + n) for n in range(200)])
    statistics = settled(nf, 200)
    assert_balanced(statistics)
    assert (statistics["ledger"]["forwarded"], statistics["ledger"]["table_full"]) == (7, 193)


def test_a_full_private_table_is_the_same_cause(bench: Bench) -> None:
    route = make_route(bench)
    nf = route.start("traffic_counter", capacity=PARTITIONS)
    inject(route.inside, [udp(client_port=40_000, server_port=1000 + n) for n in range(200)])
    statistics = settled(nf, 200)
    assert_balanced(statistics)
    assert (statistics["ledger"]["forwarded"], statistics["ledger"]["table_full"]) == (7, 193)
    bench.end_processes()
