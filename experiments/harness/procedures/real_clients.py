"""What real programs get through the NF: goodput of streams and downloads, rate and latency of web requests.

A workload is one program at work; each is a point. A download whose checksum is wrong, a request that failed and a ledger that
does not balance make their point invalid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datastore.base.errors import NearstateError, unknown
from experiments.harness import accounting
from experiments.harness.bench import COMMON_SETTINGS, READY_S, Bench
from topologies.emulation.processes import RunningProcess

if TYPE_CHECKING:
    from experiments.harness.checks import Planned

WORKLOADS = ("tcp", "udp", "download", "requests", "many_connections", "new_connections", "handshakes")
SETTINGS = {**COMMON_SETTINGS, "workloads": WORKLOADS, "seconds": 1, "udp_mbps": 100.0, "small_bytes": 1024,
            "large_bytes": 10_000_000, "downloads": 3, "connections": 16, "many": 1000, "handshakes": 200}  # fmt: skip
ANSWER_S = 120.0
SMALL, LARGE = "small", "large"
HTTP_ONLY = {"services": ["nginx"]}
Answer = dict[str, Any]


class RealClients:
    """Servers on one host and clients on another, of a started bench.

    address: what the clients ask in place of the server's own, a balancer's. backends: hosts besides the server's that serve the
    same files over HTTP. served_at: the address they all serve at in place of their own.
    """

    def __init__(
        self, bench: Bench, client: str = "client", server: str = "server", address: str = "", backends: Sequence[str] = (),
        served_at: str = "",
    ) -> None:  # fmt: skip
        self.bench, settings = bench, bench.settings
        files = {SMALL: int(settings["small_bytes"]), LARGE: int(settings["large_bytes"])}
        config = {"files": files, "seed": bench.trial.seed}
        own = {name: str(bench.network.hosts[name].interfaces["net"].ipv4).partition("/")[0] for name in (server, *backends)}
        serving = {name: config | {"address": served_at or own[name]} | (HTTP_ONLY if name != server else {}) for name in own}
        self.backends = {name: self._spawn("servers", name, serving[name]) for name in own}
        told = {name: self._ready(process) for name, process in self.backends.items()}[server]
        self.servers = self.backends[server]
        self.sha256: dict[str, str] = told["sha256"]
        self._asked = (client, {"address": address or own[server], **{name: told[name] for name in ("user_key", "host_key")}})
        self.clients = self.more_clients()

    def more_clients(self) -> RunningProcess:
        """Start clients that do one thing while the others do another."""
        clients = self._spawn("clients", *self._asked)
        self._ready(clients)
        return clients

    def _spawn(self, role: str, host: str, config: dict[str, Any]) -> RunningProcess:
        target = f"experiments.workloads.real_{role}:main"
        started = sum(process.name.startswith(f"{role}-on-{host}") for process in self.bench.extra)
        name = f"{role}-on-{host}{f'-{started + 1}' if started else ''}"
        process = self.bench.launcher.spawn(name, self.bench.network.hosts[host], target, config)
        self.bench.extra.insert(0, process)  # clients end before their servers, and say so
        return process

    @staticmethod
    def _ready(process: RunningProcess) -> Answer:
        answer = process.receive(READY_S)
        if not answer:
            raise NearstateError(f"{process.name} was not ready after {READY_S:g} s; its log is {process.log}")
        return answer

    def begin(self, action: str, clients: RunningProcess | None = None, **arguments: Any) -> None:
        """Have the clients do something; `end` returns what came of it."""
        (clients or self.clients).send({"do": action, **arguments})

    def end(self, clients: RunningProcess | None = None) -> Answer:
        """Return the action's result; where its program failed, {"failed": what it said}."""
        process = clients or self.clients
        answer = process.receive(ANSWER_S)
        if answer is None:
            raise NearstateError(f"{process.name} did not answer in {ANSWER_S:g} s; its log is {process.log}")
        return answer

    def do(self, action: str, clients: RunningProcess | None = None, **arguments: Any) -> Answer:
        """Begin and end."""
        self.begin(action, clients, **arguments)
        return self.end(clients)

    def stacks(self) -> dict[str, dict[str, int]]:
        """Return the trouble counted by the kernels of both ends: segments sent again, datagrams no reader came for in time."""
        wanted = {"Tcp": ("RetransSegs",), "Udp": ("RcvbufErrors",)}
        return {process.name: protocol_counters(process.pid, wanted) for process in (self.clients, self.servers)}

    def connections(self, server: str = "") -> int:
        """Return how many connections are established now at the web server, or at that of host `server`."""
        process = self.backends[server] if server else self.servers
        process.send({"connections": True})
        return int((process.receive(READY_S) or {}).get("connections", -1))

    def accepted(self, server: str) -> int:
        """Return how many connections host `server` has ever accepted."""
        return protocol_counters(self.backends[server].pid, {"Tcp": ("PassiveOpens",)})["PassiveOpens"]


def protocol_counters(pid: int, wanted: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return counters of a process's network namespace by name (/proc/net/snmp, names after RFC 4022 and RFC 4113)."""
    lines = [line.split() for line in Path(f"/proc/{pid}/net/snmp").read_text().splitlines()]
    counters = {names[0].rstrip(":"): dict(zip(names[1:], values[1:])) for names, values in zip(lines[::2], lines[1::2])}
    return {name: int(counters[protocol][name]) for protocol, names in wanted.items() for name in names}


def check(planned: Planned) -> None:
    """Check that every workload is one there is."""
    for name in planned.settings["workloads"]:
        if name not in WORKLOADS:
            raise unknown("workload", name, WORKLOADS)
    if not planned.settings["workloads"]:
        raise planned.refuse("workloads=(): nothing would be measured")


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
