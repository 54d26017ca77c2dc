"""Stateful firewall: inside may open connections; outside may only answer them.

TCP is followed through its handshake, close and reset (RFC 9293, section 3.3.2); UDP and ICMP echo get pseudo-connections.
The time-outs are those of RFC 5382 (TCP), RFC 4787 (UDP) and RFC 5508 (ICMP). An ICMP error passes when the connection it
speaks of exists; other ICMP is queries from who may open and their answers (RFC 792). IPv6 is treated alike (RFC 6092, sections
3.2 and 3.3): ICMPv6 errors by their connection, "packet too big" among them (RFC 4890, section 4.3.1); of ICMPv6 queries the echo
(RFC 4443); what is for the link alone, neighbour discovery above all, passes as ARP does (RFC 4890, sections 4.2 and 4.4.1).

Settings: `rules`, up to 32 texts (`_rules.py`), are asked about new connections only, the first that matches decides; accept lets
also outside open. `track_window` drops segments that are not within the windows of their connection (`_window.py`).

Verdicts in trouble: a new connection that a rule refuses, DROP with cause refused_by_rule; a segment out of its window, DROP with
cause out_of_window; all else that is dropped, the function's verdict. Table full or state unreachable: DROP with that cause, from
inside too, until there is room or the store answers; a connection whose record is there goes on. One connection, walked through:

    inside SYN          CLOSED      -> SYN_SENT        remember for 120 s
    outside SYN ACK     SYN_SENT    -> SYN_RECEIVED
    inside ACK          SYN_RECEIVED-> ESTABLISHED     remember for 2 h 4 min
    inside FIN          ESTABLISHED -> inside closed   remember for 240 s
    outside FIN         both closed -> TIME_WAIT       remember for 120 s (twice the maximum segment lifetime, RFC 793: 2 min)
    either RST          any, was reset                 remember for 240 s (RFC 5382, REQ-5); other segments take it back
    outside RST ACK     SYN_SENT    -> RESET           it acknowledges the SYN: refused; remember for 10 s

**Segments that an end may refuse** change nothing by themselves (`_tcp.py`). A RST is passed on, and so are the challenge ACK
that answers it and all that follows (RFC 5961, sections 3.2 and 9.3). A FIN counts until its side sends what cannot stand before
it. A SYN on a live connection is passed on and remembered (`reopening`); a challenge ACK and a RST may follow, on the connection
as it was. Only the other side's SYN ACK begins the connection anew, from SYN_RECEIVED (RFC 9293, sections 3.5.1 and 3.10.7). With
`track_window` that answer must acknowledge the SYN. Segments of the other incarnation are not held against the windows: the SYN,
its answer, a RST that acknowledges it, and in SYN_SENT the opener's RST, which answers a challenge ACK.

Segments whose flags no end can mean are dropped in every state: what is neither SYN nor RST acknowledges, and SYN, FIN and RST
exclude each other (RFC 9293, section 3.10.7). A SYN_SENT connection lets bare acknowledgments in: a server that still knows
an earlier connection answers so, and the client's RST must follow (section 3.5.1). Where the kernel decides otherwise
is listed in docs/network_functions.md.
"""

import numpy as np

from datastore.compiled import inline
from nfs._rules import ACCEPT, MAX_RULES, REFUSE, WORDS, first_match, parsed_rules
from nfs._tcp import MEANINGFUL, contradicts_fin, control_flags, end_of
from nfs._window import REOPENING_SCALE, begin_again, forget_windows, in_window
from nfs.dataplane import (
    ACK,
    DROP,
    FIN,
    FLOW,
    FORWARD,
    ICMP,
    ICMPV6,
    INSIDE,
    OUT_OF_WINDOW,
    REFUSED_BY_RULE,
    RST,
    SYN,
    TCP,
    UDP,
    network_function,
    record,
)

CONNECTION = record(opener_end="u4", opener_limit="u4", opener_window="u4", answerer_end="u4", answerer_limit="u4",
                    answerer_window="u4", reopening="u4", scales="u2", state="u1", marks="u1")  # fmt: skip
"""All zero for a key never seen; the windows stay zero unless they are tracked (`_window.py`).

opener_end, answerer_end: without tracking, where a side's SYN (before the handshake is over) or FIN ended. reopening: where the
SYN ended that waits for its answer; its scale is the third of `scales`.
"""

CLOSED, OPEN, SYN_SENT, SYN_RECEIVED, ESTABLISHED, CLOSING, TIME_WAIT, RESET = range(8)
OPENER_CLOSED, ANSWERER_CLOSED, WAS_RESET, FROM_OUTSIDE, REOPENING, TURNS = 1, 2, 4, 8, 16, 32
"""`marks`. FROM_OUTSIDE: outside opened. REOPENING: a SYN waits for its answer; with TURNS it came from the answerer."""
BOTH_CLOSED = OPENER_CLOSED | ANSWERER_CLOSED
ALL_BUT_RESET, ALL_BUT_TURNS = 0xFF ^ WAS_RESET, 0xFF ^ TURNS
UNCHECKED = 3
"""A verdict of `follow`: FORWARD, and no window has a say in it."""

QUERIES = 1 << 8 | 1 << 13 | 1 << 15 | 1 << 17  # echo, time stamp, information, address mask (RFC 792, RFC 950)
ANSWERS = 1 << 0 | 1 << 14 | 1 << 16 | 1 << 18
ECHO_REQUEST_6, ECHO_REPLY_6 = 128, 129  # RFC 4443, section 4

UDP_S, ICMP_S, OPENING_S, ESTABLISHED_S, CLOSING_S, TIME_WAIT_S, RESET_S, REFUSED_S = 300, 60, 120, 7440, 240, 120, 240, 10


@inline
def is_over(connection):
    """Tell whether there is no connection, or none that is alive for certain."""
    state = connection.state
    return state in (CLOSED, RESET, TIME_WAIT) or connection.marks & WAS_RESET != 0


@inline
def asks_to_open(packet, connection, from_opener):
    """Tell whether a packet asks for a connection, so that the rules are asked: there is none, or its answerer sends a SYN."""
    if packet.icmp_error or packet.protocol != TCP:
        return connection.state == CLOSED and not packet.icmp_error
    return control_flags(packet) == SYN and (is_over(connection) or (not from_opener and connection.state >= ESTABLISHED))


@inline
def follow(packet, connection, env, from_opener, may_open):
    """Follow the connection by a packet; return the verdict, or UNCHECKED. may_open: its sender may open connections."""
    if packet.icmp_error or packet.fragment_offset > 0:  # a later fragment has neither flags nor type: its first one had them
        return FORWARD if connection.state != CLOSED else DROP
    asks = may_open if connection.state == CLOSED else from_opener
    if packet.ip_version == 6:
        if packet.protocol == ICMPV6 and packet.icmp_type != (ECHO_REQUEST_6 if asks else ECHO_REPLY_6):
            return DROP
    elif packet.protocol == ICMP and not (QUERIES if asks else ANSWERS) >> min(int(packet.icmp_type), 31) & 1:
        return DROP
    if packet.protocol == TCP:
        return follow_tcp(packet, connection, env, from_opener, may_open)
    if connection.state == CLOSED:
        if not may_open:
            return DROP
        connection.state, connection.marks = OPEN, 0 if packet.arrived_from == INSIDE else FROM_OUTSIDE
    env.idle_timeout_s = UDP_S if packet.protocol == UDP else ICMP_S
    return FORWARD


@inline
def follow_tcp(packet, connection, env, from_opener, may_open):
    """`follow` for a TCP segment."""
    flags = control_flags(packet)
    if not MEANINGFUL >> flags & 1:
        return DROP
    state = connection.state
    if state in (CLOSED, RESET) or (state == TIME_WAIT and flags & (SYN | RST)):
        if flags == SYN and may_open:
            return open_anew(packet, connection, env)
        return FORWARD if state == TIME_WAIT and flags & RST else DROP
    if flags & RST:
        return reset(packet, connection, env, from_opener)
    if flags & SYN:
        verdict = synchronize(packet, connection, env, from_opener, may_open)
    elif state == SYN_SENT and (from_opener or packet.tcp_flags != ACK or packet.payload_bytes != 0):
        return DROP
    else:
        connection.marks &= ALL_BUT_RESET
        verdict = FORWARD
        if state == SYN_RECEIVED and from_opener:
            connection.state = ESTABLISHED
        close(packet, connection, env, from_opener, flags & FIN != 0)
    set_time_out(packet, connection, env, flags)
    return verdict


@inline
def open_anew(packet, connection, env):
    """Begin a connection by its SYN; nothing of the one before counts."""
    connection.state = SYN_SENT
    connection.marks = FROM_OUTSIDE if packet.arrived_from != INSIDE else 0
    forget_windows(connection)
    connection.opener_end, connection.reopening = end_of(packet), 0
    env.idle_timeout_s = OPENING_S
    return FORWARD


@inline
def acknowledges_reopening(packet, connection, from_opener):
    """Tell whether a segment acknowledges the SYN that waits for its answer, and comes from the other side."""
    awaited = connection.marks & REOPENING != 0 and from_opener == (connection.marks & TURNS != 0)
    return awaited and packet.tcp_flags & ACK != 0 and packet.tcp_acknowledgment == connection.reopening


@inline
def reset(packet, connection, env, from_opener):
    """Follow a RST: a refusal ends the attempt, any other may be refused itself (RFC 5961, section 3.2)."""
    refuses = connection.state == SYN_SENT and not from_opener and packet.tcp_flags & ACK != 0
    again = acknowledges_reopening(packet, connection, from_opener)
    if again or (refuses and packet.tcp_acknowledgment == connection.opener_end):
        connection.state = RESET
        env.idle_timeout_s = REFUSED_S
        return UNCHECKED
    if connection.state == SYN_SENT and not from_opener:  # it acknowledges no SYN: its receiver refuses it (section 3.10.7.3)
        return FORWARD
    connection.marks |= WAS_RESET
    env.idle_timeout_s = OPENING_S if connection.state <= SYN_RECEIVED else RESET_S
    return UNCHECKED if connection.state == SYN_SENT else FORWARD


@inline
def synchronize(packet, connection, env, from_opener, may_open):
    """Follow a SYN, or SYN ACK, where there is a connection."""
    opening = connection.state <= SYN_RECEIVED
    if packet.tcp_flags & ACK:
        marked = connection.marks & REOPENING != 0 and from_opener == (connection.marks & TURNS != 0)
        if marked and (not env.track_window or packet.tcp_acknowledgment == connection.reopening):
            accept_reopening(connection)
        elif connection.state == SYN_SENT and not from_opener:
            connection.state = SYN_RECEIVED
        elif from_opener and connection.state != SYN_RECEIVED:
            return DROP  # who opened sends no SYN ACK any more (RFC 9293, section 3.10.7.4)
        return FORWARD
    if not from_opener and opening:  # a simultaneous open (RFC 9293, figure 8)
        connection.state = SYN_RECEIVED
        return FORWARD
    if not may_open and (not from_opener or connection.marks & WAS_RESET):
        return DROP
    if opening and end_of(packet) == connection.opener_end:
        return FORWARD  # sent again
    connection.reopening = end_of(packet)
    connection.scales = np.int64(connection.scales) & 0xFF | np.int64(packet.tcp_window_scale) << REOPENING_SCALE
    connection.marks = connection.marks & ALL_BUT_TURNS | REOPENING | (0 if from_opener else TURNS)
    return UNCHECKED


@inline
def accept_reopening(connection):
    """Begin anew with the SYN that has waited: the other side has answered it."""
    outside = connection.marks & FROM_OUTSIDE
    if connection.marks & TURNS:
        outside ^= FROM_OUTSIDE
    begin_again(connection)
    connection.state, connection.marks = SYN_RECEIVED, outside


@inline
def close(packet, connection, env, from_opener, fin):
    """Follow a side's FIN, and take back one that what this segment carries contradicts."""
    side = OPENER_CLOSED if from_opener else ANSWERER_CLOSED
    fin_end = connection.opener_end if from_opener else connection.answerer_end
    if connection.marks & side and contradicts_fin(packet, fin_end):
        connection.marks ^= side
        connection.state = CLOSING if connection.marks & BOTH_CLOSED else ESTABLISHED
    if not fin:
        return
    connection.marks |= side
    connection.state = TIME_WAIT if connection.marks & BOTH_CLOSED == BOTH_CLOSED else CLOSING
    if env.track_window:
        return
    if from_opener:
        connection.opener_end = end_of(packet)
    else:
        connection.answerer_end = end_of(packet)


@inline
def set_time_out(packet, connection, env, flags):
    """Set how long a connection is remembered after a segment that is no RST."""
    state = connection.state
    if state <= SYN_RECEIVED or (flags == SYN and connection.marks & WAS_RESET):
        env.idle_timeout_s = OPENING_S
    elif state == ESTABLISHED:
        env.idle_timeout_s = ESTABLISHED_S
    elif state == CLOSING:
        env.idle_timeout_s = CLOSING_S
    elif flags & FIN or packet.payload_bytes > 0:  # TIME_WAIT, which a FIN begins anew (RFC 9293, section 3.10.7.4)
        env.idle_timeout_s = TIME_WAIT_S


@network_function(
    key=FLOW,
    state=CONNECTION,
    passes=("not_ip",),
    settings={"rules": (f"{MAX_RULES * WORDS}u8", []), "track_window": ("u1", False)},
    prepare=lambda settings: settings | {"rules": parsed_rules(settings["rules"])},
    needs_answers=True,
)
def firewall(packet, connection, env):
    state, marks = connection.state, connection.marks
    inside = packet.arrived_from == INSIDE
    from_opener = inside == (marks & FROM_OUTSIDE == 0)
    may_open = inside
    if asks_to_open(packet, connection, from_opener):
        ruling = first_match(packet, env)
        if ruling == REFUSE:
            env.cause = REFUSED_BY_RULE
            return DROP
        may_open = inside or ruling == ACCEPT
    verdict = follow(packet, connection, env, from_opener, may_open)
    whole = packet.protocol == TCP and not packet.icmp_error and packet.fragment_offset == 0
    if verdict == FORWARD and env.track_window and whole:
        from_opener = inside == (connection.marks & FROM_OUTSIDE == 0)
        if not in_window(packet, connection, from_opener, state <= SYN_RECEIVED or connection.state <= SYN_RECEIVED):
            env.cause = OUT_OF_WINDOW
            env.idle_timeout_s = 0
            verdict = DROP
    if verdict == DROP:
        connection.state, connection.marks = state, marks
        return DROP
    return FORWARD
