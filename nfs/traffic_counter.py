"""Traffic counter: packets and bytes of every connection, both ways; a write on every packet, the worst case for its state.

Bytes are those of the Ethernet header, what it carries before IP, and the IP packet by its own length; Ethernet's padding and
trailers are no part of what was sent.

Verdicts in trouble: table full or state unreachable, DROP with that cause: what passes is counted.
"""

import numpy as np

from nfs.dataplane import FLOW, FORWARD, INSIDE, network_function, record

COUNTERS = record(packets_out="u8", bytes_out="u8", packets_in="u8", bytes_in="u8")
IDLE_TIMEOUT_S = 600


@network_function(key=FLOW, state=COUNTERS, passes=("not_ip", "unreadable", "fragment"))
def traffic_counter(packet, counters, env):
    size = np.uint64(packet.network_offset) + np.uint64(packet.ip_bytes)
    if packet.arrived_from == INSIDE:
        counters.packets_out += 1
        counters.bytes_out += size
    else:
        counters.packets_in += 1
        counters.bytes_in += size
    env.idle_timeout_s = IDLE_TIMEOUT_S
    return FORWARD
