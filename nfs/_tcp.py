"""TCP as a middlebox can follow it: which state may be taken from a segment that its receiver may refuse?

An end refuses segments that a middlebox has seen: a RST that is not exactly due (RFC 5961, section 3.2), a SYN on a live
connection (RFC 9293, section 3.10.7.4), a FIN or data outside its window. Therefore no such segment ends a connection by itself:

    RST     leaves the connection as it is, with the transitory time-out of RFC 5382, REQ-5. Any other segment of the connection
            takes the RST back, as in RFC 6146, section 3.5.2.2 (state TRANS), and RFC 7857, section 2
    FIN     counts until its side sends something that cannot stand before it (`contradicts_fin`)
    SYN     on a live connection is the first word of the next one; only the answer to it begins that one (firewall.py)

Two followers use this: of one side, by what the side that opens sends (`next_state`: translators and load balancer), and of both
sides (firewall.py).
"""

import numpy as np

from datastore.compiled import inline
from nfs.dataplane import ACK, FIN, RST, SYN

MODULUS = 0xFFFFFFFF
HALF = 1 << 31
ONE_CONNECTION_BYTES = 1 << 24
"""A segment that begins at most so far before the end of a closing connection is one of it, sent again."""

NONE, OPENING, ESTABLISHED, CLOSING = range(4)
"""States of one side's follower: nothing, SYN, ACK, FIN."""
WAS_RESET = 8
"""Beside a state: a RST came after it, and nothing since."""

MEANINGFUL = 1 << SYN | 1 << (SYN | ACK) | 1 << ACK | 1 << (FIN | ACK) | 1 << RST | 1 << (RST | ACK)


@inline
def control_flags(packet):
    """Return the flags of a segment that open and close connections, as an int."""
    return int(packet.tcp_flags) & (SYN | ACK | RST | FIN)


@inline
def behind(one, other):
    """Tell whether sequence number `one` is less than `other` (RFC 9293, section 3.4)."""
    return (np.int64(one) - np.int64(other)) & MODULUS >= HALF


@inline
def end_of(packet):
    """Return the sequence number behind a segment: payload, SYN and FIN counted (RFC 9293, section 3.4)."""
    size = np.int64(packet.payload_bytes)
    if packet.tcp_flags & SYN:
        size += 1
    if packet.tcp_flags & FIN:
        size += 1
    return (np.int64(packet.tcp_sequence) + size) & MODULUS


@inline
def contradicts_fin(packet, fin_end):
    """Tell whether a segment shows that its side's FIN, which ended at `fin_end`, was not the last of its connection.

    It begins beyond the FIN, or far before it: then the FIN stood outside the window, and its receiver has refused it.
    """
    return (np.int64(fin_end) - np.int64(packet.tcp_sequence)) & MODULUS > ONE_CONNECTION_BYTES


@inline
def next_state(state, packet, fin_end):
    """Return the state of a one-sided follower after a segment; fin_end: where the FIN ended, read in CLOSING only.

    A SYN begins a connection where there is none, or none that is alive as far as this side tells. A repeated FIN stays CLOSING.
    """
    flags = control_flags(packet)
    before = np.int64(state) & ~WAS_RESET
    if flags & RST:
        return before | WAS_RESET
    if flags & SYN:
        return np.int64(ESTABLISHED if state == ESTABLISHED else OPENING)
    if flags & FIN:
        return np.int64(CLOSING)
    if before == CLOSING:
        return np.int64(ESTABLISHED if contradicts_fin(packet, fin_end) else CLOSING)
    return np.int64(ESTABLISHED if before <= OPENING and flags & ACK else before)
