"""Peaks: the greatest activation of each feature in an analysis, what strengths in peaks count in."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from analyze.inputs import Subject
from analyze.scoring.matrices import FEATURES, ScoreMatrix
from analyze.steering.feature_changes import Key
from store.errors import MismatchError, UsageError


def read_peaks(out: Path, subjects: Iterable[Subject]) -> dict[Key, np.ndarray]:
    """(feature,) float32 of each dictionary that `out` has scores of: the maximum over all images, tokens and steps there.

    A dictionary without scores is left out.  `UsageError` for a folder that is no analysis or has none of them;
    `MismatchError` for scores of another dictionary under its name.
    """
    if not (out / "run.json").is_file():
        raise UsageError(f"{out} holds no analysis: give the --out of python -m analyze scores")
    found: dict[Key, np.ndarray] = {}
    for subject in subjects:
        for folder in sorted((out / subject.name).glob("step.*")):
            scored = ScoreMatrix.open(folder).attributes.get("dictionary")
            if scored != subject.identity:
                raise MismatchError(
                    f"{folder} holds scores of another dictionary than {subject.outline.name}: {str(scored)[:16]}…, expected "
                    f"{subject.identity[:16]}…: give the analysis of these dictionaries"
                )
            peak = pq.read_table(folder / FEATURES, columns=["max"])["max"].to_numpy().astype(np.float32)
            key = subject.site, subject.outline.config.kind
            found[key] = np.fmax(found.get(key, peak), peak)
    if not found:
        raise UsageError(
            f"{out} has scores of none of these dictionaries: run python -m analyze scores over them first"
        )
    return found
