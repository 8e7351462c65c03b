"""What `scan` can be told."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from analyze.settings import Inputs
from store.errors import UsageError

Kind = Literal["contrastive", "spatial", "temporal", "top"]
Rank = Literal["difference", "effect", "auroc", "share", "change", "level"]
Direction = Literal["a", "b", "both"]
Match = Literal["auto", "seed", "none"]
Pattern = Literal["any", "rise", "fall", "only"]

RANKS: dict[Kind, tuple[Rank, ...]] = {
    "contrastive": ("difference", "effect", "auroc"),
    "spatial": ("difference", "effect", "share"),
    "temporal": ("change",),
    "top": ("level",),
}
"""What each kind of scan can rank by; the first is the default."""

COVERED, MIN_IMAGES = 0.5, 8

FLAGS: dict[str, tuple[Kind, ...]] = {
    "pairs": ("contrastive",),
    "positive": ("contrastive",),
    "negative": ("contrastive",),
    "against": ("contrastive",),
    "prompts": ("spatial", "temporal", "top"),
    "region": ("spatial", "top"),
    "mask": ("spatial", "top"),
    "tokens": ("top",),
    "words": ("top",),
}
"""The kinds of scan that a flag belongs to."""


@dataclass(frozen=True, kw_only=True)
class ScanSettings(Inputs):
    """Find features worth looking at; the table of the best goes to OUT/scan/NAME.csv."""

    kind: Kind
    """contrastive: prompts against prompts; spatial: inside a region against outside; temporal: steps compared; top: strongest."""
    name: str | None = None
    """Name of the table, OUT/scan/NAME.csv; the kind when it is left out."""
    best: int = 20
    """How many features to list."""
    rank: Rank | None = None
    """What to rank by: difference, effect or auroc (contrastive), difference, effect or share (spatial); first is default."""
    every_step: bool = False
    """List a feature once for every step where it is among the best, not only at its best step."""
    per_image: bool = False
    """Write also OUT/scan/NAME.images.csv: the figure of every listed feature on each image by itself."""
    plan: bool = False
    """Say what would be read, and stop."""

    images: str | None = None
    """Images to look at, such as 0-9,12 (default: all), also with --positive; with --against those of side a."""
    against: str | None = None
    """Images of side b of a contrastive scan, such as 10-19."""
    prompts: str | None = None
    """Look only at images whose prompt matches this regular expression (case does not matter)."""
    positive: str | None = None
    """Side a of a contrastive scan: images whose prompt matches this regular expression, such as '\\bred\\b'."""
    negative: str | None = None
    """Side b: images whose prompt matches this one; left out: all images that do not match --positive."""
    pairs: Path | None = None
    """Pairs of a contrastive scan: CSV with the columns prompt_a,prompt_b, or image_a,image_b."""
    direction: Direction = "a"
    """Which contrastive features to list: those more active on side a, on side b, or both."""

    match: Match = "auto"
    """Contrastive: compare images of equal seed (seed), or sides as they are (none); auto: seed where sides share half of them."""

    region: str | None = None
    """A rectangle of image tokens, rows:columns, 3-6:1-4 in tokens counted from 1, 0.25-0.75:0.0-0.5 in shares, or centre, top, …"""
    mask: Path | None = None
    """A picture of any size: its bright half is the region, as far as it is opaque."""
    covered: float = COVERED
    """A token lies inside when the region covers at least this share of it."""
    min_images: int = MIN_IMAGES
    """With --rank share: list features that are active in the region on at least so many images (all, where there are fewer)."""
    tokens: str | None = None
    """Look only at these tokens of the stream, such as 0-3,7."""
    words: str | None = None
    """Look only at text tokens whose piece matches this regular expression."""

    pattern: Pattern = "any"
    """Temporal features to list: any that change, those that rise, those that fall, or those active at only one step."""

    def __post_init__(self) -> None:
        if self.best < 1:
            raise UsageError(f"--best is {self.best}: list at least 1 feature")
        if self.min_images < 1:
            raise UsageError(
                f"--min-images is {self.min_images}: a feature that is listed is active on at least 1 image"
            )
        if not 0 < self.covered <= 1:
            raise UsageError(f"--covered is {self.covered}: a share of a token lies above 0 and up to 1")
        if self.name is not None and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.name) is None:
            raise UsageError(f"--name is {self.name!r}: a file name of letters, digits, points, _ and -")
        if self.rank is not None and self.rank not in RANKS[self.kind]:
            raise UsageError(
                f"--rank {self.rank} is not for {self.kind} scans, which rank by {' or '.join(RANKS[self.kind])}"
            )
        for flag, kinds in FLAGS.items():
            if getattr(self, flag) is not None and self.kind not in kinds:
                raise UsageError(f"--{flag} belongs to {' and '.join(kinds)} scans, not to --kind {self.kind}")
        _check_choice(self)

    @property
    def ranked_by(self) -> Rank:
        """What the table is ranked by."""
        return self.rank or RANKS[self.kind][0]

    @property
    def title(self) -> str:
        """The name of the table."""
        return self.name or self.kind


def _check_choice(settings: ScanSettings) -> None:
    """Refuse sides, regions and tokens that are missing or given twice."""
    match settings.kind:
        case "contrastive":
            numbered = settings.against is not None or (settings.images is not None and settings.positive is None)
            if sum([settings.pairs is not None, settings.positive is not None, numbered]) != 1:
                raise UsageError(
                    "a contrastive scan needs one choice of its sides: --pairs FILE.csv, --positive TEXT [--negative TEXT], "
                    "or --images 0-9 --against 10-19"
                )
            if numbered and (settings.images is None or settings.against is None):
                raise UsageError("--images and --against belong together: the two sides of a contrastive scan")
            if settings.negative is not None and settings.positive is None:
                raise UsageError("--negative needs --positive: the side that it is compared with")
        case "spatial":
            if (settings.region is None) == (settings.mask is None):
                raise UsageError("a spatial scan needs a region: --region rows:columns, or --mask FILE.png")
        case "top":
            given = [flag for flag in ("region", "mask", "tokens", "words") if getattr(settings, flag) is not None]
            if len(given) > 1:
                raise UsageError(f"--{given[0]} and --{given[1]} both choose tokens: give one of them")
    if settings.covered != COVERED and settings.region is None and settings.mask is None:
        raise UsageError("--covered says how much of a token a region covers: it needs --region or --mask")
    if settings.min_images != MIN_IMAGES and settings.ranked_by != "share":
        raise UsageError("--min-images belongs to spatial scans with --rank share")
    if settings.kind == "temporal" and settings.every_step:
        raise UsageError("--every-step has no effect on --kind temporal, which looks at all steps at once")
    if settings.kind != "temporal" and settings.pattern != "any":
        raise UsageError(f"--pattern belongs to temporal scans, not to --kind {settings.kind}")
    if settings.kind != "contrastive" and settings.direction != "a":
        raise UsageError(f"--direction belongs to contrastive scans, not to --kind {settings.kind}")
    if settings.kind != "contrastive" and settings.match != "auto":
        raise UsageError(f"--match belongs to contrastive scans, not to --kind {settings.kind}")
