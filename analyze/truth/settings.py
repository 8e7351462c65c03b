"""What `truth` can be told."""

from dataclasses import dataclass
from pathlib import Path

from analyze.settings import Images, Inputs
from store.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TruthSettings(Inputs):
    """For each attribute, the feature that stands for it; the store is one of `builtin:shapes`, or --attributes says what is true."""

    attributes: Path | None = None
    """Your own truth: CSV with image and one column an attribute (1, 0, or empty: not known), or image,attribute,value.

    A column group keeps images together that must not stand in different halves (needed where the store has no prompts)."""
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
        if self.attributes is not None and self.any_picture:
            raise UsageError(
                "--any-picture is about pictures of builtin:shapes: with --attributes your file alone says what is true"
            )
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}: seeds start at 0")

    @property
    def title(self) -> str:
        """What the files in OUT are called: `truth`, or `attributes` for a truth of one's own."""
        return "truth" if self.attributes is None else "attributes"
