"""nftables: the kernel's own stateful firewall between the same two interfaces, with the rules of `nfs/firewall.py`.

The kernel forwards between `inside` and `outside` of nf1 in its own network namespace: established and related traffic both
ways, new connections only from inside. Nothing outside that namespace is changed.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datastore.native.errors import NearstateError

if TYPE_CHECKING:
    from experiments.harness.bench import Bench

STORES = None
INSIDE_GATEWAY, OUTSIDE_GATEWAY = "10.127.255.254/9", "10.255.255.254/9"
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

    def stop(self) -> None:
        """Nothing to do: rules, addresses and conntrack entries are the namespace's."""


def start(bench: Bench) -> Kernel:
    """Let the kernel of nf1's namespace forward and filter. Raises NearstateError when nft is missing or refuses."""
    nf = bench.nf_hosts[0]
    server = bench.network.hosts["server"].interfaces["net"]
    commands = [
        ["ip", "address", "add", INSIDE_GATEWAY, "dev", "inside"],
        ["ip", "address", "add", OUTSIDE_GATEWAY, "dev", "outside"],
        ["ip", "neighbour", "replace", str(server.ipv4).partition("/")[0], "lladdr", server.mac, "dev", "outside",
         "nud", "permanent"],
        ["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0"],
        ["nft", "-f", "-"],
    ]  # fmt: skip
    for command in commands:
        _run(nf.pid, command, RULES if command[0] == "nft" else "")
    return Kernel(nf.interfaces["inside"].mac)


def _run(pid: int, command: list[str], text: str) -> None:
    """Run a command in the network namespace of process `pid`."""
    try:
        done = subprocess.run(["nsenter", "-t", str(pid), "-n", *command], input=text, text=True, capture_output=True,
                              check=False, timeout=20)  # fmt: skip
    except FileNotFoundError as error:
        raise NearstateError("nsenter is not installed: apt-get install util-linux") from error
    if done.returncode:
        raise NearstateError(f"peer nftables: {' '.join(command)} failed: {done.stderr.strip()}; is nftables installed?")
