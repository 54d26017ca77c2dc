"""What tests share: hosts in network namespaces, cables between them, a launcher; all of it gone afterwards, also on failure."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.secrets_of_tests import key_of
from topologies.emulation import system
from topologies.emulation.journal import Journal
from topologies.emulation.processes import Launcher, RunningProcess

settings.register_profile("tests", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("tests")

READY_S = 400.0
"""Longest wait for a process, which compiles what it runs when its sources have changed; pytest gives up a test after 600."""
ETH_P_ALL = 0x0003


@dataclass
class Host:
    """A network namespace, held by a sleeping process that dies with us."""

    name: str
    holder: subprocess.Popen[bytes]
    cgroup: Path | None = None

    @property
    def pid(self) -> int:
        return self.holder.pid

    def ip(self, command: str) -> None:
        """Run an `ip` command in the namespace."""
        with system.network_namespace(self.pid):
            system.run(["ip", *command.split()], dict(os.environ))

    def packet_socket(self, interface: str) -> socket.socket:
        """Return a raw socket that sends and sees every frame of an interface."""
        with system.network_namespace(self.pid):
            opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        opened.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
        opened.bind((interface, ETH_P_ALL))
        return opened


@dataclass
class Bench:
    """Hosts, cables and processes of one test module, by hand: smaller and quicker than a topology."""

    run_id: str
    launcher: Launcher
    journal: Journal
    hosts: list[Host] = field(default_factory=list)
    started: int = 0

    def host(self, name: str) -> Host:
        """Make a namespace with its loopback up."""
        holder = subprocess.Popen(
            ["unshare", "--net", "sleep", "600"], env=self.journal.environment(), preexec_fn=system.dying_with_us()
        )
        own = Path("/proc/self/ns/net").readlink()
        deadline = time.monotonic() + 5
        while Path(f"/proc/{holder.pid}/ns/net").readlink() == own and time.monotonic() < deadline:
            time.sleep(0.001)
        self.hosts.append(Host(name, holder))
        self.hosts[-1].ip("link set lo up")
        return self.hosts[-1]

    def cable(self, one: tuple[Host, str], other: tuple[Host, str], mtu: int = 1500, addresses: Sequence[str] = ()) -> None:
        """Join two interfaces by a veth pair; checksums are complete and no IPv6 chatter is on it."""
        (first, name), (second, peer) = one, other
        system.run(["ip", "link", "add", name, "mtu", str(mtu), "netns", str(first.pid), "type", "veth", "peer", "name", peer,
                    "mtu", str(mtu), "netns", str(second.pid)], dict(os.environ))  # fmt: skip
        for host, interface in (one, other):
            with system.network_namespace(host.pid):
                system.without_ipv6(interface)
                for offload in ("tx_checksum", "tso", "gso", "gro"):
                    system.set_offload(interface, offload, False)
        for (host, interface), address in zip((one, other), addresses, strict=False):
            host.ip(f"address add {address} dev {interface}")
        for host, interface in (one, other):
            host.ip(f"link set {interface} up")

    def spawn(self, name: str, host: Host, target: str, config: dict[str, Any]) -> RunningProcess:
        """Start a process on a host and wait until it says it is ready."""
        self.started += 1
        process = self.launcher.spawn(f"{name}-{self.started}", host, target, config, key=key_of(target, config))
        answer = process.receive(READY_S)
        assert answer, f"{name} is not ready: {process.log.read_text()}"
        assert answer["ready"]
        return process

    def end_processes(self) -> None:
        """Kill every process that still runs: the next test starts from nothing."""
        for process in self.launcher.processes:
            process.kill()

    def close(self) -> None:
        for host in self.hosts:
            host.holder.kill()
            host.holder.wait()


def make_bench(name: str, logs: Path, preload: Sequence[str]) -> Iterator[Bench]:
    """Yield a bench, then remove everything it made. For module fixtures."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it makes network namespaces")
    with Journal(f"{name}-{os.getpid()}") as journal, Launcher(journal, logs, preload) as launcher:
        bench = Bench(journal.run_id, launcher, journal)
        try:
            launcher.wait_ready()
            yield bench
        finally:
            bench.close()


def ask(process: RunningProcess, message: dict[str, Any], timeout_s: float = READY_S) -> dict[str, Any]:
    """Send a process a message and return its answer."""
    process.send(message)
    answer = process.receive(timeout_s)
    assert answer is not None, f"{process.name} does not answer {message}: {process.log.read_text()}"
    return answer


def received(tap: socket.socket, quiet_s: float = 0.3, count: int | None = None) -> list[bytes]:
    """Return the frames that came in on a packet socket, until there are `count` or none has come for a while."""
    frames: list[bytes] = []
    tap.settimeout(quiet_s)
    with contextlib.suppress(TimeoutError):
        while count is None or len(frames) < count:
            frame, (_, _, kind, *_rest) = tap.recvfrom(65536)
            if kind != socket.PACKET_OUTGOING:
                frames.append(frame)
    return frames


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Wait until something is so. Raises AssertionError, saying what is not, when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
