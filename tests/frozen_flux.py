"""tiny-flux with attention patterns and norms frozen to those of row 0 of a batch: the linear model that attribution graphs are of.

For tests alone: the program never touches the model so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers.models.transformers.transformer_flux as flux
import torch
from torch import Tensor, nn


@contextmanager
def frozen(patterns: bool = True, norms: bool = True) -> Iterator[None]:
    """Inside, every row of a batch has the attention patterns and the deviations of row 0; means stay its own."""
    attend: Any = flux.dispatch_attention_fn  # type: ignore[attr-defined]
    normalise = nn.LayerNorm.forward

    def attend_as_row_0(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        found: Tensor = attend(query[:1].expand_as(query), key[:1].expand_as(key), value, **options)
        return found

    def normalise_as_row_0(self: nn.LayerNorm, values: Tensor) -> Tensor:
        if self.elementwise_affine:  # of the text encoders
            return normalise(self, values)
        deviation = torch.rsqrt(values[:1].var(-1, unbiased=False, keepdim=True) + self.eps)
        return (values - values.mean(-1, keepdim=True)) * deviation

    if patterns:
        flux.dispatch_attention_fn = attend_as_row_0  # type: ignore[attr-defined]
    if norms:
        nn.LayerNorm.forward = normalise_as_row_0  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        flux.dispatch_attention_fn = attend  # type: ignore[attr-defined]
        nn.LayerNorm.forward = normalise  # type: ignore[method-assign]
