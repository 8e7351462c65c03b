"""The loss of record, in float32 and outside autocast."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-6


class Loss(NamedTuple):
    """Scalars: `total = residual + l1 * sparsity`."""

    total: Float[Tensor, ""]
    residual: Float[Tensor, ""]
    """squared residual over the batch's variance: the FVU of the batch"""
    sparsity: Float[Tensor, ""]
    """mean over rows of the sum of |z|"""


def loss_of_record(
    y: Float[Tensor, "row d_model"],
    y_hat: Float[Tensor, "row d_model"],
    z: Float[Tensor, "row n_features"],
    l1: float,
) -> Loss:
    """`mean_rows sum_d (y - y_hat)^2 / (sum_d var_batch(y_d, biased) + 1e-6) + l1 * mean_rows sum_f |z_f|`."""
    with torch.autocast(y.device.type, enabled=False):
        y, y_hat = y.float(), y_hat.float()
        variance = y.var(dim=0, correction=0).sum()
        residual = (y - y_hat).square().sum(dim=1).mean() / (variance + EPSILON)
        sparsity = z.sum(dtype=torch.float32) / len(z)  # z >= 0, so |z| = z
        total = residual if l1 == 0 else residual + l1 * sparsity
    return Loss(total, residual, sparsity)
