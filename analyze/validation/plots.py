"""What was predicted against what was measured, as PNG; equal input gives equal bytes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from analyze.validation.agreement import Rows, pearson, spearman
from train.results.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, TITLE, drawing, log_scale, png

TITLES = {
    "direct": "direct: edges, MLPs held",
    "total": "total: pairs, everything live",
    "pairwise": "pairwise: sources of explained targets",
    "pairwise-all": "pairwise: all pairs of nodes",
}
AXES = {
    True: ("predicted change of the pre-activation", "measured change"),
    False: ("influence in the graph", "|measured change|"),
}
COLOURS = {"img": BLUE, "txt": ORANGE, "padding": PURPLE, "joint": GREEN}
SMALLEST = 1e-5
"""of the largest value: what is less is out of a logarithmic plot's range"""
LINEAR = (1e-4, 1e-2)
"""of the largest value, at least and at most: what is less than a tenth of the values is drawn linearly"""
WIDTH, HEIGHT = 4.3, 4.7


def scatter(tests: Sequence[Rows], title: str) -> bytes:
    """A panel a test: with signs on axes that are linear near 0 and logarithmic beyond, with the line of equality; else logarithmic."""
    with drawing(max(WIDTH * len(tests) + 0.3, 6.0), HEIGHT) as figure:
        figure.suptitle(title, **TITLE)
        grid = figure.subplots(1, len(tests), squeeze=False)[0]
        width = figure.get_figwidth()
        figure.subplots_adjust(left=0.75 / width, right=1 - 0.15 / width, top=0.8, bottom=0.2, wspace=0.32)
        for axes, rows in zip(grid, tests, strict=True):
            _panel(axes, rows)
        seen = [name for name in COLOURS if any(name in _where(rows) for rows in tests)]
        for place, name in enumerate(seen):
            figure.text(0.012 + place * 1.5 / width, 0.025, f"● source in {name}", color=COLOURS[name], fontsize=9)
        return png(figure)


def _panel(axes: Any, rows: Rows) -> None:
    everything = np.ones(len(rows.table), dtype=bool)
    predicted, measured = rows.values(everything)
    where = np.asarray(_where(rows), dtype=object)
    across, up = AXES[rows.signed]
    figures = f"n {len(predicted):,}   Spearman {_short(spearman(predicted, measured))}   Pearson {_short(pearson(predicted, measured))}"
    axes.set_title(f"{TITLES[rows.test]}\n{figures}", pad=8)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if rows.signed:
        largest = float(max(np.abs(predicted).max(initial=0), np.abs(measured).max(initial=0))) or 1.0
        few = float(np.quantile(np.abs(predicted), 0.1)) if len(predicted) else 0.0
        threshold = 10.0 ** np.floor(np.log10(np.clip(few, LINEAR[0] * largest, LINEAR[1] * largest)))
        for scale in (axes.set_xscale, axes.set_yscale):
            scale("symlog", linthresh=threshold, linscale=1.0)
        limit = 1.3 * largest
        axes.plot([-limit, limit], [-limit, limit], color=GREY, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
        axes.set_xlim(-limit, limit)
        axes.set_ylim(-limit, limit)
        _decades(axes, threshold, largest)
    else:
        kept = (predicted > SMALLEST * predicted.max(initial=0)) & (measured > SMALLEST * measured.max(initial=0))
        left_out = int(np.sum(~kept))
        predicted, measured, where = predicted[kept], measured[kept], where[kept]
        if len(predicted):
            for scale, axis, values in (
                (axes.set_xscale, axes.xaxis, predicted),
                (axes.set_yscale, axes.yaxis, measured),
            ):
                log_scale(scale, axis, 3 * float(values.max() / values.min()))
        if left_out:
            axes.text(
                0.02, 0.98, f"{left_out:,} too small to be shown", transform=axes.transAxes, va="top", fontsize=8, color=GREY
            )  # fmt: skip
    size, pale = (5, 0.35) if len(predicted) > 1500 else (10, 0.55)
    for name, colour in COLOURS.items():
        mine = where == name
        axes.scatter(predicted[mine], measured[mine], s=size, alpha=pale, color=colour, linewidths=0, zorder=2)


def _decades(axes: Any, threshold: float, largest: float) -> None:
    """Ticks at 0 and at powers of ten beyond the linear part, few enough to be read."""
    first, last = round(float(np.log10(threshold))), int(np.floor(np.log10(largest) + 1e-9))
    every = 1 if last - first < 3 else 2
    powers = [10.0**exponent for exponent in range(last, first, -every)][::-1]
    ticks = [-power for power in reversed(powers)] + [0.0] + powers
    names = [f"{tick:g}" for tick in ticks]
    axes.set_xticks(ticks, names, fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.minorticks_off()


def _where(rows: Rows) -> list[str]:
    """The colour's name of each row."""
    streams, padding = (rows.table[name].to_pylist() for name in ("stream", "padding"))
    return ["padding" if pad else stream for stream, pad in zip(streams, padding, strict=True)]


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
