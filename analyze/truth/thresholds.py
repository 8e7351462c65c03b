"""Best F1: the threshold that makes a column the best yes or no of a label on some rows, and how it does on the others."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Cut(NamedTuple):
    """A threshold for every label, in the column's own units, and what it reaches."""

    threshold: Float[np.ndarray, " label"]
    f1: Float[np.ndarray, " label"]


def best_f1(
    values: Float[np.ndarray, "row label"], shown: Bool[np.ndarray, "row label"], choose: Bool[np.ndarray, " row"]
) -> Cut:
    """The threshold of highest F1 on the rows `choose`, and its F1 on the others; column k of `values` tells label k.

    Yes means at or above the threshold, which lies midway between two values that occur; of equals the highest is taken.
    """
    return f1_of(values[~choose], shown[~choose], best_threshold(values[choose], shown[choose]))


def best_threshold(
    values: Float[np.ndarray, "row label"], shown: Bool[np.ndarray, "row label"]
) -> Float[np.ndarray, " label"]:
    """The threshold of highest F1 on these rows."""
    order = np.argsort(-values, axis=0, kind="stable")
    value = np.take_along_axis(values, order, axis=0).astype(np.float64)
    hits = np.cumsum(np.take_along_axis(shown, order, axis=0), axis=0)
    said = np.arange(1, len(values) + 1)[:, None]
    f1 = 2 * hits / (said + hits[-1])
    below = np.concatenate([value[1:], value[-1:]])
    f1[:-1][value[:-1] == below[:-1]] = -1  # rows of equal value are told alike
    at, label = np.argmax(f1, axis=0), np.arange(values.shape[1])
    return np.asarray((value[at, label] + below[at, label]) / 2)


def f1_of(
    values: Float[np.ndarray, "row label"], shown: Bool[np.ndarray, "row label"], threshold: Float[np.ndarray, " label"]
) -> Cut:
    """What given thresholds reach on these rows; 0 where nothing is said and nothing is there."""
    said = values >= threshold
    hits, both = (said & shown).sum(axis=0), said.sum(axis=0) + shown.sum(axis=0)
    return Cut(threshold, 2 * hits / np.maximum(both, 1))
