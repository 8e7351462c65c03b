"""What a model takes in memory while it takes a step and while it is measured, in bytes.

Weights, moments and gradients are counted.  What else a step holds goes with the entries of the (row, n_features) matrix, and
with the way that `train.learning.forward` goes: so many bytes an entry, found as peaks of resident memory on a CPU (torch 2.13,
4,096 rows of 8,192 features and 1,024 of 12,288).  The dense ways hold the matrix several times over, and sums of booleans
take 8 bytes an entry for a moment.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from store.shards import Pack
from train.dictionaries.checkpoint import progress_bytes
from train.dictionaries.dictionary import build
from train.learning.forward import pays
from train.learning.kernels import BLOCK_BYTES
from train.models import Model
from train.results.evaluate import ENTRIES_AT_ONCE, Cells
from train.rows.reading import ROWS_AT_ONCE

PYTHON = 4 * 10**8
"""of Python and its libraries, beside what is planned here"""
STEP = {
    "fused relu": (4.2, 2.6), "sparse topk": (0.0, 0.0), "sparse batchtopk": (5.7, 3.8),
    "relu": (17.0, 13.5), "topk": (21.0, 16.0), "batchtopk": (24.0, 20.0), "jumprelu": (22.0, 17.0),
}  # fmt: skip
"""bytes an entry while a batch goes forward and back, in float32 and under bfloat16 autocast"""
MEASURING = {"relu": 8.0, "topk": 16.0, "batchtopk": 17.0, "jumprelu": 13.0}
"""bytes an entry of a block of held-out rows"""
CHANNEL, CHANNEL_MEASURED = 56, 36
"""bytes of each channel of a row: input, target, scale and shift, reconstruction, their gradients; float64 where rows are measured"""
KEPT = 12
"""bytes of each of the k entries that a row keeps: value and place"""


@dataclass(frozen=True)
class Need:
    """What one model takes, in bytes."""

    parameters: int
    """how many, not bytes"""
    weights: int
    lasting: int
    """weights and moments, while its group is trained"""
    passing: int
    """gradients and activations, while it takes a step"""
    measuring: int
    """a block of held-out rows"""
    checkpoint: int

    @classmethod
    def of(cls, model: Model, batch: int, held_out: int, device: torch.device) -> "Need":
        """Of a model with so many rows a step on one device; `held_out`: rows of the largest shard that it is measured on."""
        config, narrow = model.config, model.recipe.autocast == "bfloat16"
        dictionary = build(config, empty=True)
        parameters = sum(value.numel() for value in dictionary.parameters())
        state, matrix = progress_bytes(dictionary), 4 * config.d_model * config.n_features
        rows = batch * (CHANNEL * config.d_model + KEPT * (config.k or 0)) + BLOCK_BYTES
        copies = matrix if narrow else 0  # both matrices in bfloat16
        entries = round(bytes_an_entry(model, batch, device) * batch * config.n_features)
        held, changing = entries + rows, 4 * parameters + matrix  # gradients, and columns that get unit norm
        dense = way_of(model, batch, device) in MEASURING  # what it holds is gone before all gradients are there
        passing = copies + (max(held, changing) if dense else held + changing)
        at_once = min(ROWS_AT_ONCE, held_out)
        block = round(MEASURING[config.activation] * min(ENTRIES_AT_ONCE, at_once * config.n_features))
        block += at_once * CHANNEL_MEASURED * config.d_model
        return cls(parameters, state // 3, state, passing, block, state)


def bytes_an_entry(model: Model, batch: int, device: torch.device) -> float:
    """What a step of a model holds at its height for each entry of its (row, n_features) matrix."""
    recipe, narrow = model.recipe, model.recipe.autocast == "bfloat16"
    found = STEP[way_of(model, batch, device)][narrow]
    if recipe.dead == "auxk":  # four matrices, where a quarter of the features is dead
        return found + (2.0 if narrow else 4.0)
    if recipe.dead != "none":  # resampling looks at the batch in float32, beside what the step keeps for the next
        return max(found, min(found, 4.0) + MEASURING[model.config.activation])
    return found


def way_of(model: Model, batch: int, device: torch.device) -> str:
    """How a model goes forward while it is trained: a key of `STEP`."""
    config = model.config
    if config.nested:
        return config.activation
    if config.activation == "relu":
        return "fused relu"
    dtype = torch.bfloat16 if model.recipe.autocast == "bfloat16" else torch.float32
    return f"sparse {config.activation}" if pays(config, batch, device, dtype) else config.activation


def counts_of(models: Sequence[Model], val: Pack) -> int:
    """Bytes of the counts of active features while models of a site are measured together."""
    return 8 * len(Cells(val, models[0].site)) * sum(model.config.n_features for model in models)
