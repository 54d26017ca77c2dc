"""conntrackd: the kernel's connection tracking, with every host's entries kept on the other one too (FTFW: reliable, ordered).

Two routers as in `nftables.py`; a conntrackd on each takes the kernel's events and sends them over the storage network. What
came from the other host waits in a cache outside the kernel: `take_over` puts it in, as the distribution's primary-backup.sh does
when a router becomes primary. The translations come with the entries, so that a connection lives on at the survivor.

Of the manual's advice (conntrack-tools.netfilter.org/manual.html): `nf_conntrack_tcp_be_liberal`, since windows are not
synchronised; `nf_conntrack_tcp_loose` off, so that what was not synchronised is not taken for a new connection.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datastore.base.errors import NearstateError
from experiments.peers import nftables
from experiments.workloads.real_servers import require
from experiments.workloads.real_servers import start as start_daemon
from topologies.emulation import system
from topologies.emulation.processes import RunningProcess

if TYPE_CHECKING:
    from experiments.harness.bench import Bench
    from experiments.harness.checks import Planned

STORES = None
PROGRAMS = {"conntrackd": "conntrackd", "unshare": "util-linux"}
FOLDER = Path("/run")
"""Of each process' own, in memory: lock and socket of two daemons on one machine would be the same files."""
FOLDER_MBYTES = 8
READY_S = 10.0
SYSCTLS = ("net.netfilter.nf_conntrack_events=1", "net.netfilter.nf_conntrack_tcp_be_liberal=1",
           "net.netfilter.nf_conntrack_tcp_loose=0")  # fmt: skip
CONFIGURATION = """
Sync {{
  Mode FTFW {{ ResendQueueSize 131072 ACKWindowSize 300 }}
  UDP {{
    IPv4_address {address}
    IPv4_Destination_Address {other}
    Port 3780
    Interface storage
    SndSocketBuffer 1249280
    RcvSocketBuffer 1249280
    Checksum on
  }}
}}
General {{
  Systemd off
  HashSize 32768
  HashLimit 131072
  LogFile off
  Syslog off
  LockFile {folder}/conntrackd.lock
  UNIX {{ Path {folder}/conntrackd.ctl }}
  NetlinkBufferSize 2097152
  NetlinkBufferSizeMaxGrowth 8388608
  Filter From Kernelspace {{
    Protocol Accept {{ TCP UDP }}
    Address Ignore {{ IPv4_address 127.0.0.1 IPv4_address {address} IPv4_address {other} }}
  }}
}}
"""


@dataclass
class Pair:
    """The running peer: two routers and their daemons, by host."""

    kernel: nftables.Kernel
    daemons: dict[str, RunningProcess]

    @property
    def next_hop_mac(self) -> str:
        return self.kernel.next_hop_mac

    def forget(self) -> None:
        """Remove all entries of connection tracking."""
        self.kernel.forget()

    def take_over(self, dead: str, survivor: str) -> None:
        """Have the survivor's kernel know what the dead host's knew; returns when it does. Raises NearstateError."""
        daemon = self.daemons[survivor]
        daemon.send({"commit": True})
        answer = daemon.receive(READY_S) or {"error": f"no answer; its log is {daemon.log}"}
        if "error" in answer:
            raise NearstateError(f"conntrackd of {survivor}: {answer['error']}")

    def stop(self) -> None:
        """End the daemons; rules, addresses and entries are the namespaces'."""
        for daemon in self.daemons.values():
            daemon.kill()


def check(planned: Planned) -> None:
    """Raise NearstateError for another number of hosts than two, and for what its kernels cannot do."""
    if len(planned.nf_hosts) != 2:
        raise NearstateError(f"peer conntrackd with {len(planned.nf_hosts)} NF hosts: FTFW is a protocol of two; give nf_hosts=2")
    nftables.check(planned)


def start(bench: Bench) -> Pair:
    """Let the kernels of two NF hosts do the job and tell each other. Raises NearstateError for another number of hosts."""
    hosts = [host.name for host in bench.nf_hosts]
    if len(hosts) != 2:
        raise NearstateError(f"peer conntrackd with {len(hosts)} NF hosts: FTFW is a protocol of two; give nf_hosts=2")
    kernel, daemons = nftables.start(bench), {}
    for host, other in zip(hosts, reversed(hosts)):
        config = {"address": bench.storage_address(host), "other": bench.storage_address(other)}
        target = "experiments.peers.conntrackd:main"
        daemons[host] = bench.launcher.spawn(f"conntrackd-{host}", bench.network.hosts[host], target, config)
    bench.wait_ready(list(daemons.values()))
    return Pair(kernel, daemons)


def main(config: dict[str, Any], control: Any) -> None:
    """Process target. config: address of this host and of the other one. Answers {"commit": true} when the other's entries are in
    this host's kernel, with how many there are."""
    require(PROGRAMS)
    system.run(["sysctl", "-qw", *SYSCTLS], dict(os.environ))
    system.private_folder(str(FOLDER), FOLDER_MBYTES)
    (FOLDER / "conntrackd.conf").write_text(CONFIGURATION.format(folder=FOLDER, **config))
    daemon = start_daemon(["conntrackd", "-C", str(FOLDER / "conntrackd.conf")])
    deadline = time.monotonic() + READY_S
    while _ask("-s").returncode:
        if daemon.poll() is not None or time.monotonic() > deadline:
            control.send({"error": "conntrackd did not start; what it said is in this process' log"})
            return
        time.sleep(0.02)
    control.send({"ready": True})
    while (message := control.receive(None)) is not None and not message.get("stop"):
        done = _ask("-c")
        control.send({"error": done.stdout.strip()} if done.returncode else {"committed": True})


def _ask(command: str) -> subprocess.CompletedProcess[str]:
    """Give the daemon a command; its own program is the only client of its socket."""
    return subprocess.run(["conntrackd", "-C", str(FOLDER / "conntrackd.conf"), command], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, check=False, timeout=READY_S)  # fmt: skip
