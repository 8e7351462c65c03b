"""How good a dictionary is on rows that it was not trained on.

    FVU of a step = sum |y - y_hat|^2 / sum |y - mean_step|^2,   mean_step from the *training* split
    pooled FVU    = sum over steps of the residuals / sum over steps of the deviations

Sums run in float64 over all rows of the pack.  Text tokens are judged together, and apart as real
tokens and padding, each against its own means.  Recomputed targets are judged like stored ones; their
means cost one pass over the training pack (`train.means`).
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from store.errors import MismatchError, UsageError
from store.shards import GROUPS, Group, Pack
from store.sites import Site
from train.config import DictionaryConfig
from train.dictionary import Dictionary
from train.loader import ROWS_AT_ONCE, read_rows
from train.means import TrainingMeans
from train.provenance import check_same_model
from train.recompute import PackPoints
from train.tensors import to_torch


class Tally:
    """Sums over the rows of one step and group."""

    def __init__(self, mean: Float[Tensor, " d_model"], n_features: int) -> None:
        self.mean = mean
        self.rows = 0
        self.residual = self.deviation = self.cosine = 0.0
        self.active = torch.zeros(n_features, dtype=torch.int64)

    def add(
        self,
        y: Float[Tensor, "row d_model"],
        residual: Float[Tensor, " row"],
        cosine: Float[Tensor, " row"],
        active: Bool[Tensor, "row n_features"],
    ) -> None:
        """Add rows: targets, their squared residuals, cosines (both float64) and active features."""
        self.rows += len(y)
        self.residual += float(residual.sum())
        self.deviation += float((y.double() - self.mean).square().sum())
        self.cosine += float(cosine.sum())
        self.active += active.sum(dim=0)


def figures(tallies: list[Tally]) -> dict[str, Any] | None:
    """FVU, cosine, L0, density, dead share and rows of several tallies as of one; None without rows."""
    rows = sum(tally.rows for tally in tallies)
    if rows == 0:
        return None
    residual, deviation = sum(t.residual for t in tallies), sum(t.deviation for t in tallies)
    active = torch.stack([tally.active for tally in tallies]).sum(dim=0)
    l0 = int(active.sum()) / rows
    return {
        "fvu": residual / deviation if deviation > 0 else None,
        "cosine": sum(t.cosine for t in tallies) / rows,
        "l0": l0,
        "density": l0 / len(active),
        "dead": int((active == 0).sum()) / len(active),
        "rows": rows,
    }


@torch.no_grad()
def evaluate(dictionary: Dictionary, means: TrainingMeans, val_pack: Pack) -> dict[str, Any]:
    """What `metrics.json` holds: figures over all rows of `val_pack`, `steps` apart; for txt also `real` and `padding`.

    `means` are those of the dictionary's target in the pack that it was trained on.
    Memory: one shard, and a few (4096, n_features) matrices.  A dead feature is active on none of `rows` rows.
    """
    site, groups = dictionary.site, GROUPS[dictionary.site.stream]
    n_features = dictionary.config.n_features
    tallies: dict[tuple[Group, int], Tally] = {}
    for group in groups:
        for step in val_pack.steps:
            mean = means.of(step, group)
            if mean is None:  # the training split has no such row; judged against the mean of the whole stream
                mean = means.of(step)
            assert mean is not None
            tallies[group, step] = Tally(mean, n_features)
    points = PackPoints(val_pack, site, dictionary.input_point, dictionary.target_point)
    for shard in val_pack.shards(site):
        rows = read_rows(shard, *points.columns)
        labels = {
            name: to_torch(column)
            for name, column in shard.columns("step", *(["real"] if len(groups) > 1 else [])).items()
        }
        columns = [torch.split(column, ROWS_AT_ONCE) for column in (*rows, *labels.values())]
        for x, y, sigma, step_of, *real in zip(*columns, strict=True):
            x, y = points.pair(x, y)
            z = dictionary.encode(x, sigma)
            y_hat = dictionary.decode(z)
            residual = (y - y_hat).double().square().sum(dim=-1)
            cosine = torch.cosine_similarity(y.double(), y_hat.double(), dim=-1)
            for (group, step), tally in tallies.items():
                chosen = step_of == step
                if group != "all":
                    chosen = chosen & (real[0] == (1 if group == "real" else 0))
                if chosen.any():
                    tally.add(y[chosen], residual[chosen], cosine[chosen], z[chosen] > 0)
    by_group: dict[str, Any] = {}
    for group in groups:
        mine = {step: tallies[group, step] for step in val_pack.steps}
        pooled = figures(list(mine.values()))
        by_group[group] = (
            None
            if pooled is None
            else {**pooled, "steps": {str(step): figures([tally]) for step, tally in mine.items()}}
        )
    about = {"pack": val_pack.id, "split": val_pack.split, "targets": val_pack.targets}
    return {**about, **by_group.pop("all"), **by_group}


def check_packs(train_pack: Pack, val_pack: Pack) -> None:
    """Refuse a validation pack whose figures would mean nothing; a note where it cannot be known."""
    if val_pack.split == train_pack.split:
        raise UsageError(
            f"--val {val_pack.path} is of the split {val_pack.split!r}, which is trained on: pack --split val"
        )
    if val_pack.d_model != train_pack.d_model:
        raise MismatchError(
            f"--val {val_pack.path} has rows of width {val_pack.d_model}, --pack {train_pack.path} of width "
            f"{train_pack.d_model}: pack both from stores of one model"
        )
    known = check_same_model(
        f"--pack {train_pack.path}", train_pack.model, f"--val {val_pack.path}", val_pack.model,
        "pack both from stores of one model",
    )  # fmt: skip
    if not known:
        print(f"note: whether {val_pack.path} and {train_pack.path} are of one model is not known: they do not say")
    if not set(val_pack.steps) <= set(train_pack.steps):
        raise MismatchError(
            f"--val {val_pack.path} has steps {', '.join(map(str, val_pack.steps))}, --pack {train_pack.path} has "
            f"{', '.join(map(str, train_pack.steps))}: FVU needs the mean of every step from training"
        )


def check_site(pack: Pack, site: Site, config: DictionaryConfig) -> None:
    """Refuse a pack without rows of the site."""
    pack.require(site, config.input_point, config.target_point)
    if pack.rows(site) == 0:
        raise UsageError(f"{pack.path} has no rows of {site}: pack more images")


def check_sigmas(train_pack: Pack, val_pack: Pack, site: Site) -> None:
    """Refuse a validation pack whose steps are not those of training: the same number, another sigma."""
    trained, held_out = sigmas_of(train_pack, site), sigmas_of(val_pack, site)
    for step in sorted(set(trained) & set(held_out)):
        if trained[step] != held_out[step]:
            raise MismatchError(
                f"step {step} is at sigma {held_out[step]:g} in --val {val_pack.path} and at {trained[step]:g} in --pack "
                f"{train_pack.path}: pack both from stores of one schedule (steps, resolution and dtype decide it)"
            )


def sigmas_of(pack: Pack, site: Site) -> dict[int, float]:
    """Sigma of every step that occurs in the first shard of a site."""
    columns = pack.shards(site)[0].columns("step", "sigma")
    steps, first = np.unique(columns["step"], return_index=True)
    return {int(step): float(columns["sigma"][row]) for step, row in zip(steps, first, strict=True)}
