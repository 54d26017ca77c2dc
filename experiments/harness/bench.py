"""The system under test of one trial: an emulated network with stores, NF processes and the workload running on it.

    bench = Bench(trial, experiment, network, launcher); bench.start(); bench.step(offered_kpps=50, seconds=1); bench.stop()

A step offers one load for a while and tells where every packet went.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datastore import placements
from datastore.base.errors import NearstateError, unknown
from datastore.base.partitioning import PARTITIONS
from datastore.placements import Cluster
from datastore.security.secret import CLIENT, Secret
from datastore.store.inspection import Record
from datastore.store.table import Table
from experiments.harness import accounting, spec
from experiments.harness.spec import Experiment, Trial, peer_names
from experiments.workloads import timeline
from experiments.workloads.traffic import CHOICES, packets_in
from nfs.dataplane.port import KINDS
from topologies.emulation import topology
from topologies.emulation.network import EmulatedHost, Network
from topologies.emulation.processes import Launcher, RunningProcess

STORE_PORT, COORDINATOR_PORT = 7077, 7070
READY_S = 60.0
SATURATION_KPPS = 3000.0
"""More than any path here carries: bounds the sink's bit map when the load is "as fast as possible"."""
SYMMETRIC, ASYMMETRIC = PATHS = ("symmetric", "asymmetric")
"""Whether the answers of a partition come back by the NF host that its packets went out by, or by another one."""


class Bench:
    """Everything that runs for one trial. Start it inside a started network, stop it before the network stops."""

    def __init__(self, trial: Trial, experiment: Experiment, network: Network, launcher: Launcher) -> None:
        self.trial, self.experiment, self.network, self.launcher = trial, experiment, network, launcher
        self.is_peer = trial.placement in peer_names()
        self.stores: dict[str, RunningProcess] = {}
        self.functions: dict[str, RunningProcess] = {}
        self.coordinator: RunningProcess | None = None
        self._coordinator_config: dict[str, Any] = {}
        self.instances = 0
        self.generator: RunningProcess | None = None
        self.sink: RunningProcess | None = None
        self.peer: Any = None
        self.disturbed: dict[str, int] = {}
        """Hosts that a procedure gave a reason to be taken for dead, and since when (CLOCK_MONOTONIC, ns)."""
        self.extra: list[RunningProcess] = []
        self.steps = 0
        self.lost: set[str] = set()
        self._offered: tuple[float, float, dict[str, Any]] | None = None
        self.overrides: dict[str, Any] = {}
        self.function_main = "nfs.dataplane.process:main"
        """What an NF process runs; a test may have it run a function that is none of `nfs/`."""
        self.secret = Secret.fresh()

    @property
    def stages(self) -> list[list[str]]:
        """The NF hosts of each stage of the chain, the innermost stage first; one stage with all of them for most trials."""
        return spec.staged([host.name for host in self.nf_hosts], self.trial.nf)

    def _hosts(self, role: str) -> list[EmulatedHost]:
        return [host for host in self.network.hosts.values() if host.role == role]

    @property
    def nf_hosts(self) -> list[EmulatedHost]:
        """The hosts that run an NF."""
        return self._hosts("nf")

    def cluster(self, stage: Sequence[str]) -> Cluster:
        """Return what the placement may know of a stage: its state is placed as if its hosts were the only ones."""
        stores = tuple(host.name for host in self._hosts("store"))
        return Cluster(tuple(stage), stores, tuple(steering_of(stage)), self.trial.replicas)

    @property
    def settings(self) -> dict[str, Any]:
        """The procedure's parameters for this trial."""
        return {**settings(self.trial, self.experiment), **self.overrides}

    @property
    def traffic(self) -> dict[str, Any]:
        """The workload's parameters for this trial: the experiment's, with the trial's seed and number of flows."""
        flows = {"flows": self.settings["flows"]} if self.settings.get("flows") else {}
        return {**self.experiment.traffic, **flows, "seed": self.trial.seed}

    def start(self) -> None:
        """Start all of it: state, network functions, workload; returns when everything is ready."""
        self.start_state()
        self.start_functions()
        self.start_workload()

    def start_state(self) -> None:
        """Start the store processes, or the peer in their place."""
        if self.is_peer:
            self.peer = importlib.import_module(f"experiments.peers.{self.trial.placement}").start(self)
        else:
            self._start_stores()

    def wait_ready(self, processes: list[RunningProcess]) -> None:
        """Wait until each process says so. Raises NearstateError naming the first that does not."""
        for process in processes:
            if not (process.receive(READY_S) or {}).get("ready"):
                raise NearstateError(f"{process.name} was not ready after {READY_S:g} s; its log is {process.log}")

    def table_name(self, host: str) -> str:
        """Return the shared memory name of a host's store."""
        return f"nearstate-{self.network.run_id}-{host}"

    @property
    def cluster_id(self) -> int:
        """A number that keeps stores and clients of different trials apart."""
        return self.secret.cluster

    @property
    def secret_path(self) -> Path:
        """The secret of this trial, for tools: `python -m datastore status ADDRESS --secret FILE`."""
        return Path("/dev/shm", f"nearstate-{self.network.run_id}.secret")

    def _keep_secret(self) -> None:
        """Leave the secret where tools of this user find it, until the run ends."""
        Path(self.launcher.journal.shared_memory(self.secret_path.name)).unlink(missing_ok=True)
        self.secret.write(self.secret_path)

    def stores_of(self, stage: Sequence[str]) -> tuple[str, ...]:
        """Return the hosts that keep the state of a stage; those with role "store" keep that of all stages."""
        return placements.load(self.trial.placement).store_hosts(self.cluster(stage))

    def map_of(self, stage: Sequence[str]) -> dict[str, Any] | None:
        """Return the partition map of a stage's state as JSON data; None when its functions keep it to themselves."""
        placement = placements.load(self.trial.placement)
        return placement.map(self.cluster(stage)).to_json() if self.stores_of(stage) else None

    @property
    def is_coordinated(self) -> bool:
        """Whether a coordinator keeps the map, because there are replicas or the trial says so."""
        return bool(self.trial.replicas > 1 or self.settings["coordinated"])

    @property
    def _state_names(self) -> list[str]:
        """The coordinator's state in /dev/shm, and what is to take its place: as if `control` had a disk of its own.

        On the disk that a box shares with everybody who writes, a save was seen to take 0.5 s, and with it a failover.
        """
        name = f"nearstate-{self.network.run_id}-coordinator"
        return [name, f"{name}.new"]

    def _start_coordinator(self, stage: Sequence[str]) -> None:
        """Start the coordinator of the one stage that there is, on the `control` host."""
        if len(self.stages) > 1 or "control" not in self.network.hosts:
            raise NearstateError(f"replicas={self.trial.replicas}, nf={self.trial.nf!r}, topology={self.trial.topology!r}: a "
                                 "coordinator needs a host `control` (topology rack) and a chain of one stage")  # fmt: skip
        for name in self._state_names:
            Path(self.launcher.journal.shared_memory(name)).unlink(missing_ok=True)
        state = Path("/dev/shm", self._state_names[0])
        self.steer_all()
        mapped = self.map_of(stage)
        placement = mapped["replicas"] if mapped else [[] for _ in range(PARTITIONS)]
        controller = str(self.network.commands_path()) if self.network.switch else ""
        steering = {"instances": list(stage), "steering": steering_of(stage), "controller": controller,
                    "aligned": placements.load(self.trial.placement).store_role == "nf"}  # fmt: skip
        self._coordinator_config = {
            "address": self.storage_address("control"), "port": COORDINATOR_PORT, "cluster": self.cluster_id,
            "replicas": self.trial.replicas, "hosts": list(self.stores_of(stage)), "placement": placement, "state": str(state),
            "lease_ms": self.settings["lease_ms"] or None, "steering": steering}  # fmt: skip
        self.restart_coordinator()

    def ask_coordinator(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return its answer to a command (`datastore/coordination/process.py`). Raises NearstateError when it refuses."""
        if self.coordinator is None:
            raise NearstateError("this trial has no coordinator: give it replicas=2 or coordinated=True")
        self.coordinator.send(dict(message))
        answer = self.coordinator.receive(READY_S) or {"error": f"no answer; its log is {self.coordinator.log}"}
        if "error" in answer:
            raise NearstateError(f"coordinator: {answer['error']}")
        return answer

    def status(self) -> dict[str, Any]:
        """Return the coordinator's picture: map, hosts, leases, moves, steering."""
        return dict(self.ask_coordinator({"status": True})["status"])

    def wait_full(self, timeout_s: float = READY_S) -> float:
        """Wait until every group has its replicas, all know it, and no move is under way; returns how long it took in seconds."""
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            status = self.status()
            groups, epoch = status["map"]["groups"], status["map"]["epoch"]
            alive = [host for host in status["hosts"].values() if host["lease_ms"] > 0]
            wanted = min(self.trial.replicas, len(alive))
            full = all(len(g["members"]) == wanted and not g["leaving"] and not g["learners"] for g in groups if g["members"])
            if full and alive and not status["moves"] and all(host["epoch"] == epoch for host in alive):
                return time.monotonic() - began
            time.sleep(0.01)
        raise NearstateError(f"the stores have not {self.trial.replicas} copies of everything after {timeout_s:g} s: "
                             f"{self.status()['log']}")  # fmt: skip

    def move(self, partitions: Sequence[int], target: str, timeout_s: float = READY_S) -> float:
        """Make `target` the primary of partitions, whose packets follow; returns how long it took, in seconds."""
        began = time.monotonic()
        self.ask_coordinator({"move": {"partitions": [int(p) for p in partitions], "target": target}})
        while time.monotonic() - began < timeout_s:
            if not self.ask_coordinator({"moves": True})["moves"]:
                took, groups = time.monotonic() - began, self.status()["map"]["groups"]
                if all(groups[p]["members"][:1] == [target] for p in partitions):
                    return took
                raise NearstateError(f"partitions were not moved to {target}: {self.status()['log'][-1:]}")
            time.sleep(0.005)
        raise NearstateError(f"{len(partitions)} partitions are not at {target} after {timeout_s:g} s")

    def _replication(self, host: str, stage: Sequence[str]) -> dict[str, Any]:
        """Return what a store's configuration says of replication."""
        peers = [{"host": name, "address": self.storage_address(name), "port": STORE_PORT}
                 for name in self.stores_of(stage) if name != host]  # fmt: skip
        return {"coordinators": [[self.storage_address("control"), COORDINATOR_PORT]], "peers": peers,
                "asynchronous": self.settings["asynchronous"], "lease_ms": self.settings["lease_ms"] or None}  # fmt: skip

    def _start_stores(self) -> None:
        self._keep_secret()
        if self.is_coordinated:
            self._start_coordinator(self.stages[0])
        stage_of = {host: stage for stage in self.stages for host in self.stores_of(stage)}
        for host, stage in stage_of.items():
            self.launcher.journal.shared_memory(self.table_name(host))
            self._start_store(host, stage)
        self.wait_ready(list(self.stores.values()))
        if self.stores and self.is_coordinated:
            self.wait_full()

    def _start_store(self, host: str, stage: Sequence[str]) -> None:
        config = {"host": host, "table": self.table_name(host), "capacity": self.settings["capacity"],
                  "value_bytes": self.settings["value_bytes"], "address": self.storage_address(host), "port": STORE_PORT,
                  "cluster": self.cluster_id, "map": self.map_of(stage), "create": True,
                  **({"replication": self._replication(host, stage)} if self.is_coordinated else {})}  # fmt: skip
        target = "datastore.process.store:main"
        self.stores[host] = self.launcher.spawn(f"store-{host}", self.network.hosts[host], target, config, key=self.secret.key)

    def restart_store(self, host: str) -> None:
        """Start a killed store process again: with an empty table, as after the loss of the host; it joins as a backup."""
        Path("/dev/shm", self.table_name(host)).unlink(missing_ok=True)
        self._start_store(host, next(stage for stage in self.stages if host in self.stores_of(stage)))
        self.wait_ready([self.stores[host]])

    def return_host(self, name: str) -> None:
        """Bring a lost host back: its links, and a store process with an empty table, which joins as a backup; no NF process."""
        self.lost.discard(name)
        self.functions.pop(name, None)
        self.network.mend(name)
        self.restart_store(name)

    def restart_coordinator(self) -> None:
        """Start a killed coordinator again, from the state it saved."""
        assert self._coordinator_config
        host, target = self.network.hosts["control"], "datastore.coordination.process:main"
        self.coordinator = self.launcher.spawn("coordinator", host, target, self._coordinator_config, prompt=True,
                                             key=self.secret.key)  # fmt: skip
        self.wait_ready([self.coordinator])

    def records(self, host: str) -> list[Record]:
        """Return the records of a store's table, whatever is happening to it."""
        table = Table.attach(self.table_name(host))
        try:
            return list(table.records())
        finally:
            table.close()

    def storage_address(self, host: str) -> str:
        """Return a host's address on the storage network; where there is none, its store listens for nobody on loopback."""
        storage = self.network.hosts[host].interfaces.get("storage")
        return str(storage.ipv4).partition("/")[0] if storage else "127.0.0.1"

    def start_functions(self) -> None:
        """Start an NF process on every NF host, if the trial has an NF, and steer the partitions to them."""
        if self.trial.nf and not self.is_peer:
            self._start_functions()
        if self.coordinator is None:
            self.steer_all()

    def steer_all(self) -> None:
        """Have the switch do what a trial begins with. Where there is a coordinator, before it: from then on it has its word."""
        self.network.chain(self.stages)
        self.steer(self.settings["paths"])

    def steer(self, paths: str) -> None:
        """Steer every partition in every stage, its answers back the same way or by another NF host (`steering`)."""
        for stage in self.stages if self.network.switch else ():
            ways = list(zip(steering_of(stage), steering_of(stage, paths), strict=True))
            for forward, back in sorted(set(ways)):
                self.network.steer([p for p in range(PARTITIONS) if ways[p] == (forward, back)], forward, back)

    def restart_function(self, host: str) -> None:
        """Start another NF process in place of a killed one."""
        self._start_function(host)
        self.wait_ready([self.functions[host]])

    def _start_functions(self) -> None:
        for host in self.nf_hosts:
            self._start_function(host.name)
        self.wait_ready(list(self.functions.values()))

    def _start_function(self, host: str) -> None:
        number = [each.name for each in self.nf_hosts].index(host)
        self.instances += 1
        config = self.function_config(host, number)
        self.functions[host] = self.launcher.spawn(f"nf-{host}", self.nf_hosts[number], self.function_main, config,
                                                   key=self.client_key(host, config["client_id"]))  # fmt: skip

    def client_key(self, host: str, client_id: int) -> bytes:
        """Return the key of a client of the stores; it proves to be this one alone."""
        return self.secret.credential(CLIENT, host, client_id).key

    def function_config(self, host: str, number: int) -> dict[str, Any]:
        """Return the configuration of the NF process on `host`: its stage's functions, their settings and their state."""
        at, stage = next((at, stage) for at, stage in enumerate(self.stages) if host in stage)
        chains = spec.stages(self.trial.nf)
        elsewhere = {name for chain in chains for name in chain} - set(chains[at])
        return {"chain": chains[at], "host": host, "inside": "inside", "outside": "outside",
                "settings": {name: given for name, given in self.settings["functions"].items() if name not in elsewhere},
                "port_kind": self.settings["port_kind"], "value_bytes": self.settings["value_bytes"], "cluster": self.cluster_id,
                "capacity": self.settings["capacity"], "map": self.map_of(stage), "client_id": number + 1,
                "table": self.table_name(host) if host in self.stores else None,
                "stores": [{"host": name, "address": self.storage_address(name), "port": STORE_PORT}
                           for name in self.stores_of(stage)],
                **(self._following(number) if self.is_coordinated else {}),
                "spin_us": 5.0 if (os.cpu_count() or 1) < 8 else 50.0}  # fmt: skip

    def _following(self, number: int) -> dict[str, Any]:
        """Return what the configuration of an NF process says in a cluster. No two processes ever share a client id."""
        return {"coordinators": [[self.storage_address("control"), COORDINATOR_PORT]],
                "lease_ms": self.settings["lease_ms"] or None, "echoes": self.network.switch is not None,
                "client_id": self.instances << 8 | number + 1}  # fmt: skip

    def change_settings(self, functions: Mapping[str, Mapping[str, Any]]) -> None:
        """Give network functions other settings, by function and name, while they run: every instance, one after the other.

        Raises NearstateError when one refuses.
        """
        for process in self.functions.values():
            process.send({"settings": functions})
            answer = process.receive(READY_S) or {}
            if not answer.get("changed"):
                raise NearstateError(f"{process.name} did not change its settings: {answer.get('error', 'no answer')}")

    def start_workload(self) -> None:
        """Start sink and generator."""
        client, server = (self.network.hosts[name] for name in ("client", "server"))
        kind = {"interface": "net", "port_kind": self.settings["port_kind"]}
        next_hop = self.peer.next_hop_mac if self.peer else server.interfaces["net"].mac
        traffic = self.traffic
        self.sink = self.launcher.spawn("sink", server, "experiments.workloads.sink:main", kind)
        self.generator = self.launcher.spawn(
            "generator", client, "experiments.workloads.generator:main",
            kind | {"source_mac": client.interfaces["net"].mac, "next_hop_mac": next_hop,
                    "server": str(server.interfaces["net"].ipv4).partition("/")[0], "traffic": traffic}, prompt=True)  # fmt: skip
        self.wait_ready([self.sink, self.generator])

    def warm_up(self) -> None:
        """Send every flow's first packet, at a load everything carries, so that records exist before anything is measured."""
        flows = min(int(self.traffic.get("flows", 1000)), CHOICES)
        rate = self.settings["warmup_kpps"]
        self.step(rate, max(0.1, flows / rate / 1000))

    def step(self, offered_kpps: float, seconds: float) -> dict[str, Any]:
        """Offer a load (0: as fast as the path takes it) and return one point's metrics, histogram, ledger and validity."""
        self.offer(offered_kpps, seconds)
        return self.finish()

    def offer(self, offered_kpps: float, seconds: float, time_line: Mapping[str, Any] | None = None) -> int:
        """Begin a step and return while its load runs, so that something can be done to the path; `finish` ends it.

        time_line: {"bin_us", "watch"} (`workloads/timeline.py`), told by `time_line`; None: not kept. Returns about when the
        load began, in ns of CLOCK_MONOTONIC.
        """
        assert self.generator
        assert self.sink
        self.steps += 1
        before = self.counters()
        line = {"time_line": {"seconds": seconds * 1.2 + 0.5, **time_line}} if time_line else {}
        packets = 2 * packets_in(offered_kpps or SATURATION_KPPS, seconds)
        self.sink.send({"step": self.steps, "packets": packets, **line})
        self.sink.receive(READY_S)
        self.generator.send({"step": self.steps, "offered_kpps": offered_kpps, "seconds": seconds})
        self._offered = offered_kpps, seconds, before
        return time.monotonic_ns()

    def finish(self) -> dict[str, Any]:
        """Wait for the end of the load that `offer` began and return the step's point."""
        assert self.generator
        assert self._offered
        offered_kpps, seconds, before = self._offered
        sent = self.generator.receive(seconds * 2 + READY_S)
        if sent is None:
            raise NearstateError(f"generator did not end a step of {seconds:g} s; its log is {self.generator.log}")
        arrived = self._drain(sent["sent"])
        after = self.counters()
        growth = accounting.since(after, before)
        reasons = accounting.doubts(offered_kpps, self.settings["lateness_limit_us"], sent, after)
        fidelity = accounting.fidelity(sent, growth) | self._steadiness()
        return {"sweep": {"offered_kpps": offered_kpps} if offered_kpps else {"load": "saturated"},
                "metrics": accounting.metrics(sent, arrived, growth), "histograms": {"latency_ns": arrived["histogram"]},
                "valid": not reasons, "invalid_reasons": reasons, "fidelity": fidelity,
                "ledger": accounting.path_ledger(sent, arrived, growth)}  # fmt: skip

    def _steadiness(self) -> dict[str, int]:
        """Return how many false failovers there were since the trial's start, where a coordinator could make any."""
        return {"false_failovers": len(self.false_failovers())} if self.coordinator else {}

    def _drain(self, sent: int) -> dict[str, Any]:
        """Wait until nothing more arrives (at most half a second) and return the sink's counts."""
        assert self.sink
        counts: dict[str, Any] = {"received": -1}
        for pause_s in (0.01, 0.04, *[0.05] * 9):
            time.sleep(pause_s)
            before = counts["received"]
            self.sink.send({"collect": self.steps})
            counts = self.sink.receive(READY_S) or counts
            if counts["received"] in (before, sent):
                break
        return counts

    def time_line(self) -> timeline.Told:
        """Return what happened when in the last step, which was offered with a time line."""
        assert self.sink
        self.sink.send({"tell": self.steps})
        return timeline.Told.of(self.sink.receive(READY_S) or {})

    # ---- failovers that nothing called for ----------------------------------------------------------------------------

    def disturb(self, host: str) -> None:
        """Remember that a host is given a reason, from now on, to be taken for dead."""
        self.disturbed.setdefault(host, time.monotonic_ns())

    def cut(self, host: str, interface: str | None = None) -> None:
        """Cut a host off (`Network.cut`). Raises NearstateError for a host or an interface that does not exist."""
        self.disturb(host)
        self.network.cut(host, interface)

    def false_failovers(self) -> list[dict[str, Any]]:
        """Return the failovers since the trial's start of hosts, or processes on them, that had no trouble of ours before."""
        there = self.coordinator is not None and self.coordinator.poll() is None
        return [failover for failover in (self.status()["failovers"] if there else [])
                if not any(self.disturbed.get(host, failover["at_ns"]) < failover["at_ns"]
                           for host in (failover["host"], failover["by"]))]  # fmt: skip

    def lose(self, what: str, host: str) -> int:
        """Lose a host, or one thing of it (LOSSES), at once; returns when, in ns of CLOCK_MONOTONIC. Raises NearstateError."""
        if what == "host":
            return self.lose_host(host)
        processes = {"function": self.functions, "store": self.stores}
        if what in processes and host not in processes[what]:
            raise NearstateError(f"{host} has no {what} that could be lost")
        self.disturb(host)
        lost_ns = time.monotonic_ns()
        if what == "link":
            self.network.cut(host, "inside")
        elif what == "store":
            self.stores[host].signal(signal.SIGKILL)
        else:  # what it counted is lost with it
            self.functions.pop(host).signal(signal.SIGKILL)
        return lost_ns

    def lose_host(self, name: str) -> int:
        """Lose a host at once: its processes stop where they are, its interfaces go down, so that no reset of a connection tells
        the others, then the processes are killed. To cut three interfaces takes the kernel some 5 ms; hence the stop first.

        Returns when, in ns of CLOCK_MONOTONIC. What its processes counted is lost with them. Raises NearstateError for a host
        that does not exist, or that is lost already.
        """
        there = sorted(set(self.network.hosts) - self.lost)
        if name not in there:
            raise NearstateError(f"host {name!r} cannot be lost: {', '.join(there)} are there")
        running = self.launcher.on_host(name)
        self.disturb(name)
        self.lost.add(name)
        lost_ns = time.monotonic_ns()
        for process in running:
            os.kill(process.pid, signal.SIGSTOP)
        self.network.cut(name)
        for process in running:
            process.signal(signal.SIGKILL)
        return lost_ns

    def function_statistics(self) -> dict[str, dict[str, Any]]:
        """Return the counters of each NF process that is not lost with its host."""
        there = {name: process for name, process in self.functions.items() if name not in self.lost}
        for process in there.values():
            process.send({"statistics": True})
        return {name: process.receive(READY_S) or {} for name, process in there.items()}

    def counters(self) -> dict[str, Any]:
        """Return what is compared before and after a step."""
        cpu = {"nf_cpu_s": self.functions, "store_cpu_s": self.stores}
        counters = {name: sum(process.cpu_seconds() for process in group.values()) for name, group in cpu.items() if group}
        if self.network.switch:
            counters["switch_cpu_s"] = self.network.switch.cpu_seconds()
        if self.stores:
            counters["storage_bytes"] = float(sum(self.network.sent_bytes("storage").values()))
        switch_drops = self.network.switch.port_statistics() if self.network.switch else {}
        return {**counters, "functions": self.function_statistics(), "switch_drops": switch_drops, "busy_s": busy_seconds(),
                "now_s": time.monotonic()}  # fmt: skip

    def memory(self) -> dict[str, float]:
        """Return resident memory of the largest NF and the largest store process."""
        found = {"nf_rss_mbytes": self.functions, "store_rss_mbytes": self.stores}
        return {name: max(process.rss_bytes() for process in group.values()) / 1e6 for name, group in found.items() if group}

    def stop(self) -> None:
        """Stop the processes of this trial; what hangs is killed."""
        workload = [process for process in (self.generator, self.sink) if process]
        coordinator = [self.coordinator] if self.coordinator else []
        for process in [*workload, *self.extra, *self.functions.values(), *coordinator, *self.stores.values()]:
            process.kill()
        if self.peer:
            self.peer.stop()
        names = [self.secret_path.name, *(self.table_name(host) for host in self.stores)]
        if self._coordinator_config:
            names += self._state_names
            with contextlib.suppress(FileNotFoundError):
                kept = f"coordinator-{self.trial.name.replace('/', '_')}.json"
                shutil.copyfile(self._coordinator_config["state"], self.launcher.logs / kept)
        for name in names:
            Path("/dev/shm", name).unlink(missing_ok=True)
            self.launcher.journal.forget("shared_memory", name)


def settings(trial: Trial, experiment: Experiment) -> dict[str, Any]:
    """Return the procedure's parameters as a trial has them."""
    procedure = importlib.import_module(f"experiments.harness.procedures.{experiment.procedure}")
    return {**procedure.SETTINGS, **experiment.settings, **trial.settings, **trial.sweep}


def steering_of(stage: Sequence[str], paths: str = SYMMETRIC) -> list[str]:
    """Return the host of a stage that each partition's packets are sent to: round robin. With asymmetric paths, the one that
    its answers are sent to: the next one.

    Raises NearstateError for other paths, and for asymmetric ones with a single host.
    """
    if paths not in PATHS:
        raise unknown("value of setting paths", paths, PATHS)
    if paths == ASYMMETRIC and len(stage) < 2:
        raise NearstateError(f"paths={paths!r} with {len(stage)} NF host: answers need another one, so at least 2")
    return [stage[(partition + (paths == ASYMMETRIC)) % len(stage)] for partition in range(PARTITIONS)]


def network_parameters(trial: Trial, experiment: Experiment) -> dict[str, Any]:
    """Return the topology's parameters: a store host only where the placement (or the peer) keeps state on one."""
    if trial.placement in peer_names():
        role = getattr(importlib.import_module(f"experiments.peers.{trial.placement}"), "STORES", None)
    else:
        role = placements.load(trial.placement).store_role
    swept = {key: trial.sweep[key] for key in topology.parameters(trial.topology) if key in trial.sweep}
    return {"store_hosts": trial.replicas if role == "store" else 0, **experiment.network, **swept}


def sleep_until(when_ns: int) -> None:
    """Sleep until a time of CLOCK_MONOTONIC; not at all when it is over."""
    time.sleep(max(0, when_ns - time.monotonic_ns()) / 1e9)


def busy_seconds() -> float:
    """Return the CPU seconds the whole machine has spent busy since it started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


COMMON_SETTINGS: Mapping[str, Any] = {"capacity": 1 << 16, "value_bytes": 32, "port_kind": "auto", "warmup_kpps": 20.0,
                                      "lateness_limit_us": accounting.LATENESS_LIMIT_US, "paths": SYMMETRIC,
                                      "functions": {}, "recorded": False, "coordinated": False, "asynchronous": False,
                                      "lease_ms": 0.0}  # fmt: skip
"""Settings every procedure has: the store's size, the port kind, the warm-up's load, the gate on the generator's lateness, by
which NF host answers come back, the network functions' own settings by function and name, and whether every interface is
recorded (which costs speed: a recorded trial is no repeat of one that is not); whether a coordinator keeps the map although there
is one replica of all; whether packets leave before their changes are committed; the lease, 0 for the default of 80 ms."""

LOSSES = ("host", "function", "store", "link")
"""What can be lost: a whole host, its NF process, its store process, the link by which packets reach it."""

CHOICES_OF: Mapping[str, tuple[str, ...]] = {"paths": PATHS, "port_kind": ("auto", *KINDS), "lost": LOSSES}
"""The values of settings that are one of a few words."""
