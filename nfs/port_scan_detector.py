"""Port scan detector: threshold random walk over the outcomes of each source's first contacts; scanners are blocked or marked.

J. Jung, V. Paxson, A. Berger, H. Balakrishnan: Fast portscan detection using sequential hypothesis testing, IEEE S&P 2004. An
attempt to open a TCP connection succeeds with probability theta_0 when its source is benign, theta_1 < theta_0 when it scans.
After s successes and f failures of first contacts (section III; the sum is the logarithm of its equation 2):

    walk = s * ln(theta_1 / theta_0) + f * ln((1 - theta_1) / (1 - theta_0))
    walk >= ln(beta / alpha)                 a scanner: detected with probability beta at least
    walk <= ln((1 - beta) / (1 - alpha))     benign: a benign source is taken for a scanner with probability alpha at most

Then the walk starts again, so a host that begins to scan later is found too; alpha and beta hold for each walk.

    SYN to a service not contacted before      pending, if one of 4 places is free; else not counted (nor remembered)
    SYN ACK from it                            success
    RST, or an ICMP error about the SYN        failure
    nothing for `answer_s`                     failure, seen at the source's next packet

What was contacted (address and port; only the address with contacts="hosts", as in the paper) is remembered as one of 64 bits,
until 32 are set: up to every second contact of a source with as many goes uncounted, whatever its outcome will be. Attempt
and answer meet in one record, under the initiator's address, whichever instances they pass.

A scanner is blocked for `block_s` (all it sends, and the answers to it; cause blocked_source), or, with action="mark", only
counted: word 0 of the shared counter (key FLAGGED_HIGH, FLAGGED_LOW) counts scanners found, word 1 the packets
of theirs since, in both cases.

An IPv6 source is one address, its services named by a hash of theirs; who has a network of addresses can scan from each.

Verdicts in trouble: what carries no TCP is never an attempt and passes unless its sender is blocked. Whoever can send with
somebody else's address can have it blocked: against an outside that can, watch "inside" or mark.
Table full or state unreachable: DROP with that cause, nobody passes unwatched.
"""

import math
from typing import Any

import numpy as np

from datastore.base.errors import NearstateError, unknown
from datastore.compiled import inline
from nfs.dataplane import (
    ACK,
    BLOCKED_SOURCE,
    DROP,
    FIN,
    FORWARD,
    INITIATOR,
    RST,
    SYN,
    TCP,
    add,
    kind_of,
    network_function,
    record,  # fmt: skip
)
from nfs.dataplane.ipv6 import destination_word, source_word

WALK = record(contacted="u8", pending="u8", since="u8", successes="u2", failures="u2", contacts="u1", scanner="u1")
"""pending: four 16-bit names of services whose answer is awaited, 0 none; since: for each, when, in ticks of 2^26 ns (67 ms)."""

PLACES, TICK_BITS, TICKS = 4, 26, 0xFFFF
REMEMBERED = 32
FORGET_S = 3600
ROUND_TICKS = 60_000
"""A source that was silent for FORGET_S starts anew, before ticks come round (4,398 s). An age of ROUND_TICKS, 4,027 s, is a
clock a little behind the one that was read at the attempt."""
LONGEST_WALK = 60_000
SIDES = {"inside": 1, "outside": 2, "both": 3}
BLOCK, MARK = 0, 1
ACTIONS = {"block": BLOCK, "mark": MARK}
CONTACTS = {"hosts": 0, "services": 1}
COUNTER_PROTOCOL = 255
"""In a counter's key, where a source's has 0."""

KIND = kind_of("port_scan_detector", WALK)
FLAGGED_HIGH, FLAGGED_LOW = np.uint64(0), np.uint64(COUNTER_PROTOCOL << 24 | KIND << 16 | KIND)
"""Key of the shared counter; any partition would do."""


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """Check probabilities and choices; choices become numbers."""
    s = settings
    if not 0 < s["theta_1"] < s["theta_0"] < 1 or s["theta_0"] - s["theta_1"] < 0.05:
        raise NearstateError(f"port scan detector with theta_0={s['theta_0']}, theta_1={s['theta_1']}: wanted is "
                             "0 < theta_1 < theta_0 < 1, "
                             "at least 0.05 apart (0.8 and 0.2 in the paper)")  # fmt: skip
    if not 0 < s["alpha"] < s["beta"] < 1:
        raise NearstateError(f"port scan detector with alpha={s['alpha']}, beta={s['beta']}: 0 < alpha < beta < 1 (0.01 and 0.99 "
                             "in the paper)")  # fmt: skip
    if not 0.1 <= s["answer_s"] <= 600 or not 1 <= s["block_s"] <= 86_400:
        raise NearstateError(f"port scan detector with answer_s={s['answer_s']}, block_s={s['block_s']}: 0.1 to 600 and 1 to "
                             "86400 are possible")  # fmt: skip
    for name, choices in (("watch", SIDES), ("action", ACTIONS), ("contacts", CONTACTS)):
        if s[name] not in choices:
            raise unknown(f"port scan detector's {name}", s[name], choices)
    return s | {"watch": SIDES[s["watch"]], "action": ACTIONS[s["action"]], "contacts": CONTACTS[s["contacts"]]}


@inline
def name_of(address, port):
    """Return a service's name, 1 to 2^32 - 1, well mixed (multiplicative hashing, D. Knuth, TAOCP 3, 6.4)."""
    mixed = (np.int64(address) << 16 | np.int64(port)) % 2_147_483_647 * 1_640_531_527
    return (mixed ^ mixed >> 24) & 0xFFFFFFFF | 1


@inline
def service(walk, n):
    """Return the 16-bit name that waits in place `n`; 0: it is free."""
    return np.int64(walk.pending >> np.uint64(16 * n) & np.uint64(TICKS))


@inline
def put(walk, n, name, tick):
    """Fill place `n`; name 0 frees it."""
    clear = ~(np.uint64(TICKS) << np.uint64(16 * n))
    walk.pending = walk.pending & clear | np.uint64(name) << np.uint64(16 * n)
    walk.since = walk.since & clear | np.uint64(tick) << np.uint64(16 * n)


@inline
def settle(walk, env, tick, name, succeeded):
    """Count the outcome of the pending attempt called `name`, if there is one, and those whose answer did not come in time."""
    late = np.int64(env.answer_s * 1e9) >> TICK_BITS
    for n in range(PLACES):
        waits = service(walk, n)
        age = (tick - np.int64(walk.since >> np.uint64(16 * n) & np.uint64(TICKS))) & TICKS
        if waits != 0 and (waits == name or late < age < ROUND_TICKS):
            if waits == name and succeeded:
                walk.successes += 1
            else:
                walk.failures += 1
            put(walk, n, 0, 0)


@inline
def attempt(walk, tick, name):
    """Remember a first contact and wait for its answer, if a place is free."""
    bit = np.uint64(1) << np.uint64(name >> 16 & 63)
    if walk.contacted & bit != np.uint64(0):
        return
    for n in range(PLACES):
        if service(walk, n) == 0:
            if walk.contacts >= REMEMBERED:
                walk.contacted = np.uint64(0)
                walk.contacts = 0
            walk.contacted |= bit
            walk.contacts += 1
            put(walk, n, name & TICKS, tick)
            return


@inline
def judge(walk, env):
    """Decide the walk, if it has come so far; True: the source is a scanner."""
    height = walk.successes * math.log(env.theta_1 / env.theta_0)
    height += walk.failures * math.log((1 - env.theta_1) / (1 - env.theta_0))
    found = height >= math.log(env.beta / env.alpha)
    if found or height <= math.log((1 - env.beta) / (1 - env.alpha)) or walk.successes + walk.failures > LONGEST_WALK:
        walk.successes = walk.failures = 0
    return found


@inline
def sentence(env):
    """Return the verdict on a packet of a scanner."""
    add(env, FLAGGED_HIGH, FLAGGED_LOW, 1, 1)
    if env.action == MARK:
        return FORWARD
    env.cause = BLOCKED_SOURCE
    return DROP


@network_function(
    key=INITIATOR,
    state=WALK,
    passes=("not_ip", "fragment"),
    settings={
        "theta_0": ("f8", 0.8),
        "theta_1": ("f8", 0.2),
        "alpha": ("f8", 0.01),
        "beta": ("f8", 0.99),
        "answer_s": ("f8", 3.0),
        "block_s": ("i8", 600),
        "watch": ("u1", "both"),  # sources "inside", "outside" or "both"
        "action": ("u1", "block"),  # or "mark"
        "contacts": ("u1", "services"),  # or "hosts"
    },
    prepare=prepare,
    needs_answers=True,
)
def port_scan_detector(packet, walk, env):
    if walk.scanner:
        return sentence(env)
    flags = packet.tcp_flags
    answer = (packet.icmp_error and packet.protocol == TCP) or flags & RST or flags & (SYN | ACK) == SYN | ACK
    opens = not answer and flags & (SYN | FIN) == SYN and env.watch >> packet.arrived_from & 1
    if not opens and walk.pending == np.uint64(0):
        return FORWARD
    tick = env.now_ns >> TICK_BITS & TICKS
    other, port = destination_word(packet), packet.destination_port
    if answer:
        other, port = source_word(packet), packet.source_port
    name = np.int64(name_of(other, port if env.contacts else 0))
    outcomes = walk.successes + walk.failures
    settle(walk, env, tick, name & TICKS if answer else -1, flags & (SYN | RST) == SYN)
    if walk.successes + walk.failures != outcomes and judge(walk, env):
        walk.scanner = 1
        env.idle_timeout_s = env.block_s
        add(env, FLAGGED_HIGH, FLAGGED_LOW, 0, 1)
        return sentence(env)
    if opens:
        attempt(walk, tick, name)
    env.idle_timeout_s = FORGET_S
    return FORWARD
