"""The best of each row over tiles of a matrix that is too large to be held: values and their columns in one number each.

A value in [-1, 1] is rounded to a multiple of 2**-20 (about 1e-6, what float32 products over thousands of terms are good for) and
packed over its column into an int64.  The greatest of these numbers are the greatest values, and of equal values those of the
lower columns: the order is total, so it does not depend on the tiles.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

QUANTUM = 2.0**20
COLUMN_BITS = 24
COLUMNS = 1 << COLUMN_BITS
"""columns that can be told apart: no dictionary is as wide"""
ABSENT = -(2.0**30)
"""what stands for -inf and NaN among whole numbers: far below those of values"""
BELOW = -(1 << 52)
"""keys below this hold nothing"""
NOTHING = -(1 << 62)
"""a key that holds nothing"""


def rounded(values: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    """The values in units of 2**-20, whole numbers that float32 holds exactly; -inf and NaN are absent."""
    return (values * QUANTUM).round_().nan_to_num_(nan=ABSENT, neginf=ABSENT)


def packed(whole: Float[Tensor, "..."], columns: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The keys of rounded values and of the columns that they stand in (broadcast against them)."""
    return whole.to(torch.int64).mul_(COLUMNS).add_(COLUMNS - 1 - columns)


def columns_of(keys: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The columns that were packed; -1 where there is nothing."""
    return torch.where(keys < BELOW, -1, COLUMNS - 1 - keys.remainder(COLUMNS))


def values_of(keys: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The rounded values that were packed, float32; NaN where there is nothing."""
    values = (torch.div(keys, COLUMNS, rounding_mode="floor").double() / QUANTUM).float()
    return torch.where(keys < BELOW, torch.nan, values)


def best_first(keys: Int[Tensor, "row column"], most: int) -> tuple[Int[Tensor, "row best"], Int[Tensor, "row best"]]:
    """The `most` greatest of each row in falling order (fewer where there are fewer columns), and where they stood."""
    found = torch.topk(keys, min(most, keys.shape[1]), dim=1, sorted=True)
    return found.values, found.indices
