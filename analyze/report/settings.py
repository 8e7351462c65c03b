"""What `report` can be told."""

from dataclasses import dataclass
from pathlib import Path

from analyze.settings import Inputs
from store.errors import UsageError

SMALLEST_PICTURE = 32


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Inputs):
    """The report: a folder of static files that opens from disk, or from any web server."""

    title: str = "What the features see"
    """Headline of the report."""
    best: int = 6
    """Features of each dictionary that the findings are chosen from; they always have heat."""
    top: int = 8
    """Images shown with each feature, with different prompts."""
    heat_features: int | None = None
    """Features of each dictionary and step whose images get heat, the most interesting first; by default all where they are few (20,000
    over all dictionaries and steps), else 250."""
    picture_side: int = 256
    """Pixels of the longer side of a picture; larger ones are scaled down."""
    similar: int = 8
    """Similar features listed with each feature."""
    graphs: tuple[Path, ...] = ()
    """Attribution graphs to show with the features: what `analyze graph --out` was told, one or several."""
    steering: tuple[Path, ...] = ()
    """Steering to show on a page of its own: what `analyze steer` or `analyze guided` was told with --out, one or several."""
    faithfulness: Path | None = None
    """Faithfulness to show on that page: what `analyze faithfulness` was told with --out."""
    plan: bool = False
    """Print files, bytes and time, and write nothing."""

    def __post_init__(self) -> None:
        if self.best < 1 or self.top < 1:
            raise UsageError(f"--best is {self.best} and --top is {self.top}: show at least 1 feature with 1 image")
        if self.heat_features is not None and self.heat_features < 0:
            raise UsageError(f"--heat-features is {self.heat_features}: say 0 for none")
        if self.picture_side < SMALLEST_PICTURE:
            raise UsageError(f"--picture-side is {self.picture_side}: expected at least {SMALLEST_PICTURE} pixels")
        if self.similar < 0:
            raise UsageError(f"--similar is {self.similar}: say 0 for none")
