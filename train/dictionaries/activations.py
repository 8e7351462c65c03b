"""What becomes of pre-activations: which features of a row are kept.

    relu       z = max(p, 0)
    topk       of relu, the k greatest of each row                                            Gao et al. 2024
    batchtopk  training: of relu, the k * rows greatest of the batch; inference: those above a stored
               threshold, the running mean of the least activation kept in training           Bussmann et al. 2024
    jumprelu   z = p where p > threshold_f, else 0; a threshold a feature, learned            Rajamanoharan et al. 2024

These are the dense forms, each a matrix of (row, n_features); `train.learning.kernels` has those that pay at large widths.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def keep_top(z: Float[Tensor, "row n_features"], k: int) -> Float[Tensor, "row n_features"]:
    """`z` with all but the k greatest entries of each row set to zero."""
    top = torch.topk(z, k, dim=-1, sorted=False)
    return torch.zeros_like(z).scatter(-1, top.indices, top.values)


def keep_top_of_batch(z: Float[Tensor, "row n_features"], k: int) -> Float[Tensor, "row n_features"]:
    """`z` with all but its `k * rows` greatest entries set to zero, whichever rows they stand in."""
    flat = z.flatten()
    top = torch.topk(flat, k * len(z), sorted=False)
    return torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(z)


def jump_relu(
    pre: Float[Tensor, "row n_features"], threshold: Float[Tensor, " n_features"], bandwidth: float
) -> tuple[Float[Tensor, "row n_features"], Float[Tensor, ""]]:
    """`z = p H(p - threshold)` and the mean number of active features a row, both with the paper's pseudo-gradients.

    The jump hides the threshold from the gradient, so a rectangle of width `bandwidth` around it stands in for the
    derivative of the step H (Rajamanoharan et al. 2024, equations 11 and 12):

        dz/dthreshold = -threshold / bandwidth   where |p - threshold| < bandwidth / 2, else 0
        dH/dthreshold =         -1 / bandwidth   there,                                 else 0

    z has the dtype of `pre`; it is compared with the threshold, and sums are taken, in the threshold's (float32).
    """
    return _JumpReLU.apply(pre, threshold, bandwidth)  # type: ignore[no-any-return, no-untyped-call]


class _JumpReLU(torch.autograd.Function):
    """Both outputs of `jump_relu` from one pass over the pre-activations, which are all that is kept for backward."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        active = pre > threshold
        return pre * active, active.sum().to(threshold.dtype) / len(pre)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_z, grad_l0 = grads
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        into_step = grad_z * threshold + grad_l0 / len(pre)
        grad_threshold = -(into_step * near).sum(dim=0) / ctx.bandwidth
        return grad_z * (pre > threshold), grad_threshold.to(threshold.dtype), None
