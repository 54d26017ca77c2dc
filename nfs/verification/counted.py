"""Counted: gives every packet of a flow the next number, which leaves in its destination address.

A number that is given twice, or to a later packet before an earlier one, shows in the frames that leave. For tests.
"""

from nfs.dataplane import FLOW, FORWARD, network_function, record

COUNT = record(packets="u8")


@network_function(key=FLOW, state=COUNT, rewrites=True)
def counted(packet, count, env):
    count.packets += 1
    packet.destination_address = count.packets & 0xFFFFFFFF
    return FORWARD
