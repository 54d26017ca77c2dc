"""nftables: the kernel's own connection tracking between the same two interfaces, doing the job of the trial's network functions.

The kernel of an NF host's network namespace forwards between its `inside` and `outside`. As `firewall`: established and related
traffic both ways, new connections only from inside. As `nat`: what inside opens leaves with one of the addresses that `nat` has,
always the same for a client, and nothing new comes in. As "firewall+nat": both. As `load_balancer`: what is for the virtual
address goes to one of its backends, by their weights and a hash of client address and port. Client and server get the kernel's
two MAC addresses for each other; else nothing outside that namespace is changed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from datastore.base.errors import NearstateError, unknown
from nfs._backends import REWRITTEN
from nfs.dataplane import load
from topologies.emulation import system

if TYPE_CHECKING:
    from experiments.harness.bench import Bench
    from experiments.harness.checks import Planned

STORES = None
INSIDE_GATEWAY, OUTSIDE_GATEWAY = "10.127.255.254/9", "10.255.255.254/9"
CLIENTS = "10.0.1.0/24"
"""The emulated clients (`workloads/traffic.py`), all behind the one client host."""
FILTER = """
  chain through {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname "inside" ct state new accept
  }
"""
GUARD = """
  chain through {
    type filter hook forward priority 0; policy accept;
    iifname "outside" ct state new,invalid drop
  }
"""
TRANSLATE = """
  chain translated {
    type nat hook postrouting priority 100;
    oifname "outside" snat to %s persistent
  }
"""
BALANCE = """
  chain balanced {
    type nat hook prerouting priority -100;
    ip daddr %s meta l4proto { tcp, udp } dnat to jhash ip saddr . th sport mod %d map { %s }
  }
"""
RULES = {"firewall": FILTER, "nat": GUARD + TRANSLATE, "firewall+nat": FILTER + TRANSLATE, "load_balancer": BALANCE}
"""By the network functions, alone or in a chain, whose job it is; "": none are named, the firewall's."""


@dataclass
class Kernel:
    """The running peer: it ends with its namespace."""

    next_hop_mac: str
    pids: tuple[int, ...]

    def forget(self) -> None:
        """Remove all entries of connection tracking: the kernel's table has a limit, 262,144 by default, for all entries."""
        for pid in self.pids:
            with system.network_namespace(pid), NFCTSocket() as tracking:
                tracking.flush()

    def take_over(self, dead: str, survivor: str) -> None:
        """Nothing to do: a kernel knows nothing of another one's connections."""

    def stop(self) -> None:
        """Nothing to do: rules, addresses and conntrack entries are the namespace's."""


def rules(nf: str, settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rules for the job of network function or chain `nf`. settings: of functions, by name; the NAT's addresses and
    the balancer's pool count.

    Raises NearstateError for a job that is not among RULES, and for a pool that keeps other than its clients' ports.
    """
    if nf and nf not in RULES:
        raise unknown("job of the peer nftables", nf, RULES)
    text = RULES[nf or "firewall"]
    if "nat" in nf:
        first, count = load("nat").make_env(settings.get("nat"))["external_addresses"][0]
        text = text % f"{IPv4Address(int(first))}-{IPv4Address(int(first + count - 1))}"
    if nf == "load_balancer":
        text = text % balanced(settings)
    return f"table ip nearstate {{{text}}}\n"


def balanced(settings: Mapping[str, Mapping[str, Any]]) -> tuple[str, int, str]:
    """Return the balancer's virtual address, the sum of its backends' weights, and who has which of so many hash values."""
    env = load("load_balancer").make_env(settings.get("load_balancer"))
    shares, total = [], 0
    for weight, address, port in pool(settings):
        if port or env["mode"][0] != REWRITTEN or env["ports"].any():
            raise NearstateError("peer nftables balances all ports and leaves them as they are: give load_balancer ports='all', "
                                 "mode='rewrite' and backends without a port")  # fmt: skip
        if weight:
            shares.append(f"{total}-{total + weight - 1} : {address}")
            total += weight
    if not total:
        raise NearstateError("peer nftables: none of load_balancer's backends has a weight; give at least one")
    return str(IPv4Address(int(env["virtual_address"][0]))), total, ", ".join(shares)


def pool(settings: Mapping[str, Mapping[str, Any]]) -> list[tuple[int, IPv4Address, int]]:
    """Return (weight, address, port) of each backend of the balancer."""
    words = load("load_balancer").make_env(settings.get("load_balancer"))["backends"][0][::2]
    return [(int(word) >> 48, IPv4Address(int(word) >> 16 & 0xFFFFFFFF), int(word) & 0xFFFF) for word in words if word]


def check(planned: Planned) -> None:
    """Raise NearstateError for a job that the kernel cannot be given, or settings of it that it has not."""
    rules(planned.trial.nf, planned.settings["functions"])
    for name in planned.settings["functions"]:
        if name not in planned.trial.nf.split("+"):
            raise unknown(f"network function with settings, of nf={planned.trial.nf!r}", str(name), planned.trial.nf.split("+"))


def start(bench: Bench) -> Kernel:
    """Let the kernel of each NF host's namespace do the job. Raises NearstateError when nft is missing or refuses.

    All hosts have the first one's MAC addresses, as routers that stand in for each other do (RFC 5798, section 7.3: VRRP), so
    that whichever the switch steers a frame to takes it.
    """
    text = rules(bench.trial.nf, bench.settings["functions"])
    client, server = (bench.network.hosts[name].interfaces["net"] for name in ("client", "server"))
    outside = [str(server.ipv4).partition("/")[0]]
    if bench.trial.nf == "load_balancer":
        outside += [str(address) for _, address, _ in pool(bench.settings["functions"])]
    commands = [
        ["ip", "address", "add", INSIDE_GATEWAY, "dev", "inside"],
        ["ip", "address", "add", OUTSIDE_GATEWAY, "dev", "outside"],
        *(["ip", "neighbour", "replace", address, "lladdr", server.mac, "dev", "outside", "nud", "permanent"]
          for address in outside),
        ["ip", "neighbour", "replace", str(client.ipv4).partition("/")[0], "lladdr", client.mac, "dev", "inside",
         "nud", "permanent"],
        ["ip", "route", "add", CLIENTS, "via", str(client.ipv4).partition("/")[0], "dev", "inside"],
        ["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0"],
        ["nft", "-f", "-"],
    ]  # fmt: skip
    first, *others = bench.nf_hosts
    for nf in (first, *others):
        for side in ("inside", "outside") if nf is not first else ():
            _run(nf.pid, ["ip", "link", "set", side, "address", first.interfaces[side].mac], "")
        for command in commands:
            _run(nf.pid, command, text if command[0] == "nft" else "")
    for name, other, side in (("client", server, "inside"), ("server", client, "outside")):
        _run(bench.network.hosts[name].pid, ["ip", "neighbour", "replace", str(other.ipv4).partition("/")[0], "lladdr",
                                             first.interfaces[side].mac, "dev", "net", "nud", "permanent"], "")  # fmt: skip
    return Kernel(first.interfaces["inside"].mac, tuple(nf.pid for nf in bench.nf_hosts))


def _run(pid: int, command: list[str], text: str) -> None:
    """Run a command in the network namespace of process `pid`."""
    try:
        done = subprocess.run(["nsenter", "-t", str(pid), "-n", *command], input=text, text=True, capture_output=True,
                              check=False, timeout=20)  # fmt: skip
    except FileNotFoundError as error:
        raise NearstateError("nsenter is not installed: apt-get install util-linux") from error
    if done.returncode:
        raise NearstateError(f"peer nftables: {' '.join(command)} failed: {done.stderr.strip()}; is nftables installed?")
