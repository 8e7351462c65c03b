"""NumPy arrays as torch tensors, bfloat16 included."""

import ml_dtypes
import numpy as np
import torch
from torch import Tensor


def to_torch(values: np.ndarray) -> Tensor:
    """`values` as a tensor of the same dtype and shape, sharing memory where NumPy lets it be written.

    NumPy has no bfloat16 of its own: `ml_dtypes.bfloat16` passes through as 16-bit integers.  A
    read-only array (a memory map) is copied, since torch cannot mark a tensor as read-only.
    """
    if not values.flags.writeable:
        values = values.copy()
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
