"""Load balancer: one virtual address for many backends; a connection stays with its backend, whatever becomes of the pool.

    10.0.1.7:40002 SYN -> 10.64.1.1:80       no record. The choice among the backends is 10.128.0.2:8080. The connection that
                                             this one has, 10.0.1.7:40002 -> it, is claimed for 10.64.1.1:80. Then the client's
                                             record says 10.128.0.2:8080, then the packet leaves to there.
    10.128.0.2:8080 SYN ACK -> 10.0.1.7:40002  the claimed record says 10.64.1.1:80: the client hears it from there
    the pool changes                         the records do not: they hold addresses, not places in the pool

Two records of key FLOW, one for each side's view: the client's connection with the virtual address, the backend's with the
client. So one client port may speak with two virtual ports, and with a backend itself, at once; where two of these would be one
connection for a backend, the claim of the second fails and it goes to the next backend. Both are in the client's partition.

**Choice.** Rendezvous hashing of client address, port and protocol (D. Thaler, C. Ravishankar: Using name-based mappings to
increase hit rates, IEEE/ACM ToN 6(1), 1998), weighted by the logarithmic method (C. Schindelhauer, G. Schomaker: Weighted
distributed hash tables, SPAA 2005): the backend with the greatest  weight / -ln(hash in (0, 1)).  Who leaves or joins moves its
own share of the new choices only; all instances choose alike in whatever order their pools are listed; a SYN sent again
after its record was lost comes to the same backend, and with `pick_up` so does a TCP segment in the middle of a connection.

**Pool.** Weight 0 drains a backend: no new connections, old ones go on; so they do with one that was removed, as long as it
answers. A SYN chooses again where nobody can be at the other end: its connection was closed, or the backend is down or removed
and either the handshake has not ended or the SYN is not the one that opened the connection.

**Load and health.** Each backend has shared counters (`counter_key`), of TCP: connections opened, closed by the client's FIN
or RST (one that only times out is never counted as closed), SYNs, answers. A backend whose SYNs grow by `failure_syns` or more
and whose answers do not for `failure_s` is down and no choice any more. Each `trial_s` one new connection that would be its own
is let through; an answer, and it is up. A RST is no answer. All instances read the same counters, so they come to the same
verdict within a period of housekeeping; each has trials of its own. UDP and ICMP need no answer and tell nothing.

**Direct return** (mode="direct"): only the next hop changes, to the backend's `mac`; the backend has the virtual address itself
(on its loopback) and answers from it. Packets from outside are left alone, so they may pass or go another way. The answer that
is counted is the client's acknowledgment; SYNs from nowhere never get one, so a flood of them makes a pool look down.

TCP is followed as far as packets from inside tell (`_tcp.py`), with the firewall's time-outs: SYN 120 s, then ACK 2 h 4 min
(RFC 5382), then FIN or RST 240 s; UDP 300 s (RFC 4787), ICMP queries 60 s (RFC 5508). A RST that its backend refuses is taken
back by the client's next segment. A backend's RST alone shortens nothing. ICMP errors about a balanced connection reach its other
end, those from outside with the virtual address for source; echo and other queries go to a backend by the same rule. What is not
for the virtual address passes untouched, from outside too, and so does IPv6, for the virtual address is one of IPv4: put a
firewall beside.

Verdicts in trouble: no backend with weight that is up (or each has this client's connection already), DROP with cause
no_backend, for new connections only; a port or protocol that is not balanced, and a packet straight to a backend that would be
mixed up with a balanced connection, DROP with cause refused_by_rule. DROP, too, for what belongs to no connection: a TCP segment
that is no SYN, an ICMP error, a later fragment; and from outside what is for, or pretends to be from, the virtual address. Table
full or state unreachable: DROP with that cause; health stays as it was known last.
"""

import math

import numpy as np

from datastore.compiled import inline, jit
from datastore.store.partitions import flow_partition, hashed_partition, key_high, key_low
from nfs._backends import DIRECT, MOST, MOST_PORTS, NAME_BITS, REWRITTEN, place_in, prepare
from nfs._tcp import CLOSING, ESTABLISHED, NONE, OPENING, WAS_RESET, end_of, next_state
from nfs.dataplane import (
    ACK,
    DROP,
    FIN,
    FLOW,
    FORWARD,
    ICMP,
    NO_BACKEND,
    OUTSIDE,
    REFUSED_BY_RULE,
    RST,
    SYN,
    TCP,
    UDP,
    add,
    claim,
    kind_of,
    network_function,
    record,
)
from nfs.firewall import CLOSING_S, ESTABLISHED_S, ICMP_S, OPENING_S, QUERIES, RESET_S, UDP_S

CONNECTION = record(address="u4", port="u2", state="u1", role="u1", timeout_s="u2", service="u2", claimed_s="u4", sequence="u4",
                    fin_end="u4", next_hop="u8")  # fmt: skip
"""address, port: of the other end, the backend's or (ANSWERS) the virtual ones. service: the port in the backend's name.
state: of `_tcp.py`; of UDP and ICMP: ESTABLISHED. sequence: of the SYN. fin_end: where the client's FIN ended, in CLOSING."""
ANSWERS, OWN = 3, 4
"""`role`, besides REWRITTEN and DIRECT, a client's connection with the virtual address: what its backend answers; a client's own
with a backend."""

KIND = kind_of("load_balancer", CONNECTION)
COUNTER_PROTOCOL = 255
OPENED, CLOSED, SYNS, ANSWERED = range(4)
"""Words of a backend's shared counters."""
ON_TRIAL = 1 << 63
"""In a word of `_down`, beside the name: the next new connection may have it."""
NAME, SYNS_THEN, ANSWERS_THEN, SILENT_S, DOWN_S = range(5)
"""Columns of `_health`: name; SYNs and answers when answers last grew; since when they do not although SYNs do (0: it is not so);
when it went down or had its last trial (0: it is up)."""
MIX_1, MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)

SETTINGS = {
    "virtual_address": ("u4", "10.64.1.1"),
    "ports": (f"{MOST_PORTS}u2", "all"),  # of TCP and UDP: "all", one, or a list
    "backends": (f"{2 * MOST}u8", ["10.128.0.1"]),  # ADDRESS[:PORT] [weight N] [mac MAC], or the same as mappings
    "mode": ("u1", "rewrite"),  # or "direct"
    "failure_syns": ("i8", 3),  # unanswered SYNs in a row, 0: health is not looked at; for at least
    "failure_s": ("f8", 1.0),
    "trial_s": ("f8", 5.0),
    "pick_up": ("u1", False),
    "_down": (f"{MOST}u8", []),
    "_health": (f"{5 * MOST}f8", []),
}


@inline
def counter_key(name):
    """Return (high, low) of the key of a backend's counters."""
    high = np.uint64(name)
    low = key_low(0, 0, COUNTER_PROTOCOL, KIND, 0)
    return high, low | np.uint64(hashed_partition(high, low))


@inline
def name_of(address, port):
    """Return a backend's name."""
    return np.uint64(address) << np.uint64(16) | np.uint64(port)


@jit
def count(env, name, word):
    """Add one to a backend's counter."""
    high, low = counter_key(name)
    add(env, high, low, word, 1)


@inline
def uniform(client, name):
    """Return a number in (0, 1) hashed from a client and a backend: 52 bits of MurmurHash3's finaliser over both."""
    mixed = client * MIX_1 ^ name
    mixed = (mixed ^ mixed >> np.uint64(33)) * MIX_1
    mixed = (mixed ^ mixed >> np.uint64(33)) * MIX_2
    return (np.float64((mixed ^ mixed >> np.uint64(33)) >> np.uint64(12)) + 0.5) / 4503599627370496.0


@jit
def chosen(client, env, opens_tcp, attempt):
    """Return the place in the pool of a client's backend number `attempt`, best first; -1: there are not so many."""
    taken = 0
    best = -1
    for _ in range(attempt + 1):
        best, best_score = -1, 0.0
        for n in range(MOST):
            word = env.backends[2 * n]
            if word == np.uint64(0):
                break
            weight, name = word >> np.uint64(48), word & np.uint64(NAME_BITS)
            if weight == np.uint64(0) or taken >> n & 1:
                continue
            down = place_in(env._down, name)
            if down >= 0 and not (opens_tcp and env._down[down] >= np.uint64(ON_TRIAL)):
                continue
            score = np.float64(weight) / -math.log(uniform(client, name))
            if score > best_score:
                best, best_score = n, score
        if best < 0:
            break
        taken |= 1 << best
    return best


@inline
def choose(packet, connection, env, opens_tcp):
    """Give a connection its backend; False: there is none."""
    ends = np.uint64(packet.source_address) << np.uint64(24) | np.uint64(packet.source_port) << np.uint64(8)
    place = chosen(ends | np.uint64(packet.protocol), env, opens_tcp, env.attempt)
    if place < 0:
        return False
    name = env.backends[2 * place] & np.uint64(NAME_BITS)
    down = place_in(env._down, name)
    if down >= 0:  # its trial: one connection
        env._down[down] = name
    connection.address, connection.service = name >> np.uint64(16), name & np.uint64(0xFFFF)
    connection.port = packet.destination_port if connection.service == 0 or packet.protocol == ICMP else connection.service
    connection.next_hop = env.backends[2 * place + 1]
    connection.state, connection.role = NONE, env.mode
    connection.timeout_s, connection.claimed_s, connection.sequence, connection.fin_end = 0, 0, 0, 0
    return True


@inline
def is_query(packet):
    """Tell whether an ICMP message is one that somebody answers."""
    return QUERIES >> min(np.int64(packet.icmp_type), 31) & 1 != 0


@inline
def may_open(packet, env):
    """Tell whether a whole packet that is no error may be a connection's first."""
    if packet.protocol == TCP:
        flags = packet.tcp_flags & (SYN | ACK | RST | FIN)
        return flags == SYN or (env.pick_up != 0 and flags == ACK)
    return packet.protocol == UDP or (packet.protocol == ICMP and is_query(packet))


@inline
def is_served(packet, env):
    """Tell whether a packet's port, or its protocol, is balanced."""
    if not packet.has_ports:
        return packet.protocol == ICMP
    found = env.ports[0] == 0
    for n in range(MOST_PORTS):
        found |= env.ports[n] == packet.destination_port and packet.destination_port != 0
    return found


@inline
def begins_anew(packet, connection, env):
    """Tell whether a packet with a record begins another connection, one that may have another backend."""
    if packet.protocol != TCP or packet.tcp_flags & (SYN | ACK | RST | FIN) != SYN:
        return False
    again = connection.sequence == packet.tcp_sequence
    if connection.state >= CLOSING:
        return not again
    if again and connection.state == ESTABLISHED:
        return False
    name = name_of(connection.address, connection.service)
    return place_in(env.backends, name) < 0 or place_in(env._down, name) >= 0


@jit
def follow(packet, connection, env, counted):
    """Set a record's state by a packet from inside and return its time-out. counted: in its backend's counters."""
    if packet.protocol != TCP:
        connection.state = ESTABLISHED
        return ICMP_S if packet.protocol == ICMP else UDP_S
    before, flags, word = np.int64(connection.state), packet.tcp_flags, -1
    state = next_state(before, packet, connection.fin_end)
    if flags & SYN and not flags & RST:
        if before <= OPENING:
            connection.sequence, word = packet.tcp_sequence, SYNS
        else:  # the SYN of this connection, sent again, or a new one that the backend will not take yet
            state = before
    elif state == CLOSING and flags & FIN:
        connection.fin_end = end_of(packet)
    if (before == ESTABLISHED) != (state == ESTABLISHED):
        word = OPENED if state == ESTABLISHED else CLOSED
    connection.state = state
    if counted and word >= 0:
        name = name_of(connection.address, connection.service)
        count(env, name, word)
        if word == OPENED and connection.role == DIRECT:
            count(env, name, ANSWERED)
    if connection.state == ESTABLISHED:
        return ESTABLISHED_S
    return OPENING_S if connection.state == OPENING else RESET_S if connection.state >= WAS_RESET else CLOSING_S


@inline
def hold(packet, connection, env, timeout_s):
    """Keep the connection with the backend claimed: when its time-out changes, and each quarter of it.

    A claim lasts half as long again as the time-out, so whoever's packets are rewritten has it, as in `_translation.py`.
    """
    now_s = env.now_ns // 1_000_000_000
    if connection.timeout_s == timeout_s and 0 <= now_s - np.int64(connection.claimed_s) < timeout_s // 4:
        return
    connection.timeout_s, connection.claimed_s = timeout_s, now_s
    partition = flow_partition(packet.source_address, packet.source_port, packet.has_ports)
    high = key_high(packet.source_address, connection.address)
    low = key_low(packet.source_port, connection.port, packet.protocol, KIND, partition)
    whose = np.uint64(packet.destination_address) | np.uint64(packet.destination_port) << np.uint64(32)
    claimed_s = timeout_s + timeout_s // 2
    claim(env, high, low, whose | np.uint64(ANSWERS) << np.uint64(56),
          np.uint64(claimed_s) | np.uint64(connection.service) << np.uint64(16), claimed_s)  # fmt: skip


@inline
def to_backend(packet, connection, env):
    """The verdict on a packet from inside to the virtual address, sent to its backend."""
    if packet.icmp_error or packet.fragment_offset > 0:
        if connection.role == NONE:
            return DROP
    else:
        if connection.role == NONE or begins_anew(packet, connection, env):
            if not is_served(packet, env):
                env.cause = REFUSED_BY_RULE
                return DROP
            if not may_open(packet, env):
                return DROP
            if not choose(packet, connection, env, packet.tcp_flags & SYN != 0):
                env.cause = NO_BACKEND
                return DROP
        elif env.attempt > 0:  # somebody else has its claim: it cannot go to another
            env.cause = NO_BACKEND
            return DROP
        elif packet.protocol == ICMP and not is_query(packet):
            return DROP
        timeout_s = follow(packet, connection, env, True)
        env.idle_timeout_s = timeout_s
        if connection.role == REWRITTEN:
            hold(packet, connection, env, timeout_s)
    if connection.role == REWRITTEN:
        packet.destination_address = connection.address
        if packet.has_ports:
            packet.destination_port = connection.port
    packet.next_hop = connection.next_hop
    return FORWARD


@inline
def is_to_backend(packet, env):
    """Tell whether a packet is straight to a backend's service, so that a balanced connection might be mixed up with it."""
    for n in range(MOST):
        name = env.backends[2 * n]
        if name == np.uint64(0):
            break
        port = name & np.uint64(0xFFFF)
        same = not packet.has_ports or port == np.uint64(0) or port == np.uint64(packet.destination_port)
        if same and name >> np.uint64(16) & np.uint64(0xFFFFFFFF) == np.uint64(packet.destination_address):
            return True
    return False


@inline
def past(packet, connection, env):
    """The verdict on a packet from inside that is not for the virtual address: it passes. One to a backend is remembered."""
    if packet.icmp_error or packet.fragment_offset > 0 or (packet.protocol == ICMP and not is_query(packet)):
        return FORWARD
    if connection.role == ANSWERS:
        env.cause = REFUSED_BY_RULE
        return DROP
    if connection.role == OWN or (env.mode == REWRITTEN and is_to_backend(packet, env)):
        connection.role = OWN
        connection.timeout_s = env.idle_timeout_s = follow(packet, connection, env, False)
    return FORWARD


@inline
def to_client(packet, connection, env):
    """The verdict on a packet from outside: what a backend answers comes from the virtual address."""
    if packet.destination_address == env.virtual_address:
        return DROP
    if connection.role == OWN:
        env.idle_timeout_s = 0 if packet.icmp_error else connection.timeout_s
    if connection.role == REWRITTEN or (packet.source_address == env.virtual_address and env.mode == REWRITTEN):
        return DROP
    query = packet.protocol == ICMP and not packet.icmp_error and packet.fragment_offset == 0 and is_query(packet)
    if connection.role != ANSWERS or query:
        return FORWARD
    if not packet.icmp_error:
        env.idle_timeout_s = connection.timeout_s
        if packet.protocol == TCP and packet.tcp_flags & (SYN | ACK) == SYN | ACK:
            count(env, name_of(packet.source_address, connection.service), ANSWERED)
    packet.source_address = connection.address
    if packet.has_ports:
        packet.source_port = connection.port
    return FORWARD


def housekeep(env, read, now_s):
    """Judge the backends by their shared counters, and give those that are down their trials."""
    settings = env[0]
    health = settings["_health"].reshape(MOST, 5)
    known = {int(row[NAME]): row.copy() for row in health if row[NAME]}
    were_down = {int(word) & NAME_BITS: int(word) for word in settings["_down"]}
    pool = [int(word) & NAME_BITS for word in settings["backends"][::2] if word]
    rows, down = np.zeros((MOST, 5)), np.zeros(MOST, np.uint64)
    downs = 0
    for n, name in enumerate(pool if settings["failure_syns"] else []):
        counts = read(*map(int, counter_key(np.uint64(name))))
        row = rows[n]
        row[:] = known.get(name, (name, counts[SYNS], counts[ANSWERED], 0, 0))
        judge(row, float(counts[SYNS]), float(counts[ANSWERED]), settings, now_s)
        if row[DOWN_S]:
            down[downs] = were_down.get(name, name)
            if now_s - row[DOWN_S] >= settings["trial_s"]:
                row[DOWN_S] = now_s
                down[downs] = name | ON_TRIAL
            downs += 1
    health[:] = rows
    settings["_down"][:] = down


def judge(row, syns, answers, settings, now_s):
    """Set a backend's row of `_health` by its counters."""
    if answers != row[ANSWERS_THEN] or syns < row[SYNS_THEN]:  # fewer: the store began anew
        row[SYNS_THEN], row[ANSWERS_THEN], row[SILENT_S], row[DOWN_S] = syns, answers, 0, 0
    elif syns > row[SYNS_THEN] and not row[SILENT_S]:
        row[SILENT_S] = now_s
    elif not row[DOWN_S] and row[SILENT_S] and now_s - row[SILENT_S] >= settings["failure_s"]:
        row[DOWN_S] = now_s if syns - row[SYNS_THEN] >= settings["failure_syns"] else 0


@network_function(key=FLOW, state=CONNECTION, passes=("not_ip",), rewrites=True, settings=SETTINGS, prepare=prepare,
                  housekeep=housekeep, needs_answers=True)  # fmt: skip
def load_balancer(packet, connection, env):
    if packet.ip_version == 6:
        return FORWARD
    if packet.arrived_from == OUTSIDE:
        return to_client(packet, connection, env)
    balanced = connection.role == REWRITTEN or connection.role == DIRECT
    if balanced or (connection.role == NONE and packet.destination_address == env.virtual_address):
        return to_backend(packet, connection, env)
    return past(packet, connection, env)
