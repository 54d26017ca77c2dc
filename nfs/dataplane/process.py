"""The NF process: opens the host's two ports, maps or reaches its state, and runs the packet loop until told to stop."""

from __future__ import annotations

import contextlib
import resource
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from datastore.base.errors import NearstateError
from datastore.base.partitioning import PARTITIONS
from datastore.coordination.heartbeats import Timing
from datastore.security.secret import CLIENT, HOUSEKEEPING, Credential, forget_key
from datastore.store.client import Client, give_up
from datastore.store.partitions import PartitionMap
from datastore.store.statuses import NOT_PRIMARY
from datastore.store.table import Table
from nfs.dataplane.echo import Echoes
from nfs.dataplane.engine import CALLED, CONFLICTS, DOWN, FETCHES, HERE, WRITES, Engine, make_engine
from nfs.dataplane.follower import Follower
from nfs.dataplane.frames import Frames, free_frames, make_frames
from nfs.dataplane.housekeeping import Housekeeper, Reader
from nfs.dataplane.ledger import device_drops, to_counts
from nfs.dataplane.loop import conserved, run, waiting
from nfs.dataplane.opening import open_ports
from nfs.dataplane.orders import Orders
from nfs.dataplane.port import TX_REFUSED, OpenPort, refill
from nfs.dataplane.steps import load_chain

SLICE_NS = 50_000_000
"""How long the packet loop runs before Python looks at messages."""
DRAIN_SLICE_NS = 500_000
"""The same while somebody waits for what is looked at between two bursts."""
RECONNECT_S = 0.05
CONNECT_S = 0.5
"""Longest wait for a store to answer, in a thread: the packet loop goes on meanwhile."""
READ_S = 1.0
MET_S = 1.0
"""Longest wait at the start for a coordinator."""
STUCK_NS = 1_000_000_000
"""For so long the packet loop may keep Python waiting; it comes back every SLICE_NS, when it gets a core."""


class Process:
    """One NF instance. config:

    chain: network functions, in the order in which packets from inside meet them. settings: of them, by name. host: its name.
    inside, outside: interface names. port_kind: afxdp, afpacket, auto. value_bytes. capacity: records of a
    private table. map: PartitionMap as JSON, or None: all state is private. table: shared memory name of the store on this
    host, or None. stores: [{"host", "address", "port"}]. cluster, client_id: numbers, the latter of this process alone. spin_us.
    secret: descriptor of the key of this host's client `client_id` (`datastore/security/secret.py`), if it reaches anybody.
    echoes: whether the switch sends echoes back (`echo.py`).
    coordinators: [[address, port], ...], if the map can change (then `stores` names the store on this host, too); lease_ms.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.chain = load_chain(config["chain"], config.get("settings", {}), config["value_bytes"])
        self.config = config
        self.frames: Frames = make_frames(config.get("frames", 16384))
        interfaces = [config["inside"], config["outside"]]
        self.opened: list[OpenPort] = open_ports(interfaces, self.frames, config.get("port_kind", "auto"))
        self.table, self.stores, primary, epoch = self._find_state()
        self.owner = self.table.register_owner()
        self.coordinators = config.get("coordinators")
        self.bell = self.table.bell(self.owner) if self.coordinators else None
        value_words = config["value_bytes"] // 8
        self.credential = Credential.received(config.get("secret", -1), CLIENT, config["host"], config["client_id"]) if (
            self.stores or self.coordinators) else None  # fmt: skip
        self.client = Client([(store["address"], store["port"]) for store in self.stores], config["client_id"],
                             config["value_bytes"], config["cluster"], epoch, timeout_s=CONNECT_S,
                             credential=self.credential)  # fmt: skip
        self.engine: Engine = make_engine(self.chain, self.frames, primary, self.owner, epoch, value_words,
                                          len(self.stores), spin_us=config.get("spin_us", 5.0),
                                          replicates=bool(self.coordinators),
                                          bells=self.bell.state if self.bell else None)  # fmt: skip
        self.tried_at = 0.0
        asked = {group[0] for group in PartitionMap.from_json(config["map"]).replicas} if config["map"] else set()
        self.orders = Orders(self.engine, [opened.port for opened in self.opened], self.client.state,
                             [store["host"] for store in self.stores], config["host"] if config["table"] else None, asked,
                             epoch, self._echoes())  # fmt: skip
        self._dialling: dict[int, Future[Any]] = {}
        self._dialler = ThreadPoolExecutor(max(len(self.stores), 1), thread_name_prefix="dial")
        self.housekeeper = Housekeeper(self.chain, self._make_reader)
        self.follower: Follower | None = None
        self._followed_ns = time.monotonic_ns()
        self._number = time.time_ns() & (1 << 62) - 1
        self._store_ended = 0
        """The incarnation of this host's store process, once it has ended."""
        self._has_left_store = False

    def _find_state(self) -> tuple[Table, list[dict[str, Any]], np.ndarray, int]:
        """Return the table on this host, the remote stores, the primaries by partition, and the map's epoch."""
        config = self.config
        if config["map"] is None:
            table = Table.private(config["capacity"], config["value_bytes"])
            return table, [], np.full(PARTITIONS, HERE), 1
        partition_map = PartitionMap.from_json(config["map"])
        table = Table.attach(config["table"]) if config["table"] else Table.private(PARTITIONS * 8, config["value_bytes"])
        reached = [store for store in config["stores"] if config.get("coordinators") or not self._is_here(store["host"])]
        numbers = {store["host"]: number for number, store in enumerate(reached)}
        primary = [HERE if self._is_here(group[0]) else numbers[group[0]] for group in partition_map.replicas]
        return table, reached, np.array(primary), partition_map.epoch

    def _echoes(self) -> Echoes | None:
        """Return the echoes by which this process knows what is under way; None without a switch."""
        ports = [opened.port for opened in self.opened]
        return Echoes(self.engine, ports, self.frames) if self.config.get("echoes") else None

    def _is_here(self, host: str | None) -> bool:
        return bool(host == self.config["host"] and self.config["table"])

    def _make_reader(self) -> Reader:
        """Return a reader of the state with connections of its own."""
        config = self.config
        credential = self.credential.for_housekeeping() if self.credential else None
        client = Client([(store["address"], store["port"]) for store in self.stores], HOUSEKEEPING | config["client_id"],
                        config["value_bytes"], config["cluster"], self.orders.epoch, timeout_s=READ_S,
                        credential=credential)  # fmt: skip
        return Reader(self.table, client, self.engine.primary, self.engine.control)

    def connect(self) -> None:
        """Connect to every store host; one that does not answer is marked down and tried again later."""
        self.engine.control[DOWN] = (1 << len(self.stores)) - 1
        self.mend()
        for dialling in self._dialling.values():
            dialling.exception(2 * CONNECT_S)
        self.mend()

    def mend(self) -> None:
        """Try the store hosts that are down, several times a second, without waiting for any."""
        down = int(self.engine.control[DOWN])
        for host, dialling in list(self._dialling.items()):
            if dialling.done():
                del self._dialling[host]
                if dialling.exception() is None:
                    self._take_connection(host, *dialling.result())
        if down and time.monotonic() - self.tried_at > RECONNECT_S:
            self.tried_at = time.monotonic()
            for host in range(len(self.stores)):
                if self.engine.control[DOWN] >> host & 1 and host not in self._dialling:
                    self._dialling[host] = self._dialler.submit(self.client.dial, host)

    def _take_connection(self, host: int, *connection: Any) -> None:
        """Use a connection to a store, unless that is the one of this host and has ended by now."""
        is_own, is_named = self.stores[host]["host"] == self.orders.here, self.table.is_named()
        if is_own and is_named and self._store_ended:
            connection[0].close()
            return
        self.client.take_connection(host, *connection)
        if is_own and not is_named:
            self.orders.forsake()
        self.engine.control[DOWN] &= ~(1 << host)

    # ---- following the map --------------------------------------------------------------------------------------------

    def call(self) -> None:
        """Have the packet loop return to Python; from another thread."""
        self.engine.control[CALLED] = 1
        if self.bell:
            self.bell.ring_own()

    def join(self) -> None:
        """Speak to the coordinator from now on: this process can carry out orders."""
        if self.coordinators:
            assert self.credential
            self.orders.load_code()
            if self.config["table"]:
                self.table.begin_function(self._number)
            timing = Timing.of(self.config.get("lease_ms"))
            self.follower = Follower(self.coordinators, self.report, self.call, timing, self.credential)
            # A coordinator must know of this process before it works in the store's memory, or it may take the end of the
            # store process for the end of the host's lease. One that is not there takes nothing for that.
            self.follower.wait_until_met(MET_S)
            if self.config["table"]:
                self._watch_store(self.follower)

    def _watch_store(self, follower: Follower) -> None:
        """Have the lease end with the store process of this host; where its end cannot be watched, the lease runs out."""
        with contextlib.suppress(OSError):
            store = self.table.watch_server()
            if store is None:
                self.end_lease()
                follower.tell()
            else:
                follower.watch(store, self.end_lease)

    def report(self) -> dict[str, Any] | None:
        """Return what the coordinator is told of this instance; from another thread. What was quiet before orders that are not
        carried out yet does not count. None: the packet loop does not come back, so it serves nobody."""
        if time.monotonic_ns() - self._followed_ns > STUCK_NS:
            return None
        quiet = [] if self.follower and self.follower.orders else self.orders.quiet
        return {"host": self.config["host"], "cluster": self.config["cluster"], "epoch": self.orders.epoch,
                "parked": self.orders.parked(), "quiet": quiet, "number": self._number,
                "store_ended": self._store_ended}  # fmt: skip

    def end_lease(self) -> None:
        """The store process of this host has ended: end the host's lease, so that nobody waits until it runs out."""
        self._store_ended = self.table.end_lease() or 0
        self.call()

    def follow(self) -> None:
        """Carry out the coordinator's orders."""
        self.engine.control[CALLED] = 0
        self._followed_ns = time.monotonic_ns()
        if self._store_ended and not self._has_left_store:
            self._has_left_store = True
            self.orders.leave_own_store(self._leave)
        while self.follower and self.follower.orders:
            self.orders.quiet = []
            self.orders.carry_out(self.follower.orders.popleft(), time.monotonic_ns(), self._leave)
            self.follower.tell()
        if self.orders.look(time.monotonic_ns()) and self.follower:
            self.follower.tell()

    def _leave(self, host: int) -> None:
        """A store that is primary of nothing any more is asked for nothing more; what it did not answer is asked elsewhere."""
        self.client.disconnect(host)
        self.engine.control[DOWN] |= 1 << host
        give_up(self.client.state, host, NOT_PRIMARY)

    def process_packets(self, duration_ns: int = SLICE_NS) -> None:
        """Run the packet loop for a while."""
        if self.orders.watches():
            duration_ns = min(duration_ns, DRAIN_SLICE_NS)
        inside, outside = (opened.port for opened in self.opened)
        run(self.engine, inside, outside, self.frames, self.table.words, self.client.state, duration_ns)

    def change_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Give network functions other settings while they run; answers {"changed": true} or {"error": why not}."""
        try:
            self.chain.change_settings(settings)
        except NearstateError as error:
            return {"error": str(error)}
        return {"changed": True}

    def statistics(self) -> dict[str, Any]:
        """Return the ledger, the kernel's drops, and what state access cost."""
        self.engine.ledger[-1] = waiting(self.engine)
        control = self.engine.control
        return {"ledger": to_counts(self.engine.ledger),
                "kernel": {name: opened.statistics() for name, opened in zip(("inside", "outside"), self.opened, strict=True)},
                "refused_by_kernel": sum(int(opened.port.control[TX_REFUSED]) for opened in self.opened),
                "missing_frames": conserved(self.engine, self.frames, [opened.port for opened in self.opened]),
                "free_frames": int(free_frames(self.frames)), "devices": device_drops(),
                "fetches": int(control[FETCHES]), "writes": int(control[WRITES]), "conflicts": int(control[CONFLICTS]),
                "down": int(control[DOWN]), "records": self.table.count(), "port_kind": self.opened[0].kind,
                "rss_kbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}  # fmt: skip


def main(config: dict[str, Any], control: Any) -> None:
    """Process target: sends {"ready": true}, answers {"statistics": true} and {"settings": {function: {name: value}}}, ends at
    {"stop": true}."""
    process = Process(config)
    forget_key(config.get("secret", -1))
    process.connect()
    process.process_packets(0)
    for opened in process.opened:  # whoever is told "ready" may send at once
        refill(opened.port, process.frames)
    process.join()
    control.send({"ready": True, "port_kind": process.opened[0].kind})
    while True:
        process.process_packets()
        process.follow()
        process.mend()
        message = control.receive(0)
        if message is None:
            continue
        if message.get("stop"):
            return
        if "settings" in message:
            control.send(process.change_settings(message["settings"]))
        elif "statistics" in message:
            control.send(process.statistics())
