"""What an import is asked to do: one frozen dataclass, from which the command line comes."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import tyro

from store.errors import UsageError
from store.foreign.schedules import Schedule
from store.format import Codec, StoreDtype
from store.sites import Point


@dataclass(frozen=True)
class ImportSettings:
    """Make a store of activations that somebody already has."""

    activations: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """a .npy or .safetensors file (image, token, d_model), or a folder of them; with --site and --step, or as
    img_5:0:mlp_out=FILE, once for each array. FILE#KEY names an array in a safetensors file"""
    out: Path
    """the store to write, a new folder; the same command again goes on where it was"""
    site: str | None = None
    """where a plain file was taken: img_5, txt_5"""
    step: str | None = None
    """the denoising step of a plain file, 0-based; of one with several (--rows-per-image) also 13, 0-3 or all"""
    point: Point = "mlp_out"
    """the point of a plain file: mlp_out (before the gate) or mlp_in (after the adaLN shift)"""
    key: str | None = None
    """the array in a safetensors file; default: activations, or the only one with three axes"""
    rows_per_image: str | None = None
    """for rows in one long array, image by image: STEPSxTOKENS of each image, such as 20x4096, the step first"""
    images: int | None = None
    """only the first so many images; default: all"""
    tokens: str = "all"
    """all image tokens, or how many to draw for each image and step"""
    text_tokens: str = "all"
    """all text tokens, only the real ones, or real+N; real is what text_length of the prompt file says, but for text_padding"""
    store_dtype: StoreDtype | None = None
    """what activations are written in; default: 16-bit values as they are, bfloat16 for wider ones"""
    codec: Codec = "none"
    """none, or zstd"""
    prompts: Path | None = None
    """the prompts: text, one a line, or CSV, JSONL or Parquet with a column prompt, and perhaps seed, text_length and others"""
    seeds_per_prompt: int = 1
    """images of each prompt, one after the other"""
    sigma: str | None = None
    """sigma at each sampler step as the transformer received it (1,0.75390625,0.5,0.25), or schnell or dev: computed as
    FLUX.1 does in bfloat16. Default: schnell where there are 4 steps"""
    num_inference_steps: int | None = None
    """denoising steps of the sampler, imported or not; default: as many as sigmas, else those of --rows-per-image, else 4"""
    guidance: float = 0.0
    """guidance scale that was used"""
    grid: str | None = None
    """ROWSxCOLUMNS of image tokens; default: a square where there is one, else one row"""
    pixels_per_token: int = 16
    """side of an image token in pixels"""
    model_id: str | None = None
    """the model that the activations come from, such as black-forest-labs/FLUX.1-dev"""
    revision: str | None = None
    """its revision"""
    seed: int = 0
    """seeds the draw of --tokens"""
    plan: bool = False
    """say what would be written, and write nothing"""
    allow_mixed: bool = False
    """go on under other library versions than the store was begun with; its later commits say so"""

    def __post_init__(self) -> None:
        if not self.activations:
            raise UsageError("say what to import: --activations FILE --site img_5 --step 0")
        for name in ("images", "seeds_per_prompt", "num_inference_steps", "pixels_per_token"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed} must be from 0 to 2**63 - 1")
        if not math.isfinite(self.guidance):
            raise UsageError(f"--guidance {self.guidance} is no number")
        if self.grid is not None:
            self.grid_of()
        self.sigmas_of()

    def grid_of(self) -> tuple[int, int]:
        """Rows and columns that `--grid` names."""
        match = re.fullmatch(r"(\d+)[x×](\d+)", (self.grid or "").strip())
        if match is None or not int(match[1]) or not int(match[2]):
            raise UsageError(f"--grid {self.grid!r}: write ROWSxCOLUMNS, such as 32x32")
        return int(match[1]), int(match[2])

    def sigmas_of(self) -> tuple[list[float], Schedule | None]:
        """The sigmas that `--sigma` lists, or the schedule that it names."""
        if self.sigma is None or self.sigma in get_args(Schedule):
            return [], self.sigma  # type: ignore[return-value]  # one of the names, or None
        try:
            found = [float(word) for word in self.sigma.split(",")]
        except ValueError:
            found = [math.nan]
        if not all(0 <= each <= 1 for each in found):
            raise UsageError(
                f"--sigma {self.sigma!r}: write numbers from 0 to 1, one a sampler step, such as 1,0.75390625,0.5,0.25; "
                f"or {' or '.join(get_args(Schedule))}"
            )
        return found, None
