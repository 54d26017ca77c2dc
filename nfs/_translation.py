"""What the address translators share: candidates for external ports, claims, TCP's time-outs, both directions.

A translation is two records. The *inside* record, under the key of packets from inside, holds the external address and port;
the *outside* record, under the key of packets from outside, holds the client's. The outside record is made, and kept alive, only
by claims, so whose the port is, is decided in one place:

    a packet from inside is translated only if its client's claim of the port was committed less than `renewal` seconds ago,
    and every claim lasts longer than that, also one that a later packet made shorter

so no port serves two, whatever became of instances and inside records. `renewal` is a quarter of the protocol's shortest
time-out, a claim lasts half as long again as the time-out it is made for; a SYN and a new time-out renew it at once.
Ports come back when the claim expires.

Candidates, numbered for each client's address and port: its own port at its own external address (the one with the
client's low bits, where a power of two is given), then a walk over all that
agree with it in bits 0 to 8 (parity and partition), from a start and with a stride that are hashed from the client, so the same
client comes to the same port again; then the same at the next external address. At most TRIES are claimed for one packet; the
record remembers how many were taken, and the client's next packet goes on from there.

TCP is followed as far as packets from inside tell (`next_state` in `_tcp.py`). The record's time-out is that of RFC 5382, REQ-5:

    SYN                          OPENING      transitory; `sequence` is the SYN's
    then an ACK                  ESTABLISHED  established
    then FIN                     CLOSING      transitory; `sequence` is where this connection ended
    in CLOSING, other numbers    ESTABLISHED  a segment of another connection from the same port, or a FIN that was refused
    then RST                     WAS_RESET    transitory, beside the state before; any segment but a SYN takes it back
    in OPENING or ESTABLISHED, a SYN with another number: several connections use the port (`shared`); one that closes no longer
    shortens the time-out of the others

What only outside says (its RST or FIN) shortens nothing: the answer from inside does, where there is one.
"""

from ipaddress import IPv4Address, IPv4Network

import numpy as np

from datastore.base.errors import NearstateError
from datastore.compiled import inline, jit
from datastore.store.partitions import flow_partition, key_high, key_low
from nfs._tcp import CLOSING, ESTABLISHED, NONE, OPENING, control_flags, end_of, next_state
from nfs.dataplane import (
    ACK,
    DROP,
    FIN,
    FORWARD,
    ICMP,
    INSIDE,
    OUTSIDE,
    PORTS_EXHAUSTED,
    REFUSED_BY_RULE,
    RST,
    SYN,
    TCP,
    TURN,
    UDP,
    claim,
    record,
)  # fmt: skip
from nfs.dataplane.keys import endpoint_key

MAPPING = record(address="u4", port="u2", state="u1", shared="u1", timeout_s="u4", claimed_s="u4", sequence="u4", tried="u4")
"""address, port: of the other side. The first word of an outside record says whose it is; its `timeout_s` is its claim's.
state: of `_tcp.py`; of UDP, ICMP and outside records: NONE or ESTABLISHED."""

MOST_ADDRESSES = 1 << 16
TRIES = 127
"""Claims for one packet: all candidates at one external address, its own port and the walk over 126."""
STRIDES = (1, 5, 11, 13, 17, 19, 23, 25, 29, 31, 37, 41, 43, 47, 53, 55)
"""Coprime to 126, so that a walk comes to every port of a class once (1024 + bits 0 to 8 + 512 n, n below 126)."""
CLASS_PORTS = 126
MOST_CANDIDATES = (CLASS_PORTS + 2) * MOST_ADDRESSES
CLASS_BITS = 0x1FF
EXHAUSTED_S = 10
"""How long it is remembered where a client without a port goes on searching."""
NUMBERS = 0xFFFFFFFF
REDIRECT = 5

SETTINGS = {
    "external_addresses": ("2u4", "10.64.0.0/28"),  # a network, an address, or consecutive addresses; kept as first and count
    "udp_timeout_s": ("i8", 300),
    "icmp_timeout_s": ("i8", 60),
    "tcp_established_s": ("i8", 7440),
    "tcp_transitory_s": ("i8", 240),
    "inbound_refresh": ("u1", True),  # RFC 4787, REQ-6a: packets from outside keep the port for its client, too
    "pick_up": ("u1", False),  # a TCP connection whose SYN was not seen gets a port, as with nf_conntrack_tcp_loose
}
SHORTEST_TIMEOUT_S, LONGEST_TIMEOUT_S = 4, 86_400


def prepare(settings):
    """Check addresses and time-outs; `external_addresses` becomes [first, count]."""
    first, count = addresses_of(settings["external_addresses"])
    for name, value in settings.items():
        if name.endswith("_s") and not (isinstance(value, int) and SHORTEST_TIMEOUT_S <= value <= LONGEST_TIMEOUT_S):
            raise NearstateError(f"{name}={value!r}: {SHORTEST_TIMEOUT_S} to {LONGEST_TIMEOUT_S} seconds are possible")
    if settings["tcp_established_s"] < settings["tcp_transitory_s"]:
        raise NearstateError(f"tcp_established_s={settings['tcp_established_s']} is shorter than "
                             f"tcp_transitory_s={settings['tcp_transitory_s']}")  # fmt: skip
    return settings | {"external_addresses": [first, count]}


def addresses_of(given):
    """Return (first, count) of the external addresses a user gives."""
    try:
        if isinstance(given, str):
            network = IPv4Network(given)
            first, count = int(network.network_address), network.num_addresses
        else:
            numbers = sorted(int(IPv4Address(address)) for address in given)
            first, count = numbers[0], len(numbers)
            if numbers != list(range(first, first + count)):
                raise ValueError
    except (ValueError, TypeError, IndexError):
        first = count = 0
    if first == 0 or not 1 <= count <= MOST_ADDRESSES:
        raise NearstateError(f"external_addresses={given!r}: give an IPv4 network as '10.64.0.0/28', or a list of consecutive "
                             f"addresses, at most {MOST_ADDRESSES:,}")  # fmt: skip
    return first, count


@inline
def mixed(address, port, protocol):
    """Return 31 bits hashed from a client's endpoint; every product fits 63 bits."""
    bits = np.int64(address) ^ np.int64(port) << 16 ^ np.int64(protocol) << 9
    bits = (bits & NUMBERS) * 0x45D9F3B
    bits = (bits ^ bits >> 27) & NUMBERS
    bits = bits * 0x45D9F3B
    return (bits ^ bits >> 31) & 0x7FFFFFFF


@inline
def external_port(address, port, protocol, n):
    """Return candidate `n` at one external address for a client's port: its own, then a walk. Never port 0 but for ICMP."""
    own, bits = np.int64(port), np.int64(mixed(address, port, protocol))
    if protocol == ICMP:
        return own if n == 0 else (bits + n * (bits >> 15 | 1)) & 0xFFFF
    if n == 0 and own > 0:
        return own
    if n == 1 and own < 1024 and own != 512:  # RFC 4787, REQ-3a: the other well-known port of its class
        return own ^ 512
    step = bits + n * STRIDES[bits >> 20 & 15]
    return (own & CLASS_BITS) + 1024 + 512 * (step % CLASS_PORTS)


@inline
def candidates(port, protocol):
    """Return how many candidates there are at one external address."""
    return 1 + CLASS_PORTS + (port < 1024) if protocol != ICMP else TRIES


@inline
def is_external(address, env):
    """Tell whether an address is one of ours."""
    return np.int64(0) <= np.int64(address) - np.int64(env.external_addresses[0]) < np.int64(env.external_addresses[1])


@jit
def allocate(packet, mapping, env, n):
    """Put candidate `n` of the client into its record. Paired pooling: the first ones are at the address that is its own."""
    first, count = np.int64(env.external_addresses[0]), np.int64(env.external_addresses[1])
    each = np.int64(candidates(packet.source_port, packet.protocol))
    n = n % (each * count)
    mapping.address = first + (np.int64(packet.source_address) - first + n // each) % count
    mapping.port = external_port(packet.source_address, packet.source_port, packet.protocol, n % each)
    mapping.state, mapping.shared = ESTABLISHED, 0


@inline
def follow(packet, mapping):
    """Set a record's `state` by the flags of a TCP segment from inside."""
    flags, number = control_flags(packet), np.int64(packet.tcp_sequence)
    if flags & SYN and (mapping.state == OPENING or mapping.state == ESTABLISHED) and mapping.sequence != number:
        mapping.shared = 1
    if flags & (FIN | RST) and mapping.shared:
        return
    mapping.state = next_state(mapping.state, packet, mapping.sequence)
    if mapping.state == OPENING and flags & SYN:
        mapping.sequence = number
    elif mapping.state == CLOSING and flags & FIN:
        mapping.sequence = end_of(packet)


@inline
def may_open(packet, env):
    """Tell whether a packet from inside may be its client's first."""
    if packet.fragment_offset > 0 or packet.icmp_error:
        return False
    if packet.protocol == TCP:
        flags = packet.tcp_flags & (SYN | ACK | RST | FIN)
        return flags == SYN or (env.pick_up != 0 and flags == ACK)
    if packet.protocol == ICMP:  # queries: echo, timestamp, information, address mask (RFC 792, RFC 950)
        return packet.icmp_type == 8 or packet.icmp_type == 13 or packet.icmp_type == 15 or packet.icmp_type == 17
    return True


@inline
def is_icmp_reply(kind):
    """RFC 792, RFC 950: echo reply, timestamp reply, information reply, address mask reply."""
    return kind == 0 or kind == 14 or kind == 16 or kind == 18


@inline
def hold(packet, mapping, env, kind, by_flow):
    """Keep the client's port claimed: the claim word by word, and when it is due. Sets the records' time-outs."""
    timeout = shortest = env.udp_timeout_s
    if packet.protocol == TCP:
        shortest = env.tcp_transitory_s
        timeout = env.tcp_established_s if mapping.state == ESTABLISHED else env.tcp_transitory_s
    elif packet.protocol == ICMP:
        timeout = shortest = env.icmp_timeout_s
    now_s = env.now_ns // 1_000_000_000
    since = now_s - np.int64(mapping.claimed_s)
    opens = packet.protocol == TCP and packet.tcp_flags & SYN != 0
    env.idle_timeout_s = timeout
    if mapping.timeout_s == timeout and 0 <= since < shortest // 4 and not (opens and since > 1):
        return
    mapping.timeout_s, mapping.claimed_s = timeout, now_s
    port, address = np.int64(mapping.port), mapping.address
    partition = flow_partition(address, port, packet.has_ports)
    if by_flow:
        server_port = port if packet.protocol == ICMP else np.int64(packet.destination_port)
        high = key_high(address, packet.destination_address)
        low = key_low(port, server_port, packet.protocol, kind, partition)
    else:
        high, low = endpoint_key(address, port, packet.protocol, OUTSIDE, kind, partition)
    whose = np.int64(packet.source_address) | np.int64(packet.source_port) << 32 | ESTABLISHED << 48
    claimed_s = timeout + timeout // 2
    claim(env, high, low, whose, claimed_s, claimed_s)


@inline
def outbound(packet, mapping, env, kind, by_flow):
    """`translate` for a packet from inside."""
    if mapping.state == NONE and not may_open(packet, env):
        return DROP
    if packet.protocol == ICMP and not packet.icmp_error and packet.fragment_offset == 0 and not may_open(packet, env):
        return DROP  # outside cannot have asked
    if not packet.icmp_error and packet.fragment_offset == 0:
        fresh = 0 <= env.now_ns // 1_000_000_000 - np.int64(mapping.claimed_s) <= 1
        held = mapping.state != NONE and (env.attempt == 0 or (fresh and env.attempt < TRIES))
        if not held:
            # a record that had a port lost it at attempt 0: its first candidate is taken at attempt 1
            n = env.attempt - (mapping.state != NONE)
            first = np.int64(mapping.tried) if mapping.state == NONE else np.int64(0)
            if n >= TRIES:
                mapping.state, mapping.address, mapping.port, mapping.timeout_s = NONE, 0, 0, 0
                mapping.tried = (first + TRIES) % MOST_CANDIDATES
                env.idle_timeout_s, env.cause = EXHAUSTED_S, PORTS_EXHAUSTED
                return DROP
            allocate(packet, mapping, env, first + n)
            mapping.timeout_s = 0
            if packet.protocol == TCP and packet.tcp_flags & SYN:
                mapping.state, mapping.sequence = OPENING, packet.tcp_sequence
        if packet.protocol == TCP:
            follow(packet, mapping)
        hold(packet, mapping, env, kind, by_flow)
    packet.source_address, packet.source_port = mapping.address, mapping.port
    if packet.protocol == ICMP:
        packet.destination_port = mapping.port
    return TURN if is_external(packet.destination_address, env) else FORWARD


@inline
def inbound(packet, mapping, env):
    """`translate` for a packet from outside."""
    if mapping.state == NONE:
        return DROP
    if not packet.icmp_error:
        if packet.protocol == ICMP and packet.fragment_offset == 0 and not is_icmp_reply(packet.icmp_type):
            return DROP
        if env.inbound_refresh:
            env.idle_timeout_s = mapping.timeout_s  # that of the claim: never shorter than what was claimed
    packet.destination_address, packet.destination_port = mapping.address, mapping.port
    if packet.protocol == ICMP:
        packet.source_port = mapping.port
    return FORWARD


@inline
def translate(packet, mapping, env, kind, by_flow):
    """Return the verdict on a packet, translated. kind: of the records. by_flow: the other party's endpoint is in their keys."""
    if packet.ip_version == 6:
        return FORWARD
    if packet.protocol != TCP and packet.protocol != UDP and packet.protocol != ICMP:
        env.cause = REFUSED_BY_RULE
        return DROP
    if (
        packet.icmp_error and packet.icmp_type == REDIRECT
    ):  # it names a router of the sender's network (RFC 1122, section 3.2.2.2)
        return DROP
    if packet.arrived_from == INSIDE:
        return outbound(packet, mapping, env, kind, by_flow)
    return inbound(packet, mapping, env)
