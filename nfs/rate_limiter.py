"""Rate limiter: a token bucket for every sender; what exceeds its rate is dropped. A write on every packet.

The buckets are those of RFC 2697 (committed burst size CBS = `burst_*`, committed information rate CIR = `*_per_s`; there is no
excess bucket), one for packets and one for bytes of IP (RFC 2697, section 2: no link headers; and by IP's own length, so that
neither padding nor a trailer counts). A record that was never seen is
a full bucket, so what is kept is not the tokens but what is missing from CBS, `owed`, in billionths of a packet or byte: a rate
per second times nanoseconds is a whole number of these, and nothing is ever rounded.

    owed(t) = max(0, owed(t0) - rate * (t - t0))           RFC 2697, section 3: tokens come at CIR, up to CBS
    a packet of size B passes iff owed + B <= burst, and then owes B more; a packet that is dropped owes nothing

So in any time t at most burst + rate * t passes, and traffic within that is never dropped. Senders are counted by address, on
whichever side they are (`limits`); each IPv6 address for itself, of which one sender may have many. The record is forgotten when
its bucket is full again.

A clock that stands still or goes back by less than a second (another instance read its own a little later) pays nothing back
twice. One that goes back further is another clock: the bucket goes on from it as it was.

Verdicts in trouble: over the rate, DROP with cause rate_exceeded. A later fragment counts as its sender's, also before its first.
Table full or state unreachable: DROP with that cause,
nobody passes uncounted. The defaults are above what the testbed's generator offers: what is measured is the cost of the state.
"""

import numpy as np

from datastore.base.errors import NearstateError, unknown
from datastore.compiled import inline
from nfs.dataplane import DROP, FORWARD, RATE_EXCEEDED, SOURCE, network_function, record

BUCKET = record(packets_owed="i8", bytes_owed="i8", updated_ns="i8")

SECOND_NS = ONE = 1_000_000_000
"""ONE: a packet or byte, in billionths."""
LARGEST_BURST = 4_000_000_000
LARGEST_RATE = 100_000_000_000
LARGEST_PACKET_BYTES = 1504
LONGEST_FILL_S = 86_400
SIDES = {"inside": 1, "outside": 2, "both": 3}


def prepare(settings):
    """Check rates and bursts; `limits` becomes a mask of sides."""
    if settings["limits"] not in SIDES:
        raise unknown("side that the rate limiter limits", settings["limits"], SIDES)
    for unit, smallest in (("packets", 1), ("bytes", LARGEST_PACKET_BYTES)):
        rate, burst = settings[f"{unit}_per_s"], settings[f"burst_{unit}"]
        if not rate:
            continue
        if not (smallest <= burst <= LARGEST_BURST and 0 < rate <= LARGEST_RATE and burst <= rate * LONGEST_FILL_S):
            raise NearstateError(f"rate limiter with {unit}_per_s={rate}, burst_{unit}={burst}: a burst is {smallest} to "
                                 f"{LARGEST_BURST:,} {unit} and comes back within a day; a rate of 0 is none")  # fmt: skip
    return settings | {"limits": SIDES[settings["limits"]]}


@inline
def left(owed, rate, elapsed_ns):
    """Return what is still owed after `elapsed_ns`; the product cannot overflow where it is used."""
    return np.int64(0) if elapsed_ns > owed // rate else owed - elapsed_ns * rate


@network_function(
    key=SOURCE,
    state=BUCKET,
    passes=("not_ip", "fragment"),
    settings={
        "packets_per_s": ("i8", 1_000_000),  # 0: packets are not limited
        "burst_packets": ("i8", 10_000),
        "bytes_per_s": ("i8", 0),  # 0: bytes are not limited
        "burst_bytes": ("i8", 1_000_000),
        "limits": ("u1", "both"),  # senders "inside", "outside" or "both"
    },
    prepare=prepare,
)
def rate_limiter(packet, bucket, env):
    if env.limits >> packet.arrived_from & 1 == 0:
        return FORWARD
    elapsed_ns = env.now_ns - bucket.updated_ns
    if elapsed_ns > 0 or elapsed_ns < -SECOND_NS:
        bucket.updated_ns = env.now_ns
    elapsed_ns = max(elapsed_ns, np.int64(0))
    packets = size = idle_ns = np.int64(0)
    if env.packets_per_s > 0:
        bucket.packets_owed = left(bucket.packets_owed, env.packets_per_s, elapsed_ns)
        packets = bucket.packets_owed + ONE
        idle_ns = packets // env.packets_per_s
    if env.bytes_per_s > 0:
        bucket.bytes_owed = left(bucket.bytes_owed, env.bytes_per_s, elapsed_ns)
        size = bucket.bytes_owed + np.int64(packet.ip_bytes) * ONE
        idle_ns = max(idle_ns, size // env.bytes_per_s)
    env.idle_timeout_s = idle_ns // SECOND_NS + 2
    if packets > env.burst_packets * ONE or size > env.burst_bytes * ONE:
        env.cause = RATE_EXCEEDED
        return DROP
    if env.packets_per_s > 0:
        bucket.packets_owed = packets
    if env.bytes_per_s > 0:
        bucket.bytes_owed = size
    return FORWARD
