"""What `compare` and `directions` can be told."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from analyze.compare.coactivation import Measure
from analyze.pictures.settings import MIN_IMAGES, TOP, Drawn
from analyze.settings import Inputs
from store.errors import UsageError
from store.sizes import parse_size


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Drawn):
    """Features of two sites or steps that belong together: by their directions, and by the images on which they fire."""

    of: str | None = None
    """One side, as DICTIONARY@STEP: `img_3@1`; by default every chosen dictionary and step."""
    other: Annotated[str | None, tyro.conf.arg(name="with")] = None
    """The other side: `img_5@1`; by default every chosen dictionary and step."""
    by: Measure = "correlation"
    """What ranks the matches that are drawn and printed; the table has the best by each measure."""
    matches: int = 8
    """Matches to keep of each feature and measure."""
    best: int | None = None
    """Matched pairs to draw of each comparison; by default 3, and none where more than one pair of sides is compared."""
    features: str | None = None
    """Features of --of to draw with their best match, on however few images they are active, such as `12,407`; by default the best
    matched ones."""
    top: int = TOP
    """Images on a picture: where the one feature is strongest and where the other is, half of each."""
    min_images: int = MIN_IMAGES
    """Of the best matches, those of features active on fewer images are neither drawn nor printed: what fires once fires together
    with anything."""
    memory: str = "2GB"
    """Memory for scores and products, beside the dictionaries."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.matches, self.top, self.min_images) < 1 or (self.best is not None and self.best < 0):
            raise UsageError(
                f"--matches {self.matches}, --top {self.top} and --min-images {self.min_images} must be at least 1, "
                f"and --best {self.best} not negative"
            )
        if self.other is not None and self.of is None:
            raise UsageError(f"--with {self.other} needs --of: name the other side too")
        if self.features is not None and (self.other is None or self.best is not None):
            raise UsageError("--features names features of --of: give --of and --with, and leave out --best")
        if self.features is not None and self.min_images != MIN_IMAGES:
            raise UsageError(
                f"--min-images {self.min_images} says which of the best matches are drawn, and --features names them: leave one out"
            )
        parse_size(self.memory)

    def refuse_if_nothing_is_drawn(self) -> None:
        """`UsageError` for flags that say how pictures look, where none will be drawn."""
        idle = [*self.changed_look(), *(["--top"] if self.top != TOP else [])]
        if idle:
            raise UsageError(
                f"no picture is drawn here, so {' and '.join(idle)} would change nothing: give --best 3, or name --of and --with, to "
                "have matched pairs drawn, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class DirectionsSettings(Inputs):
    """Where the decoder directions of features point: their cosines, their nearest neighbours, their projection onto a plane."""

    features: str | None = None
    """Features of the heat map of cosines, such as `12,407`; by default the best of each dictionary."""
    best: int = 32
    """How many features the heat map has when none are named."""
    neighbours: int = 8
    """Nearest features to list with each feature."""

    def __post_init__(self) -> None:
        if not 1 <= self.best <= MOST_ON_MAP or self.neighbours < 1:
            raise UsageError(
                f"--best is {self.best} and --neighbours is {self.neighbours}: draw 1 to {MOST_ON_MAP} features with at least 1 neighbour"
            )


MOST_ON_MAP = 96
"""features whose names can still be read beside a heat map"""
