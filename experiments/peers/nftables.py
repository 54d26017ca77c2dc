"""nftables: the kernel's own stateful firewall between the same two interfaces, with the rules of `nfs/firewall.py`.

The kernel forwards between `inside` and `outside` of nf1 in its own network namespace: established and related traffic both
ways, new connections only from inside. Nothing outside that namespace is changed.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from datastore.native.errors import NearstateError
from topologies.emulation import system

if TYPE_CHECKING:
    from experiments.harness.bench import Bench

STORES = None
INSIDE_GATEWAY, OUTSIDE_GATEWAY = "10.127.255.254/9", "10.255.255.254/9"
CLIENTS = "10.0.1.0/24"
"""The emulated clients (`workloads/traffic.py`), all behind the one client host."""
RULES = """
table ip nearstate {
  chain through {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname "inside" ct state new accept
  }
}
"""


@dataclass
class Kernel:
    """The running peer: it ends with its namespace."""

    next_hop_mac: str
    pid: int

    def forget(self) -> None:
        """Remove all entries of connection tracking: the kernel's table has a limit, 262,144 by default, for all entries."""
        with system.network_namespace(self.pid), NFCTSocket() as tracking:
            tracking.flush()

    def stop(self) -> None:
        """Nothing to do: rules, addresses and conntrack entries are the namespace's."""


def start(bench: Bench) -> Kernel:
    """Let the kernel of nf1's namespace forward and filter. Raises NearstateError when nft is missing or refuses."""
    nf = bench.nf_hosts[0]
    client, server = (bench.network.hosts[name].interfaces["net"] for name in ("client", "server"))
    commands = [
        ["ip", "address", "add", INSIDE_GATEWAY, "dev", "inside"],
        ["ip", "address", "add", OUTSIDE_GATEWAY, "dev", "outside"],
        ["ip", "neighbour", "replace", str(server.ipv4).partition("/")[0], "lladdr", server.mac, "dev", "outside",
         "nud", "permanent"],
        ["ip", "neighbour", "replace", str(client.ipv4).partition("/")[0], "lladdr", client.mac, "dev", "inside",
         "nud", "permanent"],
        ["ip", "route", "add", CLIENTS, "via", str(client.ipv4).partition("/")[0], "dev", "inside"],
        ["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0"],
        ["nft", "-f", "-"],
    ]  # fmt: skip
    for command in commands:
        _run(nf.pid, command, RULES if command[0] == "nft" else "")
    return Kernel(nf.interfaces["inside"].mac, nf.pid)


def _run(pid: int, command: list[str], text: str) -> None:
    """Run a command in the network namespace of process `pid`."""
    try:
        done = subprocess.run(["nsenter", "-t", str(pid), "-n", *command], input=text, text=True, capture_output=True,
                              check=False, timeout=20)  # fmt: skip
    except FileNotFoundError as error:
        raise NearstateError("nsenter is not installed: apt-get install util-linux") from error
    if done.returncode:
        raise NearstateError(f"peer nftables: {' '.join(command)} failed: {done.stderr.strip()}; is nftables installed?")
