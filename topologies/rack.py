"""Rack: every host on one top-of-rack switch; an NF host has a port for each side of the packet path and one for storage.

    client (inside)                 server (outside)
         |                                |
  =======+========== tor (switch) ========+=======
    |         |            |         |        |         |
inside outside|storage  inside outside|storage |storage |storage
  +---nf1-----+           +---nf2-----+      store1  control
"""

from __future__ import annotations

from collections.abc import Mapping

from topologies.emulation.topology import DataCenter


class Rack(DataCenter):
    """nf_hosts: NF hosts nf1..n. store_hosts: store1..m. server_hosts: server, server2..k. delay_us: of each link and direction.

    cpu: cores by role.
    """

    def build(
        self,
        nf_hosts: int = 2,
        store_hosts: int = 0,
        delay_us: float = 0.0,
        cpu: Mapping[str, float] | None = None,
        server_hosts: int = 1,
    ) -> None:
        tor = self.switch("tor")
        self.cable(self.host("client", "client"), "net", tor, delay_us=delay_us)
        for name in ("server", *(f"server{number}" for number in range(2, server_hosts + 1))):
            self.cable(self.host(name, "server"), "net", tor, delay_us=delay_us)
        for number in range(1, nf_hosts + 1):
            nf = self.host(f"nf{number}", "nf")
            for interface in ("inside", "outside", "storage"):
                self.cable(nf, interface, tor, delay_us=delay_us)
        for number in range(1, store_hosts + 1):
            self.cable(self.host(f"store{number}", "store"), "storage", tor, delay_us=delay_us)
        self.cable(self.host("control", "control"), "storage", tor, delay_us=delay_us)
