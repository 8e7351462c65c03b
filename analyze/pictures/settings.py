"""What the commands that draw can be told."""

from dataclasses import dataclass

from analyze.settings import Inputs
from store.errors import UsageError


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
