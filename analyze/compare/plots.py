"""Plots of directions and of how sides match, as PNG in the style of the training's pictures; equal input gives equal bytes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from matplotlib.ticker import FuncFormatter, MaxNLocator

from train.results.plots import BLUE, GREY, STEPS, TITLE, VERMILION, drawing, png, short_number

COSINES = "RdBu_r"
POINTS_PALE = 5_000
"""from so many points on they are drawn smaller and paler"""
NEVER = "#D9D9D9"
MOST_WITH_NUMBERS = 6
"""sides of a map whose squares have room for a number"""


def cosine_map(cosines: Float[np.ndarray, "feature feature"], names: Sequence[str], title: str) -> bytes:
    """The cosines of chosen features with one another as a heat map: rows are named, columns numbered."""
    short = [name if len(name) <= 48 else name[:47] + "…" for name in names]
    side = max(0.19 * len(names), 2.0)
    room = 0.35 + 0.072 * max(map(len, short))
    with drawing(max(room + side + 1.3, 5.0), side + 1.2) as figure:
        figure.suptitle(title, **TITLE)
        width, height = figure.get_figwidth(), figure.get_figheight()
        axes = figure.add_axes((room / width, 0.55 / height, side / width, side / height))
        shown = axes.imshow(cosines, cmap=COSINES, vmin=-1, vmax=1, interpolation="nearest")
        axes.set_xticks(range(len(names)), [name.split(" ")[0] for name in names], rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), short, fontsize=8)
        axes.grid(False)
        axes.tick_params(length=0)
        bar = figure.add_axes(((room + side + 0.2) / width, 0.55 / height, 0.16 / width, side / height))
        figure.colorbar(shown, cax=bar, label="cosine of the decoder directions")
        return png(figure)


def neighbour_histogram(cosines: Float[np.ndarray, " feature"], chance: float, title: str) -> bytes:
    """How near the nearest neighbour of each feature is, and how near it would be among random directions."""
    with drawing(7.5, 4.0) as figure:
        figure.suptitle(title, **TITLE)
        axes = figure.subplots()
        figure.subplots_adjust(left=0.1, right=0.97, top=0.87, bottom=0.14)
        low = min(0.0, float(np.floor(cosines.min() * 10) / 10))
        counts, *_ = axes.hist(
            cosines, bins=np.linspace(low, 1, 51).tolist(), color=BLUE, edgecolor="white", linewidth=0.5
        )
        axes.set_xlim(low, 1)
        axes.set_ylim(top=1.25 * float(np.max(counts)))  # room for what the lines are called
        axes.set_xlabel("cosine with the nearest other direction")
        axes.set_ylabel("features")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(short_number))
        _mark(axes, float(np.median(cosines)), "median", "black", 0.97)
        _mark(axes, chance, "median of random directions", VERMILION, 0.89)
        return png(figure)


def _mark(axes: Any, at: float, name: str, colour: str, height: float) -> None:
    low, high = axes.get_xlim()
    left = at > (low + high) / 2
    axes.axvline(at, color=colour, linewidth=1.3, linestyle=(0, (4, 2)))
    axes.text(
        at + (-1 if left else 1) * 0.01 * (high - low), height, f"{name} {at:.2f}", transform=axes.get_xaxis_transform(),
        ha="right" if left else "left", va="top", color=colour, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def projection_plot(
    places: Float[np.ndarray, "feature 2"],
    explained: tuple[float, float],
    colours: Sequence[tuple[str, Float[np.ndarray, " feature"], str]],
    named: Sequence[tuple[int, str]],
    title: str,
) -> bytes:
    """The directions in their plane, once for each (name, value of each feature, colour map); NaN is drawn grey.

    `named`: features whose names stand beside their points.
    """
    with drawing(6.2 * len(colours) + 0.3, 5.6) as figure:
        figure.suptitle(title, **TITLE)
        panels = np.atleast_1d(figure.subplots(1, len(colours), sharex=True, sharey=True))
        width = figure.get_figwidth()
        figure.subplots_adjust(left=0.75 / width, right=1 - 0.7 / width, top=0.9, bottom=0.1, wspace=0.16)
        many = len(places) > POINTS_PALE
        for axes, (name, values, colour_map) in zip(panels, colours, strict=True):
            there = np.isfinite(values)
            size = 3 if many else 14
            axes.scatter(*places[~there].T, s=size, color=NEVER, linewidths=0)
            points = axes.scatter(
                *places[there].T, c=values[there], cmap=colour_map, s=size, alpha=0.6 if many else 0.9, linewidths=0
            )
            if there.any():
                figure.colorbar(points, ax=axes, label=name, fraction=0.045, pad=0.02)
            axes.set_xlabel(f"first principal axis: {explained[0]:.1%} of the variance")
            axes.axhline(0, color=GREY, linewidth=0.5)
            axes.axvline(0, color=GREY, linewidth=0.5)
            marked = places[[feature for feature, _ in named]]
            axes.scatter(*marked.T, s=34, facecolors="none", edgecolors="black", linewidths=0.9)
            for feature, text in named:
                axes.annotate(
                    text, places[feature], xytext=(4, 3), textcoords="offset points", fontsize=7.5,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.7},
                )  # fmt: skip
        panels[0].set_ylabel(f"second: {explained[1]:.1%}")
        return png(figure)


def pair_map(table: pa.Table) -> bytes:
    """How well the features of each side (row) are found in each other (column): the median best match, a panel a measure.

    Below each panel what unrelated features would give; grey where there is nothing to compare, or a cosine that says nothing.
    """
    rows = table.to_pylist()
    sides = list(dict.fromkeys(row["of"] for row in rows))
    measures = list(dict.fromkeys(row["by"] for row in rows))
    place = {name: number for number, name in enumerate(sides)}
    inch = max(2.2, 0.24 * len(sides))
    room = 0.3 + 0.085 * max(map(len, sides))
    with drawing(room + len(measures) * (inch + 0.75) + 0.4, 2 * inch + room + 1.6) as figure:
        figure.suptitle("Median over features of the best match (row: feature of, column: found in)", **TITLE)
        width, height = figure.get_figwidth(), figure.get_figheight()
        figure.text(
            0.15 / width, 1 - 0.55 / height, "by chance: random directions, or the images of one side in another order; "
            "grey: one side alone, or one decoder at two steps, whose cosines say nothing", fontsize=9, color=GREY, va="center",
        )  # fmt: skip
        for level, key in enumerate(("median_best", "median_by_chance")):
            bottom = (room + (1 - level) * (inch + 0.45)) / height
            for number, measure in enumerate(measures):
                values = np.full((len(sides), len(sides)), np.nan)
                for row in rows:
                    if row["by"] == measure and row[key] is not None:
                        values[place[row["of"]], place[row["with"]]] = row[key]
                left = (room + number * (inch + 0.75)) / width
                axes = figure.add_axes((left, bottom, inch / width, inch / height))
                axes.set_title(measure if level == 0 else f"{measure} by chance")
                shown = _map_of_medians(axes, values)
                axes.set_xticks(range(len(sides)), sides if level else [""] * len(sides), rotation=90, fontsize=8)
                axes.set_yticks(range(len(sides)), sides if number == 0 else [""] * len(sides), fontsize=8)
                if number == len(measures) - 1:
                    bar = figure.add_axes((left + (inch + 0.12) / width, bottom, 0.14 / width, inch / height))
                    figure.colorbar(shown, cax=bar)
        return png(figure)


def _map_of_medians(axes: Any, values: Float[np.ndarray, "side side"]) -> Any:
    """Medians as colours, and as numbers too where there is room for them."""
    axes.set_facecolor(NEVER)
    shown = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.grid(False)
    axes.tick_params(length=0)
    if len(values) <= MOST_WITH_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "white" if value < 0.6 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    return shown
