"""How does each placement look? One table of label, colour, marker and dashes, and the sizes of a paper's columns."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ONE_COLUMN_IN = 3.33  # ACM sigconf: two columns of 3.33 in, 7.0 in across both
TWO_COLUMNS_IN = 7.0


@dataclass(frozen=True)
class Look:
    """How one placement is drawn, everywhere."""

    label: str
    colour: str
    marker: str
    dashes: tuple[float, ...]  # on, off, ... in line widths; empty for a solid line
    hatch: str  # of its bars


# Colours: Okabe and Ito, Color Universal Design (2008), its yellow deepened since it vanishes on white paper. No two
# placements share a marker, a dash pattern or (black aside) a hatch either, so a greyscale print tells them apart.
PLACEMENTS = {
    "integrated": Look("integrated", "#0072B2", "o", (), ""),
    "centralized": Look("centralized", "#D55E00", "s", (4, 1.5), "////"),
    "local": Look("local", "#000000", "d", (1, 1.2), ""),
    "integrated:hashed": Look("integrated, hashed", "#56B4E9", "^", (6, 1.5, 1, 1.5), "...."),
    "cached": Look("cached", "#009E73", "v", (3, 1, 1, 1, 1, 1), "\\\\\\\\"),
    "migrated": Look("migrated", "#CC79A7", "P", (8, 2), "xxxx"),
    "redis": Look("Redis", "#E69F00", "X", (2, 1), "++++"),
    "nftables": Look("nftables (kernel)", "#999999", "<", (5, 1, 2, 1), "----"),
    "conntrackd": Look("conntrackd (kernel)", "#A89B00", ">", (1, 2.5), "||||"),
}
SPARE_MARKERS = ("*", "p", "h", "8", "D")

# Bars stacked by who spends the time, or what it is spent on: shade and hatch both tell, in colour and in grey.
COMPONENTS = {
    "nf_cpu_us": ("NF process", "#0072B2", ""),
    "store_cpu_us": ("store process", "#E69F00", "////"),
    "switch_cpu_us": ("switch", "#BBBBBB", "...."),
    "other_cpu_us": ("rest of the machine (kernel, generator, sink)", "#FFFFFF", ""),
    "detection_ms": ("detection", "#BBBBBB", "...."),
    "recovery_ms": ("recovery", "#0072B2", ""),
}

PAPER = {
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    # STIX ships with matplotlib, so a figure looks the same wherever it is drawn; it sits well beside a paper's text.
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.4,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.5,
    "errorbar.capsize": 1.8,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    "figure.constrained_layout.hspace": 0.06,
}


def look(placement: str) -> Look:
    """Return how a placement is drawn; one that is not in the table is grey under its own name, always the same way."""
    if placement in PLACEMENTS:
        return PLACEMENTS[placement]
    spare = zlib.crc32(placement.encode()) % len(SPARE_MARKERS)
    return Look(placement.replace("_", " "), "#555555", SPARE_MARKERS[spare], (1 + spare, 1.5), "**")


def line(placement: str) -> dict[str, Any]:
    """Return the keyword arguments for matplotlib's `plot` that draw a placement's line."""
    style = look(placement)
    return {
        "label": style.label,
        "color": style.colour,
        "marker": style.marker,
        "linestyle": (0, style.dashes) if style.dashes else "-",
        "markeredgewidth": 0,
    }


def order(placements: Iterable[str]) -> list[str]:
    """Return the placements in the table's order, unknown ones last by name: legends and bars always read alike."""
    return _ranked(placements, tuple(PLACEMENTS))


def order_nfs(nfs: Iterable[str]) -> list[str]:
    """Return network functions from the one that keeps no state to those that write on every packet, others by name."""
    return _ranked(nfs, ("passthrough", "firewall", "nat", "traffic_counter"))


def order_topologies(topologies: Iterable[str]) -> list[str]:
    """Return the default topology first, then the others by name."""
    return _ranked(topologies, ("rack",))


def _ranked(names: Iterable[str], known: tuple[str, ...]) -> list[str]:
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))
