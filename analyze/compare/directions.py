"""Decoder directions: which point the same way, how near random ones would come, and where they lie in a plane.

A feature's direction is its column of the decoder: what it writes.  Everything walks over blocks of columns, so that beside the
dictionary itself and one copy of its decoder only some hundred MB are held, at 49,152 features of width 3,072 as at 512 of 64.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import betaincinv
from torch import Tensor
from tqdm import tqdm

from analyze.compare.ranked import NOTHING, best_first, columns_of, packed, rounded, values_of
from store.errors import UsageError
from train import Dictionary

BLOCK = 2048
"""features of a tile: its cosines and their keys are 48 MiB"""


@dataclass(frozen=True)
class Projection:
    """Directions in the plane in which they spread most."""

    places: Float[np.ndarray, "feature 2"]
    explained: tuple[float, float]
    """share of the variance of the directions along each axis"""


def device_of_work() -> torch.device:
    """Where large products are made: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def unit_directions(dictionary: Dictionary) -> Float[Tensor, "d_model feature"]:
    """The columns of the decoder, float32, each of length 1; a column of length 0 stays 0 and is like no other."""
    columns = dictionary.decoder.weight.detach().to(device_of_work(), torch.float32)
    directions: Tensor = columns / torch.linalg.vector_norm(columns, dim=0).clamp(min=torch.finfo(torch.float32).tiny)
    return directions


@torch.no_grad()
def nearest(dictionary: Dictionary, k: int) -> tuple[Int[np.ndarray, "feature k"], Float[np.ndarray, "feature k"]]:
    """For each feature the `k` others whose decoder directions have the greatest cosine with its own: indices and cosines.

    Best first; cosines that agree to about 1e-6 are equal, and then the lower index comes first.  Of a dictionary of n features each
    has n - 1 others: `UsageError` for a `k` beyond that.  Costs n^2 d_model operations, half of what all pairs would.
    """
    count = int(dictionary.config.n_features)
    if not 1 <= k < count:
        raise UsageError(f"a feature of {dictionary.name} has {count - 1} others: {k} nearest ones cannot be listed")
    directions = unit_directions(dictionary)
    best = torch.full((count, k), NOTHING, dtype=torch.int64, device=directions.device)
    blocks = [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    pairs = list(combinations_with_replacement(blocks, 2))
    for rows, columns in tqdm(
        pairs, desc="nearest", unit="tile", mininterval=0.5, disable=len(pairs) < 20, leave=False
    ):
        cosines = directions[:, rows].T @ directions[:, columns]
        if rows == columns:
            cosines.fill_diagonal_(-torch.inf)  # itself
        whole = rounded(cosines)
        _keep_best(best, rows, whole, columns)
        if rows != columns:
            _keep_best(best, columns, whole.T, rows)
    return columns_of(best).to(torch.int32).cpu().numpy(), values_of(best).clamp(-1, 1).cpu().numpy()


def _keep_best(best: Int[Tensor, "feature k"], rows: slice, whole: Float[Tensor, "row column"], columns: slice) -> None:
    """Merge a tile of rounded cosines into what is kept, in place."""
    numbers = torch.arange(columns.start, columns.stop, device=whole.device)
    found, _ = best_first(packed(whole, numbers), best.shape[1])
    best[rows], _ = best_first(torch.cat([best[rows], found], dim=1), best.shape[1])


@torch.no_grad()
def cosines_between(dictionary: Dictionary, features: Int[np.ndarray, " chosen"]) -> Float[np.ndarray, "chosen chosen"]:
    """The cosines of the chosen features' directions with one another."""
    columns = dictionary.decoder.weight.detach()[:, torch.from_numpy(np.asarray(features, np.int64))].double()
    columns = columns / torch.linalg.vector_norm(columns, dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    return np.asarray((columns.T @ columns).clamp(-1, 1).float().numpy())


@torch.no_grad()
def projected(directions: Float[Tensor, "d_model feature"]) -> Projection:
    """The directions along their first two principal components, which point to where their largest entry is positive.

    The covariance is summed in float64 over blocks; a space of one dimension has a second axis of zeros.
    """
    d_model, count = directions.shape
    blocks = [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    mean = torch.zeros(d_model, dtype=torch.float64, device=directions.device)
    for block in blocks:
        mean += directions[:, block].double().sum(dim=1) / count
    covariance = torch.zeros(d_model, d_model, dtype=torch.float64, device=directions.device)
    for block in blocks:
        centred = directions[:, block].double() - mean[:, None]
        covariance += centred @ centred.T
    variance, axes = torch.linalg.eigh(covariance)  # rising
    axes = torch.cat([torch.zeros(d_model, 1).to(axes), axes], dim=1)[:, -2:].flip(1)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    places = torch.cat([(directions[:, block].double() - mean[:, None]).T @ axes for block in blocks])
    shares = torch.cat([torch.zeros(1).to(variance), variance])[-2:].flip(0).clamp(min=0) / max(
        float(variance.sum()), 1e-300
    )
    return Projection(places.float().cpu().numpy(), (float(shares[0]), float(shares[1])))


def chance_cosine(n_features: int, d_model: int) -> float:
    """The median over features of the greatest cosine with another, were their directions random.

    The square of a cosine with a random direction is Beta(1/2, (d - 1) / 2); of n - 1 of them the greatest lies below t in half of
    the cases where each does with probability 0.5 ** (1 / (n - 1)).
    """
    if d_model < 2 or n_features < 2:
        return 1.0
    above = -np.expm1(np.log(0.5) / (n_features - 1))
    if above >= 0.5:
        return 0.0
    return float(np.sqrt(1 - betaincinv((d_model - 1) / 2, 0.5, 2 * above)))
