"""The NF process: opens the host's two ports, maps or reaches its state, and runs the packet loop until told to stop."""

from __future__ import annotations

import resource
import time
from typing import Any

import numpy as np

from datastore.native.errors import NearstateError
from datastore.store.client import Client
from datastore.store.partitions import PARTITIONS, PartitionMap
from datastore.store.table import Table
from nfs.dataplane.engine import CONFLICTS, DOWN, FETCHES, HERE, WRITES, Engine, conserved, make_engine, run, waiting
from nfs.dataplane.frames import Frames, free_frames, make_frames
from nfs.dataplane.housekeeping import Housekeeper, Reader
from nfs.dataplane.ledger import device_drops, to_counts
from nfs.dataplane.port import TX_REFUSED, OpenPort, open_ports, refill
from nfs.dataplane.steps import load_chain

SLICE_NS = 50_000_000
"""How long the packet loop runs before Python looks at messages."""
RECONNECT_S = 0.2
CONNECT_S = 0.1
"""Longest wait for a store to answer: the packet loop stands still meanwhile."""
READ_S = 1.0
READER_CLIENTS = 1 << 16
"""Client ids of housekeeping begin here."""


class Process:
    """One NF instance. config:

    chain: network functions, in the order in which packets from inside meet them. settings: of them, by name. host: its name.
    inside, outside: interface names. port_kind: afxdp, afpacket, auto. value_bytes. capacity: records of a
    private table. map: PartitionMap as JSON, or None: all state is private. table: shared memory name of the store on this
    host, or None. stores: [{"host", "address", "port"}]. cluster, client_id: numbers. spin_us.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.chain = load_chain(config["chain"], config.get("settings", {}), config["value_bytes"])
        self.config = config
        self.frames: Frames = make_frames(config.get("frames", 16384))
        interfaces = [config["inside"], config["outside"]]
        self.opened: list[OpenPort] = open_ports(interfaces, self.frames, config.get("port_kind", "auto"))
        self.table, self.stores, primary, epoch = self._find_state()
        self.owner = self.table.register_owner()
        value_words = config["value_bytes"] // 8
        self.client = Client([(store["address"], store["port"]) for store in self.stores], config["client_id"],
                             config["value_bytes"], config["cluster"], epoch, timeout_s=CONNECT_S)  # fmt: skip
        self.engine: Engine = make_engine(self.chain, self.frames, primary, self.owner, epoch, value_words,
                                          len(self.stores), spin_us=config.get("spin_us", 5.0))  # fmt: skip
        self.primary, self.epoch, self.tried_at = primary, epoch, 0.0
        self.housekeeper = Housekeeper(self.chain, self._make_reader)

    def _find_state(self) -> tuple[Table, list[dict[str, Any]], np.ndarray, int]:
        """Return the table on this host, the remote stores, the primaries by partition, and the map's epoch."""
        config = self.config
        if config["map"] is None:
            table = Table.private(config["capacity"], config["value_bytes"])
            return table, [], np.full(PARTITIONS, HERE), 1
        partition_map = PartitionMap.from_json(config["map"])
        table = Table.attach(config["table"]) if config["table"] else Table.private(PARTITIONS * 8, config["value_bytes"])
        stores = [store for store in config["stores"] if store["host"] != config["host"] or not config["table"]]
        numbers = {store["host"]: number for number, store in enumerate(stores)}
        primary = [numbers.get(group[0], HERE) for group in partition_map.replicas]
        return table, stores, np.array(primary), partition_map.epoch

    def _make_reader(self) -> Reader:
        """Return a reader of the state with connections of its own."""
        config = self.config
        client = Client([(store["address"], store["port"]) for store in self.stores], READER_CLIENTS + config["client_id"],
                        config["value_bytes"], config["cluster"], self.epoch, timeout_s=READ_S)  # fmt: skip
        return Reader(self.table, client, self.primary, self.epoch)

    def connect(self) -> None:
        """Connect to every store host; one that does not answer is marked down and tried again later."""
        for host in range(len(self.stores)):
            self._reconnect(host)

    def _reconnect(self, host: int) -> None:
        try:
            self.client.connect(host)
            self.engine.control[DOWN] &= ~(1 << host)
        except (NearstateError, OSError):
            self.engine.control[DOWN] |= 1 << host

    def mend(self) -> None:
        """Try the store hosts that are down, a few times a second."""
        down = int(self.engine.control[DOWN])
        if down and time.monotonic() - self.tried_at > RECONNECT_S:
            self.tried_at = time.monotonic()
            for host in range(len(self.stores)):
                if down >> host & 1:
                    self._reconnect(host)

    def process_packets(self, duration_ns: int = SLICE_NS) -> None:
        """Run the packet loop for a while."""
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
                "down": int(control[DOWN]), "port_kind": self.opened[0].kind,
                "rss_kbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}  # fmt: skip


def main(config: dict[str, Any], control: Any) -> None:
    """Process target: sends {"ready": true}, answers {"statistics": true} and {"settings": {function: {name: value}}}, ends at
    {"stop": true}."""
    process = Process(config)
    process.connect()
    process.process_packets(0)
    for opened in process.opened:  # whoever is told "ready" may send at once
        refill(opened.port, process.frames)
    control.send({"ready": True, "port_kind": process.opened[0].kind})
    while True:
        process.process_packets()
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
