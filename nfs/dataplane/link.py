"""What stands between an Ethernet header and IP, and which protocols are the link's own?

A filter that passes whatever it cannot read lets any IP packet through that its sender hides (CERT VU#855201, CVE-2021-27853):
the receiver's stack, or a router on the way, takes the wrapping off. So all usual wrappings are looked through, one in another:

    VLAN tags             0x8100, 0x88a8 (IEEE 802.1Q), 0x9100, 0x9200, 0x9300; tags of VLAN 0 too
    backbone instance tag 0x88e7 (IEEE 802.1Q, section 9.7; 802.1ah), with the customer's Ethernet header behind it
    LLC and SNAP          a length in place of the EtherType, then AA-AA-03 and an EtherType (RFC 1042)
    PPPoE sessions        0x8864 (RFC 2516), PPP's protocol number of 2 bytes, or compressed to one
    MPLS                  0x8847, 0x8848 (RFC 3032); what the last label carries is told by its first four bits, as routers do

NOT_IP are the link protocols in LINK_PROTOCOLS, spanning tree (LLC 42-42-03) and PPP's control protocols. All else is UNREADABLE:
unknown EtherTypes, MACsec (0x88e5), pseudowires, and more wrappings than MOST_WRAPPINGS.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline, jit
from datastore.compiled.memory import network16
from nfs.dataplane.ledger import NOT_IP, TRUNCATED, UNREADABLE

IPV4, IPV6 = 0x0800, 0x86DD
LINK_PROTOCOLS = {
    "ARP": 0x0806,
    "reverse ARP": 0x8035,
    "flow control": 0x8808,
    "slow protocols (link aggregation)": 0x8809,
    "PPPoE discovery": 0x8863,
    "port authentication (802.1X)": 0x888E,
    "LLDP": 0x88CC,
    "precision time (1588)": 0x88F7,
    "connectivity faults (802.1ag)": 0x8902,
    "loopback test": 0x9000,
}
"""EtherTypes of protocols that carry no IP (IEEE, Standard Group EtherTypes)."""
_NAMED = tuple(LINK_PROTOCOLS.values())
MOST_WRAPPINGS, MOST_LABELS = 8, 8
LARGEST_LENGTH = 1500
"""IEEE 802.3, section 3.2.6: up to here the field is a length, from 0x600 an EtherType, and nothing between."""
UNKNOWN = -1
"""An EtherType that is none."""


@inline
def _is_tag(kind: int) -> bool:
    return kind == 0x8100 or kind == 0x88A8 or kind == 0x9100 or kind == 0x9200 or kind == 0x9300


@jit
def _is_named(kind: int) -> bool:
    for named in _NAMED:  # noqa: SIM110 (compiled code has no generators)
        if kind == named:
            return True
    return False


@jit
def skip_link_headers(memory: np.ndarray, at: int, length: int, kind: int) -> Any:
    """Look for IP behind the Ethernet header of the frame of `length` bytes at byte `at`, whose EtherType `kind` is not IP.

    Returns (status, EtherType, bytes from the frame's start to what it names). Status 0: IPV4 or IPV6. Else NOT_IP, UNREADABLE or
    TRUNCATED.
    """
    kind, offset = np.int64(kind), np.int64(14)
    for _ in range(MOST_WRAPPINGS):
        if kind in (IPV4, IPV6):
            return np.int64(0), kind, offset
        if _is_named(kind):
            return np.int64(NOT_IP), kind, offset
        status, kind, offset = _unwrap(memory, at, length, kind, offset)
        if status:
            return status, kind, offset
    if kind in (IPV4, IPV6):
        return np.int64(0), kind, offset
    return np.int64(NOT_IP if _is_named(kind) else UNREADABLE), kind, offset


@jit
def _unwrap(memory: np.ndarray, at: int, length: int, kind: int, offset: int) -> Any:
    """Take off one wrapping; returns (status, EtherType, offset) of what it carries, status 0 for what may be looked at."""
    if _is_tag(kind):
        return _carried(memory, at, length, offset, np.int64(2))
    if kind == 0x88E7:
        return _carried(memory, at, length, offset, np.int64(16))
    if kind <= LARGEST_LENGTH:
        return _unwrap_llc(memory, at, length, offset)
    if kind == 0x8864:
        return _unwrap_ppp(memory, at, length, offset)
    if kind == 0x8847 or kind == 0x8848:
        return _unwrap_mpls(memory, at, length, offset)
    return np.int64(UNREADABLE), np.int64(UNKNOWN), np.int64(offset)


@inline
def _carried(memory: np.ndarray, at: int, length: int, offset: int, kind_at: int) -> Any:
    """Return (status, EtherType, offset) of a wrapping with its EtherType `kind_at` bytes behind its beginning."""
    behind = np.int64(offset + kind_at + 2)
    if length < behind:
        return np.int64(TRUNCATED), np.int64(UNKNOWN), np.int64(offset)
    kind = np.int64(network16(memory, at + offset + kind_at))
    return np.int64(0), kind, behind


@jit
def _unwrap_llc(memory: np.ndarray, at: int, length: int, offset: int) -> Any:
    """LLC: spanning tree, or SNAP with the OUI of an EtherType (RFC 1042) or of a bridge's translation (IEEE 802.1H)."""
    if length < offset + 3:
        return np.int64(TRUNCATED), np.int64(UNKNOWN), np.int64(offset)
    access = np.int64(network16(memory, at + offset))
    if access == 0x4242 and memory[at + offset + 2] == 3:
        return np.int64(NOT_IP), np.int64(UNKNOWN), np.int64(offset)
    if access != 0xAAAA or memory[at + offset + 2] != 3:
        return np.int64(UNREADABLE), np.int64(UNKNOWN), np.int64(offset)
    status, kind, behind = _carried(memory, at, length, offset, np.int64(6))
    if status:
        return status, kind, behind
    high, low = np.int64(network16(memory, at + offset + 3)), np.int64(memory[at + offset + 5])
    if high != 0 or (low != 0 and low != 0xF8) or kind <= LARGEST_LENGTH:
        return np.int64(UNREADABLE), np.int64(UNKNOWN), behind
    return np.int64(0), kind, behind


@jit
def _unwrap_ppp(memory: np.ndarray, at: int, length: int, offset: int) -> Any:
    """PPPoE: 6 bytes, then PPP's protocol number, of which a leading zero byte may be left out (RFC 1661, section 6.5)."""
    if length < offset + 8:
        return np.int64(TRUNCATED), np.int64(UNKNOWN), np.int64(offset)
    number, behind = np.int64(memory[at + offset + 6]), np.int64(offset + 7)
    if number & 1 == 0:
        number, behind = number << 8 | np.int64(memory[at + offset + 7]), behind + 1
    if number == 0x21 or number == 0x57:
        return np.int64(0), np.int64(IPV4 if number == 0x21 else IPV6), behind
    return np.int64(NOT_IP if number >= 0x8000 else UNREADABLE), np.int64(UNKNOWN), behind


@jit
def _unwrap_mpls(memory: np.ndarray, at: int, length: int, offset: int) -> Any:
    """MPLS: labels of 4 bytes up to the one with the bottom bit, then IP by its version (RFC 4928, section 2)."""
    offset = np.int64(offset)
    for _ in range(MOST_LABELS):
        if length < offset + 5:
            return np.int64(TRUNCATED), np.int64(UNKNOWN), offset
        bottom = memory[at + offset + 2] & np.uint8(1)
        offset += 4
        if bottom:
            version = memory[at + offset] >> np.uint8(4)
            if version == 4 or version == 6:
                return np.int64(0), np.int64(IPV4 if version == 4 else IPV6), offset
            break
    return np.int64(UNREADABLE), np.int64(UNKNOWN), offset
