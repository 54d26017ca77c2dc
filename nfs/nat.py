"""NAT: many clients behind a few external addresses; ports translated, each owned by one client (NAPT of RFC 3022).

    10.0.1.7:40002 SYN -> 10.128.0.1:80     no record. Candidate 0 is 10.64.0.7:40002. Claimed for 10.0.1.7:40002: committed.
                                            Then its own record, then the packet leaves as 10.64.0.7:40002 -> 10.128.0.1:80.
    10.128.0.1:80 -> 10.64.0.7:40002        the record that was claimed says 10.0.1.7:40002; delivered to it
    10.0.1.23:40002 ... the same address    the next candidate, 1024 + bits 0 to 8 of 40002 + 512 n: 10.64.0.7:20034, say

Ports, claims and time-outs are told in `_translation.py`. What is required, and where:

    RFC 4787  1 endpoint-independent mapping; 2 paired pooling (the next address when a client's own is full); 3, 3a no port
              overloading, well-known and other ports apart as long as there are any; 4 parity; 5 UDP 300 s; 6 refreshed from
              inside, 6a (`inbound_refresh`) the port from outside; 8 endpoint-independent filtering; 9, 9a hairpinning with
              external source; 10 no ALGs; 11 deterministic; 12 ICMP ends nothing; 14 fragments in any order (those that
              overtake their first one wait for it). Not: 7; 13 (nothing is fragmented, no ICMP is sent)
    RFC 5382  1, 3 as above; 2 SYN both ways, simultaneous open; 4 an unwanted SYN is dropped silently; 5 time-outs 2 h 4 min and
              4 min; 7 no overloading; 8 hairpinning; 9, 10 ICMP errors are translated and end nothing
    RFC 5508  1, 1a queries of all kinds; 2 60 s; 3b, 3c options in a quotation, its checksums not validated; 4, 5 errors
              translated, inside and out; 6 errors refresh nothing; 7, 7a hairpinned errors (hairpinned queries are asked of
              Basic NAT only); 11 other ICMP is dropped, and so are redirects: they name a router of the sender's network
              (RFC 1122, section 3.2.2.2). Not: 3, 3a (no checksum is validated: they are updated, so a wrong one stays
              wrong); 8, 10 (no ICMP is sent: the ledger counts)
    RFC 7857  section 2: RST leaves the mapping its transitory time-out, until inside goes on (RFC 6146, section 3.5.2.2); a RST
              from outside alone shortens nothing

For filtering by address and port as well, put the firewall before it: chain=("firewall", "nat"). For a port for every connection
see `nat_symmetric`. The defaults give 16 addresses to all clients; a client's is the one with its low four bits, so that echo
replies and fragments, which switches steer by the address, come back to the same one of two, four, eight or 16 instances.

IPv6 is not translated and keeps no state: it passes both ways as it is, as on a dual-stack router that does NAT (RFC 7084), or
past nftables' masquerading of IPv4. Its addresses do not run short, and what NAT seems to protect the state of a firewall does
(RFC 4864, sections 2.2 and 4.2): chain=("firewall", "nat") filters both.

Verdicts in trouble: all ports of a client's class taken, DROP with cause ports_exhausted, and the client's next packet searches
on, so it recovers when a port expires. Protocols other than TCP, UDP and ICMP cannot share an address: DROP, refused_by_rule.
DROP, too, for what may not be a client's first packet (a TCP segment that is no SYN, unless `pick_up`; a later fragment; an ICMP
error about nothing known, a redirect), and from outside to a port that nobody has. Table full or state unreachable (causes
table_full, state_unreachable): no packet leaves untranslated, a client whose claim was made before its record keeps the port, and
all goes on as soon as there is room or the store answers.
"""

from nfs._translation import MAPPING, SETTINGS, prepare, translate
from nfs.dataplane import ENDPOINT, kind_of, network_function

KIND = kind_of("nat", MAPPING)


@network_function(key=ENDPOINT, state=MAPPING, passes=("not_ip",), rewrites=True, settings=SETTINGS, prepare=prepare)
def nat(packet, mapping, env):
    return translate(packet, mapping, env, KIND, False)
