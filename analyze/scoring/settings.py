"""What `scores` and `features` can be told."""

from dataclasses import dataclass
from typing import Literal

from analyze.settings import Inputs
from store.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ScoresSettings(Inputs):
    """Score matrices and the statistics of every feature, in one pass over the store."""

    padding: bool = False
    """Count the padding tokens of the text too (FLUX has no text mask; by default only real tokens count)."""
    top: int = 16
    """How many top images to keep with each feature."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UsageError(f"--top is {self.top}: keep at least 1 top image per feature")


@dataclass(frozen=True, kw_only=True)
class FeaturesSettings(Inputs):
    """A ranking of the features, from the statistics that `scores` left."""

    best: int = 10
    """How many features of each site to list."""
    rank: Literal["interest", "max", "share"] = "interest"
    """Rank by interest (z-score of the mean activation, times root of the share of images), max, or share of images."""

    def __post_init__(self) -> None:
        if self.best < 1:
            raise UsageError(f"--best is {self.best}: list at least 1 feature")
