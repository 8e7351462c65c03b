"""What every command of `python -m analyze` can be told; each adds its own in the `settings` of its room."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from analyze.scoring.statistics import ACTIVE_ABOVE
from store.errors import UsageError

Images = Literal["val", "all"]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every command reads, and where it writes."""

    store: Annotated[str | Path, tyro.conf.arg(metavar="STORE")]
    """The store whose activations are analyzed, a folder or a URL (s3://, hf://, https://)."""
    dictionaries: Path
    """Folder of dictionaries: ours (`transcoder_img_6/`), or published `.pt` files."""
    out: Path
    """Folder of the results; the commands build on one another in it."""
    sites: str = "all"
    """Sites to analyze, such as `img_0-3,txt_6`; `all`: every site that has a dictionary."""
    steps: str = "all"
    """Denoising steps to analyze, such as `0,2-3`; `all`: every step in the store."""


@dataclass(frozen=True, kw_only=True)
class AllSettings(Inputs):
    """Scores, then coherence and truth where the store has what they need, then the report."""

    padding: bool = False
    """Count the padding tokens of the text too."""
    top: int = 16
    """How many top images to keep with each feature."""
    active_above: float = ACTIVE_ABOVE
    """A feature is active where z is above this, in every figure of the analysis."""
    dtype: Literal["float32", "float16"] = "float32"
    """What scores are written in; float16 takes half the bytes."""
    memory: str = "2GB"
    """Bound on what `scores` holds at once."""
    workers: int | None = None
    """Threads of this machine that compute scores; default: one a core."""
    scheduler: str | None = None
    """tcp://HOST:PORT of a dask scheduler whose workers compute the scores."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where activations and image embeddings are computed: auto (a GPU where there is one), cpu or cuda."""
    clip: str | None = None
    """CLIP model that coherence is measured with: a folder, or an id of the Hugging Face hub such as openai/clip-vit-base-patch32.
    Default: tiny-flux's own for its pictures, and no coherence for those of other models."""
    embeddings: str | None = None
    """Image embeddings to measure coherence with instead: FILE.npy or FILE.safetensors[#KEY], (image, dim)."""
    top_m: int = 10
    """How many of a feature's best images coherence compares."""
    images: Images = "val"
    """Images that the truth table is judged on: `val` or `all`."""
    any_picture: bool = False
    """Judge also on images whose picture was never made or does not show what its prompt says."""
    seed: int = 0
    """Seed of the halves of the truth table."""
    title: str = "What the features see"
    """Headline of the report."""
    graphs: tuple[Path, ...] = ()
    """Attribution graphs to show in the report: what `analyze graph --out` was told, one or several."""
    steering: tuple[Path, ...] = ()
    """Steering to show in the report: what `analyze steer` or `analyze guided` was told with --out, one or several."""
    faithfulness: Path | None = None
    """Faithfulness to show in the report: what `analyze faithfulness` was told with --out."""

    def __post_init__(self) -> None:
        if self.top_m > self.top:
            raise UsageError(
                f"--top-m is {self.top_m}, and --top keeps {self.top} images of each feature: make --top at least --top-m"
            )
