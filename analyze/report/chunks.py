"""The files of examples: some dozens of features each, named as SAEDashboard and Neuronpedia name what they have in common.

`data/features/DICTIONARY/N.js` holds what no step changes: similar features, the profile over the steps.
`data/examples/DICTIONARY/step.K/N.js` holds the figures, the histogram and the examples of one step.

`frac_nonzero` (share of tokens), `maxActApprox`, `freq_hist_data_bar_heights`, `activations` with `maxValue` and
`maxValueTokenIndex`, `topkCosSimIndices` and `topkCosSimValues` are theirs.  A file is columns, one entry a feature, half the bytes
of a list of records; the page's export button gives the record of a feature, with `feature_index`, `freq_hist_data_bar_values`, and
the `tokens` and `values` of each activation, whose heat stands packed here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from analyze.report.columns import FeatureColumns
from analyze.report.packing import rounded
from analyze.report.spool import Spool

CHUNK = 64
"""features in a file"""


NAMES = {"density": "frac_nonzero", "max": "maxActApprox"}
"""figures of ours that have a name elsewhere"""


@dataclass(frozen=True)
class Similar:
    """The features with the nearest decoder directions."""

    index: Int[np.ndarray, "feature similar"]
    cosine: Float[np.ndarray, "feature similar"]


@dataclass(frozen=True)
class Profile:
    """How a feature changes over the steps."""

    density: Float[np.ndarray, "step feature"]
    mean_active: Float[np.ndarray, "step feature"]


def chunk_slices(n_features: int) -> list[slice]:
    """The features of each file."""
    return [slice(start, min(start + CHUNK, n_features)) for start in range(0, n_features, CHUNK)]


def feature_chunk(features: slice, similar: Similar | None, profile: Profile) -> dict[str, Any]:
    """What no step changes: a column a name, a row a feature."""
    value: dict[str, Any] = {
        "first": features.start,
        "profile": {
            "density": _rows(profile.density[:, features].T),
            "mean_active": _rows(profile.mean_active[:, features].T),
        },
    }
    if similar is not None:
        value["topkCosSimIndices"] = similar.index[features].tolist()
        value["topkCosSimValues"] = _rows(similar.cosine[features])
    return value


def examples_chunk(
    features: slice,
    columns: FeatureColumns,
    coherence: Float[np.ndarray, " feature"] | None,
    heat: tuple[Spool, Mapping[int, int]] | None,
    judged: Mapping[int, Sequence[dict[str, Any]]],
) -> dict[str, Any]:
    """What one step says of its features; `heat`: the spool, and the row in it of each feature that has heat."""
    numbers = {NAMES.get(name, name): _row(each[features]) for name, each in columns.numbers.items()}
    value: dict[str, Any] = {
        "first": features.start,
        "figures": {**numbers, "images_active": columns.images_active[features].tolist()},
        "activations": _activations(features, columns),
    }
    if columns.histogram is not None:
        value["freq_hist_data_bar_edges"] = columns.edges
        value["freq_hist_data_bar_heights"] = [_trimmed(counts) for counts in columns.histogram[features]]
    if coherence is not None:
        value["figures"]["coherence"] = [None if np.isnan(x) else rounded(x) for x in coherence[features].tolist()]
    if columns.words:
        value["words"] = columns.words[features]
        value["word_values"] = [[rounded(score) for score in group] for group in columns.word_scores[features]]
    if columns.kinds:
        value["kinds"] = {
            kind: {name: _row(each[features]) for name, each in group.items()} for kind, group in columns.kinds.items()
        }
    if found := {str(f): list(judged[f]) for f in range(features.start, features.stop) if f in judged}:
        value["stands_for"] = found
    if heat is not None and (packed := _heat(features, columns, *heat)):
        value["heat"] = packed
    return value


def _activations(features: slice, columns: FeatureColumns) -> dict[str, list[Any]]:
    """Image, greatest value and its token of each example."""
    counts = (columns.images[features] >= 0).sum(axis=1).tolist()
    found: dict[str, list[Any]] = {}
    for name, values in (("image", columns.images), ("maxValueTokenIndex", columns.tokens)):
        found[name] = [row[:n] for row, n in zip(values[features].tolist(), counts, strict=True)]
    found["maxValue"] = [row[:n] for row, n in zip(_rows(columns.scores[features]), counts, strict=True)]
    return found


def _heat(
    features: slice, columns: FeatureColumns, spool: Spool, rows: Mapping[int, int]
) -> dict[str, list[str | None]]:
    """Of the features that have heat: for each example `PEAK LEVELS`, of a joint site twice (see `spooled`)."""
    width = columns.images.shape[1]
    return {
        str(feature): [spool.get(rows[feature], place) for place in range(width) if columns.images[feature, place] >= 0]
        for feature in range(features.start, features.stop)
        if feature in rows
    }


def _trimmed(counts: Int[np.ndarray, " bin"]) -> list[int]:
    """The first bin that is not empty, then the counts from there to the last one."""
    filled = np.flatnonzero(counts)
    return [int(filled[0]), *counts[filled[0] : filled[-1] + 1].tolist()] if len(filled) else [0]


def _row(values: Float[np.ndarray, " feature"]) -> list[float]:
    return [rounded(x) for x in values.tolist()]


def _rows(values: Float[np.ndarray, "feature column"]) -> list[list[float]]:
    return [_row(row) for row in values]
