"""What each command of `python -m analyze` can be told: one frozen dataclass a command, its fields are its flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from store.errors import UsageError

Images = Literal["val", "all"]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every command reads, and where it writes."""

    store: Annotated[str | Path, tyro.conf.arg(metavar="STORE")]
    """The store whose activations are analyzed, a folder or a URL (s3://, hf://, https://)."""
    dictionaries: Path
    """Folder of dictionaries: ours (`transcoder_img_6/`), or published `.pt` files."""
    out: Path
    """Folder of the results; the commands build on one another in it."""
    sites: str = "all"
    """Sites to analyze, such as `img_0-3,txt_6`; `all`: every site that has a dictionary."""
    steps: str = "all"
    """Denoising steps to analyze, such as `0,2-3`; `all`: every step in the store."""


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


@dataclass(frozen=True, kw_only=True)
class TruthSettings(Inputs):
    """For each attribute that the prompts ask for, the feature that stands for it; needs a store of `builtin:shapes`."""

    images: Images = "val"
    """Images to judge on: `val`, those whose prompts no dictionary is trained on, or `all`."""
    any_picture: bool = False
    """Use also images whose picture was never made or does not show what its prompt says."""
    seed: int = 0
    """Seed of the two halves: features are chosen on one and scored on the other."""
    threshold: float = 0.9
    """A feature stands for an attribute from this AUROC on."""

    def __post_init__(self) -> None:
        if not 0.5 < self.threshold <= 1:
            raise UsageError(f"--threshold is {self.threshold}: an AUROC that says anything lies above 0.5 and up to 1")
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}: seeds start at 0")


@dataclass(frozen=True, kw_only=True)
class SheetSettings(Inputs):
    """Contact sheets: the top images of a feature with the heat of its activation over them, as PNG."""

    features: str | None = None
    """Features to draw, such as `12,407`; by default the best of each site and step."""
    best: int = 3
    """How many features of each site and step to draw when none are named."""
    top: int = 8
    """Images on a sheet, with different prompts."""

    def __post_init__(self) -> None:
        if self.best < 1 or self.top < 1:
            raise UsageError(f"--best is {self.best} and --top is {self.top}: draw at least 1 feature with 1 image")


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Inputs):
    """The report: one folder of HTML and pictures that opens from disk."""

    title: str = "What the features see"
    """Headline of the report."""
    best: int = 6
    """Features shown for each dictionary."""
    top: int = 6
    """Images shown with each feature, with different prompts."""

    def __post_init__(self) -> None:
        if self.best < 1 or self.top < 1:
            raise UsageError(f"--best is {self.best} and --top is {self.top}: show at least 1 feature with 1 image")


@dataclass(frozen=True, kw_only=True)
class AllSettings(Inputs):
    """Scores, then truth where the store has it, then the report."""

    padding: bool = False
    """Count the padding tokens of the text too."""
    images: Images = "val"
    """Images that the truth table is judged on: `val` or `all`."""
    any_picture: bool = False
    """Judge also on images whose picture was never made or does not show what its prompt says."""
    seed: int = 0
    """Seed of the halves of the truth table."""
    title: str = "What the features see"
    """Headline of the report."""
