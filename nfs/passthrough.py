"""Passthrough: forwards every frame and keeps no state; what the path itself costs."""

from nfs.dataplane import FORWARD, NONE, network_function


@network_function(key=NONE, passes=("truncated", "malformed", "not_ip", "unreadable", "fragment"))
def passthrough(packet, record, env):
    return FORWARD
