"""Claimed: as `counted`, and every flow has a name of its own, claimed from the store as a NAT claims a port.

All flows try the same names in the same order. A flow's name leaves in its packets' source address, so one that two flows have,
or that a flow changes, shows in the frames that leave. For tests.
"""

import numpy as np

from nfs.dataplane import DROP, FLOW, FORWARD, claim, kind_of, network_function, record

NAMED = record(packets="u4", name="u4")
KIND = kind_of("claimed", NAMED)
NAMES = 16
NAME_HIGH = 0x4E414D45
"""High word of the key of a name's record; the low word's first bits are its partition."""
PARTITIONS = 4
LASTS_S = 3600


@network_function(key=FLOW, state=NAMED, rewrites=True)
def claimed(packet, named, env):
    if named.name == 0:
        name = env.attempt + 1
        if name > NAMES:
            return DROP
        low = np.uint64(name) << np.uint64(24) | np.uint64(KIND) << np.uint64(16) | np.uint64(name % PARTITIONS)
        claim(env, NAME_HIGH, low, packet.source_port, 0, LASTS_S)
        named.name = name
    named.packets += 1
    packet.destination_address = named.packets
    packet.source_address = named.name
    return FORWARD
