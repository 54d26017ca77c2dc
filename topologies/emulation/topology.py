"""What may a topology file say, and is a request for it right, before anything starts?

A topology is one file: `rack.py` holds class `Rack(DataCenter)` whose `build` names hosts by role and links them, in the way
of Mininet's Topo. Its parameters are the keyword arguments of `build`.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from mininet.topo import Topo

from datastore.base.errors import NearstateError, import_file, located, unknown

FOLDER = Path(__file__).resolve().parents[1]
ROLES = ("client", "server", "nf", "store", "control")
ENDS = {"client": ("net",), "server": ("net",), "nf": ("inside", "outside"), "store": ("storage",), "control": ("storage",)}
"""The interfaces that a host of a role must have; an NF host may have one for storage besides."""
INTERFACES = ("net", "inside", "outside", "storage")
RANGES = {"nf_hosts": (1, 32), "store_hosts": (0, 32), "server_hosts": (1, 32), "delay_us": (0, 1_000_000)}
LARGEST = 1_000_000
NAME = re.compile(r"[a-z][a-z0-9]*")
MOST_CABLES = 256
"""A cable's number is one byte of its interfaces' MAC addresses."""
MIDDLE = "wire"
"""The name of the host, added by the network, in which cables have their delays."""
DEVICE_BYTES = 15
"""The longest name of a network device (IFNAMSIZ of <linux/if.h>, less its zero)."""


def port_name(bridge: str, host: str, role: str, interface: str) -> str:
    """Return the device name of a switch's port by what is plugged in: nsk3x9-nf1i, nsk3x9-server."""
    return f"{bridge}-{host}{interface[0] if role == 'nf' else ''}"


class DataCenter(Topo):
    """Mininet's Topo with the vocabulary of a data center: hosts have roles, cables have named ends and a delay.

    RANGES: of a topology's own parameters, (least, most) or (least, most, why) by name, in place of the common ones.
    """

    RANGES: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def host(self, name: str, role: str) -> str:
        """Add a host; its interfaces are named by its cables. Raises NearstateError for a wrong name or role."""
        if role not in ROLES:
            raise unknown(f"role of host {name}", str(role), ROLES)
        self._check_name("host", name)
        longest = max((port_name("ns0000", name, role, interface) for interface in (*ENDS[role], "storage")), key=len)
        if len(longest) > DEVICE_BYTES:
            most = DEVICE_BYTES - len(longest) + len(name)
            raise NearstateError(f"host {name!r}: the device at the other end of its cable would be called {longest}, longer "
                                 f"than the {DEVICE_BYTES} bytes that Linux allows; a host of role {role} has a name of {most} "
                                 "at most")  # fmt: skip
        return str(self.addHost(name, role=role))

    def switch(self, name: str) -> str:
        """Add the switch. Raises NearstateError for a wrong name, and for a second switch."""
        self._check_name("switch", name)
        if self.switches():
            raise NearstateError(f"switch {name!r} beside {self.switches()[0]!r}: the controller steers at one switch")
        return str(self.addSwitch(name, dpid=f"{len(self.switches()) + 1:016x}"))

    def cable(self, host: str, interface: str, other: str, other_interface: str | None = None, delay_us: float = 0) -> None:
        """Link a host's interface to a switch, or to another host's interface; `delay_us` holds for each direction.

        Raises NearstateError, naming both ends, for what does not exist, for an interface that has a cable already, and for a
        delay that is none.
        """
        told = f"cable of {host} {interface} to {other}{f' {other_interface}' if other_interface else ''}"
        ends = [(host, interface)] + ([(other, other_interface)] if other in self.hosts() else [])
        for node in (host, other):
            if node not in self.nodes():
                raise NearstateError(f"{told}: {unknown('host or switch', str(node), self.nodes())}")
        if host not in self.hosts():
            raise NearstateError(f"{told}: its first end is a host's, not a switch's; give them the other way round")
        for node, name in ends:
            self._check_end(told, node, name)
        if isinstance(delay_us, bool) or not isinstance(delay_us, (int, float)) or not 0 <= delay_us <= RANGES["delay_us"][1]:
            raise NearstateError(f"{told}: delay_us={delay_us!r}; 0 to {RANGES['delay_us'][1]} are possible")
        self.addLink(host, other, intfName1=interface, intfName2=other_interface, delay_us=delay_us)

    def _check_name(self, kind: str, name: str) -> None:
        if not isinstance(name, str) or not NAME.fullmatch(name) or name == MIDDLE:
            raise NearstateError(f"{kind} {name!r}: a name is lower-case letters and digits, not {MIDDLE!r}")
        if name in self.nodes():
            raise NearstateError(f"{kind} {name!r} is there twice: give each a name of its own")

    def _check_end(self, told: str, host: str, interface: Any) -> None:
        role = self.nodeInfo(host)["role"]
        possible = (*ENDS[role], *(("storage",) if role == "nf" else ()))
        if interface not in possible:
            raise NearstateError(f"{told}: {unknown(f'interface of a host of role {role}', str(interface), possible)}")
        if interface in interfaces(self, host):
            raise NearstateError(f"{told}: {interface} of {host} has a cable already")


def interfaces(graph: DataCenter, host: str) -> list[str]:
    """Return the interfaces of a host that have a cable."""
    ends = [(info[f"node{end}"], info[f"intfName{end}"]) for _, _, info in graph.links(withInfo=True) for end in (1, 2)]
    return [str(interface) for node, interface in ends if node == host]


@dataclass(frozen=True)
class Plan:
    """A topology whose parameters have been checked completely. `graph` is Mininet's Topo, nothing is started yet."""

    name: str
    parameters: Mapping[str, Any]
    graph: DataCenter
    cpu: Mapping[str, float]

    def hosts(self, role: str) -> list[str]:
        """Return the names of the hosts of a role, in their order."""
        return [name for name in self.graph.hosts() if self.graph.nodeInfo(name)["role"] == role]

    def interfaces(self, host: str) -> list[str]:
        """Return the interfaces of a host that have a cable."""
        return interfaces(self.graph, host)


def names() -> list[str]:
    """Return the names of the topologies there are: the files in topologies/."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def load(name: str) -> type[DataCenter]:
    """Return a topology's class. Raises NearstateError for one that does not exist, or whose file has no such class."""
    if name not in names():
        raise unknown("topology", name, names())
    wanted = "".join(word.capitalize() for word in name.split("_"))
    found = getattr(import_file(f"topologies.{name}"), wanted, None)
    if not (isinstance(found, type) and issubclass(found, DataCenter)):
        raise NearstateError(f"topologies/{name}.py has no class {wanted}(DataCenter), as a file of that name must")
    return found


def parameters(name: str) -> dict[str, Any]:
    """Return a topology's parameters and their defaults. Raises NearstateError for a topology that does not exist."""
    arguments = inspect.signature(load(name).build).parameters
    for key, argument in arguments.items():
        if key != "self" and argument.default is argument.empty:
            raise NearstateError(f"topologies/{name}.py: build has {argument} without a default: give {key} one")
    return {key: argument.default for key, argument in arguments.items() if key != "self"}


def plan(name: str, given: Mapping[str, Any]) -> Plan:
    """Check a topology's name, parameters, hosts and cables, and freeze them. Raises NearstateError: what is wrong, and where."""
    topology, defaults = load(name), parameters(name)
    for key in given:
        if key not in defaults:
            raise unknown(f"parameter of topology {name}", key, defaults)
    values = {**defaults, **given}
    ranges = {**RANGES, **topology.RANGES}
    for key, value in values.items():
        _check(name, key, value, defaults[key], ranges.get(key, (0, LARGEST)))
    cpu = MappingProxyType(dict(values.get("cpu") or {}))
    graph = _built(name, topology, values)
    _check_graph(name, graph)
    return Plan(name, MappingProxyType(values), graph, cpu)


def _built(name: str, topology: type[DataCenter], values: Mapping[str, Any]) -> DataCenter:
    """Return the topology's graph. Raises NearstateError naming the line of its file and what is wrong there."""
    try:
        return topology(**values)
    except Exception as error:  # whatever a user's file may raise
        raise located(f"topologies.{name}", error) from error


def _check_graph(name: str, graph: DataCenter) -> None:
    """Raise NearstateError unless packets can cross: a client, servers, NF hosts between them, each with its cables."""
    roles = {host: graph.nodeInfo(host)["role"] for host in graph.hosts()}
    for end in ("client", "server"):
        if roles.get(end) != end:
            raise NearstateError(f"topology {name}: it has no host {end!r} of role {end!r}, where traffic begins or ends")
    if (clients := sum(role == "client" for role in roles.values())) > 1:
        raise NearstateError(f"topology {name}: it has {clients} hosts of role client; all traffic comes from one")
    if "nf" not in roles.values():
        raise NearstateError(f"topology {name}: it has no host of role nf, which would carry the traffic")
    if any(role == "control" and host != "control" for host, role in roles.items()):
        raise NearstateError(f"topology {name}: the one host of role control is called 'control'")
    for host, role in roles.items():
        missing = [end for end in ENDS[role] if end not in interfaces(graph, host)]
        if missing:
            raise NearstateError(f"topology {name}: host {host} of role {role} has no cable at {missing[0]}")
    if len(graph.links()) > MOST_CABLES:
        raise NearstateError(f"topology {name}: it has {len(graph.links())} cables, {MOST_CABLES} are possible")
    direct = [(one, other) for one, other in graph.links() if one in roles and other in roles]
    if graph.switches() and direct:
        raise NearstateError(f"topology {name}: a cable joins hosts {' and '.join(direct[0])} past switch {graph.switches()[0]}, "
                             "which then steers nothing; have every cable end at the switch, or have no switch")  # fmt: skip
    if not graph.switches() and list(roles.values()).count("nf") > 1:
        raise NearstateError(f"topology {name}: it has several hosts of role nf and no switch that deals packets to them")


def _check(topology: str, key: str, value: Any, default: Any, limits: tuple[Any, ...]) -> None:
    """Raise NearstateError for a value of the wrong kind or out of its range."""
    if key == "cpu":
        _check_cpu(topology, value or {})
        return
    kind = type(default)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise NearstateError(f"topology {topology}: {key}={value!r} is no {kind.__name__}; the default is {default!r}")
    least, most, *why = limits
    if isinstance(value, (int, float)) and not least <= value <= most:
        raise NearstateError(f"topology {topology}: {key}={value}{f'; {why[0]}' if why else f' is outside {least} to {most}'}")


def _check_cpu(topology: str, limits: Any) -> None:
    if not isinstance(limits, Mapping):
        raise NearstateError(f"topology {topology}: cpu={limits!r}: give cores by role, as {{'nf': 0.5}}")
    most = os.cpu_count() or 1
    for role, cores in limits.items():
        if role not in ROLES:
            raise unknown(f"role in cpu of topology {topology}", str(role), ROLES)
        if isinstance(cores, bool) or not isinstance(cores, (int, float)) or not 0.01 <= cores <= most:
            raise NearstateError(f"topology {topology}: cpu of {role} is {cores!r}; give 0.01 to {most} cores")
