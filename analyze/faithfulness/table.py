"""The tables: a row a splicing for programs, and the same as Markdown for people."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from analyze.faithfulness.groups import MEAN
from analyze.faithfulness.measuring import ABOUT
from analyze.steering.distances import COLUMNS, typical

Row = Mapping[str, Any]
COUNTED = ("all", "real")
"""tokens whose rows a splicing's figures are of; padding has rows of its own in sites.parquet"""
TEXTS = {
    "fvu": "FVU", "l0": "L0", "cosine": "cosine", "latent_fvu": "latents off %", "recovered": "recovered %",
    "latent_cosine": "latent cosine", "psnr": "PSNR",
    "ssim": "SSIM", "flip": "FLIP", "lpips": "LPIPS", "clip": "CLIP", "kept_colour": "colour kept %", "kept_shape": "shape kept %",
    "kept_position": "position kept %", "kept_background": "background kept %",
}  # fmt: skip
SHARES = ("latent_fvu", "recovered", "kept_colour", "kept_shape", "kept_position", "kept_background")
"""shown in percent"""
TERMS = """\
A dictionary stands in for the MLP of its site while the model draws; everything after it goes on with what it gives.

- FVU, cosine, L0: of the dictionary in that run, on the rows that it replaces (real tokens of the text, all of the image): its
  squared difference from what the MLP would have given there, over the squared deviation of the plain outputs from their mean;
  steps are pooled as sums. Of several sites together: the mean over the sites.
- latents off %: the squared difference of the final latents from the plain ones, over the latents' own squared deviation from their
  channel means. recovered %: 100 when the latents are the plain ones, 0 when they are as far off as with each MLP's mean output in
  its place (mean output; of the text a prompt's own tokens and its padding have a mean each).
  PSNR (dB), SSIM, FLIP and the other distances of latents and pictures are medians over the images.
- kept %: the share of pictures in which tiny-flux's judge reads what it reads in the plain ones, of every object."""


def summary(images: pa.Table, sites: pa.Table) -> dict[str, Any]:
    """One splicing as one row: its names, its figures at its sites, and those of its latents and pictures."""
    row: dict[str, Any] = {name: images[name][0].as_py() for name in ABOUT.names}
    counted = [each for each in sites.to_pylist() if each["tokens"] in COUNTED]
    pooled = [pool([each for each in counted if each["site"] == site]) for site in _distinct(counted, "site")]
    row |= {name: _mean([each[name] for each in pooled]) for name in ("l0", "fvu", "cosine")}
    values = {
        name: images[name].to_numpy(zero_copy_only=False) for name in images.column_names if name not in ABOUT.names
    }
    deviation = float(values["latent_deviation"].sum())
    row |= {
        "images": len(images),
        "latent_fvu": float(values["latent_residual"].sum()) / deviation if deviation else None,
    }
    row |= typical({name: values[name] for name in COLUMNS if name in values})
    for name in (name for name in values if name.startswith("kept_")):
        row[name] = float(values[name].mean())
    return row


def pool(rows: Sequence[Row]) -> dict[str, float | None]:
    """L0, FVU and cosine of rows of sites.parquet together: FVU as the ratio of sums, the others as means over activations' rows."""
    count = sum(row["rows"] for row in rows)
    deviation = sum(row["deviation"] for row in rows if row["rows"])
    if not count:
        return {"l0": None, "fvu": None, "cosine": None}
    return {
        "l0": sum(row["l0"] * row["rows"] for row in rows if row["rows"]) / count,
        "cosine": sum(row["cosine"] * row["rows"] for row in rows if row["rows"]) / count,
        "fvu": sum(row["residual"] for row in rows) / deviation if deviation > 0 else None,
    }


def with_recovered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `recovered`: 1 - latent_fvu over that of the baseline at the same sites and steps, where there is one."""
    baseline = {(row["sites"], row["steps"]): row["latent_fvu"] for row in rows if row["kind"] == MEAN}
    found = []
    for row in rows:
        off = baseline.get((row["sites"], row["steps"]))
        found.append(
            {**row, "recovered": 1 - row["latent_fvu"] / off if off and row["latent_fvu"] is not None else None}
        )
    return found


def summary_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """faithfulness.parquet: a row a splicing."""
    numbers = list(dict.fromkeys(name for row in rows for name in row if name not in ABOUT.names))
    fields = [*ABOUT, *(pa.field(name, pa.int64() if name == "images" else pa.float64()) for name in numbers)]
    return pa.Table.from_pylist(list(rows), pa.schema(fields))


def _distinct(rows: Sequence[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def of_scope(rows: Sequence[Row], scope: str, every_step: bool | None = True) -> list[Row]:
    """The rows of splicings that are of a scope (and at all steps, or at one alone)."""
    return [
        row
        for row in rows
        if scope in row["scopes"].split(",") and (every_step is None or row["every_step"] == every_step)
    ]


def figure(name: str, value: float | None) -> str:
    """A value as the tables show it."""
    if value is None or value != value:
        return "-"
    if value in (float("inf"), float("-inf")):
        return "equal"
    if name in SHARES:
        return f"{100 * value:.3g}" if abs(value) < 0.1 else f"{100 * value:.1f}"
    return {"l0": f"{value:.1f}", "psnr": f"{value:.1f}"}.get(name, f"{value:.4f}")


def lines_of(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table whose first `left` columns are texts."""
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return [f"| {' | '.join(row)} |" for row in (heads, rule, *rows)]


def shown_columns(rows: Sequence[Row]) -> list[str]:
    """The figures that the tables of splicings show: those of which there is any."""
    return [name for name in TEXTS if any(row.get(name) is not None for row in rows)]


def markdown(
    title: str,
    facts: Sequence[str],
    rows: Sequence[Row],
    sites: Sequence[Row],
    exact: Sequence[Row],
    files: Sequence[str],
) -> str:
    """faithfulness.md: sparsity against faithfulness a site, transcoders against SAEs, steps, sites together, errors added back.

    `sites` are the rows of sites.parquet, `files` the pictures beside it.
    """
    parts = [f"# {title}", *(f"- {fact}" for fact in facts), "", TERMS, ""]
    parts += [f"![{name}]({name})\n" for name in files]
    names = shown_columns(rows)
    heads = [TEXTS[name] for name in names]
    alone = of_scope(rows, "site")
    if alone:
        parts.append("## One site at a time\n")
        for site in _distinct(alone, "sites"):
            cells = [
                [row["group"], *(figure(name, row.get(name)) for name in names)]
                for row in alone
                if row["sites"] == site
            ]
            parts += [f"### {site}\n", *lines_of(["dictionary", *heads], cells), ""]
        parts += [*_kinds(alone), *_steps(rows, sites)]
    for scope, head in (("cumulative", "Block by block"), ("all", "All sites together")):
        chosen = of_scope(rows, scope)
        if chosen:
            cells = [[row["group"], row["sites"], *(figure(name, row.get(name)) for name in names)] for row in chosen]
            parts += [f"## {head}\n", *lines_of(["dictionaries", "sites", *heads], cells, 2), ""]
    parts += _exact(exact)
    return "\n".join(parts).rstrip() + "\n"


def kinds_compared(alone: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(transcoder, SAE) of the same site and sparsity, each alone."""
    saes = {(row["sites"], row["sparsity"]): row for row in alone if row["kind"] == "sae"}
    return [
        (row, saes[row["sites"], row["sparsity"]])
        for row in alone
        if row["kind"] == "transcoder" and (row["sites"], row["sparsity"]) in saes
    ]


def _kinds(alone: Sequence[Row]) -> list[str]:
    pairs = kinds_compared(alone)
    if not pairs:
        return []
    heads = ["site", "sparsity", "FVU transcoder", "FVU SAE", "latents off % transcoder", "latents off % SAE", "nearer"]
    cells = []
    for transcoder, sae in pairs:
        nearer = "transcoder" if transcoder["latent_fvu"] < sae["latent_fvu"] else "SAE"
        each = [figure(name, row[name]) for name in ("fvu", "latent_fvu") for row in (transcoder, sae)]
        cells.append([transcoder["sites"], transcoder["sparsity"], *each, nearer])
    won = sum(cell[-1] == "SAE" for cell in cells)
    said = f"The latents stay nearer with the SAE in {won} of {len(cells)} pairs, with the transcoder in {len(cells) - won}."
    why = "An SAE reads the MLP's own output and only has to hand it on; a transcoder has to compute it from the MLP's input."
    return ["## Transcoders against SAEs\n", f"{said} {why}\n", *lines_of(heads, cells, 2), ""]


def _steps(rows: Sequence[Row], sites: Sequence[Row]) -> list[str]:
    """FVU at each step of splicings at all steps; latents of splicings at one step alone, where there are any."""
    alone, single = of_scope(rows, "site"), of_scope(rows, "site", every_step=False)
    counted = [row for row in sites if row["tokens"] in COUNTED and row["every_step"] and row["sites"] == row["site"]]
    steps = _distinct(sorted(counted, key=lambda row: row["step"]), "step")
    heads = [f"FVU step {step}" for step in steps] + (
        [f"latents off %, step {step} alone" for step in steps] if single else []
    )
    fvu = {(row["group"], row["site"], row["step"]): row["fvu"] for row in counted}
    latents = {(row["group"], row["sites"], row["steps"]): row["latent_fvu"] for row in single}
    cells = []
    for row in alone:
        key = row["group"], row["sites"]
        cells.append([*key, *(figure("fvu", fvu.get((*key, step))) for step in steps)])
        if single:
            cells[-1] += [figure("latent_fvu", latents.get((*key, str(step)))) for step in steps]
    return ["## Step by step\n", *lines_of(["dictionary", "site", *heads], cells, 2), ""]


def _exact(exact: Sequence[Row]) -> list[str]:
    if not exact:
        return []
    cells = [
        [
            row["group"],
            row["sites"],
            row["errors"],
            str(row["images"]),
            *(f"{row[name]:.2e}" for name in ("largest", "rms")),
        ]
        for row in exact
    ]
    worst = {way: max(row["largest"] for row in exact if row["errors"] == way) for way in ("live", "kept")}
    said = (
        f"With what the dictionaries leave unexplained added back, the final latents (RMS {exact[0]['latent_rms']:.3f}) differ from the "
        f"plain ones by {worst['live']:.1e} at most with the errors of the same run (live), and by {worst['kept']:.1e} with those of the "
        "plain run (kept). Where kept errors are further off than rounding, another feature was chosen by a TopK (or a threshold) whose "
        "last ones are equal to rounding; a graph's replacement model freezes that choice, a splicing makes it anew."
    )
    heads = ["dictionaries", "sites", "errors", "images", "largest difference", "RMS difference"]
    return ["## Errors added back\n", said + "\n", *lines_of(heads, cells, 3), ""]
