"""TCP windows as a middlebox can know them: may this segment be what its receiver accepts now?

G. van Rooij: Real stateful TCP packet filtering in IP Filter, 2001, section 4, as Linux conntrack has it (`tcp_in_window`). For
each side S of a connection, R the other, from the segments seen so far:

    end      the highest sequence number S has sent, plus one         (with SYN and FIN counted)
    limit    the highest that R has said S may send: ack + window     (scaled, RFC 7323, when both SYNs had the option)
    window   the largest window S has offered

A segment of S with sequence numbers seq to seq + length and acknowledgment ack is accepted when

    I    seq <= S.limit                             not beyond what R offered
    II   seq + length >= S.end - R.window           not older than what R's window can reach back to
    III  ack <= R.end                               not for what R has not sent
    IV   ack >= R.end - max(S.window, 66000)        not older than a window

all modulo 2^32. Selective acknowledgments are not read: bounds III and IV are those of the cumulative one.
A RST is judged and moves nothing: its receiver may refuse it (RFC 5961, section 3.2). Segments of another incarnation of the
connection are not judged at all; the firewall knows them (RFC 9293, section 3.5.1).
Later fragments have no sequence numbers and are not looked at, so what they carry counts as not sent: TCP in fragments
(path MTU discovery avoids it) fails bound III.
"""

import numpy as np

from datastore.compiled import inline
from nfs._tcp import MODULUS, behind, end_of
from nfs.dataplane import ACK, RST, SYN

LARGEST_UNSCALED_SYN = 65535
ANSWERER_SCALE, REOPENING_SCALE = 4, 8
"""Places in `scales`, behind the opener's: four bits for each, 1 + the shift or 0."""
LARGEST_UNSCALED = 66000
"""Of the paper, section 4: 65535 and room for one full segment."""


@inline
def forget_windows(connection):
    """Start anew: windows of zero are not known yet."""
    connection.opener_window = connection.answerer_window = 0
    connection.opener_end = connection.opener_limit = connection.answerer_end = connection.answerer_limit = 0
    connection.scales = 0


@inline
def begin_again(connection):
    """Start anew with the SYN that waits for its answer: where it ended, its scale, and the most that it can have offered."""
    end, scale = connection.reopening, connection.scales >> REOPENING_SCALE & 15
    forget_windows(connection)
    connection.opener_end = connection.opener_limit = end
    connection.opener_window, connection.scales = LARGEST_UNSCALED_SYN, scale


@inline
def offered(packet, scale, other_scale):
    """Return the window of a segment in bytes, at least 1 in a SYN; scales are 1 + the shift, 0 when there was no option."""
    window = np.int64(packet.tcp_window)
    if packet.tcp_flags & SYN:
        return max(window, np.int64(1))
    return window << np.int64(scale - 1) if scale != 0 and other_scale != 0 else window


@inline
def in_window(packet, connection, from_opener, opening):
    """Tell whether a segment is within the windows, and follow them by it; opening: the handshake is not over."""
    end, limit, window, scale = connection.opener_end, connection.opener_limit, connection.opener_window, connection.scales & 15
    o_end, o_limit, o_window, o_scale = (connection.answerer_end, connection.answerer_limit, connection.answerer_window,
                                         connection.scales >> ANSWERER_SCALE & 15)  # fmt: skip
    if not from_opener:
        end, limit, o_end, o_limit = o_end, o_limit, end, limit
        window, scale, o_window, o_scale = o_window, o_scale, window, scale
    s_end, s_limit, s_window, s_scale = np.int64(end), np.int64(limit), np.int64(window), np.int64(scale)
    o_end, o_limit, o_window, o_scale = np.int64(o_end), np.int64(o_limit), np.int64(o_window), np.int64(o_scale)
    flags = packet.tcp_flags
    first = np.int64(packet.tcp_sequence)
    last = end_of(packet)
    answers = opening and flags & ACK and np.int64(packet.tcp_acknowledgment) == o_end
    if flags & SYN and (s_window == 0 or (answers and s_end != last)):  # its first, or an answer by who forgot the first
        s_end = s_limit = last
        s_window = offered(packet, 0, 0)
        s_scale = np.int64(packet.tcp_window_scale)
    elif s_window == 0:  # before its SYN: a refusal must acknowledge ours (RFC 9293, section 3.10.7.3)
        return flags & RST == 0 or (flags & ACK != 0 and np.int64(packet.tcp_acknowledgment) == o_end)
    ack = np.int64(packet.tcp_acknowledgment)
    if flags & ACK == 0 or (flags & RST and ack == 0):
        ack = o_end
    reach = max(s_window, np.int64(LARGEST_UNSCALED))
    if (
        behind(s_limit, first)
        or (o_window != 0 and behind(last, s_end - o_window))
        or behind(o_end, ack)
        or behind(ack, o_end - reach)
    ):
        return False
    if flags & RST:
        return True
    size = offered(packet, s_scale, o_scale)
    s_window = max(s_window, size)
    if behind(s_end, last):
        s_end = last
    if o_window != 0 and behind(s_limit, last):
        o_window += (last - s_limit) & MODULUS
    right = (ack + max(size, np.int64(1))) & MODULUS
    if flags & ACK and not behind(right, o_limit):
        o_limit = right
    if from_opener:
        s_end, o_end, s_limit, o_limit, s_window, o_window = o_end, s_end, o_limit, s_limit, o_window, s_window
        s_scale, o_scale = o_scale, s_scale
    connection.answerer_end, connection.answerer_limit, connection.answerer_window = s_end, s_limit, min(s_window, MODULUS)
    connection.opener_end, connection.opener_limit, connection.opener_window = o_end, o_limit, min(o_window, MODULUS)
    connection.scales = o_scale | s_scale << ANSWERER_SCALE | np.int64(connection.scales) & (15 << REOPENING_SCALE)
    return True
