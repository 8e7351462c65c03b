"""Pictures of a training as PNG: how it went, and how dense its features are.

The same input gives the same bytes: matplotlib's own defaults and font whatever the user's settings are, and no date or
version in the file.  Colours are those of Okabe and Ito, which people tell apart whatever colours they see.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from train.dictionaries.checkpoint import LogLine

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY = "#6E6E6E"
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titley": 1.0, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#E4E4E4", "axes.axisbelow": True, "figure.dpi": 110,
    "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip
TITLE = {"x": 0.012, "y": 0.985, "ha": "left", "va": "top", "fontsize": 12, "fontweight": "bold"}
STEPS = (1, 2, 2.5, 5, 10)
"""distances of ticks, in powers of ten"""
SMOOTHED = 100
"""curves of more points than so many are drawn pale, under their running mean over a fiftieth of them"""
PANELS = {
    "loss": ("loss", BLUE),
    "residual": ("residual term of the loss", VERMILION),
    "l0": ("L0: active features a row", GREEN),
    "dead": ("dead, %", GREY),
    "lr": ("learning rate", PURPLE),
    "resampled": ("features resampled so far", ORANGE),
    "sparsity": ("sparsity term, before its weight", ORANGE),
}
"""of a line of the log; where nothing is resampled the sparsity term stands in that place"""
LINEAR = ("lr", "dead", "resampled")
HEADROOM = 1.18
"""height of a density plot in its highest bars: a word stands above them"""
GROUP_TITLES = {"all": "all tokens", "real": "real tokens", "padding": "padding", "image": "image tokens"}


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches in our style."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        yield figure


def png(figure: Figure) -> bytes:
    """The figure's file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def curves(lines: Sequence[LogLine], title: str) -> bytes:
    """Loss, L0, dead features, learning rate and more over the rows seen; `lines` are those of `log.jsonl`."""
    resampled = any("resampled" in line for line in lines)
    keys = [key for key in PANELS if key != ("sparsity" if resampled else "resampled")]
    with drawing(12.6, 5.6) as figure:
        figure.suptitle(title, **TITLE)
        grid = figure.subplots(2, 3, sharex=True)
        figure.subplots_adjust(left=0.05, right=0.985, top=0.87, bottom=0.1, wspace=0.19, hspace=0.26)
        for axes, key in zip(grid.flat, keys, strict=True):
            points = [(line["rows"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]
            name, colour = PANELS[key]
            values = np.array(points, dtype=np.float64).reshape(-1, 2)
            if key == "dead" and points:
                values[:, 1] *= 100
                name += f": active on none of the last {short_number(max(line['dead_rows'] for line in lines))} rows"
            axes.set_title(name)
            _curve(axes, values, colour, key not in LINEAR)
            axes.margins(x=0.01)
        if len(lines) > SMOOTHED:
            note = "pale: every logged batch; dark: running mean"
            figure.text(0.98, 0.975, note, ha="right", va="top", fontsize=9, color=GREY)
        for axes in grid[1]:
            axes.set_xlabel("rows seen")
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
            axes.xaxis.set_major_formatter(FuncFormatter(short_number))
        return png(figure)


def _curve(axes: Any, points: np.ndarray, colour: str, logarithmic: bool) -> None:
    """Draw one curve; if so asked by powers of ten, where it spans more than one of them."""
    rows, values = points.T
    if not len(values):
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set_yticks([])
        return
    if logarithmic and values.min() > 0 and values.max() > 10 * values.min():
        log_scale(axes.set_yscale, axes.yaxis, float(values.max() / values.min()))
    else:
        axes.set_ylim(bottom=min(0.0, 1.05 * float(values.min())), top=1.06 * float(values.max()) or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(short_number))
    if len(values) > SMOOTHED:
        axes.plot(rows, values, color=colour, alpha=0.25, linewidth=0.8)
        values = running_mean(values, len(values) // 50)
    axes.plot(rows, values, color=colour, linewidth=1.6, marker="o" if len(values) <= 12 else None, markersize=3.5)


def log_scale(set_scale: Any, axis: Any, span: float) -> None:
    """Make an axis logarithmic, with plain numbers: at 1, 2, 5 of each decade where it has few of them."""
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1.0,) if span > 300 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(short_number))
    axis.set_minor_locator(NullLocator())


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` values around each; over those that there are at the ends."""
    window = np.ones(width)
    return np.asarray(np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same"))


def short_number(value: float | int, _: object = None) -> str:
    """`0`, `250 k`, `1.5 M`, `3e-4`"""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.4g}"
    digits, exponent = f"{value:.3e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def density(metrics: Mapping[str, Any], title: str) -> bytes:
    """How many features are active on which share of the held-out rows, never-active ones apart; txt and joint: each kind of token too."""
    groups = [("all", metrics)] + [
        (name, metrics[name]) for name in GROUP_TITLES if name != "all" and metrics.get(name)
    ]
    edges = [float(edge) for edge in metrics["density_log10_edges"]]
    with drawing(8.0, 1.3 + 2.2 * len(groups)) as figure:
        figure.suptitle(title, **TITLE)
        grid = figure.subplots(
            len(groups), 2, sharex="col", sharey="row", squeeze=False, gridspec_kw={"width_ratios": (1, 10)}
        )
        height = figure.get_figheight()
        figure.subplots_adjust(
            left=0.09, right=0.965, top=1 - 0.72 / height, bottom=0.55 / height, wspace=0.09, hspace=0.28
        )
        first = min(_first_bin(found) for _, found in groups)
        for (never, axes), (name, found) in zip(grid, groups, strict=True):
            _density_row(never, axes, found, edges, first)
            more = f"{GROUP_TITLES[name]}: " if len(groups) > 1 else ""
            axes.set_title(
                f"{more}{found['rows']:,} rows, L0 {found['l0']:.4g}, {100 * found['dead']:.1f} % never active"
            )
            never.set_ylabel("features")
        grid[-1][1].set_xlabel("density: share of the held-out rows on which a feature is active")
        return png(figure)


def _first_bin(found: Mapping[str, Any]) -> int:
    """The first bin worth showing: that of the sparsest feature, and not less than three decades before the last."""
    counts = found["density_histogram"]["counts"]
    return min([place for place, count in enumerate(counts) if count] + [len(counts) - 12])


def _density_row(never: Any, axes: Any, found: Mapping[str, Any], edges: Sequence[float], first: int) -> None:
    histogram = found["density_histogram"]
    never.bar([0], [histogram["never"]], width=0.8, color=VERMILION)
    never.set_xlim(-0.7, 0.7)
    never.set_xticks([0], ["never"])
    never.grid(False, axis="x")
    never.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=STEPS))
    never.yaxis.set_major_formatter(FuncFormatter(short_number))
    low = math.floor(edges[first])
    axes.bar(
        edges[:-1],
        histogram["counts"],
        width=np.diff(edges),
        align="edge",
        color=BLUE,
        edgecolor="white",
        linewidth=0.6,
    )
    axes.set_xlim(low, 0.02)
    ticks = list(range(low, 1))
    axes.set_xticks(ticks, [f"{100 * 10.0**tick:g} %" for tick in ticks])
    axes.tick_params(left=False)
    axes.set_ylim(0, HEADROOM * max(histogram["never"], *histogram["counts"], 1))
    if found["density"] > 10**low:
        axes.axvline(math.log10(found["density"]), color="black", linewidth=1.2, linestyle=(0, (4, 2)))
        axes.text(
            math.log10(found["density"]) - 0.06,
            0.985,
            "mean",
            transform=axes.get_xaxis_transform(),
            ha="right",
            va="top",
        )
