"""What may a topology file say, and is a request for it right, before anything starts?

A topology is one file: `rack.py` holds class `Rack(DataCenter)` whose `build` names hosts by role and links them, in the way
of Mininet's Topo. Its parameters are the keyword arguments of `build`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mininet.topo import Topo

from datastore.native.errors import NearstateError, import_file, unknown

FOLDER = Path(__file__).resolve().parents[1]
ROLES = ("client", "server", "nf", "store", "control")
LARGEST = {"nf_hosts": 32, "store_hosts": 32, "server_hosts": 32, "delay_us": 1_000_000}


class DataCenter(Topo):
    """Mininet's Topo with the vocabulary of a data center: hosts have roles, cables have named ends and a delay."""

    def host(self, name: str, role: str) -> str:
        """Add a host; its interfaces are named by its cables."""
        return str(self.addHost(name, role=role))

    def switch(self, name: str) -> str:
        """Add a switch."""
        return str(self.addSwitch(name, dpid=f"{len(self.switches()) + 1:016x}"))

    def cable(self, host: str, interface: str, other: str, other_interface: str | None = None, delay_us: float = 0) -> None:
        """Link a host's interface to a switch, or to another host's interface; `delay_us` holds for each direction."""
        self.addLink(host, other, intfName1=interface, intfName2=other_interface, delay_us=delay_us)


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


def names() -> list[str]:
    """Return the names of the topologies there are: the files in topologies/."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def load(name: str) -> Any:
    """Return a topology's class. Raises NearstateError for one that does not exist."""
    if name not in names():
        raise unknown("topology", name, names())
    return getattr(import_file(f"topologies.{name}"), "".join(word.capitalize() for word in name.split("_")))


def parameters(name: str) -> dict[str, Any]:
    """Return a topology's parameters and their defaults. Raises NearstateError for a topology that does not exist."""
    arguments = inspect.signature(load(name).build).parameters
    return {key: argument.default for key, argument in arguments.items() if key != "self"}


def plan(name: str, given: Mapping[str, Any]) -> Plan:
    """Check a topology's name and parameters and freeze them. Raises NearstateError naming the nearest valid ones."""
    topology, defaults = load(name), parameters(name)
    for key in given:
        if key not in defaults:
            raise unknown(f"parameter of topology {name}", key, defaults)
    values = {**defaults, **given}
    for key, value in values.items():
        _check(name, key, value, defaults[key])
    cpu = MappingProxyType(dict(values.get("cpu") or {}))
    return Plan(name, MappingProxyType(values), topology(**values), cpu)


def _check(topology: str, key: str, value: Any, default: Any) -> None:
    """Raise NearstateError for a value of the wrong kind or out of its range."""
    if key == "cpu":
        _check_cpu(topology, value or {})
        return
    kind = type(default)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise NearstateError(f"topology {topology}: {key}={value!r} is no {kind.__name__}; the default is {default!r}")
    if isinstance(value, (int, float)) and not 0 <= value <= LARGEST.get(key, 1_000_000):
        raise NearstateError(f"topology {topology}: {key}={value} is outside 0 to {LARGEST.get(key, 1_000_000)}")


def _check_cpu(topology: str, limits: Any) -> None:
    if not isinstance(limits, Mapping):
        raise NearstateError(f"topology {topology}: cpu={limits!r}: give cores by role, as {{'nf': 0.5}}")
    most = os.cpu_count() or 1
    for role, cores in limits.items():
        if role not in ROLES:
            raise unknown(f"role in cpu of topology {topology}", str(role), ROLES)
        if isinstance(cores, bool) or not isinstance(cores, (int, float)) or not 0.01 <= cores <= most:
            raise NearstateError(f"topology {topology}: cpu of {role} is {cores!r}; give 0.01 to {most} cores")
