"""Dead features: how long each has been quiet, and what is done for those that are quiet too long.

They are counted whatever the recipe does for them, so that a log can say how many there are.

auxk      Gao et al. 2024: the aux_k dead features with the greatest pre-activations on a row explain what the
          living ones leave over of it
resample  Bricken et al. 2023 (Anthropic): dead features start again at rows that are explained badly
flux-sae  the same in that system ("SAEs for visual features in FLUX.1"), by its own rule
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from train.dictionaries.activations import keep_top
from train.dictionaries.dictionary import Dictionary
from train.learning.loss import residual_term


class Dead:
    """How many rows each feature has been quiet for, and how many were started again."""

    def __init__(self, n_features: int, dead_rows: int, device: torch.device) -> None:
        self.dead_rows = dead_rows
        self.quiet_rows = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.resampled = torch.zeros((), dtype=torch.int64, device=device)
        """how often a feature was started again, so far"""
        self._fired = torch.zeros(n_features, dtype=torch.int64, device=device)

    def share(self, rows: int) -> Float[Tensor, ""]:
        """Which share of the features was active on none of the last `rows` rows."""
        return (self.quiet_rows >= rows).float().mean()

    def features(self) -> Int[Tensor, " dead"]:
        """The dead features, rising: active on none of the last `dead_rows` rows."""
        return (self.quiet_rows >= self.dead_rows).nonzero().squeeze(1)

    def note(self, fired: Bool[Tensor, " n_features"]) -> None:
        """Remember, until `advance`, which features are active in this step's batch."""
        self._fired = fired.long()

    def merge(self, all_reduce: Callable[[Tensor], object]) -> None:
        """Make this step's features those of all ranks' batches."""
        all_reduce(self._fired)

    def advance(self, rows: int) -> None:
        """Count this step's rows."""
        self.quiet_rows += rows
        self.quiet_rows.masked_fill_(self._fired > 0, 0)

    def revive(self, features: Int[Tensor, " some"]) -> None:
        """Start to count again for features that were resampled."""
        self.quiet_rows[features] = 0
        self.resampled += len(features)


def auxiliary_term(
    dictionary: Dictionary,
    prepared: Float[Tensor, "row d_model"],
    missed: Float[Tensor, "row d_model"],
    dead: Int[Tensor, " dead"],
    aux_k: int,
) -> Float[Tensor, ""]:
    """How badly dead features explain what is `missed`, over its variance in the batch; zero when none is dead.

    As Gao et al. 2024: of each row the `aux_k` greatest pre-activations among the dead, after ReLU, without the decoder's
    bias; `missed` takes no gradient.  Only the dead features' rows and columns are multiplied.
    """
    if len(dead) == 0:
        return missed.new_zeros(())
    encoder, decoder = dictionary.encoder, dictionary.decoder
    z = functional.relu(functional.linear(prepared, encoder.weight[dead], encoder.bias[dead]))
    if aux_k < len(dead):
        z = keep_top(z, aux_k)
    return residual_term("record", missed, [functional.linear(z, decoder.weight[:, dead])])
