"""Graphs drawn small, a panel each, so that they can be compared: a node stands at the same place in all of them.

Layers go upwards, text left and image right.  A node is the larger the more influence it has, and hollow in panels where it is
missing; an edge is the wider the more it passes on to the targets (its share of what feeds its end, times the influence of that
end), orange where it excites, blue where it suppresses, as on the page.  A target has a black ring.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analyze.circuits.nodes import Node
from train.results.plots import BLUE, GREY, TITLE, VERMILION, drawing, png

PANEL_WIDTH, LAYER_HEIGHT = 5.2, 0.62
ACROSS = 4
"""panels in a row"""
STREAMS = {"txt": "#8C6D1F", "img": "#3B3B3B"}
MISSING, ASKED = "#C9C9C9", "#000000"
LARGEST, WIDEST = 190.0, 5.0
"""points² of a node that has all influence, points of an edge that passes on all of it"""
NARROWEST_STREAM = 0.25
"""part of a panel that a stream has at least"""
MARGIN = 0.75
"""inches for the names of blocks"""
WORDS = {"feature": "feature", "input": "input", "error": "error", "rest": "not expanded"}
MARKERS = {"feature": "o", "supernode": "o", "input": "s", "error": "D", "rest": "d"}


@dataclass(frozen=True)
class Panel:
    """One graph to draw."""

    title: str
    nodes: Mapping[str, float]
    """influence by name"""
    edges: Sequence[tuple[str, str, float]]
    """source, target, signed share of what feeds the target of the edge"""
    targets: frozenset[str] = frozenset()


def draw_panels(panels: Sequence[Panel], title: str, most: int) -> bytes:
    """The panels as PNG; of their nodes the targets and the `most` that have the most influence in any of them."""
    plan = layout(panels, most)
    layers = sorted({round(y) for _, y in plan.places.values()})
    across = min(ACROSS, len(panels))
    down = ceil(len(panels) / across)
    height = max(2.6, LAYER_HEIGHT * len(layers) * (1.0 if len(panels) > 1 else 1.4) + 1.0)
    with drawing(PANEL_WIDTH * across * (1.0 if len(panels) > 1 else 1.7) + 0.4, height * down + 1.0) as figure:
        figure.suptitle(title if len(title) < 110 else title[:109] + "…", **TITLE)
        grid = np.atleast_1d(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)).ravel()
        total = figure.get_figheight()
        figure.subplots_adjust(
            left=MARGIN / figure.get_figwidth(),
            right=0.99,
            top=1 - 0.72 / total,
            bottom=0.62 / total,
            wspace=0.04,
            hspace=0.18,
        )
        for axes, panel in zip(grid, panels, strict=False):
            _panel(axes, panel, plan)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        named = {-1: "input"} | {layer: f"block {layer}" for layer in layers if layer >= 0}
        for axes in grid[::across]:
            axes.set_yticks(layers, [named[layer] for layer in layers])
        figure.legend(handles=_legend(panels, plan), loc="lower center", ncols=8, frameon=False, fontsize=9)
        return png(figure)


@dataclass(frozen=True)
class Layout:
    """Where nodes stand: x in a panel of width 1, text left of 0 and image right; y the layer, inputs at -1."""

    places: Mapping[str, tuple[float, float]]
    text: float
    """the part of a panel that the text stream is given"""


def layout(panels: Sequence[Panel], most: int) -> Layout:
    """Where the nodes that are drawn stand: the targets, and the `most` others that have the most influence in any panel."""
    strongest: dict[str, float] = defaultdict(float)
    for panel in panels:
        for name, influence in panel.nodes.items():
            strongest[name] = max(strongest[name], influence)
    targets = {name for panel in panels for name in panel.targets}
    others = sorted((name for name in strongest if name not in targets), key=lambda name: (-strongest[name], name))
    rows: dict[tuple[str, int], list[str]] = defaultdict(list)
    top = max((_level(name) for name in strongest), default=0)
    for name in [*sorted(targets), *others[:most]]:
        rows[_stream(name), top if name.startswith("supernode") else _level(name)].append(name)
    text = _part_of_text(rows)
    places: dict[str, tuple[float, float]] = {}
    for (stream, level), names in rows.items():
        names.sort(key=_order)
        left, width = (-text, text) if stream == "txt" else (0.0, 1.0 - text)
        for number, name in enumerate(names):
            shift = 0.16 * (number % 2 - 0.5) if len(names) > 5 else 0.0  # the words of neighbours would touch
            places[name] = left + width * (0.03 + 0.94 * (number + 0.5) / len(names)), level + shift
    return Layout(places, text)


def _part_of_text(rows: Mapping[tuple[str, int], Sequence[str]]) -> float:
    """Which part of a panel the text stream is given, by how many of its nodes stand beside one another."""
    most = {
        stream: max((len(names) for (of, _), names in rows.items() if of == stream), default=0) for stream in STREAMS
    }
    return float(np.clip(most["txt"] / max(1, sum(most.values())), NARROWEST_STREAM, 1 - NARROWEST_STREAM))


def _level(name: str) -> int:
    node = Node.parse(name)
    if node.kind == "input" or node.site is None:
        return -1
    return node.site.layer


def _stream(name: str) -> str:
    site = Node.parse(name).site
    return "txt" if site is not None and site.stream == "txt" else "img"


def _order(name: str) -> tuple[bool, int, str]:
    node = Node.parse(name)
    return node.kind != "feature", node.feature or 0, name


def _panel(axes: Axes, panel: Panel, plan: Layout) -> None:
    places, text = plan.places, plan.text
    axes.set_title(panel.title)
    axes.grid(False)
    levels = [y for _, y in places.values()]
    axes.set_xlim(-text - 0.02, 1.02 - text)
    axes.set_ylim(min(levels) - 0.55, max(levels) + 0.6)
    axes.set_xticks([-text / 2, (1 - text) / 2], ["text", "image"])
    axes.tick_params(length=0)
    axes.axvline(0, color="#E4E4E4", linewidth=1, zorder=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    passed = [(edge[0], edge[1], edge[2] * panel.nodes.get(edge[1], 0.0)) for edge in panel.edges]
    for source, target, value in sorted(passed, key=lambda edge: abs(edge[2])):
        if source in places and target in places:
            (x0, y0), (x1, y1) = places[source], places[target]
            strength = abs(value) ** 0.5
            axes.plot(
                (x0, x1), (y0, y1), color=VERMILION if value > 0 else BLUE, linewidth=0.3 + WIDEST * strength,
                alpha=min(0.9, 0.12 + strength), solid_capstyle="round", zorder=1,
            )  # fmt: skip
    for name, (x, y) in places.items():
        there, asked = name in panel.nodes, name in panel.targets
        size = 14 + LARGEST * min(1.0, panel.nodes.get(name, 0.0))
        colour = STREAMS[_stream(name)] if there else MISSING
        axes.scatter(
            x, y, s=size, marker=MARKERS.get(Node.parse(name).kind, "o"), facecolors=colour if there else "white",
            edgecolors=ASKED if asked else colour, linewidths=1.8 if asked else 0.8, zorder=3,
        )  # fmt: skip
        axes.annotate(
            _word(name), (x, y), xytext=(0, 5 + np.sqrt(size) / 2.2), textcoords="offset points", ha="center", va="center",
            fontsize=7, color="black" if there else MISSING, zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.7},
        )  # fmt: skip


def _word(name: str) -> str:
    node = Node.parse(name)
    return {"feature": str(node.feature), "supernode": str(node.term)}.get(node.kind, "")


def _legend(panels: Sequence[Panel], plan: Layout) -> list[Line2D]:
    """What is drawn, and no more."""

    def mark(marker: str, text: str, **style: str) -> Line2D:
        return Line2D([], [], marker=marker, color=GREY, linestyle="none", markersize=6, label=text, **style)  # type: ignore[arg-type]

    drawn = {Node.parse(name).kind for name in plan.places}
    found = [
        Line2D([], [], color=VERMILION, linewidth=2.5, label="excites"),
        Line2D([], [], color=BLUE, linewidth=2.5, label="suppresses"),
    ]
    if any(panel.targets for panel in panels):
        found.append(mark("o", "target", mec=ASKED))
    found += [mark(MARKERS[kind], text) for kind, text in WORDS.items() if kind in drawn]
    if any(name not in panel.nodes for panel in panels for name in plan.places):
        found.append(mark("o", "not in this graph", mfc="white", mec=MISSING))
    return found
