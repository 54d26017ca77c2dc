"""What a network function is written with; see `declaration.py`. The packet loop that runs it is `loop.py`."""

from nfs.dataplane.declaration import DROP, FORWARD, TURN, NetworkFunction, kind_of, load, network_function, record
from nfs.dataplane.headers import ACK, FIN, ICMP, ICMPV6, INSIDE, OUTSIDE, PACKET, RST, SYN, TCP, UDP
from nfs.dataplane.keys import ENDPOINT, FLOW, INITIATOR, NONE, SOURCE, TUPLE
from nfs.dataplane.ledger import BLOCKED_SOURCE, NO_BACKEND, OUT_OF_WINDOW, PORTS_EXHAUSTED, RATE_EXCEEDED, REFUSED_BY_RULE
from nfs.dataplane.requests import ENV, add, claim

__all__ = ["ACK", "BLOCKED_SOURCE", "DROP", "ENDPOINT", "ENV", "FIN", "FLOW", "FORWARD", "ICMP", "ICMPV6", "INITIATOR", "INSIDE",
           "NONE", "NO_BACKEND", "OUTSIDE", "OUT_OF_WINDOW", "PACKET", "PORTS_EXHAUSTED", "RATE_EXCEEDED", "REFUSED_BY_RULE",
           "RST", "SOURCE", "SYN", "TCP", "TUPLE", "TURN", "UDP", "NetworkFunction", "add", "claim", "kind_of", "load",
           "network_function", "record"]  # fmt: skip
