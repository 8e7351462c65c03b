"""Plots of sparsity against faithfulness, of steps, and of blocks, as PNG in the style of the training's pictures.

Equal input gives equal bytes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from analyze.faithfulness.groups import MEAN
from analyze.faithfulness.table import COUNTED, Row, of_scope
from train.results.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    STEPS,
    TITLE,
    VERMILION,
    drawing,
    png,
    short_number,
)

COLOURS = {"transcoder": BLUE, "sae": VERMILION}
NAMES = {"transcoder": "transcoders", "sae": "SAEs"}
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = "osD^vPX"
MOST_PANELS = 4
"""sites beside one another; more stand in further lines"""
FIGURES = (("fvu", "FVU of the dictionary\nin the run"), ("latent_fvu", "final latents off,\nshare of their variance"))


def sparsity_plot(rows: Sequence[Row]) -> bytes | None:
    """L0 against FVU and against the final latents, a column a site, transcoders and SAEs; None without a site alone."""
    alone = of_scope(rows, "site")
    sites = list(dict.fromkeys(row["sites"] for row in alone))
    if not sites:
        return None
    columns = min(len(sites), MOST_PANELS)
    lines = -(-len(sites) // columns)
    width, height = max(3.3 * columns + 0.9, 6.6), 2.6 * 2 * lines + 1.2
    with drawing(width, height) as figure:
        figure.suptitle("Sparsity against faithfulness, one site spliced at a time", **TITLE)
        grid = figure.subplots(2 * lines, columns, squeeze=False, sharey="row")
        figure.subplots_adjust(
            left=1.0 / width,
            right=1 - 0.15 / width,
            top=1 - 0.95 / height,
            bottom=0.6 / height,
            wspace=0.1,
            hspace=0.3,
        )
        for place in range(lines * columns):
            line, column = divmod(place, columns)
            for offset, (key, name) in enumerate(FIGURES):
                axes = grid[2 * line + offset, column]
                if place >= len(sites):
                    axes.set_visible(False)
                    continue
                _trade(axes, [row for row in alone if row["sites"] == sites[place]], key)
                axes.set_title(f"{sites[place]}" if offset == 0 else "")
                axes.set_ylabel(name if column == 0 else "", fontsize=8.5)
                axes.set_xlabel("L0: active features a row" if offset == 1 else "")
        kinds = [kind for kind in NAMES if any(row["kind"] == kind for row in alone)]
        handles = [grid[0, 0].plot([], [], color=COLOURS[kind], marker="o", label=NAMES[kind])[0] for kind in kinds]
        if any(row["kind"] == MEAN for row in alone):
            handles += grid[0, 0].plot([], [], color=GREY, linestyle=(0, (4, 2)), label="mean output of the MLP")
        figure.legend(handles=handles, loc="upper left", ncols=len(handles), bbox_to_anchor=(0.005, 1 - 0.3 / height))
        return png(figure)


def _trade(axes: Any, rows: Sequence[Row], key: str) -> None:
    """The points of one site, joined by kind in the order of their L0."""
    for row in rows:
        if row["kind"] == MEAN and key == "latent_fvu" and row[key]:
            axes.axhline(row[key], color=GREY, linewidth=1.2, linestyle=(0, (4, 2)))
    for kind, colour in COLOURS.items():
        points = sorted((row["l0"], row[key]) for row in rows if row["kind"] == kind and row["l0"] and row[key])
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=5, linewidth=1.4)
    ticks = sorted({round(row["l0"]) for row in rows if row["l0"]})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(_apart(ticks), [short_number(tick) for tick in _apart(ticks)])
    axes.margins(x=0.08, y=0.1)
    axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
    axes.yaxis.set_minor_formatter(FuncFormatter(_plain_minor))
    axes.tick_params(axis="y", which="both", labelsize=8)


def _apart(ticks: Sequence[int]) -> list[int]:
    """The ticks that leave room for their numbers on a log axis."""
    kept: list[int] = []
    for tick in sorted(ticks, reverse=True):
        if tick > 0 and (not kept or kept[-1] / tick > 1.4):
            kept.append(tick)
    return kept[::-1]


def _plain_number(value: float, _place: object) -> str:
    return f"{value:g}"


def _plain_minor(value: float, _place: object) -> str:
    """Numbers at 2 and 5 only."""
    return f"{value:g}" if f"{value:.0e}"[0] in "25" else ""


def steps_plot(rows: Sequence[Row], sites: Sequence[Row]) -> bytes | None:
    """FVU of each splicing of one site at each denoising step, a column a site and a line of panels a kind.

    Below them, where steps were spliced alone too, how far off that leaves the final latents.  None where there is one step only.
    """
    counted = [
        row for row in sites
        if row["tokens"] in COUNTED and row["every_step"] and row["sites"] == row["site"] and row["kind"] != MEAN
    ]  # fmt: skip
    single = [
        {**row, "site": row["sites"], "step": int(row["steps"])} for row in of_scope(rows, "site", every_step=False)
    ]
    if len({row["step"] for row in counted}) < 2:
        return None
    kinds = [kind for kind in NAMES if any(row["kind"] == kind for row in counted)]
    names = list(dict.fromkeys(row["site"] for row in sorted(counted, key=lambda row: (row["site"][:3], row["step"]))))
    series = list(dict.fromkeys(_series(row) for row in counted))
    looks = {each: (SERIES[n % len(SERIES)], MARKERS[n % len(MARKERS)]) for n, each in enumerate(series)}
    lines = [("fvu", kind, counted) for kind in kinds] + [("latent_fvu", kind, single) for kind in kinds if single]
    width, height = max(2.9 * len(names) + 2.2, 6.6), 2.4 * len(lines) + 1.0
    with drawing(width, height) as figure:
        figure.suptitle("Faithfulness step by step, one site spliced at a time", **TITLE)
        grid = figure.subplots(len(lines), len(names), squeeze=False, sharex=True)
        figure.subplots_adjust(
            left=1.0 / width, right=1 - 1.35 / width, top=1 - 0.8 / height, bottom=0.6 / height, wspace=0.08, hspace=0.3
        )
        filled = [{row["site"] for row in source if row["kind"] == kind} for _, kind, source in lines]
        for line, (key, kind, source) in enumerate(lines):
            first = next((column for column, site in enumerate(names) if site in filled[line]), 0)
            for column, site in enumerate(names):
                axes = grid[line, column]
                axes.sharey(grid[0 if key == "fvu" else len(kinds), 0])
                here = [row for row in source if (row["site"], row["kind"]) == (site, kind)]
                axes.set_visible(bool(here))  # not every site has dictionaries of every kind
                _over_steps(axes, here, key, looks)
                axes.set_title(f"{site}, {NAMES[kind]}")
                lowest = not any(site in below for below in filled[line + 1 :])
                axes.set_xlabel("denoising step" if lowest else "")
                axes.tick_params(axis="x", labelbottom=lowest)
                axes.tick_params(axis="y", which="both", labelleft=column == first)
            said = "FVU at the step" if key == "fvu" else "latents off,\nthis step spliced alone"
            grid[line, first].set_ylabel(said, fontsize=9)
        handles, labels = _legend(grid)
        figure.legend(handles, labels, loc="upper right", bbox_to_anchor=(0.995, 1 - 0.6 / height))
        return png(figure)


def _over_steps(axes: Any, rows: Sequence[Row], key: str, looks: Mapping[str, tuple[str, str]]) -> None:
    """The lines of one site and kind, one a group."""
    for name, (colour, marker) in looks.items():
        points = sorted((row["step"], row[key]) for row in rows if _series(row) == name and row[key])
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.2, label=name or "-")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
    axes.yaxis.set_minor_formatter(FuncFormatter(_plain_minor))
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=STEPS))


def blocks_plot(rows: Sequence[Row]) -> bytes | None:
    """The final latents as block after block is spliced, a line a group; None without cumulative splicings of two blocks and more."""
    lines, means = block_lines(rows)
    if not lines:
        return None
    with drawing(7.4, 4.2) as figure:
        figure.suptitle("Final latents as block after block is spliced", **TITLE)
        axes = figure.subplots()
        figure.subplots_adjust(left=0.11, right=0.7, top=0.88, bottom=0.13)
        for number, (group, points) in enumerate(lines.items()):
            x, y = zip(*points, strict=True)
            colour = GREY if group in means else SERIES[(number - len(means)) % len(SERIES)]
            axes.plot(
                x, y, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=5, linewidth=1.4, label=group
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
        axes.yaxis.set_minor_formatter(FuncFormatter(_plain_minor))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=STEPS))
        axes.set_xlabel("last block that is spliced")
        axes.set_ylabel("latents off, share of their variance")
        figure.legend(loc="upper left", bbox_to_anchor=(0.71, 0.89))
        return png(figure)


def block_lines(rows: Sequence[Row]) -> tuple[dict[str, list[tuple[int, float]]], set[str]]:
    """Name -> (last block, latents off) of each line of the plot, the baseline's first, and which lines are the baseline's.

    The baseline was measured at the sites of every group; a line of it has the sets of sites of one group that is drawn, so that it
    grows by the same sites as that group.  Groups of other sites have a line of their own beside theirs.
    """
    chosen = of_scope(rows, "cumulative")
    chains: dict[tuple[str, ...], list[str]] = {}  # sets of sites -> groups
    for group in dict.fromkeys(row["group"] for row in chosen if row["kind"] != MEAN):
        chain = tuple(row["sites"] for row in chosen if row["group"] == group)
        if len(chain) > 1:
            chains.setdefault(chain, []).append(group)
    lines: dict[str, list[tuple[int, float]]] = {}
    for chain in chains:
        there = {row["sites"]: row for row in chosen if row["kind"] == MEAN}
        points = [(last_layer(sites), there[sites]["latent_fvu"]) for sites in chain if sites in there]
        if points:
            name = there[chain[-1]]["group"] if chain[-1] in there else MEAN
            lines[name if len(chains) == 1 else f"{name}, {chain[-1]}"] = points
    means = set(lines)
    for group in (group for groups in chains.values() for group in groups):
        lines[group] = [(last_layer(row["sites"]), row["latent_fvu"]) for row in chosen if row["group"] == group]
    return lines, means


def last_layer(sites: str) -> int:
    """The highest layer in a text such as `img_0-4,txt_3`."""
    return max(int(number) for word in sites.split(",") for number in word.split("_")[1].split("-"))


def _series(row: Row) -> str:
    """What tells a group from others of its kind: `k 8`."""
    return str(row["group"]).removeprefix(row["kind"]).strip()


def _legend(grid: Any) -> tuple[list[Any], list[str]]:
    """Every label of the panels once."""
    found: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
