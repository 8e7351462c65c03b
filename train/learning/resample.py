"""Resampling: dead features start again at rows of the batch that are explained badly.

    resample   Bricken et al. 2023 (Anthropic).  Rows are drawn with probability proportional to the square of their squared
               error.  Encoder rows get 0.2 of the mean norm of the living ones; the optimizer's moments of all that
               changed become zero.
    flux-sae   "SAEs for visual features in FLUX.1".  Rows are drawn by softmax(10 * how far their mean squared error lies
               above the batch's mean, in standard deviations); encoder rows are 0.2 of the input as it is; moments are left.
               That system finds dead features (density below 1e-4) and rows (10,000) by passes over its data; here features
               are dead by `dead_rows`, rows are the batch's.

In both a row gives the decoder's column a direction, of unit norm, and the bias becomes zero.  Both know only SAEs: the
direction is that of the input.  Here the encoder gets what it reads on that row (the input after scale and shift, or less
`pre_bias`) and the decoder what it should write there (the target less its bias and skip path).

Departures from both systems, because with many dead features their rules as they stand wreck a model:

- flux-sae takes the softmax of 10 * error itself.  That depends on the unit of the activations: where errors differ by more
  than 1, one row is drawn for every feature.  Here errors are standardised first.
- No row is drawn twice, with either rule (flux-sae draws with replacement): twins get one gradient and never part.  Dead
  features beyond the rows wait for the next time.
- New features must not drown what the model has learned: 0.2 of an input of norm 50 answers that input with 500, and hundreds
  of small features add up where rows have a direction in common.  Where the squared error on the batch would come to more
  than 4 times what it was (as if they wrote no more, all together, than was missed), all new encoder rows are halved,
  again and again, until it does not.
"""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from train.dictionaries.dictionary import FIRST_THRESHOLD, Dictionary
from train.recipe import Recipe

SMALL = 0.2
"""norm of a new encoder row, at most: in mean norms of the living ones (resample), or in norms of what it reads (flux-sae)"""
SHARPNESS = 10.0
"""flux-sae: logarithm of how much likelier a row is drawn for each standard deviation of the mean squared error"""
WORST, HALVINGS = 4.0, 40
"""how many times the squared error on the batch may grow, and how often new encoder rows are halved until it does not"""


class Share(NamedTuple):
    """How ranks share what they find."""

    all_reduce: Callable[[Tensor], object]
    """sums a tensor over all ranks, in place"""
    rank: int
    world: int


class Candidates(NamedTuple):
    """What each row of a batch offers to a dead feature."""

    reads: Float[Tensor, "row d_model"]
    writes: Float[Tensor, "row d_model"]
    weights: Float[Tensor, " row"]
    """how likely it is to be drawn; they need not sum to 1"""
    missed: Float[Tensor, ""]
    """squared error, summed over the rows"""


@torch.no_grad()
def resample(
    dictionary: Dictionary, optimizer: torch.optim.Optimizer, recipe: Recipe, dead: Int[Tensor, " dead"],
    x: Float[Tensor, "row d_model"], y: Float[Tensor, "row d_model"], sigma: Float[Tensor, " row"], step: int,
    share: Share | None = None,
) -> Int[Tensor, " some"]:  # fmt: skip
    """Start `dead` features again, in place; gives back those that were.  Living ones keep every bit.

    What is drawn depends on (recipe.seed, step).  Of several ranks each serves every so-manieth dead feature from its own
    rows; all end with the same weights.
    """
    rank, world = (share.rank, share.world) if share else (0, 1)
    found = _candidates(dictionary, recipe, x, y, sigma)
    mine = torch.arange(len(dead), device=dead.device)[rank::world]
    rows = _draw(found.weights, len(mine), recipe.seed, step, rank)
    directions = torch.zeros(len(dead), 2 * x.shape[1] + 1, device=x.device)  # the last column: whether there is one
    directions[mine[: len(rows)]] = torch.cat(
        [found.reads[rows], found.writes[rows], torch.ones(len(rows), 1, device=x.device)], dim=1
    )
    if share is not None:
        share.all_reduce(directions)
    served = directions[:, -1] > 0
    reads, writes = directions[served, :-1].chunk(2, dim=1)
    if recipe.dead != "flux-sae":
        reads = functional.normalize(reads, dim=1) * _living_norm(dictionary.encoder.weight, dead)
        _forget(dictionary, optimizer, dead[served])
    reads, writes = SMALL * reads, functional.normalize(writes, dim=1)
    _write(dictionary, dead[served], reads, writes)
    for _ in range(HALVINGS if len(reads) else 0):
        sums = torch.stack([found.missed, _errors(dictionary, x, y, sigma).sum()])
        if share is not None:
            share.all_reduce(sums)
        if not sums[1] > WORST * sums[0]:
            break
        reads = reads / 2
        dictionary.encoder.weight[dead[served]] = reads
    return dead[served]


def _candidates(dictionary: Dictionary, recipe: Recipe, x: Tensor, y: Tensor, sigma: Tensor) -> Candidates:
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.float(), y.float()
        reads, writes = dictionary.prepare(x, sigma), y - dictionary.output_bias
        linear = dictionary.linear(x, sigma)
    if linear is not None:
        writes = writes - linear
    by_row = _errors(dictionary, x, y, sigma)
    spread = by_row.std(correction=0).clamp_min(torch.finfo(by_row.dtype).tiny)
    flux_sae = torch.softmax(SHARPNESS * (by_row - by_row.mean()) / spread, dim=0)
    return Candidates(reads, writes, flux_sae if recipe.dead == "flux-sae" else by_row.square(), by_row.sum())


def _draw(weights: Tensor, count: int, seed: int, step: int, rank: int) -> Tensor:
    """Numbers of rows, none twice: `count` of them, or fewer where no more are to be had; none where a weight is not finite."""
    count = min(count, int((weights > 0).sum())) if weights.isfinite().all() else 0
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=weights.device)
    digest = hashlib.sha256(f"granary-resampling-1:{seed}:{step}:{rank}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.multinomial((weights / weights.max()).cpu(), count, generator=generator).to(weights.device)


def _errors(dictionary: Dictionary, x: Tensor, y: Tensor, sigma: Tensor) -> Float[Tensor, " row"]:
    """The squared error of each row, float64."""
    with torch.autocast(x.device.type, enabled=False):
        y_hat: Tensor = dictionary(x.float(), sigma)
        return (y.float() - y_hat).square().double().sum(dim=1)


def _living_norm(weight: Tensor, dead: Tensor) -> Tensor:
    living = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    living[dead] = False
    norms: Tensor = weight.norm(dim=1)
    return norms[living].mean() if living.any() else norms.mean()


def _write(dictionary: Dictionary, features: Tensor, reads: Tensor, writes: Tensor) -> None:
    dictionary.encoder.weight[features] = reads
    dictionary.encoder.bias[features] = 0.0
    dictionary.decoder.weight[:, features] = writes.T
    if dictionary.config.activation == "jumprelu":
        dictionary.log_threshold[features] = math.log(FIRST_THRESHOLD)


def _forget(dictionary: Dictionary, optimizer: torch.optim.Optimizer, features: Tensor) -> None:
    """Zero the optimizer's moments of everything that belongs to these features."""
    by_row = [dictionary.encoder.weight, dictionary.encoder.bias]
    if dictionary.config.activation == "jumprelu":
        by_row.append(dictionary.log_threshold)
    for parameter in (*by_row, dictionary.decoder.weight):
        for moment in optimizer.state.get(parameter, {}).values():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                (moment.T if parameter is dictionary.decoder.weight else moment)[features] = 0.0
