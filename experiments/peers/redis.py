"""Redis: what people reach for today, in the store's place on the store host, reached over the same links.

The server keeps everything in memory only (no snapshots, no log) and listens on the storage network inside the emulation.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datastore.base.errors import NearstateError
from topologies.emulation.processes import RunningProcess

if TYPE_CHECKING:
    from experiments.harness.bench import Bench

STORES = "store"
FORWARDS = False
"""It keeps state; packets do not pass it."""
PORT = 6379


@dataclass
class Server:
    """The running peer."""

    process: RunningProcess
    address: str
    next_hop_mac: str = ""

    def stop(self) -> None:
        """End the server; it has nothing on disk."""
        self.process.kill()


def start(bench: Bench) -> Server:
    """Start redis-server on the store host. Raises NearstateError when it is not installed or does not start."""
    if not shutil.which("redis-server"):
        raise NearstateError("peer redis: redis-server is not installed: apt-get install redis-server")
    host = next(host for host in bench.network.hosts.values() if host.role == STORES)
    address = bench.storage_address(host.name)
    process = bench.launcher.spawn(f"redis-{host.name}", host, f"{__name__}:main", {"address": address})
    time.sleep(0.2)
    if process.poll() is not None:
        raise NearstateError(f"peer redis: redis-server ended at once; its log is {process.log}")
    return Server(process, address)


def main(config: dict[str, Any], control: Any) -> None:
    """Process target: becomes redis-server, in memory only."""
    arguments = ["--bind", config["address"], "--port", str(PORT), "--save", "", "--appendonly", "no",
                 "--protected-mode", "no", "--dir", "/tmp"]  # fmt: skip
    os.execvp("redis-server", ["redis-server", *arguments])
