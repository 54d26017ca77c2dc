"""What do real clients get through the network? ping, traceroute, dig, curl, scp, iperf3 and wrk, run on an emulated host.

The process answers one request after the other, {"do": <action>, ...its arguments}, each with the action's result or, when the
program failed, {"failed": <what it said>}. Actions are the functions of ACTIONS. Every program is bounded in time, and what it
writes lies in an empty /run that only this process sees and that goes with it.

Unlike the generator's, these loads are closed: a client asks again when it has been answered. Their latencies are those a user
of that client sees at the rate it reached, and a stalled network is sampled less often while it stalls.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram

from datastore.compiled.histogram import DIGITS, HIGHEST_NS
from experiments.workloads.real_servers import (
    CLIENTS,
    DOMAIN,
    FOLDER,
    FOLDER_MBYTES,
    IPERF_PORT,
    SSH_PORT,
    raise_open_files,
    require,
)
from topologies.emulation import system

MARGIN_S = 15.0
"""How much longer than asked for a program may take, on a busy machine."""
UDP_PAYLOAD_BYTES = 1400
CURL = ("curl", "--disable", "--silent", "--show-error", "--fail")
"""--disable: no .curlrc is read."""
WRK_QUANTILES = np.concatenate([np.arange(0.25, 99, 0.5), np.arange(99.025, 100, 0.05)])
"""In percent: the middles of the shares that a value of wrk's stands for. wrk takes long to tell every value."""
WRK_REPORT = """
done = function(summary, latency, requests)
  local values = {}
  for line in io.lines("%s") do table.insert(values, string.format("%%d", latency:percentile(tonumber(line)))) end
  local errors = summary.errors
  io.write(string.format('\\n{"seconds": %%f, "requests": %%d, "failed": %%d, "us": [%%s]}\\n', summary.duration / 1e6,
    summary.requests, errors.connect + errors.read + errors.write + errors.status + errors.timeout, table.concat(values, ",")))
end
"""


class Failed(Exception):
    """A program ended with an error; the message is one line."""


def main(config: dict[str, Any], control: Any) -> None:
    """Process target. config: the servers' `address`, and for scp their `user_key` and `host_key`."""
    require(CLIENTS)
    raise_open_files()
    system.private_folder(str(FOLDER), FOLDER_MBYTES)
    address = str(config["address"])
    prepare(address, config)
    control.send({"ready": True})
    while (message := control.receive(None)) is not None and not message.get("stop"):
        try:
            answer = ACTIONS[message.pop("do")](address, **message)
        except Failed as failure:
            answer = {"failed": str(failure)}
        control.send(answer)


def prepare(address: str, config: dict[str, Any]) -> None:
    """Write the files the programs read."""
    key = FOLDER / "user_key"
    key.touch(mode=0o600)
    key.write_text(config.get("user_key", ""))
    (FOLDER / "known_hosts").write_text(f"[{address}]:{SSH_PORT} {config.get('host_key', '')}")
    (FOLDER / "quantiles").write_text("\n".join(map(str, WRK_QUANTILES)))
    (FOLDER / "report.lua").write_text(WRK_REPORT % (FOLDER / "quantiles"))


def environment() -> dict[str, str]:
    """Return what programs are started with: no proxy, which is not to be reached from a host, and nobody's configuration."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**kept, "HOME": str(FOLDER)}


def run(command: Sequence[str], timeout_s: float) -> str:
    """Return a program's output. Raises Failed with its exit code and its last words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False,
                              stdin=subprocess.DEVNULL, env=environment(), preexec_fn=system.dying_with_us())  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"{command[0]}: no end in {timeout_s:g} s") from None
    if done.returncode != 0:
        words = " ".join((done.stderr or done.stdout).split())
        raise Failed(f"{command[0]}: exit code {done.returncode}: {words[-300:]}")
    return done.stdout


def ping(address: str, count: int, payload_bytes: int = 56, deadline_s: int = 5) -> dict[str, Any]:
    """Ask for echoes, 10 ms apart, until there are `count`. Returns {sent, received, duplicates, median_us}.

    received: of the first `count`. With a deadline, ping sends more while answers are on their way (ping(8), -w).
    """
    command = ["ping", "-n", "-c", str(count), "-i", "0.01", "-w", str(deadline_s), "-s", str(payload_bytes), address]
    told = run(command, MARGIN_S)
    times_ms = {int(number): float(ms) for number, ms in re.findall(r"icmp_seq=(\d+) .*time=([\d.]+) ms", told)}
    return {"sent": count, "received": sum(number <= count for number in times_ms), "duplicates": told.count("(DUP!)"),
            "median_us": 1000 * statistics.median(times_ms.values() or [0.0])}  # fmt: skip


def trace(address: str, method: str = "default") -> dict[str, Any]:
    """Trace the route by a method of traceroute(8): default (UDP), icmp, tcp. Returns {hops: [address or "*"]}."""
    output = run(["traceroute", "-n", "-q", "1", "-w", "2", "-m", "3", "-M", method, address], MARGIN_S)
    return {"hops": re.findall(r"^ *\d+ +(\S+)", output, re.MULTILINE)}


def lookup(address: str, name: str = DOMAIN, tcp: bool = False, tries: int = 2) -> dict[str, Any]:
    """Ask the name server for a name's IPv4 addresses, waiting a second each time. Returns {addresses}."""
    how = "+tcp" if tcp else "+notcp"
    return {"addresses": run(["dig", f"@{address}", "+short", f"+tries={tries}", "+time=1", how, name, "A"], MARGIN_S).split()}


def download(address: str, file: str, count: int = 1, timeout_s: float = 20.0) -> dict[str, Any]:
    """Download a file `count` times. Returns {sha256: [one each], bytes: of all, seconds: of all}."""
    sums, size, seconds = [], 0, 0.0
    for _ in range(count):
        target = FOLDER / "download"
        told = run([*CURL, "--max-time", str(timeout_s), "--output", str(target),
                    "--write-out", "%{time_total}", f"http://{address}/{file}"], timeout_s + MARGIN_S)  # fmt: skip
        content = target.read_bytes()
        sums.append(hashlib.sha256(content).hexdigest())
        size, seconds = size + len(content), seconds + float(told)
        target.unlink()
    return {"sha256": sums, "bytes": size, "seconds": seconds}


def connect(address: str, file: str, count: int) -> dict[str, Any]:
    """Get a file `count` times, each over a TCP connection of its own, one after the other.

    Returns {connections, seconds, latency: {p50_us ...}, histogram of ns}: from before the handshake to the last byte.
    """
    output = run([*CURL, "--max-time", "10", "--header", "Connection: close",
                  "--output", "/dev/null", "--write-out", "%{num_connects} %{time_total}\n",
                  f"http://{address}/{file}?[1-{count}]"], 10.0 + MARGIN_S)  # fmt: skip
    rows = [line.split() for line in output.splitlines()]
    times_ns = [int(float(seconds) * 1e9) for _, seconds in rows]
    connections = sum(int(opened) for opened, _ in rows)
    return {"connections": connections, "seconds": sum(times_ns) / 1e9, **distribution(times_ns, [1] * len(times_ns))}


def copy(address: str, size: int) -> dict[str, Any]:
    """Copy a file of random content to the server and back by scp. Returns {same: the copy equals the original}."""
    content = os.urandom(size)
    original, back, there = FOLDER / "original", FOLDER / "back", f"root@{address}:/copy"
    original.write_bytes(content)
    options = {"BatchMode": "yes", "StrictHostKeyChecking": "yes", "UserKnownHostsFile": FOLDER / "known_hosts",
               "GlobalKnownHostsFile": "/dev/null", "IdentityFile": FOLDER / "user_key", "IdentitiesOnly": "yes",
               "ConnectTimeout": 5}  # fmt: skip
    command = ["scp", "-q", "-s", "-F", "/dev/null", "-P", str(SSH_PORT)]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    run([*command, str(original), there], 20 + MARGIN_S)
    run([*command, there, str(back)], 20 + MARGIN_S)
    same = back.read_bytes() == content
    original.unlink()
    back.unlink()
    return {"same": same}


def stream(address: str, seconds: int, udp_mbps: float = 0.0, reverse: bool = False) -> dict[str, Any]:
    """Send a stream (reverse: receive it) with iperf3: TCP as fast as it goes, UDP at `udp_mbps`.

    Returns {goodput_mbps} for TCP, {goodput_mbps, lost, loss_ratio, jitter_us} for UDP: what the receiver counted.
    """
    command = ["iperf3", "--client", address, "--port", str(IPERF_PORT), "--json", "--time", str(seconds)]
    command += ["--connect-timeout", "5000"] + (["--reverse"] if reverse else [])
    if not udp_mbps:
        end = json.loads(run(command, seconds + MARGIN_S))["end"]
        return {"goodput_mbps": end["sum_received"]["bits_per_second"] / 1e6}
    command += ["--udp", "--bitrate", f"{udp_mbps}M", "--length", str(UDP_PAYLOAD_BYTES)]
    counted = json.loads(run(command, seconds + MARGIN_S))["end"]["sum"]
    sent, lost = counted["packets"], counted["lost_packets"]
    return {"goodput_mbps": (sent - lost) * UDP_PAYLOAD_BYTES * 8 / counted["seconds"] / 1e6,
            "lost": lost, "loss_ratio": lost / max(1, sent), "jitter_us": 1000 * counted["jitter_ms"]}  # fmt: skip


def request(address: str, file: str, connections: int, seconds: int, keep: bool = True) -> dict[str, Any]:
    """Have wrk ask for a file over `connections` at once, all the time; keep=False: a new connection for each request.

    Returns {requests, failed, seconds, latency: {p50_us ...}, histogram of ns}. wrk's latency is from a request's first byte to
    its answer's last one, without the handshake. It fails what takes longer than 5 s.
    """
    command = ["wrk", "--connections", str(connections), "--threads", "2" if connections > 100 else "1", "--duration",
               f"{seconds}s", "--timeout", "5s", "--script", str(FOLDER / "report.lua")]  # fmt: skip
    command += [] if keep else ["--header", "Connection: close"]
    told = json.loads(run([*command, f"http://{address}/{file}"], seconds + MARGIN_S).splitlines()[-1])
    values_ns = [value * 1000 for value in told.pop("us")]
    shares = np.diff(np.concatenate([[0.0], (WRK_QUANTILES[:-1] + WRK_QUANTILES[1:]) / 2, [100.0]]))
    counts = np.diff(np.round(np.concatenate([[0.0], np.cumsum(shares)]) / 100 * told["requests"])).astype(int)
    return {**told, **distribution(values_ns, counts.tolist())}


def distribution(values_ns: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
    """Return latencies as their summary in us and as an encoded histogram."""
    histogram = HdrHistogram(1, HIGHEST_NS, DIGITS)
    for value, count in zip(values_ns, counts, strict=True):
        if count:
            histogram.record_value(min(max(1, int(value)), HIGHEST_NS), count)
    if not histogram.get_total_count():
        return {"latency": {}, "histogram": ""}
    quantiles = {"p50_us": 50.0, "p99_us": 99.0}
    latency = {name: histogram.get_value_at_percentile(quantile) / 1e3 for name, quantile in quantiles.items()}
    return {"latency": latency, "histogram": bytes(histogram.encode()).decode()}


ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    action.__name__: action for action in (ping, trace, lookup, download, connect, copy, stream, request)
}
