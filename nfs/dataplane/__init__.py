"""What a network function is written with; see `declaration.py`. The engine that runs it is `engine.py`."""

from nfs.dataplane.declaration import DROP, ENV, FORWARD, NetworkFunction, load, network_function, record
from nfs.dataplane.headers import ACK, FIN, ICMP, INSIDE, OUTSIDE, PACKET, RST, SYN, TCP, UDP
from nfs.dataplane.keys import FLOW, NONE, SOURCE, TUPLE

__all__ = ["ACK", "DROP", "ENV", "FIN", "FLOW", "FORWARD", "ICMP", "INSIDE", "NONE", "OUTSIDE", "PACKET", "RST", "SOURCE",
           "SYN", "TCP", "TUPLE", "UDP", "NetworkFunction", "load", "network_function", "record"]  # fmt: skip
