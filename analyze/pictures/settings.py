"""What the commands that draw can be told."""

from dataclasses import dataclass

from analyze.pictures.overlay import CLIP_PERCENTILE, Look
from analyze.settings import Inputs
from store.errors import UsageError

SMALLEST_SIDE = 16
TOP = 8
MIN_IMAGES = 8
"""on fewer images a feature says too little to be matched with another"""


@dataclass(frozen=True, kw_only=True)
class Drawn(Inputs):
    """How heat is laid over pictures."""

    patches: bool = False
    """Draw the heat token by token; by default it is smoothed."""
    clip_percentile: float = CLIP_PERCENTILE
    """The percentile of a feature's positive heat that is drawn hottest; all above it looks the same, 100 clips nothing."""
    side: int | None = None
    """Longer side of each picture in pixels; by default 168 on sheets, and single overlays are as large as their picture."""

    def __post_init__(self) -> None:
        if not 0 < self.clip_percentile <= 100:
            raise UsageError(f"--clip-percentile is {self.clip_percentile}: it must be above 0 and at most 100")
        if self.side is not None and self.side < SMALLEST_SIDE:
            raise UsageError(f"--side is {self.side}: pictures need at least {SMALLEST_SIDE} pixels")

    def changed_look(self) -> list[str]:
        """The flags of pictures that are not as by default."""
        changed = {
            "--patches": self.patches,
            "--clip-percentile": self.clip_percentile != CLIP_PERCENTILE,
            "--side": self.side is not None,
        }
        return [flag for flag, differs in changed.items() if differs]

    @property
    def look(self) -> Look:
        """The same as overlays take it."""
        return Look(self.patches, self.clip_percentile)


@dataclass(frozen=True, kw_only=True)
class SheetSettings(Drawn):
    """Contact sheets: the top images of a feature with the heat of its activation over them, as PNG."""

    features: str | None = None
    """Features to draw, such as `12,407`; by default the best of each site and step."""
    best: int = 3
    """How many features of each site and step to draw when none are named."""
    top: int = TOP
    """Images on a sheet, with different prompts."""
    images: str | None = None
    """Draw these images whatever their rank, such as `3,17`: an overlay a file, or with --over-steps the lines of each sheet."""
    over_steps: bool = False
    """The same images at every step side by side, on one scale of colours, a sheet a feature."""
    matched: bool = False
    """With --over-steps: at the other steps, the feature that fires most like the one at the step where it is on most images."""
    min_images: int = MIN_IMAGES
    """With --matched: features active on fewer images are not matched, for what fires once fires together with anything."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best < 1 or self.top < 1:
            raise UsageError(f"--best is {self.best} and --top is {self.top}: draw at least 1 feature with 1 image")
        if self.min_images < 1:
            raise UsageError(f"--min-images is {self.min_images}: it must be at least 1")
        if self.min_images != MIN_IMAGES and not self.matched:
            raise UsageError("--min-images says which features --matched finds: give --over-steps --matched too")
        if self.over_steps and self.images is not None and self.top != TOP:
            raise UsageError(
                f"--images names the lines of each sheet over steps, so --top {self.top} would change nothing: leave one of them out"
            )
        if self.matched and not self.over_steps:
            raise UsageError("--matched says which features stand side by side over steps: give --over-steps too")
