"""Chooses, for every label, the column that tells it best on one set of rows, and scores it on another."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from analyze.truth.auroc import auroc
from analyze.truth.thresholds import best_f1

MIN_ROWS = 3
"""A label with fewer positive or negative rows than this in either half is not judged."""

Columns: TypeAlias = Float[np.ndarray, "row column"] | sparse.csr_array


@dataclass(frozen=True)
class Choice:
    """The best column of every label; NaN in its figures where a label cannot be judged."""

    column: Int[np.ndarray, " label"]
    selection: Float[np.ndarray, " label"]
    """AUROC on the rows it was chosen on"""
    scored: Float[np.ndarray, " label"]
    """AUROC on the other rows"""
    threshold: Float[np.ndarray, " label"]
    """of highest F1 on the rows it was chosen on; of the column times -1 where it stands for a label by its low values"""
    f1: Float[np.ndarray, " label"]
    """of that threshold on the other rows"""

    def put(self, labels: Int[np.ndarray, " chosen"], found: "Choice") -> None:
        """Write what was found for some labels into this choice for all."""
        for field in fields(self):
            getattr(self, field.name)[labels] = getattr(found, field.name)

    def moved(self, by: int) -> "Choice":
        """The choice with columns counted from an earlier one."""
        return Choice(self.column + by, self.selection, self.scored, self.threshold, self.f1)


def empty_choice(count: int) -> Choice:
    """Nothing judged yet, for `count` labels."""
    return Choice(np.zeros(count, np.int64), *(np.full(count, np.nan) for _ in range(4)))


def judged(shown: Bool[np.ndarray, "row label"], choose: Bool[np.ndarray, " row"]) -> Bool[np.ndarray, " label"]:
    """Which labels have enough rows of both kinds in both halves."""
    enough = np.ones(shown.shape[1], bool)
    for half in (shown[choose], shown[~choose]):
        present = half.sum(axis=0)
        enough &= (present >= MIN_ROWS) & (len(half) - present >= MIN_ROWS)
    return enough


def choose_columns(
    values: Columns, shown: Bool[np.ndarray, "row label"], choose: Bool[np.ndarray, " row"], sign_free: bool = False
) -> Choice:
    """The column of highest AUROC on the rows `choose`, scored on the others; `sign_free` takes a low AUROC for a high one of -x."""
    enough = judged(shown, choose)
    result = empty_choice(shown.shape[1])
    if enough.any():  # AUROC and F1 of halves without rows would be nothing
        result.put(np.flatnonzero(enough), _chosen(values, shown[:, enough], choose, sign_free))
    return result


def _chosen(
    values: Columns, shown: Bool[np.ndarray, "row label"], choose: Bool[np.ndarray, " row"], sign_free: bool
) -> Choice:
    found = auroc(values[choose], shown[choose])
    strength = np.maximum(found, 1 - found) if sign_free else found
    best = np.argmax(strength, axis=1)
    label = np.arange(len(best))
    own = columns_of(values, best)
    if sign_free:
        own = np.where(found[label, best] < 0.5, -own, own)
    cut = best_f1(own, shown, choose)
    return Choice(best, strength[label, best], diagonal_auroc(own[~choose], shown[~choose]), *cut)


def columns_of(values: Columns, column: Int[np.ndarray, " label"]) -> Float[np.ndarray, "row label"]:
    """The given column for each label, dense."""
    own = values[:, column]
    return own.toarray() if isinstance(own, sparse.sparray) else np.asarray(own)


def diagonal_auroc(
    values: Float[np.ndarray, "row label"], shown: Bool[np.ndarray, "row label"]
) -> Float[np.ndarray, " label"]:
    """AUROC of column k for label k."""
    return np.diagonal(auroc(values, shown)).copy()


def best_of(choices: Iterable[Choice]) -> Choice:
    """The best for every label of choices among different columns, the first of equals."""
    best: Choice | None = None
    for found in choices:
        best = found if best is None else _better(best, found)
    assert best is not None
    return best


def _better(old: Choice, new: Choice) -> Choice:
    take = (new.selection > old.selection) | np.isnan(old.selection)
    return Choice(*(np.where(take, getattr(new, f.name), getattr(old, f.name)) for f in fields(Choice)))


def only(choice: Choice, judged: Bool[np.ndarray, " label"]) -> Choice:
    """The choice with NaN for labels that are not judged."""
    figures = (getattr(choice, field.name) for field in fields(Choice)[1:])
    return Choice(choice.column, *(np.where(judged, values, np.nan) for values in figures))
