"""What a reconstruction misses, in float32 and outside autocast.

record  mean_rows sum_d (y - y_hat)^2 / (sum_d var_batch(y_d, biased) + 1e-6)      the loss of record (DifFRACT)
mse     mean over all elements of (y - y_hat)^2                                    the second family's (FLUX-SAE)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from train.recipe import LossName

EPSILON = 1e-6


class Loss(NamedTuple):
    """Scalars: `total = residual + l1 * sparsity`."""

    total: Float[Tensor, ""]
    residual: Float[Tensor, ""]
    """squared residual over the batch's variance: the FVU of the batch"""
    sparsity: Float[Tensor, ""]
    """mean over rows of the sum of |z|"""


def residual_term(
    loss: LossName, y: Float[Tensor, "row d_model"], y_hats: Sequence[Float[Tensor, "row d_model"]]
) -> Float[Tensor, ""]:
    """The residual by the named loss, float32; of several reconstructions of the same rows the mean."""
    with torch.autocast(y.device.type, enabled=False):
        y = y.float()
        if loss == "mse":
            terms = [(y - y_hat.float()).square().mean() for y_hat in y_hats]
        else:
            scale = y.var(dim=0, correction=0).sum() + EPSILON
            terms = [(y - y_hat.float()).square().sum(dim=1).mean() / scale for y_hat in y_hats]
        return terms[0] if len(terms) == 1 else torch.stack(terms).mean()


def loss_of_record(
    y: Float[Tensor, "row d_model"],
    y_hat: Float[Tensor, "row d_model"],
    z: Float[Tensor, "row n_features"],
    l1: float,
) -> Loss:
    """`mean_rows sum_d (y - y_hat)^2 / (sum_d var_batch(y_d, biased) + 1e-6) + l1 * mean_rows sum_f |z_f|`."""
    residual = residual_term("record", y, [y_hat])
    with torch.autocast(y.device.type, enabled=False):
        sparsity = z.sum(dtype=torch.float32) / len(z)  # z >= 0, so |z| = z
        total = residual if l1 == 0 else residual + l1 * sparsity
    return Loss(total, residual, sparsity)
