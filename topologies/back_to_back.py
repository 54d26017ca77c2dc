"""Back to back: client, one NF host and server wired directly, no switch: what NF and store cost by themselves.

client net --- inside nf1 outside --- net server
                  storage
                     |
                  storage store1 (with store_hosts=1)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from topologies.emulation.topology import DataCenter


class BackToBack(DataCenter):
    """store_hosts: 0 or 1. delay_us: of each link and direction. cpu: cores by role. nf_hosts is 1."""

    RANGES: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "nf_hosts": (1, 1, "it has no switch, so 1 (or use rack)"),
        "store_hosts": (0, 1, "one cable, so 0 or 1 (or use rack)"),
    }

    def build(
        self, nf_hosts: int = 1, store_hosts: int = 0, delay_us: float = 0.0, cpu: Mapping[str, float] | None = None
    ) -> None:
        nf = self.host("nf1", "nf")
        self.cable(self.host("client", "client"), "net", nf, "inside", delay_us)
        self.cable(self.host("server", "server"), "net", nf, "outside", delay_us)
        if store_hosts:
            self.cable(self.host("store1", "store"), "storage", nf, "storage", delay_us)
