"""An NF process that runs `counted`, which is none of `nfs/`, where chains look."""

from __future__ import annotations

from typing import Any

from nfs.dataplane import process
from nfs.dataplane.steps import make_chain
from nfs.verification.counted import counted


def main(config: dict[str, Any], control: Any) -> None:
    """Process target: `nfs.dataplane.process:main` with this function in place of the chain in `config`."""
    process.load_chain = lambda names, settings, value_bytes: make_chain([counted], settings, value_bytes)
    process.main(config, control)
