"""What `truth` can be told."""

from dataclasses import dataclass

from analyze.settings import Images, Inputs
from store.errors import UsageError


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
