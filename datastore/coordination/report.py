"""What does a coordinator's status say, for a person at a glance?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table as Sheet

SILENT_MS = 200.0
"""An NF process reports every 25 ms."""


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as ranges: "0-3, 7"."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in found)


def condition(host: dict[str, Any], epoch: int) -> str:
    """Return in a word or two how a host is."""
    if host["heard_ms_ago"] is None:
        return "never heard"
    if host["lease_ms"] <= 0:
        return f"MISSING for {host['heard_ms_ago'] / 1000:.1f} s"
    return "ok" if host["epoch"] == epoch else f"follows map {host['epoch']}"


def host_sheet(status: dict[str, Any]) -> Sheet:
    """Return the hosts: what they hold, their leases, and who is missing."""
    groups, epoch = status["map"]["groups"], status["map"]["epoch"]
    columns = ("host", "state", "primary of", "backup of", "learning", "leaving", "packets of", "lag", "lease left", "heard")
    sheet = Sheet(*columns, title=f"map {epoch}", title_justify="left")
    for name, host in status["hosts"].items():
        counts = [
            sum(bool(group["members"]) and group["members"][0] == name for group in groups),
            sum(name in group["members"][1:] for group in groups),
            *(sum(name in group[part] for group in groups) for part in ("learners", "leaving")),
            status["steering"].count(name), host["lag"],
        ]  # fmt: skip
        heard = "never" if host["heard_ms_ago"] is None else f"{host['heard_ms_ago']:.0f} ms ago"
        sheet.add_row(name, condition(host, epoch), *map(str, counts), f"{host['lease_ms']:.0f} ms", heard)
    return sheet


def troubles(status: dict[str, Any]) -> list[str]:
    """Return a line about everything that is not as it should be, or is under way."""
    groups, wanted = status["map"]["groups"], status["replicas"]
    kinds = {
        "without any copy, refused": [n for n, group in enumerate(groups) if not group["members"]],
        f"with fewer than {wanted} copies": [n for n, group in enumerate(groups) if 0 < len(group["members"]) < wanted],
        "being copied": [n for n, group in enumerate(groups) if group["learners"]],
        "being handed over": [n for n, group in enumerate(groups) if group["successor"]],
        "waiting for a former replica": [n for n, group in enumerate(groups) if group["leaving"]],
        "to be moved": [int(partition) for partition in status["moves"]],
    }
    lines = [f"{len(found)} partition{'s' * (len(found) > 1)} {what}: {ranges(found)}" for what, found in kinds.items() if found]
    lines += [f"NF process of {name}: not heard for {instance['heard_ms_ago'] / 1000:.1f} s"
              for name, instance in status["instances"].items() if (instance["heard_ms_ago"] or 0) > SILENT_MS]  # fmt: skip
    lines += [f"two processes call themselves {name}: the later one is refused; give each host its own name"
              for name, host in status["hosts"].items() if host["rival"]]  # fmt: skip
    lines += [f"NF process of {name}: one of its links is down"
              for name, instance in status["instances"].items() if not instance["link"]]  # fmt: skip
    return [status["trouble"]] * bool(status["trouble"]) + lines
