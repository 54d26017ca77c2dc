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
    either RST          any         -> RESET           remember for 10 s; a new inside SYN opens it again

Segments whose flags no end can mean are dropped in every state: what is neither SYN nor RST acknowledges, and SYN, FIN and RST
exclude each other (RFC 9293, section 3.10.7). A SYN_SENT connection lets bare acknowledgments in: a server that still knows
an earlier connection answers so, and the client's RST must follow (section 3.5.1). Where the kernel decides otherwise
is listed in docs/network_functions.md.
"""

from datastore.native import inline
from nfs._rules import ACCEPT, MAX_RULES, REFUSE, WORDS, first_match, parsed_rules
from nfs._window import in_window
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
                    answerer_window="u4", scale_1="u1", scale_2="u1", state="u1", closed="u1", from_outside="u1")  # fmt: skip
"""All zero for a key never seen; the windows stay zero unless they are tracked (`_window.py`)."""

CLOSED, OPEN, SYN_SENT, SYN_RECEIVED, ESTABLISHED, CLOSING, TIME_WAIT, RESET = range(8)
INSIDE_CLOSED, OUTSIDE_CLOSED = 1, 2

MEANINGFUL = 1 << SYN | 1 << (SYN | ACK) | 1 << ACK | 1 << (FIN | ACK) | 1 << RST | 1 << (RST | ACK)
QUERIES = 1 << 8 | 1 << 13 | 1 << 15 | 1 << 17  # echo, time stamp, information, address mask (RFC 792, RFC 950)
ANSWERS = 1 << 0 | 1 << 14 | 1 << 16 | 1 << 18
ECHO_REQUEST_6, ECHO_REPLY_6 = 128, 129  # RFC 4443, section 4

UDP_S, ICMP_S, OPENING_S, ESTABLISHED_S, CLOSING_S, TIME_WAIT_S, RESET_S = 300, 60, 120, 7440, 240, 120, 10


@inline
def is_new(packet, connection):
    """Tell whether a packet asks for a connection that there is none of, or none any more."""
    if packet.icmp_error or packet.protocol != TCP:
        return connection.state == CLOSED and not packet.icmp_error
    over = connection.state == CLOSED or connection.state == RESET or connection.state == TIME_WAIT
    return over and packet.tcp_flags & (SYN | ACK | RST | FIN) == SYN


@inline
def forget_windows(connection):
    """Start anew: windows of zero are not known yet."""
    connection.opener_window = connection.answerer_window = 0
    connection.opener_end = connection.opener_limit = connection.answerer_end = connection.answerer_limit = 0
    connection.scale_1 = connection.scale_2 = 0


@inline
def follow(packet, connection, env, inside):
    """Follow the connection by a packet; return the verdict. inside: the packet is from the side that opened, or may open."""
    if packet.icmp_error or packet.fragment_offset > 0:  # a later fragment has neither flags nor type: its first one had them
        return FORWARD if connection.state != CLOSED else DROP
    if packet.ip_version == 6:
        if packet.protocol == ICMPV6 and packet.icmp_type != (ECHO_REQUEST_6 if inside else ECHO_REPLY_6):
            return DROP
    elif packet.protocol == ICMP and not (QUERIES if inside else ANSWERS) >> min(int(packet.icmp_type), 31) & 1:
        return DROP
    if packet.protocol != TCP:
        if connection.state == CLOSED and not inside:
            return DROP
        connection.state = OPEN
        env.idle_timeout_s = UDP_S if packet.protocol == UDP else ICMP_S
        return FORWARD

    flags = int(packet.tcp_flags) & (SYN | ACK | RST | FIN)
    if not MEANINGFUL >> flags & 1:
        return DROP
    opens = flags == SYN
    if connection.state == CLOSED or connection.state == RESET or connection.state == TIME_WAIT:
        if inside and opens:
            connection.state = SYN_SENT
            connection.closed = 0
            env.idle_timeout_s = OPENING_S
            return FORWARD
        # the last segments of a connection being closed may still be on their way
        return FORWARD if connection.state == TIME_WAIT and not flags & SYN else DROP
    if flags & RST:
        connection.state = RESET
        env.idle_timeout_s = RESET_S
        return FORWARD
    if connection.state == SYN_SENT:
        if not inside and flags & SYN:  # the answer, or a simultaneous open (RFC 9293, figure 8)
            connection.state = SYN_RECEIVED
        elif not opens and (inside or packet.tcp_flags != ACK or packet.payload_bytes != 0):
            return DROP
        env.idle_timeout_s = OPENING_S
        return FORWARD
    if connection.state == SYN_RECEIVED:
        env.idle_timeout_s = OPENING_S
        if inside and flags & ACK and not flags & SYN:
            connection.state = ESTABLISHED
    elif flags & SYN and inside == (flags & ACK != 0):
        return DROP  # who opened sends no SYN ACK any more, and who answered no SYN (RFC 9293, section 3.10.7.4)
    elif connection.state == CLOSING and flags == SYN | ACK:
        # who answered has forgotten that connection and accepts a new one: nobody has closed it (section 3.5.1)
        connection.state, connection.closed = SYN_RECEIVED, 0
        env.idle_timeout_s = OPENING_S
    if connection.state == ESTABLISHED:
        env.idle_timeout_s = ESTABLISHED_S
    if flags & FIN:
        connection.closed |= INSIDE_CLOSED if inside else OUTSIDE_CLOSED
        connection.state = TIME_WAIT if connection.closed == INSIDE_CLOSED | OUTSIDE_CLOSED else CLOSING
    if connection.state == CLOSING:
        env.idle_timeout_s = CLOSING_S
    elif connection.state == TIME_WAIT:
        env.idle_timeout_s = TIME_WAIT_S
    return FORWARD


@network_function(
    key=FLOW,
    state=CONNECTION,
    passes=("not_ip",),
    settings={"rules": (f"{MAX_RULES * WORDS}u8", []), "track_window": ("u1", False)},
    prepare=lambda settings: settings | {"rules": parsed_rules(settings["rules"])},
    needs_answers=True,
)
def firewall(packet, connection, env):
    state, closed, from_outside = connection.state, connection.closed, connection.from_outside
    new = is_new(packet, connection)
    if new:
        ruling = first_match(packet, env)
        if ruling == REFUSE:
            env.cause = REFUSED_BY_RULE
            return DROP
        connection.from_outside = 1 if ruling == ACCEPT and packet.arrived_from != INSIDE else 0
    from_opener = (packet.arrived_from == INSIDE) == (connection.from_outside == 0)
    verdict = follow(packet, connection, env, from_opener)
    whole = packet.protocol == TCP and not packet.icmp_error and packet.fragment_offset == 0
    if verdict == FORWARD and env.track_window and whole:
        if new:
            forget_windows(connection)
        if not in_window(packet, connection, from_opener, state <= SYN_RECEIVED):
            env.cause = OUT_OF_WINDOW
            env.idle_timeout_s = 0
            verdict = DROP
    if verdict == DROP:
        connection.state, connection.closed, connection.from_outside = state, closed, from_outside
    return verdict
