"""How good a dictionary is on rows that it was not trained on.

    FVU of a step = sum |y - y_hat|^2 / sum |y - mean_step|^2,   mean_step from the *training* split
    pooled FVU    = sum over steps of the residuals / sum over steps of the deviations

Sums run in float64 over all rows of the pack.  Text tokens are judged together, and apart as real
tokens and padding, each against its own means.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from store.errors import MismatchError, UsageError
from store.shards import GROUPS, Group, Pack
from store.sites import Site
from train.config import DictionaryConfig
from train.dictionary import Dictionary
from train.loader import read_rows
from train.tensors import to_torch

ROWS_AT_ONCE = 4096


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
def evaluate(dictionary: Dictionary, train_pack: Pack, val_pack: Pack) -> dict[str, Any]:
    """What `metrics.json` holds: figures over all rows of `val_pack`, `steps` apart; for txt also `real` and `padding`.

    Memory: one shard, and a few (4096, n_features) matrices.  A dead feature is active on none of `rows` rows.
    """
    site, groups = dictionary.site, GROUPS[dictionary.site.stream]
    n_features = dictionary.config.n_features
    tallies: dict[tuple[Group, int], Tally] = {}
    for group in groups:
        for step in val_pack.steps:
            mean = train_pack.mean(site, step, dictionary.target_point, group)
            if mean is None:  # the training split has no such row; judged against the mean of the whole stream
                mean = train_pack.mean(site, step, dictionary.target_point)
            assert mean is not None
            tallies[group, step] = Tally(to_torch(mean), n_features)
    for shard in val_pack.shards(site):
        rows = read_rows(shard, dictionary.input_point, dictionary.target_point)
        labels = {
            name: to_torch(column)
            for name, column in shard.columns("step", *(["real"] if len(groups) > 1 else [])).items()
        }
        columns = [torch.split(column, ROWS_AT_ONCE) for column in (*rows, *labels.values())]
        for x, y, sigma, step_of, *real in zip(*columns, strict=True):
            y = y.float()
            z = dictionary.encode(x.float(), sigma)
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
    return {"pack": val_pack.id, "split": val_pack.split, **by_group.pop("all"), **by_group}


def check_val(train_pack: Pack, val_pack: Pack, config: DictionaryConfig) -> None:
    """Refuse a validation pack whose figures would mean nothing, before any step is taken."""
    if val_pack.split == train_pack.split:
        raise UsageError(
            f"--val {val_pack.path} is of the split {val_pack.split!r}, which is trained on: pack --split val"
        )
    if val_pack.model != train_pack.model or val_pack.d_model != train_pack.d_model:
        raise MismatchError(
            f"{val_pack.path} is of another model than {train_pack.path}: {val_pack.model} against {train_pack.model}"
        )
    if not set(val_pack.steps) <= set(train_pack.steps):
        raise MismatchError(
            f"{val_pack.path} has steps {val_pack.steps}, {train_pack.path} has {train_pack.steps}: FVU needs "
            "the mean of every step from training"
        )
    check_site(val_pack, config.site, config)


def check_site(pack: Pack, site: Site, config: DictionaryConfig) -> None:
    """Refuse a pack without rows of the site."""
    pack.require(site, config.input_point, config.target_point)
    if pack.rows(site) == 0:
        raise UsageError(f"{pack.path} has no rows of {site}: pack more images")
