"""What a reconstruction misses, in float32 and outside autocast.

record  mean_rows sum_d (y - y_hat)^2 / (sum_d var_batch(y_d, biased) + 1e-6)      the loss of record (DifFRACT)
mse     mean over all elements of (y - y_hat)^2                                    the second family's (FLUX-SAE)
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from train.recipe import LossName

EPSILON = 1e-6


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
