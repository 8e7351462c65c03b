"""What becomes of a picture when dictionaries stand in for MLPs: each splicing drawn beside the plain pictures, and compared.

1. The plain pictures are drawn once, and how far each site's outputs lie from their mean is counted.
2. Every splicing draws the same shots; how well its dictionaries do at their sites is counted in that run, where they read what
   earlier ones left.  Its latents and pictures are compared with the plain ones.
3. What came out is two tables a splicing: a row an image, and a row a site, step and kind of tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from analyze.faithfulness.groups import Splicing, sites_text
from analyze.faithfulness.judged import kept
from analyze.faithfulness.splicing import MeanOutput, Spread, Watch, splice
from analyze.features.clip import Clip
from analyze.steering.distances import distances
from analyze.steering.drawing import Drawing, Painter, Shot
from analyze.steering.judging import readings
from harvest.tiny_flux.judge import Reading
from store.sites import Site, spans
from train import Dictionary

ABOUT = pa.schema(
    [
        ("group", pa.string()), ("kind", pa.string()), ("sparsity", pa.string()), ("scopes", pa.string()),
        ("sites", pa.string()), ("steps", pa.string()), ("every_step", pa.bool_()),
    ]
)  # fmt: skip
"""what every row of every table begins with: which splicing it is of"""
SITE_ROWS = pa.schema(
    [
        *ABOUT, ("site", pa.string()), ("step", pa.int64()), ("tokens", pa.string()), ("rows", pa.int64()), ("l0", pa.float64()),
        ("fvu", pa.float64()), ("cosine", pa.float64()), ("residual", pa.float64()), ("deviation", pa.float64()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Plain:
    """The pictures as the model draws them, and how far the outputs of its MLPs lie from their means."""

    shots: tuple[Shot, ...]
    real: np.ndarray
    """(shot, token) of the text: True where a token is no padding"""
    drawing: Drawing
    spreads: Mapping[tuple[Site, int, str], Spread]
    deviation: np.ndarray
    """(shot,) squared deviation of the final latents from the mean of each channel over all shots and tokens, summed over both"""
    readings: list[Reading] | None = None
    """what the judge sees in the pictures, where it can"""


def batches(painter: Painter, shots: Sequence[Shot]) -> Iterator[slice]:
    """The shots in the batches that they are drawn in."""
    for start in range(0, len(shots), painter.batch_size):
        yield slice(start, min(start + painter.batch_size, len(shots)))


def draw_plain(
    painter: Painter,
    shots: tuple[Shot, ...],
    real: np.ndarray,
    sites: Sequence[Site],
    pictures: bool,
    judged: bool,
    bar: "tqdm[Any]",
) -> Plain:
    """The plain pictures and latents of the shots; the outputs of `sites` are counted on the way.

    `judged`: the judge reads the pictures.
    """
    watch, drawn = Watch(), []
    for rows in batches(painter, shots):
        watch.real = torch.from_numpy(real[rows])
        observing: Any = {(site, "mlp"): [watch.observe] for site in sites}
        drawn.append(painter.draw(shots[rows], extra=observing, pictures=pictures))
        bar.update(len(shots[rows]))
    latents = torch.cat([each.latents for each in drawn])
    images = [image for each in drawn for image in each.pictures or []] if pictures else None
    deviation = (latents.double() - latents.double().mean(dim=(0, 1))).square().sum(dim=(1, 2)).numpy()
    seen = readings(images) if judged and images is not None else None
    return Plain(shots, real, Drawing(images, latents), watch.spreads, deviation, seen)


def measure(
    painter: Painter,
    splicing: Splicing,
    dictionaries: Mapping[Site, Dictionary | MeanOutput],
    plain: Plain,
    bar: "tqdm[Any]",
    clip: Clip | None = None,
) -> tuple[pa.Table, pa.Table, list[Any]]:
    """(a row an image, a row a site, step and tokens, the first batch's pictures) of one splicing.

    `residual` is the squared difference between what the dictionary gave and what the MLP would have, in this run, summed over rows and
    channels; `deviation` that of the plain run's outputs from their mean; `fvu` their ratio.
    """
    watch, columns = Watch(), []
    first: list[Any] = []
    for rows in batches(painter, plain.shots):
        watch.real = torch.from_numpy(plain.real[rows])
        drawn = painter.draw(
            plain.shots[rows], extra=splice(dictionaries, splicing.steps, watch=watch),
            pictures=plain.drawing.pictures is not None,
        )  # fmt: skip
        columns.append(_compared(plain, rows, drawn, clip))
        first = first or list(drawn.pictures or [])
        bar.update(len(plain.shots[rows]))
    joined = {name: np.concatenate([each[name] for each in columns]) for name in columns[0]}
    images = pa.table({"image": [shot.image for shot in plain.shots], **joined})
    return with_splicing(splicing, images), _site_rows(splicing, watch, plain), first


def _compared(plain: Plain, rows: slice, drawn: Drawing, clip: Clip | None) -> dict[str, np.ndarray]:
    """The columns of some images: distances, the squared difference of the latents, what the judge reads."""
    before = plain.drawing.pictures[rows] if plain.drawing.pictures is not None else None
    latents = plain.drawing.latents[rows]
    found: dict[str, np.ndarray] = {
        "latent_residual": (drawn.latents.double() - latents.double()).square().sum(dim=(1, 2)).numpy(),
        "latent_deviation": plain.deviation[rows],
        **distances(before, drawn.pictures, latents, drawn.latents, clip),
    }
    if plain.readings is not None and drawn.pictures is not None:
        found |= kept(plain.readings[rows], drawn.pictures)
    return found


def _site_rows(splicing: Splicing, watch: Watch, plain: Plain) -> pa.Table:
    rows = []
    for (site, step, tokens), fit in watch.fits.items():
        deviation = plain.spreads[site, step, tokens].deviation
        rows.append({
            "site": str(site), "step": step, "tokens": tokens, "rows": fit.rows, "residual": fit.residual, "deviation": deviation,
            **_figures(fit.rows, fit.active, fit.cosine, fit.residual, deviation),
        })  # fmt: skip
    rows.sort(key=lambda row: (row["site"], row["step"], row["tokens"]))
    return with_splicing(splicing, pa.Table.from_pylist(rows, pa.schema(list(SITE_ROWS)[len(ABOUT) :])))


def _figures(rows: int, active: float, cosine: float, residual: float, deviation: float) -> dict[str, float | None]:
    """L0, cosine and FVU of so many rows; None where there are none, or where nothing varies."""
    if rows == 0:
        return {"l0": None, "cosine": None, "fvu": None}
    return {"l0": active / rows, "cosine": cosine / rows, "fvu": residual / deviation if deviation > 0 else None}


def with_splicing(splicing: Splicing, table: pa.Table) -> pa.Table:
    """The table with the columns of `ABOUT` before its own."""
    about = {
        "group": splicing.group.label, "kind": splicing.group.kind, "sparsity": splicing.group.sparsity,
        "scopes": ",".join(splicing.scopes), "sites": sites_text(splicing.sites), "steps": spans(splicing.steps),
        "every_step": splicing.every_step,
    }  # fmt: skip
    before = [pa.array([about[field.name]] * len(table), field.type) for field in ABOUT]
    return pa.table([*before, *table.columns], names=[*ABOUT.names, *table.column_names])
