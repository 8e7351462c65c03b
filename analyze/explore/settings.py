"""What `explore` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from store.errors import UsageError

HIGHEST_PORT = 65_535


@dataclass(frozen=True, kw_only=True)
class ExploreSettings:
    """A local app: find features, type a prompt, move sliders, see plain, changed and difference.  It runs FLUX."""

    store: Annotated[str | Path, tyro.conf.arg(metavar="STORE")]
    """The store whose model draws, in its size and steps, a folder or a URL (s3://, hf://, https://)."""
    dictionaries: Path
    """Folder of dictionaries: ours (`transcoder_img_6/`), or published `.pt` files."""
    analysis: Path | None = None
    """What `analyze scores` (or `all`) wrote with --out: features can then be browsed, and strengths count in their peaks."""
    graphs: Path | None = None
    """What `analyze graph` wrote with --out: its page is linked."""
    out: Path | None = None
    """Folder that saved experiments go to, NAME.yaml each; left out, they can only be downloaded."""
    model: str | None = None
    """Folder of the store's model, where the store does not lead to it."""

    prompt: str | None = None
    """Prompt to begin with; default: that of the store's first image."""
    seed: int | None = None
    """Seed to begin with; default: that of the store's first image."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, without any password."""
    port: int = 7860
    """Port to listen on; 0 takes any that is free."""
    browser: bool = False
    """Open the page in the browser of this machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs: auto (a GPU where there is one), cpu or cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the model computes in; default: what the store was made with."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= HIGHEST_PORT:
            raise UsageError(f"--port is {self.port}: a port lies between 1 and {HIGHEST_PORT}, and 0 takes a free one")
        if self.prompt is not None and not self.prompt.strip():
            raise UsageError("--prompt is empty: give a text, or leave it out")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed is {self.seed}: a seed lies between 0 and 2^63 - 1")
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out {self.out} is a file: name a folder, which may be new")
