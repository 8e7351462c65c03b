"""What `responsive` can be told."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from analyze.settings import Inputs
from analyze.steering.edits import FeatureEdit, Method, Mode, Unit
from analyze.steering.settings import DType
from analyze.steering.token_choice import TokenChoice
from store import Site
from store.errors import UsageError

Rank = Literal["flip", "ssim", "psnr", "lpips", "latent_mse", "latent_cosine", "clip", "concept"]
ANY = Site.parse("img_0")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class ResponsiveSettings(Inputs):
    """Find the prompts on which changing a feature shows; draws pictures, so it RUNS FLUX: --plan says how often.

    OUT is an analysis: its scores say where a feature is active.  The table and the pictures go to OUT/responsive/NAME/.
    """

    features: tuple[str, ...]
    """Features to try, such as img_3:66,70 txt_2:5 (of a site with two dictionaries: transcoder_img_2:5)."""
    name: str = "responsive"
    """Name of the results' folder, OUT/responsive/NAME."""
    low: float = 70.0
    """Images whose score lies above this percentile of the images on which the feature is active …"""
    high: float = 95.0
    """… and at most at this one: there it is active, but not saturated."""
    candidates: int = 16
    """How many of these images to draw for each feature, of different prompts, spread evenly over their scores."""
    best: int = 6
    """How many of them to show in the picture of a feature."""
    rank: Rank = "flip"
    """What the response is measured by: flip, ssim, psnr, lpips, clip (between pictures), latent_mse, latent_cosine, or concept: how far
    the picture moved towards the feature's best pictures, by CLIP."""

    mode: Mode = "amplify"
    """What becomes of the feature: zero, amplify, invert, set or add."""
    strengths: tuple[float, ...] = (4.0,)
    """Strengths to draw with, each a column of the picture; the response is the mean over them. zero takes none."""
    unit: Unit = "absolute"
    """peak: the strengths of set and add count in the feature's greatest activation in this analysis."""
    at_steps: str = "all"
    """Denoising steps at which the feature is changed, such as 2-3; --steps says whose scores count."""
    tokens: str = "all"
    """Tokens at which it is changed: all, 3,7-9, above:0.5 (share of the feature's maximum) or mask:FILE.png."""
    method: Method = "difference"
    """difference: add what the change makes to the MLP's true output; replacement: put the dictionary in its place."""

    model: str | None = None
    """Folder of the model that made the store, where the store's id does not lead to it."""
    clip: str | None = None
    """CLIP model for clip and concept: a folder or an id of the Hugging Face hub. Default: tiny-flux's own for its pictures, else none."""
    batch_size: int | None = None
    """Pictures drawn at once; part of what decides the last digits. Default: as the store was drawn."""
    dtype: DType | None = None
    """What the model computes in. Default: as the store was drawn."""
    device: str | None = None
    """cuda, cuda:1, cpu; default: cuda where there is one."""
    plan: bool = False
    """Say which images would be drawn, how often the transformer would run, and stop."""

    def __post_init__(self) -> None:
        if not self.features:
            raise UsageError("--features names none: write for example --features img_3:66,70 txt_2:5")
        if NAME.fullmatch(self.name) is None:
            raise UsageError(f"--name is {self.name!r}: a folder name of letters, digits, points, _ and -")
        if not 0 <= self.low < self.high <= 100:  # NaN is neither
            raise UsageError(f"--low {self.low:g} and --high {self.high:g}: percentiles with 0 <= low < high <= 100")
        if self.candidates < 1 or self.best < 1:
            raise UsageError(f"--candidates is {self.candidates} and --best is {self.best}: each is at least 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size is {self.batch_size}: it must be at least 1")
        self._check_strengths()
        TokenChoice.parse(self.tokens)

    def _check_strengths(self) -> None:
        if self.mode == "zero" and self.strengths != ResponsiveSettings.strengths:
            raise UsageError("--strengths and --mode zero: zero takes no strength")
        if not self.strengths or len(set(self.strengths)) < len(self.strengths):
            raise UsageError(f"--strengths {' '.join(map(str, self.strengths))}: name one or several, each once")
        if odd := [strength for strength in self.strengths if not math.isfinite(strength)]:
            raise UsageError(f"--strengths {odd[0]}: a strength is a finite number")
        if self.unit == "peak" and self.mode not in ("set", "add"):
            raise UsageError(f"--unit peak: the strength of {self.mode} is a factor; only set and add count in peaks")
        asked = () if self.mode == "zero" else self.strengths
        if asked and all(FeatureEdit(ANY, (0,), self.mode, strength).idle for strength in asked):
            raise UsageError(f"--mode {self.mode} --strengths {asked[0]:g} changes nothing: give another strength")
