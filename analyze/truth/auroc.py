"""AUROC of many columns against many labels at once, exact, ties averaged; fast where most values are zero.

AUROC = (R - P(P + 1)/2) / (P N), where R is the sum of the ranks of the P positive rows among all P + N rows
(Mann-Whitney).  Feature activations are mostly zero and all zeros of a column share one rank, so only the others are sorted:

1. Order the non-zero entries by (column, value): one sort of 64-bit keys, the column above the value's bits.
2. Give each its midrank within its column: negatives first, then the block of zeros, then positives.
3. Sum ranks over the positive rows of every label: one sparse product; zeros add count x their midrank.

Where most values are not zero (raw channels), whole columns are sorted instead, some of them at a time, and the product is dense.
"""

from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float
from scipy import sparse

from store.errors import NonFiniteError

MOSTLY = 0.5
"""share of values that are not zero from which columns are sorted whole"""

DENSE_VALUES = 2**20
"""how many values are ranked at a time where whole columns are sorted"""

Values: TypeAlias = Float[np.ndarray, "row column"] | sparse.csr_array


def auroc(values: Values, positive: Bool[np.ndarray, "row label"]) -> Float[np.ndarray, "label column"]:
    """Chance that a positive row exceeds another in each column, ties counting half; NaN where a label has no rows of one kind.

    `values` are float32, dense or sparse.  Memory beside them: some 80 bytes a non-zero entry, or 60 MB where most are.
    `NonFiniteError` for a NaN or an infinity.
    """
    labels = positive.astype(np.float64).T
    positives = positive.sum(axis=0, dtype=np.float64)[:, None]
    negatives = len(positive) - positives
    if isinstance(values, np.ndarray) and np.count_nonzero(values) > MOSTLY * values.size:
        size = max(1, DENSE_VALUES // max(len(values), 1))
        blocks = [values[:, start : start + size] for start in range(0, values.shape[1], size)]
        rank_sum = np.concatenate([labels @ _dense_midranks(block) for block in blocks], axis=1)
    else:
        rank_sum = _sparse_rank_sum(labels, positives, sparse.coo_array(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        result = (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
    result[(positives * negatives)[:, 0] == 0] = np.nan
    return np.asarray(result)


def _dense_midranks(values: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row column"]:
    """The 1-based midrank of every value within its column."""
    _refuse_non_finite(values)
    by_column = np.ascontiguousarray(values.T)
    order = np.argsort(by_column, axis=1)  # equal values share a rank, so their order does not matter
    ordered = np.take_along_axis(by_column, order, axis=1)
    place = np.broadcast_to(np.arange(ordered.shape[1]), ordered.shape)
    new = np.concatenate([np.ones_like(ordered[:, :1], bool), ordered[:, 1:] != ordered[:, :-1]], axis=1)
    first = np.maximum.accumulate(np.where(new, place, 0), axis=1)
    ends = np.concatenate([new[:, 1:], np.ones_like(new[:, :1])], axis=1)
    last = np.minimum.accumulate(np.where(ends, place, ordered.shape[1])[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty(ordered.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, axis=1)
    return ranks.T


def _sparse_rank_sum(
    labels: Float[np.ndarray, "label row"], positives: Float[np.ndarray, "label 1"], entries: sparse.coo_array
) -> Float[np.ndarray, "label column"]:
    ranks, zero_rank = _midranks(entries)
    stored = ranks.copy()
    stored.data = np.ones_like(stored.data)
    zeros = positives - labels @ stored
    return np.asarray(labels @ ranks + zeros * zero_rank[None, :])


def _refuse_non_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise NonFiniteError("a NaN or an infinity among the values to be ranked: an AUROC of those means nothing")


def _midranks(entries: sparse.coo_array) -> tuple[sparse.csc_array, Float[np.ndarray, " column"]]:
    """The 1-based midrank of every non-zero entry within its column, and the midrank that each column's zeros share."""
    n_rows, n_columns = entries.shape
    value = entries.data.astype(np.float32, copy=False)
    _refuse_non_finite(value)
    there = value != 0
    row, column, value = entries.coords[0][there], entries.coords[1][there], value[there]
    key = (column.astype(np.uint64) << np.uint64(32)) | _ordered_bits(value)
    order = np.argsort(key)  # equal keys share a rank, so their order does not matter
    row, column, key, negative = row[order], column[order], key[order], value[order] < 0

    counts = np.bincount(column, minlength=n_columns)
    below = np.bincount(column[negative], minlength=n_columns)
    zeros = n_rows - counts
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    first, last = _tie_bounds(key)
    rank = (first + last) / 2 + 1 - starts[column] + np.where(negative, 0, zeros[column])
    ranks = sparse.csc_array((rank, row, np.append(starts, len(key))), shape=entries.shape)
    return ranks, below + (zeros + 1) / 2


def _tie_bounds(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each place of a sorted array, the first and the last place that hold the same key."""
    if not len(key):
        return np.zeros(0), np.zeros(0)
    starts = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
    lengths = np.diff(np.append(starts, len(key)))
    return np.repeat(starts, lengths), np.repeat(starts + lengths - 1, lengths)


def _ordered_bits(value: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the float32 values: IEEE bits with the sign flipped, negatives inverted."""
    bits = value.view(np.uint32)
    flipped = np.where(bits >> np.uint32(31) == 1, ~bits, bits | np.uint32(0x80000000))
    return flipped.astype(np.uint64)
