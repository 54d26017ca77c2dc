"""What did the emulated network look like? Draws a trial's "network" as SVG, in the layout of the design's picture.

    client                  server
====+=======  switch  ======+=======
 |    |    |             |
+---- nf1 ----+       store1
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import networkx as nx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

LANE = 1.0  # width of one link's lane; all lengths in the drawing's own unit
BOX_HEIGHT, ROW, BAR_HEIGHT = 0.95, 1.75, 0.36
INCHES = 0.53  # per unit
FILL = {"nf": "#DCEAF5", "store": "#FBEBD0", "switch": "#E8E8E8"}
LOOK = {"svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 8}
Place = tuple[float, float]  # x, y
Box = tuple[float, float, float, float]  # centre x, centre y, width, height
ABOVE, BELOW = ("client", "server"), ("nf", "store", "control")


def picture(network: dict[str, Any]) -> str:
    """Return an inline SVG element of a network described as `Network.describe()` does; "" without nodes."""
    nodes, links = network.get("nodes", []), network.get("links", [])
    if not nodes:
        return ""
    switches = [node["name"] for node in nodes if node["role"] == "switch"]
    boxes = _around_a_switch(nodes, links, switches[0]) if len(switches) == 1 else _in_tiers(nodes, links)
    with matplotlib.rc_context(LOOK):
        figure = Figure()
        axes = figure.add_axes((0, 0, 1, 1))
        for link, (start, end) in zip(links, _paths(links, boxes)):
            _draw_link(axes, link, start, end)
        for node in nodes:
            _draw_node(axes, node, boxes[node["name"]])
        edges = [(x - width / 2, x + width / 2, y - height / 2, y + height / 2) for x, y, width, height in boxes.values()]
        left, right = min(edge[0] for edge in edges) - 0.1, max(edge[1] for edge in edges) + 0.1
        low, high = min(edge[2] for edge in edges) - 0.1, max(edge[3] for edge in edges) + 0.1
        axes.set(xlim=(left, right), ylim=(low, high))
        axes.axis("off")
        figure.set_size_inches((right - left) * INCHES, (high - low) * INCHES)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace("'DejaVu Sans'", "'DejaVu Sans', sans-serif")


def _around_a_switch(nodes: Sequence[dict[str, Any]], links: Sequence[dict[str, Any]], switch: str) -> dict[str, Box]:
    """Place the switch as a bar, clients and servers above it, everything else below."""
    lanes = {node["name"]: max(1, sum(node["name"] in (link["a"], link["b"]) for link in links)) for node in nodes}
    upper = sorted((node for node in nodes if node["role"] in ABOVE), key=lambda node: (ABOVE.index(node["role"]), node["name"]))
    lower = sorted(
        (node for node in nodes if node["role"] not in (*ABOVE, "switch")),
        key=lambda node: (BELOW.index(node["role"]) if node["role"] in BELOW else 9, node["name"]),
    )
    widths = {node["name"]: max(1.7, lanes[node["name"]] * LANE) for node in nodes}
    span = max(sum(widths[node["name"]] + 0.3 for node in row) for row in (upper, lower, [nodes[0]]) if row)
    boxes: dict[str, Box] = {switch: (span / 2, 0.0, span, BAR_HEIGHT)}
    for row, y in ((upper, ROW - 0.25), (lower, -ROW + 0.25)):
        gap = (span - sum(widths[node["name"]] for node in row)) / max(1, len(row))
        x = 0.0
        for node in row:
            width = widths[node["name"]]
            boxes[node["name"]] = (x + gap / 2 + width / 2, y, width, BOX_HEIGHT)
            x += width + gap
    return boxes


def _in_tiers(nodes: Sequence[dict[str, Any]], links: Sequence[dict[str, Any]]) -> dict[str, Box]:
    """Without a switch: client, NF, server in a row and stores below. With several: hosts below, switches by distance."""
    graph: nx.Graph = nx.Graph((link["a"], link["b"]) for link in links)
    graph.add_nodes_from(node["name"] for node in nodes)
    switches = {node["name"] for node in nodes if node["role"] == "switch"}
    if switches:
        tiers = {name: int(hops) for name, hops in nx.multi_source_dijkstra_path_length(graph, set(graph) - switches).items()}
    else:
        tiers = {node["name"]: 1 if node["role"] in (*ABOVE, "nf") else 0 for node in nodes}
    rank = {"client": 0, "nf": 1, "store": 2, "control": 3, "server": 9}
    boxes: dict[str, Box] = {}
    longest = max(sum(tier == level for tier in tiers.values()) for level in set(tiers.values()))
    for level in set(tiers.values()):
        alike = [node for node in nodes if tiers[node["name"]] == level]
        row = sorted(alike, key=lambda node: (rank.get(node["role"], 5), node["name"]))
        for place, node in enumerate(row):
            step = longest * 2.9 / len(row)
            boxes[node["name"]] = ((place + 0.5) * step, level * ROW * 1.05, 1.8, BOX_HEIGHT if node["role"] != "switch" else 0.5)
    return boxes


def _paths(links: Sequence[dict[str, Any]], boxes: dict[str, Box]) -> list[tuple[Place, Place]]:
    """Return each link's ends: side by side along the host's edge, straight up or down where a wide bar is opposite."""
    drawn = []
    for link in links:
        host, peer = sorted((link["a"], link["b"]), key=lambda name: boxes[name][2] > 2 * LANE and boxes[name][3] == BAR_HEIGHT)
        siblings = [other for other in links if host in (other["a"], other["b"])]
        (x, y, width, height), (peer_x, peer_y, peer_width, peer_height) = boxes[host], boxes[peer]
        if abs(y - peer_y) < 0.1:
            side = 1 if peer_x > x else -1
            drawn.append(((x + side * width / 2, y), (peer_x - side * peer_width / 2, peer_y)))
            continue
        up = 1 if peer_y > y else -1
        bar = peer_height == BAR_HEIGHT
        lane = x - width / 2 + width * (siblings.index(link) + 0.5) / len(siblings) if bar else x
        drawn.append(((lane, y + up * height / 2), (lane if bar else peer_x, peer_y - up * peer_height / 2)))
    return drawn


def _draw_link(axes: Axes, link: dict[str, Any], start: Place, end: Place) -> None:
    axes.plot([start[0], end[0]], [start[1], end[1]], color="#666666", linewidth=1, zorder=1)
    delay = f"\n{link['delay_us']:g} µs" if link.get("delay_us") else ""
    axes.text(
        (start[0] + end[0]) / 2,
        (start[1] + end[1]) / 2,
        f"{link.get('label', '')}{delay}",
        ha="center",
        va="center",
        fontsize=6.5,
        color="#333333",
        zorder=2,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )


def _draw_node(axes: Axes, node: dict[str, Any], box: Box) -> None:
    x, y, width, height = box
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=FILL.get(node["role"], "#FFFFFF"),
            edgecolor="#333333",
            linewidth=0.9,
            zorder=3,
        )
    )
    processes = node.get("processes", [])
    axes.text(x, y + (0.25 if processes else 0), node["name"], ha="center", va="center", weight="bold", zorder=4)
    if processes:
        axes.text(x, y - 0.15, "\n".join(processes), ha="center", va="center", fontsize=7, zorder=4, linespacing=1.1)
