"""The trade of sparsity against faithfulness: which dictionaries are on the Pareto front, and the picture of it.

A dictionary is on the front when no other of the same site and kind has both no more active features a row and no more
unexplained variance on the held-out rows, and less of one of them.  There is a front where there are two to compare at least,
and nobody is on it who explains less than the mean does (FVU 1 and above).  A transcoder and an SAE are never compared: the SAE
reads what it is to explain.  Nor are dictionaries that were measured on different rows: another validation pack, or targets
recomputed here and stored there.  For text, real tokens and padding each have a front of their own, and so have the
image tokens of joint sites.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from store.sites import Site
from store.strata import Group, kinds_of
from train.dictionaries.dictionary import Dictionary
from train.results.differences import SEEDS, setting, shown, sparsity_of, varying
from train.results.plots import (
    BLUE,
    GREEN,
    GREY,
    GROUP_TITLES,
    ORANGE,
    PURPLE,
    SKY,
    STEPS,
    TITLE,
    VERMILION,
    drawing,
    log_scale,
    png,
)

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLUMNS = 3
PLACES = (
    (6, 2), (6, -12), (-6, -12), (-6, 2), (8, -5), (-8, -5), (0, 6), (0, -17), (12, 8), (-12, -18), (12, -18), (-12, 8),
    (22, -5), (-22, -5), (0, 17), (0, -28),
)  # fmt: skip
"""where a label may stand beside its point, in typographic points, best first"""
KINDS = {"transcoder": "transcoder", "sae": "SAE"}
ACTIVATIONS = {"relu": "ReLU", "topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}


_IN_SERIES = ("family", "activation", "skip")
"""settings that the legend names"""
RING: dict[str, Any] = {
    "marker": "o", "color": "none", "markeredgecolor": "black", "markersize": 10.5, "markeredgewidth": 1.0, "linestyle": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One dictionary in one panel."""

    dictionary: Dictionary
    l0: float
    fvu: float
    telling: Sequence[str] = ()
    """settings that tell dictionaries of its site apart, beside series, sparsity and seeds"""

    @property
    def series(self) -> str:
        """`transcoder, ReLU, 1,024 features`"""
        config = self.dictionary.config
        more = "".join(f", {word}" for word in (config.skip and "skip", config.nested and "nested") if word)
        return f"{KINDS[config.kind]}, {ACTIVATIONS[config.activation]}, {config.n_features:,} features{more}"

    @property
    def order(self) -> tuple[str, str, int, str]:
        """Where its series stands in the legend."""
        config = self.dictionary.config
        return config.kind, config.activation, config.n_features, self.series

    @property
    def label(self) -> str:
        """What sets its sparsity, and what else tells it apart: `k 64`, `λ 3e-4, lr 1e-3`; empty where nobody knows."""
        others = [(name.replace("_", " "), setting(self.dictionary, name)) for name in self.telling]
        words = [
            name if value is True else f"{name} {shown(value)}"
            for name, value in others
            if value is not None and value is not False and value != ()
        ]
        return ", ".join(word for word in (sparsity_of(self.dictionary).replace("l1", "λ"), *words) if word)


@dataclass(frozen=True)
class Panel:
    """The dictionaries of a site, as they are on one kind of rows."""

    site: Site
    group: Group
    points: Sequence[Point]

    @property
    def title(self) -> str:
        return str(self.site) + (f", {GROUP_TITLES[self.group]}" if self.group != "all" else "")


def figures_of(dictionary: Dictionary, group: Group) -> Mapping[str, Any]:
    """Its figures on the rows of a group; empty where it was not measured on any."""
    metrics = dictionary.metrics or {}
    return (metrics if group == "all" else metrics.get(group)) or {}


def on_front(dictionaries: Sequence[Dictionary], group: Group) -> list[bool]:
    """For each dictionary whether it is on the front of its site, kind and held-out rows, by its figures on those of `group`."""
    places = [(figures_of(each, group).get("l0"), figures_of(each, group).get("fvu")) for each in dictionaries]
    kinds = [(each.site, each.config.kind, measured_on(each)) for each in dictionaries]
    found = []
    for place, kind in zip(places, kinds, strict=True):
        rivals = [other for other, its in zip(places, kinds, strict=True) if its == kind and None not in other]
        judged = None not in place and len(rivals) > 1 and (place[1] or 0) < 1
        found.append(judged and not any(_better(other, place) for other in rivals))
    return found


def measured_on(dictionary: Dictionary) -> tuple[str | None, str | None]:
    """On which rows its figures are: the id of the validation pack, and whether targets were `stored` or `recomputed`."""
    metrics = dictionary.metrics or {}
    return metrics.get("pack"), metrics.get("targets")


def rows_named(dictionary: Dictionary) -> str | None:
    """`1a2b3c4d recomputed`: on which rows its figures are, in short; None where it was not measured."""
    pack, targets = measured_on(dictionary)
    return None if pack is None else f"{pack.removeprefix('sha256-')[:8]} {targets or ''}".rstrip()


def unlike(dictionaries: Sequence[Dictionary]) -> list[Site]:
    """The sites of which dictionaries of one kind were measured on different rows, so that there are several fronts."""
    seen: dict[tuple[Site, str], set[tuple[str | None, str | None]]] = {}
    for each in dictionaries:
        if each.metrics:
            seen.setdefault((each.site, each.config.kind), set()).add(measured_on(each))
    return sorted({site for (site, _), rows in seen.items() if len(rows) > 1}, key=lambda s: (s.stream, s.layer))


def _better(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def pareto(dictionaries: Sequence[Dictionary]) -> bytes | None:
    """L0 against FVU on held-out rows as PNG; None when nothing was measured.

    A panel a site, and where a stream has several kinds of tokens a panel for each.
    """
    panels = _panels(dictionaries)
    if not panels:
        return None
    names = {point.order: point.series for panel in panels for point in panel.points}
    looks = {names[order]: (COLOURS[i % 6], MARKERS[i % 7]) for i, order in enumerate(sorted(names))}
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    lines = -(-(len(looks) + 2) // columns)  # of the legend
    width, height = max(6.6, 4.4 * columns), 1.35 + 3.5 * rows + 0.22 * lines
    with drawing(width, height) as figure:
        figure.suptitle("Unexplained variance against sparsity, on held-out rows", **TITLE)
        grid = figure.subplots(rows, columns, squeeze=False)
        figure.subplots_adjust(
            left=0.7 / width, right=1 - 0.15 / width, top=1 - 0.75 / height, bottom=(0.7 + 0.22 * lines) / height,
            wspace=0.2, hspace=0.36,
        )  # fmt: skip
        for axes in list(grid.flat)[len(panels) :]:
            axes.remove()
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw(axes, panel, looks)
            _label(figure, axes, panel.points, looks)
        for axes in grid[:, 0]:
            axes.set_ylabel("FVU: share of variance unexplained")
        _legend(figure, looks, columns)
        return png(figure)


def _panels(dictionaries: Sequence[Dictionary]) -> list[Panel]:
    """Those that have any point: image sites first, by layer."""
    panels = []
    for site in sorted({each.site for each in dictionaries}, key=lambda site: (site.stream, site.layer)):
        mine = [each for each in dictionaries if each.site == site]
        telling = [name for name in varying(mine) if name not in (*SEEDS, *_IN_SERIES)]
        kinds = [kind for kind in kinds_of(site.stream) if any(figures_of(each, kind) for each in mine)]
        for group in kinds or ["all"]:
            points = []
            for dictionary in mine:
                found = figures_of(dictionary, group)
                if found.get("fvu") is not None and found["l0"] > 0:
                    points.append(Point(dictionary, found["l0"], found["fvu"], telling))
            if points:
                panels.append(Panel(site, group, points))
    return panels


def _draw(axes: Any, panel: Panel, looks: Mapping[str, tuple[str, str]]) -> None:
    points = panel.points
    low, high = min(point.l0 for point in points), max(point.l0 for point in points)
    middle, reach = math.sqrt(low * high), max(1.35 * math.sqrt(high / low), 2.0)
    log_scale(axes.set_xscale, axes.xaxis, reach**2)
    axes.set_xlim(middle / reach, middle * reach)
    axes.set_ylim(0, 1.2 * max(point.fvu for point in points) or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    axes.set_xlabel("L0: active features a row")
    differ = unlike([point.dictionary for point in points])
    axes.set_title(panel.title + (", held-out rows differ" if differ else ""))
    for name, (colour, marker) in looks.items():
        mine = [point for point in points if point.series == name]
        if means := sorted(_mean(same) for same in _by_label(mine)):
            axes.plot(*zip(*means, strict=True), color=colour, linewidth=1.2, alpha=0.6)
            axes.plot(
                [p.l0 for p in mine], [p.fvu for p in mine], marker, color=colour, markersize=6, markeredgewidth=0
            )
    best = on_front([point.dictionary for point in points], panel.group)
    ringed = [point for point, is_best in zip(points, best, strict=True) if is_best]
    axes.plot([p.l0 for p in ringed], [p.fvu for p in ringed], **RING)


def _by_label(points: Sequence[Point]) -> list[list[Point]]:
    """Points of one series and one setting, such as seeds, together."""
    found: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        found.setdefault((point.series, point.label), []).append(point)
    return list(found.values())


def _mean(points: Sequence[Point]) -> tuple[float, float]:
    return sum(point.l0 for point in points) / len(points), sum(point.fvu for point in points) / len(points)


def _label(figure: Any, axes: Any, points: Sequence[Point], looks: Mapping[str, tuple[str, str]]) -> None:
    """Write a label beside the rightmost point of each setting, where it covers as little as can be and crosses no edge."""
    renderer, unit = figure.canvas.get_renderer(), figure.dpi / 72
    pixels = axes.transData.transform([(point.l0, point.fvu) for point in points])
    taken = np.hstack([pixels - 5 * unit, pixels + 5 * unit])  # x0, y0, x1, y1
    inside = axes.get_window_extent(renderer).extents
    for same in _by_label(points):
        place = max(same, key=lambda point: (point.l0, point.fvu))
        if not place.label:
            continue
        text = axes.annotate(
            place.label, (place.l0, place.fvu), (0, 0), textcoords="offset points", fontsize=9, va="bottom",
            color=tuple(0.75 * part for part in to_rgb(looks[place.series][0])),
        )  # fmt: skip
        width, height = text.get_window_extent(renderer).size
        at = axes.transData.transform((place.l0, place.fvu))
        boxes = []
        for across, up in PLACES:
            low = at + np.array([across * unit - width * (across < 0) - width / 2 * (across == 0), up * unit])
            boxes.append(np.hstack([low, low + np.array([width, height])]))
        costs = [_common(box, taken).sum() + width * height - _common(box, inside[None]).sum() for box in boxes]
        best = int(np.argmin(np.round(costs)))  # the first of equals
        across = PLACES[best][0]
        text.set_position(PLACES[best])
        text.set_ha("left" if across > 0 else "right" if across < 0 else "center")
        taken = np.vstack([taken, boxes[best] + unit * np.array([-2, -1, 2, 1])])


def _common(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Square pixels that a box has in common with each of others."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return np.asarray(np.clip(sides, 0, None).prod(axis=1))


def _legend(figure: Any, looks: Mapping[str, tuple[str, str]], columns: int) -> None:
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=6, linewidth=1.2, label=name)
        for name, (colour, marker) in looks.items()
    ]
    handles.append(Line2D([], [], **RING, label="on the Pareto front of its site, kind and rows"))
    handles.append(Line2D([], [], color=GREY, linewidth=1.2, label="line: mean of those with one label, such as seeds"))
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.005, 0.0), ncols=columns)
