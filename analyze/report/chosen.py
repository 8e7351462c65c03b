"""What a report holds of each dictionary and step: its feature table as columns, coherence, and which features get heat."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Float, Int

from analyze.features.coherence import coherence_table
from analyze.inputs import Analysis, Subject
from analyze.report.columns import FeatureColumns
from analyze.report.findings import Spotlight
from analyze.report.settings import ReportSettings

FEW = 20_000
"""alive features over all dictionaries and steps up to which all get heat by default"""
MANY = 250
"""features of each dictionary and step that get heat by default where there are more"""


@dataclass(frozen=True)
class Round:
    """One dictionary at one step."""

    subject: Subject
    step: int
    columns: FeatureColumns
    coherence: Float[np.ndarray, " feature"] | None
    """NaN where a feature has too few images; None when coherence was never computed"""
    heated: Int[np.ndarray, " heated"]
    """features whose images get heat, in rising order"""

    @property
    def name(self) -> str:
        """`img_3/step.1`"""
        return f"{self.subject.name}/step.{self.step}"


def heat_limit(analysis: Analysis, settings: ReportSettings) -> int:
    """How many features of a dictionary and step get heat."""
    if settings.heat_features is not None:
        return settings.heat_features
    alive = 0
    for subject in analysis.subjects:
        for step in analysis.steps:
            alive += int(pc.sum(analysis.matrix(subject, step).features()["alive"]).as_py() or 0)
    return max((subject.n_features for subject in analysis.subjects), default=0) if alive <= FEW else MANY


def rounds(
    analysis: Analysis, subject: Subject, settings: ReportSettings, limit: int, spots: Sequence[Spotlight]
) -> Iterator[Round]:
    """The dictionary at each step, one at a time; `spots` get heat whatever the limit is, unless it is 0."""
    table = coherence_table(analysis, subject)
    for step in analysis.steps:
        columns = FeatureColumns.of(analysis.matrix(subject, step).features(), settings.top)
        coherence = None
        if table is not None:
            own = table.filter(pc.equal(table["step"], step))
            coherence = np.full(columns.n_features, np.nan)
            values = own["coherence"].to_numpy(zero_copy_only=False).astype(np.float64)
            coherence[own["feature"].to_numpy()] = values
        heated = most_interesting(columns, limit)
        if limit:
            named = [spot.feature for spot in spots if spot.step == step]
            heated = np.union1d(heated, np.asarray(named, np.int64))
        yield Round(subject, step, columns, coherence, heated)


def most_interesting(columns: FeatureColumns, most: int) -> Int[np.ndarray, " feature"]:
    """The alive features of the highest interest, at most `most`, in rising order."""
    alive = np.flatnonzero(columns.images_active > 0)
    order = np.lexsort((alive, -columns.numbers["interest"][alive]))
    return np.sort(alive[order[:most]]).astype(np.int64)
