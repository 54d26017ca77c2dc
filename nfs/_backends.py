"""A load balancer's pool: what a user gives, "10.128.0.1:8080 weight 2 mac 02:00:00:00:00:05", to words searched quickly.

    weight << 48 | address << 16 | port       MAC address, 0: none
    backend 0                                 backend 0                  backend 1 ...

The lower 48 bits of the first word are the backend's name; a pool ends at its first word of 0.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address
from typing import Any

import numpy as np

from datastore.base.errors import NearstateError, unknown
from datastore.compiled import jit

MOST, MOST_PORTS, MOST_WEIGHT = 16, 16, 0xFFFF
NAME_BITS = (1 << 48) - 1
REWRITTEN, DIRECT = 1, 2
MODES = {"rewrite": REWRITTEN, "direct": DIRECT}
BACKEND = re.compile(r"(?P<address>[^\s:]+)(:(?P<port>\d+))?(\s+weight\s+(?P<weight>\d+))?(\s+mac\s+(?P<mac>\S+))?")
EXAMPLE = '"10.128.0.1:80 weight 2" or {"address": "10.128.0.1", "port": 80, "weight": 2}'


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a load balancer's settings with its pool in words, its ports as numbers. Raises NearstateError."""
    s = settings
    if s["mode"] not in MODES:
        raise unknown("load balancer's mode", s["mode"], MODES)
    virtual = s["virtual_address"]
    try:
        virtual = int(IPv4Address(virtual))
    except ValueError:
        virtual = 0
    if not virtual:
        raise NearstateError(f"load balancer's virtual_address={s['virtual_address']!r}: give an IPv4 address as '10.64.1.1'")
    if not (s["failure_syns"] >= 0 and 0.1 <= s["failure_s"] <= 3600 and 0.1 <= s["trial_s"] <= 3600):
        raise NearstateError(f"load balancer with failure_syns={s['failure_syns']}, failure_s={s['failure_s']}, "
                             f"trial_s={s['trial_s']}: 0 or more SYNs, and 0.1 to 3600 s, are possible")  # fmt: skip
    given = [s["backends"]] if isinstance(s["backends"], (str, dict)) else list(s["backends"])
    if len(given) > MOST:
        raise NearstateError(f"load balancer with {len(given)} backends: {MOST} are possible")
    pool = [word for backend in given for word in backend_words(backend, s["mode"])]
    names = [word & NAME_BITS for word in pool[::2]]
    for backend, name in zip(given, names):
        if names.count(name) > 1:
            raise NearstateError(f"load balancer's backend {backend!r} is there twice: give it the weight of both")
        if s["mode"] == "rewrite" and name >> 16 == virtual:
            raise NearstateError(f"load balancer's backend {backend!r} has the virtual address: that is for mode='direct'")
    return s | {"virtual_address": virtual, "ports": port_list(s["ports"]), "backends": pool, "mode": MODES[s["mode"]]}


def backend_words(given: Any, mode: str) -> tuple[int, int]:
    """Return the two words of a backend as a user gives it. Raises NearstateError naming it and what is wrong."""
    found = BACKEND.fullmatch(given.strip()) if isinstance(given, str) else None
    parts = found.groupdict() if found else given
    if not isinstance(parts, dict) or not {"address"} <= set(parts) <= {"address", "port", "weight", "mac"}:
        raise NearstateError(f"load balancer's backend {given!r} is not understood; give {EXAMPLE}")
    address, port, weight, mac = (parts.get(name) for name in ("address", "port", "weight", "mac"))
    try:
        number, port, weight = int(IPv4Address(address)), int(port or 0), int(1 if weight is None else weight)
        next_hop = int(re.sub(r"[:-]", "", mac), 16) if mac else 0
    except (ValueError, TypeError) as error:
        raise NearstateError(f"load balancer's backend {given!r}: {error}; give {EXAMPLE}") from None
    if not number or not 0 <= port <= 65535 or not 0 <= weight <= MOST_WEIGHT or not 0 <= next_hop < 1 << 48:
        raise NearstateError(f"load balancer's backend {given!r}: an address that is not 0.0.0.0, a port of 0 to 65535, a weight "
                             f"of 0 to {MOST_WEIGHT} (0: no new connections), a MAC address of 6 bytes")  # fmt: skip
    if mode == "direct" and (port or not next_hop):
        raise NearstateError(f"load balancer's backend {given!r}: with direct return it needs its MAC address and keeps the "
                             'port, as "10.128.0.1 mac 02:00:00:00:00:05"')  # fmt: skip
    return weight << 48 | number << 16 | port, next_hop


def port_list(given: Any) -> list[int]:
    """Return the ports as a user gives them; none for all."""
    texts = [] if given == "all" else str(given).split(",") if isinstance(given, (str, int)) else list(given)
    try:
        ports = [int(port) for port in texts]
        if len(ports) > MOST_PORTS or not all(0 < port <= 65535 for port in ports):
            raise ValueError
    except (ValueError, TypeError):
        raise NearstateError(f"load balancer's ports={given!r}: 'all', or up to {MOST_PORTS} of 1 to 65535") from None
    return ports


@jit
def place_in(words, name):
    """Return where in the pool, or with stride 1 in `_down`, a name stands; -1: nowhere."""
    stride = len(words) // MOST
    for n in range(MOST):
        word = words[stride * n]
        if word == np.uint64(0):
            break
        if word & np.uint64(NAME_BITS) == name:
            return n
    return -1
