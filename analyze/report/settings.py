"""What `report` can be told."""

from dataclasses import dataclass

from analyze.settings import Inputs
from store.errors import UsageError


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
