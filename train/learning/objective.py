"""What the training of one model minimises, and what it does to the model before and after each optimizer step.

    total = residual + l1 * sparsity + aux_weight * auxiliary

    residual     by the recipe's loss (`train.learning.loss`); nested: the mean over the inner prefixes and the whole.  Bussmann et
                 al. 2025 add them up; the mean keeps what l1 weighs against the same for any number of prefixes
    sparsity     record: mean_rows sum_f |z_f|;  mse: mean |z|, one n_features-th of that;  jumprelu: mean L0
    auxiliary    what dead features explain of the residual (`train.learning.dead`), where the recipe asks for it

Everything is a function of the batch, the step and `state()`: randomness is drawn from (recipe.seed, step), so that a
resumed run needs no generator's state.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from train.dictionaries.dictionary import Dictionary
from train.learning.dead import Dead, auxiliary_term
from train.learning.forward import forward
from train.learning.loss import residual_term
from train.learning.resample import Share, resample
from train.recipe import Recipe

RECORD_ROWS, RECORD_PERIOD = 1_000_000, 256
THRESHOLD_BATCHES = 1000
"""batchtopk: the threshold is a mean over about so many of the last batches, at most, and never over more than a tenth of the
run: the model sharpens while it trains, and a mean that goes back to its start lies too low"""


class Terms(NamedTuple):
    """The terms of one batch: 0-dim, float32, on the device of the model."""

    total: Float[Tensor, ""]
    residual: Float[Tensor, ""]
    sparsity: Float[Tensor, ""]
    auxiliary: Float[Tensor, ""]
    """zero where there is none"""
    l0: Float[Tensor, ""]
    """mean number of active features a row, no gradient; NaN unless counted"""


class Objective:
    """What one model's training keeps beside weights and optimizer."""

    def __init__(self, dictionary: Dictionary, recipe: Recipe, steps: int, batch: int) -> None:
        """`steps` and `batch` (rows a step, of all ranks together) are those of the whole run."""
        self.dictionary, self.recipe, self.steps, self.batch = dictionary, recipe, steps, batch
        self.device = dictionary.encoder.weight.device
        self.dead = Dead(dictionary.config.n_features, recipe.dead_rows, self.device)
        self.watched = min(recipe.dead_rows, max(batch, steps * batch // 10))
        """rows over which the log calls a feature dead: those of the recipe, or a tenth of the run where that is less"""
        self._batches = torch.zeros((), dtype=torch.int64, device=self.device)
        self._least = torch.zeros(2, device=self.device)
        """of this step: the sum of the least kept activations, and of how many ranks' batches; until after_step"""
        self._share: Share | None = None

    @property
    def resamples(self) -> bool:
        """Whether dead features are started again."""
        return self.recipe.dead in ("resample", "flux-sae")

    def dead_line(self, step: int) -> dict[str, float | int]:
        """What the log says of dead features after a step: their share, over how many rows, and how many were resampled so far."""
        rows = min(self.watched, (step + 1) * self.batch)
        resampled = {"resampled": int(self.dead.resampled)} if self.resamples else {}
        return {"dead": float(self.dead.share(rows)), "dead_rows": rows, **resampled}

    def terms(
        self, x: Float[Tensor, "row d_model"], y: Float[Tensor, "row d_model"], sigma: Float[Tensor, " row"], step: int,
        count: bool,
    ) -> Terms:  # fmt: skip
        """The terms of a batch, `total` with its gradient; products run under the caller's autocast, the loss in float32.

        `count` asks for `l0`, which costs one more pass over the features.
        """
        dictionary, recipe = self.dictionary, self.recipe
        prepared = dictionary.prepare(x, sigma)
        found = forward(dictionary, prepared, recipe.bandwidth, count=count)
        y_hats, linear = found.y_hats, dictionary.linear(x, sigma)
        if linear is not None:
            y_hats = [y_hat + linear for y_hat in y_hats]
        residual = residual_term(recipe.loss, y, y_hats)
        sparsity = found.sparsity
        if recipe.loss == "mse" and recipe.activation != "jumprelu":
            sparsity = sparsity / dictionary.config.n_features
        l1 = recipe.l1 * risen(step, recipe.l1_warmup_rows, self.batch)
        total = residual if l1 == 0 else residual + l1 * sparsity
        auxiliary = torch.zeros((), device=self.device)
        if recipe.dead == "auxk":
            missed = (y - y_hats[-1]).detach().float()
            aux_k = recipe.aux_k or max(1, dictionary.config.d_model // 2)
            auxiliary = auxiliary_term(dictionary, prepared, missed, self.dead.features(), aux_k)
            total = total + recipe.aux_weight * auxiliary
        self.dead.note(found.fired)
        if found.least is not None:
            there = found.least.isfinite()
            self._least = torch.stack([found.least.where(there, 0), there.float()])
        l0 = found.l0 if found.l0 is not None else torch.full((), math.nan, device=self.device)
        return Terms(total, residual, sparsity, auxiliary, l0)

    def merge(self, all_reduce: Callable[[Tensor], object], rank: int = 0, world: int = 1) -> None:
        """Make what this step counted that of all ranks' batches; between `terms` and `after_step`.

        `all_reduce` sums a tensor over the ranks in place.  Every rank calls this at every step, and afterwards their
        `after_step` change their models alike.
        """
        self.dead.merge(all_reduce)
        if self.recipe.activation == "batchtopk":
            all_reduce(self._least)
        self._share = Share(all_reduce, rank, world)

    @torch.no_grad()
    def before_step(self) -> None:
        """Between backward and the optimizer's step: take the decoder's gradient along its columns off, where asked for."""
        weight = self.dictionary.decoder.weight
        if self.recipe.project and weight.grad is not None:
            weight.grad -= weight * (weight * weight.grad).sum(dim=0)

    @torch.no_grad()
    def after_step(
        self, optimizer: torch.optim.Optimizer, x: Float[Tensor, "row d_model"], y: Float[Tensor, "row d_model"],
        sigma: Float[Tensor, " row"], step: int,
    ) -> None:  # fmt: skip
        """After the optimizer's step: unit columns, the threshold, the count of dead features, resampling when it is due.

        x, y, sigma are the rows that `terms` had; resampling draws from them.
        """
        self.dictionary.normalise_decoder()
        if self.recipe.activation == "batchtopk":
            self._move_threshold()
        self.dead.advance(self.batch)
        if self.resamples and self._due(step):
            dead = self.dead.features()
            done = resample(self.dictionary, optimizer, self.recipe, dead, x, y, sigma, step, self._share)
            self.dead.revive(done)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs beside the parameters and the optimizer, bit for bit."""
        found: dict[str, Tensor] = {"quiet_rows": self.dead.quiet_rows}
        if self.resamples:
            found["resampled"] = self.dead.resampled
        if self.recipe.activation == "batchtopk":
            found |= {"threshold": self.dictionary.threshold, "threshold_batches": self._batches}
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()`; `KeyError` where a name is missing."""
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(state[name])

    def _move_threshold(self) -> None:
        total, ranks = self._least
        found = ranks > 0
        self._batches += found.long()
        share = 1 / self._batches.clamp(1, max(1, min(THRESHOLD_BATCHES, self.steps // 10)))
        moved = torch.lerp(self.dictionary.threshold, total / ranks.clamp_min(1), share.float())
        self.dictionary.threshold.copy_(moved.where(found, self.dictionary.threshold))

    def _due(self, step: int) -> bool:
        every, batch = self.recipe.resample_rows, self.batch
        return (step + 1) * batch // every > step * batch // every and step + 1 < self.steps


def learning_rate(recipe: Recipe, step: int, steps: int, batch: int) -> float:
    """The learning rate of a step.

    `record` changes it once per 1e6 rows: the closed form of torch's `CosineAnnealingLR` with T_max 256, whose own recursion
    differs from it in the last bits.  Past 256e6 rows it rises again as the cosine does, and is back at the top at 512e6.
    """
    if recipe.schedule == "record":
        angle = (step * batch // RECORD_ROWS) / RECORD_PERIOD
    else:
        angle = step / steps if recipe.schedule == "cosine" else 0.0
    return recipe.lr * risen(step, recipe.lr_warmup_rows, batch) * 0.5 * (1 + math.cos(math.pi * angle))


def risen(step: int, warmup_rows: int, batch: int) -> float:
    """How far a warm-up over so many rows has come at a step, 0 to 1."""
    return min(1.0, (step + 1) * batch / warmup_rows) if warmup_rows else 1.0
