"""Rule lists of the firewall: text such as "accept tcp from 10.0.0.0/8 to any port 80-443" to words that are compared quickly.

    (accept | drop) [in | out] [any | tcp | udp | icmp | icmpv6 | NUMBER] [from PLACE] [to PLACE]
    PLACE: (any | ADDRESS[/BITS]) [port PORT[-PORT]]          IPv4 or IPv6: "drop in udp from 2001:db8::/32"

out: packets from inside; in: packets from outside; neither: both. The first rule that matches decides. A rule without addresses
is one for both versions of IP. It has ten words:

    source address: high, low, mask of high, mask of low      the same of the destination      (IPv4's are in the low 32 bits)
    first << 48 | last << 32 of the source's ports, first << 16 | last of the destination's
    verdict | sides << 8 | (protocol + 1, 0 for any) << 16 | (4 or 6, 0 for any) << 32
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

import numpy as np

from datastore.base.errors import NearstateError
from datastore.compiled import inline
from nfs.dataplane.ipv6 import low_word

MAX_RULES, WORDS = 32, 10
DESTINATION, PORTS, KIND = 4, 8, 9
NO_RULE, ACCEPT, REFUSE = 0, 1, 2
SIDES = {"out": 1, "in": 2}
PROTOCOLS = {"any": 0, "icmp": 2, "tcp": 7, "udp": 18, "icmpv6": 59}
ANY_PORT, ANYWHERE = (0, 65535), (0, 0, 0, 0)
LOW_64 = (1 << 64) - 1
EXAMPLE = '"accept out tcp from 10.0.0.0/8 to any port 80-443"'


def parsed_rules(texts: list[str] | str) -> list[int]:
    """Return the words of these rules. Raises NearstateError naming the rule and the word that is wrong."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if len(texts) > MAX_RULES:
        raise NearstateError(f"{len(texts)} firewall rules: {MAX_RULES} are possible")
    return [word for text in texts for word in parsed_rule(text)]


def parsed_rule(text: str) -> list[int]:
    """Return the ten words of a rule."""
    words = str(text).lower().split()

    def wrong(what: str) -> NearstateError:
        return NearstateError(f"firewall rule {text!r}: {what}; a rule looks like {EXAMPLE}")

    def take() -> str:
        return words.pop(0) if words else ""

    verdict = {"accept": ACCEPT, "drop": REFUSE}.get(take())
    if verdict is None:
        raise wrong("it begins with accept or drop")
    sides = SIDES[take()] if words and words[0] in SIDES else 3
    protocol = 0
    if words and words[0] in PROTOCOLS:
        protocol = PROTOCOLS[take()]
    elif words and words[0].isdigit():
        protocol = int(take()) + 1
        if protocol > 256:
            raise wrong(f"protocol {protocol - 1}; protocols are 0 to 255")
    places: dict[str, tuple[int, ...]] = {"from": ANYWHERE, "to": ANYWHERE}
    ports, versions = {"from": ANY_PORT, "to": ANY_PORT}, {0}
    for end in ("from", "to"):
        if not words or words[0] != end:
            continue
        take()
        place = take()
        if place != "any":
            network = _network(place, end, wrong)
            places[end] = _place_words(network)
            versions.add(network.version)
        if words and words[0] == "port":
            take()
            ports[end] = _port_range(take(), wrong)
            if protocol not in (PROTOCOLS["tcp"], PROTOCOLS["udp"]):
                raise wrong("only tcp and udp have ports")
    if words:
        raise wrong(f"{words[0]!r} is not understood here")
    if versions >= {4, 6}:
        raise wrong("one place is IPv4, the other IPv6")
    (first, last), (to_first, to_last) = ports["from"], ports["to"]
    return [*places["from"], *places["to"], first << 48 | last << 32 | to_first << 16 | to_last,
            verdict | sides << 8 | protocol << 16 | max(versions) << 32]  # fmt: skip


def _network(place: str, end: str, wrong: Any) -> IPv4Network | IPv6Network:
    try:
        return ip_network(place)
    except ValueError as error:
        raise wrong(f"{end} {place!r} is no network ({error})") from None


def _place_words(network: IPv4Network | IPv6Network) -> tuple[int, ...]:
    address, mask = int(network.network_address), int(network.netmask)
    return address >> 64, address & LOW_64, mask >> 64, mask & LOW_64


def _port_range(text: str, wrong: Any) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not first.isdigit() or (last and not last.isdigit()) or text.endswith("-"):
        raise wrong(f"port {text!r} is no port and no range such as 80-443")
    found = int(first), int(last or first)
    if not found[0] <= found[1] <= 65535:
        raise wrong(f"port {text}: ports are 0 to 65535, the lower one first")
    return found


@inline
def _within(high, low, rules, at):
    return (high ^ rules[at]) & rules[at + 2] == np.uint64(0) and (low ^ rules[at + 1]) & rules[at + 3] == np.uint64(0)


@inline
def first_match(packet, env):
    """Return what the first rule that matches says of a packet, ACCEPT or REFUSE; NO_RULE when none does."""
    source = low_word(packet.source_middle, packet.source_address)
    destination = low_word(packet.destination_middle, packet.destination_address)
    for n in range(0, MAX_RULES * WORDS, WORDS):
        kind = np.int64(env.rules[n + KIND])
        if kind == 0:
            break
        protocol, version = kind >> 16 & 0xFFFF, kind >> 32
        if kind >> 8 >> packet.arrived_from & 1 == 0 or (protocol != 0 and protocol != np.int64(packet.protocol) + 1):
            continue
        if version != 0 and version != packet.ip_version:
            continue
        if not _within(packet.source_high, source, env.rules, n):
            continue
        if not _within(packet.destination_high, destination, env.rules, n + DESTINATION):
            continue
        ports = env.rules[n + PORTS]
        from_first, from_last = np.int64(ports >> np.uint64(48)), np.int64(ports >> np.uint64(32) & np.uint64(0xFFFF))
        to_first, to_last = np.int64(ports >> np.uint64(16) & np.uint64(0xFFFF)), np.int64(ports & np.uint64(0xFFFF))
        if from_first <= packet.source_port <= from_last and to_first <= packet.destination_port <= to_last:
            return kind & 3
    return NO_RULE
