"""That nothing but what the dictionaries leave unexplained sets a splicing apart from the plain run.

With their errors added back the latents must come out as the plain ones, to the rounding of the model's dtype: site by site and
with all sites together, with the errors of the same run (live) and with those of the plain run (kept, as in a graph's replacement
model).  Where a TopK's last features are equal to rounding, another may be chosen; then the kept errors no longer fit to the last digit.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from tqdm import tqdm

from analyze.faithfulness.groups import Group, sites_text
from analyze.faithfulness.measuring import batches
from analyze.faithfulness.splicing import KeptErrors, splice
from analyze.steering.drawing import Painter, Shot
from store.sites import Site

EXACTNESS = pa.schema(
    [
        ("group", pa.string()), ("sites", pa.string()), ("errors", pa.string()), ("images", pa.int64()),
        ("largest", pa.float64()), ("rms", pa.float64()), ("latent_rms", pa.float64()),
    ]
)  # fmt: skip
WAYS = ("live", "kept")


def sets_of(group: Group) -> list[tuple[Site, ...]]:
    """What is spliced with errors: each site, and all together where there are several."""
    alone: list[tuple[Site, ...]] = [(site,) for site in group.sites]
    return [*alone, group.sites] if len(group.sites) > 1 else alone


def pictures_of(group: Group, images: int) -> int:
    """How many pictures `exactness` draws for a group: plain ones, those whose errors are kept, and those with errors added back."""
    return images * (2 + len(WAYS) * len(sets_of(group)))


def exactness(
    painter: Painter, group: Group, steps: Sequence[int], shots: Sequence[Shot], bar: "tqdm[Any]"
) -> pa.Table:
    """A row a set of sites and way (`EXACTNESS`).

    `largest`, `rms`: of the difference from the plain latents; `latent_rms` that of the plain latents themselves.
    """
    dictionaries = {site: group.dictionary(site) for site in group.sites}
    differences: dict[tuple[tuple[Site, ...], str], list[torch.Tensor]] = {}
    squares: list[torch.Tensor] = []
    for rows in batches(painter, shots):
        errors = KeptErrors()
        plain = painter.draw(shots[rows], pictures=False).latents.double()
        painter.draw(shots[rows], extra=errors.recording(dictionaries), pictures=False)
        bar.update(2 * len(shots[rows]))
        squares.append(plain.square().flatten())
        for sites in sets_of(group):
            chosen = {site: dictionaries[site] for site in sites}
            for way in WAYS:
                changes = splice(chosen, steps, errors if way == "kept" else True)
                found = painter.draw(shots[rows], extra=changes, pictures=False).latents.double()
                differences.setdefault((sites, way), []).append((found - plain).flatten())
                bar.update(len(shots[rows]))
    latent_rms = float(torch.cat(squares).mean().sqrt())
    made = []
    for (sites, way), parts in differences.items():
        each = torch.cat(parts)
        made.append({
            "group": group.label, "sites": sites_text(sites), "errors": way, "images": len(shots),
            "largest": float(each.abs().max()), "rms": float(each.square().mean().sqrt()), "latent_rms": latent_rms,
        })  # fmt: skip
    return pa.Table.from_pylist(made, EXACTNESS)
