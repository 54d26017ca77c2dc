"""The address translators as subjects of the oracle: what nftables is told to do the same job, and what is meant to differ."""

from __future__ import annotations

from nfs.dataplane.headers import ACK, FIN, ICMP, INSIDE, OUTSIDE, SYN, TCP, UDP
from tests.oracle import FIREWALL, KNOWN_DIFFERENCES, SYSCTLS, Known, Seen, Subject, completes_handshake, datagram, header_holds
from tests.traces import ECHO, ECHO_REPLY, TRANSLATED, checksum
from tests.translated import INSIDE_NET, is_hairpin, place_of

EXTERNAL = "192.0.2.1"
TRANSLATE = f"""
  chain translated {{
    type nat hook postrouting priority 100;
    ip saddr != 10.127.0.1 oifname "outside" snat to {EXTERNAL}
  }}
"""
FILTER = """
  chain through {
    type filter hook forward priority 0; policy accept;
    ct state invalid drop
    iifname "outside" ct state new drop
  }
"""


def checksums_alike(packet: bytes, frame: bytes) -> bytes:
    """Return a packet of `datagram(frame)` with zero for checksums of all ones: the two are one number (RFC 1624, section 3)."""
    changed = bytearray(packet)
    for source in (True, False):
        place = place_of(frame, source)
        for check in (*place.over_address, *place.over_port) if place else ():
            at = check.at - 14
            if not check.udp and changed[at : at + 2] == b"\xff\xff":
                changed[at : at + 2] = b"\0\0"
    return bytes(changed)


def same_untranslated(given: bytes, ours: bytes, theirs: bytes) -> bool:
    """Both left as they entered, once the translation is undone; what had a good header checksum has one still."""
    one, other = (checksums_alike(datagram(frame), frame) for frame in (ours, theirs))
    return one == other and (header_holds(ours) or not header_holds(given)) and header_holds(theirs)


def known_from(*names: str) -> tuple[Known, ...]:
    """Return the firewall's known differences of these names."""
    return tuple(known for known in KNOWN_DIFFERENCES if known.name in names)


def _misrouted(seen: Seen) -> bool:
    return not is_hairpin(seen.frame, seen.side) and ROUTING.explains(seen)


def _other_protocol(seen: Seen) -> bool:
    return seen.fields["status"] == 0 and seen.fields["protocol"] not in (TCP, UDP, ICMP)


def _unopened(seen: Seen) -> bool:
    """Nothing of this flow has gone out yet by the kernel."""
    mine = seen.side == INSIDE and not seen.fields["icmp_error"] and seen.fields["protocol"] != TCP
    return seen.ours is not None and not mine and not any(step.side == INSIDE and step.theirs for step in seen.flow)


def _disorderly(seen: Seen) -> bool:
    """TCP out of the order of RFC 9293, figures 6 and 12: handshake, then nothing but acknowledgments and FIN."""
    if seen.fields["protocol"] != TCP or seen.ours is None:
        return False
    steps = [step for step in (*seen.flow, seen) if not step.fields["icmp_error"]]
    done = next((n for n in range(len(steps) - 1, -1, -1) if completes_handshake(steps[n])), None)
    if done is None:
        return any((step.side, step.flags) not in ((INSIDE, SYN), (OUTSIDE, SYN | ACK)) for step in steps)
    return any(step.control not in (ACK, FIN | ACK) for step in steps[done + 1 :])


def _other_kind(seen: Seen) -> bool:
    """About an ICMP query that has not gone out in this flow, although another one with the same identifier has."""
    if seen.fields["protocol"] != ICMP or (seen.side == INSIDE and not seen.fields["icmp_error"]):
        return False
    at = seen.fields["transport_offset"]
    if seen.fields["icmp_error"]:
        at += 8 + (seen.frame[at + 8] & 15) * 4
    kind, code = seen.frame[at : at + 2]
    is_answer = kind in (ECHO_REPLY, 14, 16, 18)
    query = kind if not is_answer else ECHO if kind == ECHO_REPLY else kind - 1
    if seen.fields["icmp_error"] and is_answer != (seen.side == INSIDE):
        return True
    return (query, code) not in {(step.fields["icmp_type"], step.fields["icmp_code"]) for step in seen.flow
                                 if step.side == INSIDE and not step.fields["icmp_error"] and step.theirs}  # fmt: skip


def _icmp_checksum(seen: Seen) -> bool:
    at, end = seen.fields["transport_offset"], 14 + int.from_bytes(seen.frame[16:18], "big")
    return bool(seen.fields["icmp_error"]) and checksum(seen.frame[at:end]) != 0


def _hairpin(seen: Seen) -> bool:
    within = {seen.fields[f"{end}_address"] >> 23 for end in ("source", "destination")} == {INSIDE_NET}
    return is_hairpin(seen.frame, seen.side) or (seen.fields["status"] == 0 and within)


def _nearly_quoted(seen: Seen) -> bool:
    """An error that quotes 18 or 19 bytes of a TCP header: the checksum, but not all of it."""
    at = seen.fields["transport_offset"] + 8
    end = 14 + int.from_bytes(seen.frame[16:18], "big")
    return bool(seen.fields["icmp_error"]) and seen.fields["protocol"] == TCP and end - at - (seen.frame[at] & 15) * 4 in (18, 19)


ROUTING = known_from("routing")[0]
COMMON = (
    *known_from("not IPv4", "time to live", "header checksum", "IP options", "fragments"),
    Known("hairpin", "RFC 4787, REQ-9; RFC 5382, REQ-8", "the kernel translates what leaves to outside, so clients cannot reach "
          "each other by external addresses", _hairpin),
    Known("routing", ROUTING.rfc, ROUTING.why, _misrouted, _misrouted),
    *known_from("unreadable quotation"),
    Known("ICMP checksum", "RFC 5508, REQ-3", "the kernel reads an error to its end before it translates it; we update its "
          "checksum, and who gets it sees whether it was right", _icmp_checksum),
    Known("checksum in a quotation", "RFC 5508, REQ-4a", "a quoted checksum is the original's again as soon as it is quoted; the "
          "kernel does that where all of a TCP header is", _nearly_quoted),
    Known("other protocols", "RFC 3022, section 2.2", "what has neither ports nor a query identifier cannot share an address; "
          "the kernel lets one client at a time use it", _other_protocol),
)  # fmt: skip
KINDS = Known("ICMP kinds of a translator", "RFC 5508, REQ-1", "one identifier serves a client's queries of all kinds; the "
              "kernel translates those of each type and code apart", _other_kind)  # fmt: skip
STATELESS = Known("disorderly", "RFC 5382, REQ-2", "a translator is no firewall: whatever has a mapping is translated; "
                  "the kernel drops what its own account of the connection does not allow", _disorderly)  # fmt: skip
INDEPENDENT = Known("not in the flow", "RFC 4787, REQ-1 and REQ-8; RFC 5382, REQ-1 and REQ-3", "mapping and filtering are "
                    "endpoint-independent: whoever knows a client's port may use it; with the kernel, only who was addressed",
                    _unopened)  # fmt: skip
PACKETS = {known.name for known in COMMON} | {"other transports"}
OF_CONNECTIONS = tuple(known for known in KNOWN_DIFFERENCES if known.name not in PACKETS)
RULES = f"table ip nearstate {{{FILTER}{TRANSLATE}}}"

NAT = Subject(
    "nat", RULES, SYSCTLS, same_untranslated, (*COMMON, INDEPENDENT, KINDS, STATELESS), TRANSLATED, EXTERNAL, True, 0.35
)
NAT_SYMMETRIC = Subject(
    "nat_symmetric", RULES, SYSCTLS, same_untranslated, (*COMMON, KINDS, STATELESS), external=EXTERNAL, strict=0.4
)
FILTERED_NAT = Subject("firewall+nat", FIREWALL.rules.rstrip().removesuffix("}") + TRANSLATE + "}", SYSCTLS, same_untranslated,
                       (*COMMON, *OF_CONNECTIONS), TRANSLATED, EXTERNAL, True)  # fmt: skip
