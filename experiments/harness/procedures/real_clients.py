"""What real programs get through the NF: goodput of streams and downloads, rate and latency of web requests.

A workload is one program at work; each is a point. A download whose checksum is wrong, a request that failed and a ledger that
does not balance make their point invalid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datastore.native.errors import NearstateError, unknown
from experiments.harness import accounting
from experiments.harness.bench import COMMON_SETTINGS, READY_S, Bench
from topologies.emulation.processes import RunningProcess

WORKLOADS = ("tcp", "udp", "download", "requests", "many_connections", "new_connections", "handshakes")
SETTINGS = {**COMMON_SETTINGS, "workloads": WORKLOADS, "seconds": 1, "udp_mbps": 100.0, "small_bytes": 1024,
            "large_bytes": 10_000_000, "downloads": 3, "connections": 16, "many": 1000, "handshakes": 200}  # fmt: skip
ANSWER_S = 120.0
SMALL, LARGE = "small", "large"
Answer = dict[str, Any]


class RealClients:
    """Servers on one host and clients on another, of a started bench."""

    def __init__(self, bench: Bench, client: str = "client", server: str = "server") -> None:
        self.bench, settings = bench, bench.settings
        hosts = bench.network.hosts
        address = str(hosts[server].interfaces["net"].ipv4).partition("/")[0]
        files = {SMALL: int(settings["small_bytes"]), LARGE: int(settings["large_bytes"])}
        self.servers = self._spawn("servers", server, {"address": address, "files": files, "seed": bench.trial.seed})
        told = self._ready(self.servers)
        self.sha256: dict[str, str] = told["sha256"]
        keys = {name: told[name] for name in ("user_key", "host_key")}
        self.clients = self._spawn("clients", client, {"address": address, **keys})
        self._ready(self.clients)

    def _spawn(self, role: str, host: str, config: dict[str, Any]) -> RunningProcess:
        target = f"experiments.workloads.real_{role}:main"
        process = self.bench.launcher.spawn(f"{role}-on-{host}", self.bench.network.hosts[host], target, config)
        self.bench.extra.insert(0, process)  # clients end before their servers, and say so
        return process

    @staticmethod
    def _ready(process: RunningProcess) -> Answer:
        answer = process.receive(READY_S)
        if not answer:
            raise NearstateError(f"{process.name} was not ready after {READY_S:g} s; its log is {process.log}")
        return answer

    def begin(self, action: str, **arguments: Any) -> None:
        """Have the clients do something; `end` returns what came of it."""
        self.clients.send({"do": action, **arguments})

    def end(self) -> Answer:
        """Return the action's result; where its program failed, {"failed": what it said}."""
        answer = self.clients.receive(ANSWER_S)
        if answer is None:
            raise NearstateError(f"{self.clients.name} did not answer in {ANSWER_S:g} s; its log is {self.clients.log}")
        return answer

    def do(self, action: str, **arguments: Any) -> Answer:
        """Begin and end."""
        self.begin(action, **arguments)
        return self.end()

    def stacks(self) -> dict[str, dict[str, int]]:
        """Return the trouble counted by the kernels of both ends: segments sent again, datagrams no reader came for in time."""
        wanted = {"Tcp": ("RetransSegs",), "Udp": ("RcvbufErrors",)}
        return {process.name: protocol_counters(process.pid, wanted) for process in (self.clients, self.servers)}

    def connections(self) -> int:
        """Return how many connections are established at the web server now."""
        self.servers.send({"connections": True})
        return int((self.servers.receive(READY_S) or {}).get("connections", -1))


def protocol_counters(pid: int, wanted: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return counters of a process's network namespace by name (/proc/net/snmp, names after RFC 4022 and RFC 4113)."""
    lines = [line.split() for line in Path(f"/proc/{pid}/net/snmp").read_text().splitlines()]
    counters = {names[0].rstrip(":"): dict(zip(names[1:], values[1:])) for names, values in zip(lines[::2], lines[1::2])}
    return {name: int(counters[protocol][name]) for protocol, names in wanted.items() for name in names}


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return one point for each workload."""
    bench.start_state()
    bench.start_functions()
    real = RealClients(bench)
    for name in bench.settings["workloads"]:
        if name not in WORK:
            raise unknown("workload", name, WORK)
    points = [point(bench, real, name) for name in bench.settings["workloads"]]
    points[-1]["metrics"] |= bench.memory()
    return points


def point(bench: Bench, real: RealClients, workload: str) -> dict[str, Any]:
    """Do one workload and account for its packets."""
    before, stacks = bench.counters(), real.stacks()
    answer = WORK[workload](real, bench.settings)
    time.sleep(0.1)  # the last segments of what was closed
    after = bench.counters()
    growth, stacks = accounting.since(after, before), accounting.since(real.stacks(), stacks)
    reasons = accounting.imbalances(after["functions"]) + answer.pop("reasons", [])
    if "failed" in answer:
        reasons.append(f"{workload}: {answer.pop('failed')}")
    nf = accounting.instance_ledger(growth["functions"])
    kernel, devices = accounting.kernel_drops(growth["functions"])
    lost = accounting.without_zeros({"nf_kernel": kernel, "devices": devices, "switch": growth["switch_drops"]})
    lost |= accounting.without_zeros({"readers": {end: counts["RcvbufErrors"] for end, counts in stacks.items()}})
    histogram = answer.pop("histogram", "")
    retransmitted = sum(counts["RetransSegs"] for counts in stacks.values())
    return {"sweep": {"workload": workload}, "metrics": {**answer, "retransmitted": retransmitted, "packets": nf["received"]},
            "histograms": {"latency_ns": histogram} if histogram else {}, "valid": not reasons, "invalid_reasons": reasons,
            "fidelity": {"cpu_saturation": accounting.saturation(growth)}, "ledger": {"nf": nf, **lost}}  # fmt: skip


def tcp(real: RealClients, settings: Answer) -> Answer:
    return real.do("stream", seconds=whole(settings))


def udp(real: RealClients, settings: Answer) -> Answer:
    return real.do("stream", seconds=whole(settings), udp_mbps=settings["udp_mbps"])


def download(real: RealClients, settings: Answer) -> Answer:
    """Files one after the other, each compared with what the server has."""
    answer = real.do("download", file=LARGE, count=int(settings["downloads"]))
    if "failed" in answer:
        return answer
    wrong = sum(found != real.sha256[LARGE] for found in answer["sha256"])
    return {"goodput_mbps": answer["bytes"] * 8 / answer["seconds"] / 1e6,
            "reasons": [f"{wrong} downloads have the wrong checksum"] if wrong else []}  # fmt: skip


def requests(real: RealClients, settings: Answer) -> Answer:
    return requested(real.do("request", file=SMALL, connections=int(settings["connections"]), seconds=whole(settings)))


def many_connections(real: RealClients, settings: Answer) -> Answer:
    """All connections open at the same time and in use; counted at the server, in the middle."""
    many = int(settings["many"])
    real.begin("request", file=SMALL, connections=many, seconds=whole(settings))
    time.sleep(0.7 * whole(settings))
    established = real.connections()
    answer = requested(real.end())
    if established < many:
        answer.setdefault("reasons", []).append(f"{established} of {many} connections were open at the same time")
    return {**answer, "connections": established}


def new_connections(real: RealClients, settings: Answer) -> Answer:
    answer = real.do("request", file=SMALL, connections=int(settings["connections"]), seconds=whole(settings), keep=False)
    return requested(answer)


def handshakes(real: RealClients, settings: Answer) -> Answer:
    """One connection after the other: what a user waits for the first answer, its handshake included."""
    answer = real.do("connect", file=SMALL, count=int(settings["handshakes"]))
    return requested({**answer, "requests": answer["connections"], "failed": 0}) if "failed" not in answer else answer


WORK: dict[str, Callable[[RealClients, Answer], Answer]] = {
    work.__name__: work for work in (tcp, udp, download, requests, many_connections, new_connections, handshakes)
}


def whole(settings: Answer) -> int:
    """Return a workload's seconds: iperf3 and wrk take whole ones only."""
    return max(1, math.ceil(settings["seconds"]))


def requested(answer: Answer) -> Answer:
    """Return the metrics of requests that were made; any that failed is a reason to doubt."""
    if isinstance(answer.get("failed"), str):
        return answer
    reasons = [f"{answer['failed']} of {answer['requests']} requests failed"] if answer["failed"] else []
    if not answer["requests"]:
        reasons.append("no request was answered")
    return {**answer["latency"], "requests_kops": answer["requests"] / max(1e-9, answer["seconds"]) / 1e3,
            "histogram": answer["histogram"], "reasons": reasons}  # fmt: skip
