"""Stateful firewall: inside may open connections; outside may only answer them.

TCP is followed through its handshake, close and reset (RFC 9293, section 3.3.2); UDP and ICMP echo get pseudo-connections.
The time-outs are those of RFC 5382 (TCP), RFC 4787 (UDP) and RFC 5508 (ICMP). An ICMP error passes when the connection it
speaks of exists. One connection, walked through:

    inside SYN          CLOSED      -> SYN_SENT        remember for 120 s
    outside SYN ACK     SYN_SENT    -> SYN_RECEIVED
    inside ACK          SYN_RECEIVED-> ESTABLISHED     remember for 2 h 4 min
    inside FIN          ESTABLISHED -> inside closed   remember for 240 s
    outside FIN         both closed -> TIME_WAIT       remember for 120 s (twice the maximum segment lifetime, RFC 793: 2 min)
    either RST          any         -> RESET           remember for 10 s; a new inside SYN opens it again
"""

from nfs.dataplane import ACK, DROP, FIN, FLOW, FORWARD, INSIDE, RST, SYN, TCP, UDP, network_function, record

CONNECTION = record(state="u1", closed="u1")  # all zero for a key never seen

CLOSED, OPEN, SYN_SENT, SYN_RECEIVED, ESTABLISHED, CLOSING, TIME_WAIT, RESET = range(8)
INSIDE_CLOSED, OUTSIDE_CLOSED = 1, 2

UDP_S, ICMP_S, OPENING_S, ESTABLISHED_S, CLOSING_S, TIME_WAIT_S, RESET_S = 300, 60, 120, 7440, 240, 120, 10


@network_function(key=FLOW, state=CONNECTION, passes=("not_ip",))
def firewall(packet, connection, env):
    inside = packet.arrived_from == INSIDE
    if packet.icmp_error:
        return FORWARD if connection.state != CLOSED else DROP
    if packet.protocol != TCP:
        if connection.state == CLOSED and not inside:
            return DROP
        connection.state = OPEN
        env.idle_timeout_s = UDP_S if packet.protocol == UDP else ICMP_S
        return FORWARD

    flags = packet.tcp_flags
    opens = flags & (SYN | ACK | RST | FIN) == SYN
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
        if not inside and flags & (SYN | FIN) == SYN:  # the answer, or a simultaneous open (RFC 9293, figure 8)
            connection.state = SYN_RECEIVED
        elif not (inside and opens):
            return DROP
        env.idle_timeout_s = OPENING_S
        return FORWARD
    if connection.state == SYN_RECEIVED:
        env.idle_timeout_s = OPENING_S
        if inside and flags & ACK and not flags & SYN:
            connection.state = ESTABLISHED
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
