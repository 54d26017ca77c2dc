"""What the store keeps a record in: memory per record at a given fill, and the store process as the kernel sees it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.harness.bench import COMMON_SETTINGS, READY_S, Bench
from experiments.harness.procedures.state_access import point, start_probe

if TYPE_CHECKING:
    from experiments.harness.checks import Planned

FORWARDS = False
"""Not only trials with a path of packets."""
SETTINGS = {**COMMON_SETTINGS, "records": 10_000, "fill": 0.7, "keys": 0}
KEY_BYTES, STAMP_BYTES = 16, 8


def check(planned: Planned) -> None:
    """Check that there is a store to be filled."""
    if not planned.stores:
        raise planned.refuse(
            f"procedure='store_memory' with placement={planned.trial.placement!r}: there is no store to be filled"
        )


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Return one point: a store filled with `records` records to the share `fill` of its capacity."""
    settings = bench.settings
    records = int(settings["records"])
    bench.overrides = {"capacity": math.ceil(records / settings["fill"]), "keys": records}
    bench.start_state()
    start_probe(bench)
    store = next(iter(bench.stores.values()))
    store.send({"statistics": True})
    statistics = (store.receive(READY_S) or {})["statistics"]
    payload_bytes = statistics["records"] * (KEY_BYTES + STAMP_BYTES + settings["value_bytes"])
    metrics = {
        "records": statistics["records"],
        "table_mbytes": statistics["table_bytes"] / 1e6,
        "table_payload_ratio": statistics["table_bytes"] / payload_bytes,
        "store_rss_mbytes": own_bytes(store.pid) / 1e6 + statistics["table_bytes"] / 1e6,
    }
    # the probe wrote the records, so the store has not touched all of its table yet: count all of it
    missing = records - statistics["records"]
    return [point({}, {"refused": missing}, metrics)]


def own_bytes(pid: int) -> int:
    """Return the resident memory of a process without shared memory (RssAnon and RssFile of proc(5))."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
