"""Chooses, for every label, the column that tells it best on one set of rows, and scores it on another."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from analyze.scoring.matrices import ScoreMatrix
from analyze.truth.auroc import auroc

MIN_ROWS = 3
"""A label with fewer positive or negative rows than this in either half is not judged."""

Columns: TypeAlias = Float[np.ndarray, "row column"] | sparse.csr_array


@dataclass(frozen=True)
class Choice:
    """The best column of every label; NaN in `selection` and `scored` where a label cannot be judged."""

    column: Int[np.ndarray, " label"]
    selection: Float[np.ndarray, " label"]
    """AUROC on the rows it was chosen on"""
    scored: Float[np.ndarray, " label"]
    """AUROC on the other rows"""


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
    found = auroc(values[choose], shown[choose])
    strength = np.maximum(found, 1 - found) if sign_free else found
    best = np.argmax(np.nan_to_num(strength, nan=-1), axis=1)
    label = np.arange(len(best))
    scored = auroc_of(values, shown, ~choose, best)
    if sign_free:
        scored = np.where(found[label, best] < 0.5, 1 - scored, scored)
    return only(Choice(best, strength[label, best], scored), judged(shown, choose))


def auroc_of(
    values: Columns,
    shown: Bool[np.ndarray, "row label"],
    rows: Bool[np.ndarray, " row"],
    column: Int[np.ndarray, " label"],
) -> Float[np.ndarray, " label"]:
    """AUROC of one given column for each label, over the given rows."""
    unique, place = np.unique(column, return_inverse=True)
    return auroc(values[rows][:, unique], shown[rows])[np.arange(len(column)), place]


def choose_features(
    matrix: ScoreMatrix,
    images: Int[np.ndarray, " row"],
    shown: Bool[np.ndarray, "row label"],
    choose: Bool[np.ndarray, " row"],
) -> Choice:
    """`choose_columns` over a score matrix, block by block of features; `images` are the matrix rows that take part."""
    best: Choice | None = None
    for block in matrix.blocks():
        found = choose_columns(matrix.scores(block)[images], shown, choose)
        found = Choice(found.column + block.start, found.selection, found.scored)
        best = found if best is None else _better(best, found)
    assert best is not None
    return best


def _better(old: Choice, new: Choice) -> Choice:
    take = new.selection > old.selection
    return Choice(
        *(np.where(take, getattr(new, name), getattr(old, name)) for name in ("column", "selection", "scored"))
    )


def only(choice: Choice, judged: Bool[np.ndarray, " label"]) -> Choice:
    """The choice with NaN for labels that are not judged."""
    return Choice(choice.column, np.where(judged, choice.selection, np.nan), np.where(judged, choice.scored, np.nan))
