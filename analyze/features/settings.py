"""What `features` and `coherence` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from analyze.scoring.statistics import CATEGORIES
from analyze.settings import Inputs
from store.errors import UsageError

Rank = Literal["interest", "max", "density", "share", "coherence"]


@dataclass(frozen=True, kw_only=True)
class FeaturesSettings(Inputs):
    """A ranking of the features, from the statistics that `scores` left."""

    best: int = 10
    """How many features of each dictionary and step to list."""
    rank: Rank = "interest"
    """Rank by interest (z-score of the mean activation, times root of the share of images), max, density (share of rows), share (of
    images), or coherence (computed by `analyze coherence`)."""
    category: str = "all"
    """Only features of these categories by the share of rows they are active on: dead (< 0.0001), rare (< 0.01), common (< 0.1),
    very-common; comma-separated. Features active nowhere are listed only where `dead` is asked for."""
    image_category: str = "all"
    """The same by the share of images."""
    min_density: float | None = None
    """Only features active on at least this share of the rows."""
    max_density: float | None = None
    """Only features active on at most this share of the rows."""
    examples: int | None = None
    """How many of its best images to name with each feature, at most one a prompt; by default 6, or as many as the analysis keeps."""
    unique_examples: bool = False
    """Name no image with two features of a dictionary and step: the higher ranked feature has it, and one that is left with fewer than
    --examples is not listed."""
    csv: Path | None = None
    """Also write the list as CSV; lists stand in it as words."""
    parquet: Path | None = None
    """Also write the list as Parquet, with every column."""

    def __post_init__(self) -> None:
        if self.best < 1:
            raise UsageError(f"--best is {self.best}: list at least 1 feature")
        if self.examples is not None and self.examples < 1:
            raise UsageError(f"--examples is {self.examples}: name at least 1 image with each feature")
        for name, value in (("min", self.min_density), ("max", self.max_density)):
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"--{name}-density is {value}: a share of rows lies between 0 and 1")
        if self.min_density is not None and self.max_density is not None and self.min_density > self.max_density:
            raise UsageError(
                f"--min-density {self.min_density} is above --max-density {self.max_density}: no feature is between"
            )
        parse_categories(self.category, "--category")
        parse_categories(self.image_category, "--image-category")


@dataclass(frozen=True, kw_only=True)
class CoherenceSettings(Inputs):
    """How much alike the best pictures of each feature are: the mean cosine between their image embeddings."""

    clip: str | None = None
    """The CLIP model that embeds the pictures: a folder, or an id of the Hugging Face hub such as openai/clip-vit-base-patch32. Default:
    tiny-flux's own for pictures of tiny-flux; other pictures need one to be named."""
    embeddings: str | None = None
    """Embeddings that you already have instead: FILE.npy or FILE.safetensors[#KEY], (image, dim) in the order of the images."""
    top_m: int = 10
    """How many of a feature's best images are compared, at most one a prompt."""
    device: str | None = None
    """Where the CLIP model runs: cpu, cuda or cuda:N; default: cuda where there is one."""

    def __post_init__(self) -> None:
        if self.top_m < 2:
            raise UsageError(f"--top-m is {self.top_m}: it takes 2 images to be alike")
        if self.clip is not None and self.embeddings is not None:
            raise UsageError("--clip and --embeddings both say where the embeddings come from: leave one of them out")


def parse_categories(text: str, flag: str) -> tuple[str, ...]:
    """The categories that `rare,very-common` names, all of them for `all`; `UsageError` for anything else."""
    if text.strip() == "all":
        return CATEGORIES
    found = tuple(" ".join(word.replace("-", " ").split()) for word in text.split(","))
    if odd := [word for word in found if word not in CATEGORIES]:
        raise UsageError(f"{flag} {text}: {odd[0]!r} is no category; there are dead, rare, common, very-common and all")
    return tuple(category for category in CATEGORIES if category in found)
