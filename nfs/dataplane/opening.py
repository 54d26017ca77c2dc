"""How does a process get a port on an interface: by AF_XDP where that works, else by AF_PACKET?"""

from __future__ import annotations

from datastore.base.errors import NearstateError
from nfs.dataplane import afpacket, afxdp
from nfs.dataplane.frames import Frames
from nfs.dataplane.port import OpenPort


def open_port(interface: str, frames: Frames, kind: str = "auto") -> OpenPort:
    """Open `interface` of the current network namespace; see `open_ports`."""
    return open_ports([interface], frames, kind)[0]


def open_ports(interfaces: list[str], frames: Frames, kind: str = "auto") -> list[OpenPort]:
    """Open several interfaces over one area of frames, all by the same kind, so that a frame can enter here and leave there.

    kind: afxdp, afpacket or auto (AF_XDP where it works). Raises NearstateError naming the interface, the kind and the reason.
    """
    if kind != "afpacket":
        try:
            return afxdp.open_ports(interfaces, frames)
        except NearstateError:
            if kind == "afxdp":
                raise
    return [afpacket.open_port(interface, frames) for interface in interfaces]
