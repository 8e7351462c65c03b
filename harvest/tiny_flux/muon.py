"""Muon: momentum whose matrix is made orthogonal before it is applied (Keller Jordan, 2024).

On the 3x3 convolutions of the VAE and the block matrices of the transformer it needs a third of AdamW's steps here;
torch's own `torch.optim.Muon` takes no convolutions.  Vectors, embeddings and first and last layers stay with AdamW.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: quintic Newton-Schulz, singular values end in [0.7, 1.2].

    `matrices` (n, rows, columns) are worked on together, which halves the time of many small ones.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; tensors of more than two dimensions are read as (first, all others)."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update with the gradients at hand."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                    momentum.lerp_(weight.grad, 1 - group["momentum"])
                    mixed = weight.grad.lerp(momentum, group["momentum"]).flatten(1)
                    alike.setdefault(mixed.shape, []).append((weight, mixed))
            for (rows, columns), pairs in alike.items():
                scale = max(1.0, rows / columns) ** 0.5
                for (weight, _), update in zip(pairs, orthogonal(torch.stack([m for _, m in pairs])), strict=True):
                    weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)
