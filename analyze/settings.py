"""What every command of `python -m analyze` can be told; each adds its own in the `settings` of its room."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

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
    """Scores, then truth where the store has it, then the report."""

    padding: bool = False
    """Count the padding tokens of the text too."""
    images: Images = "val"
    """Images that the truth table is judged on: `val` or `all`."""
    any_picture: bool = False
    """Judge also on images whose picture was never made or does not show what its prompt says."""
    seed: int = 0
    """Seed of the halves of the truth table."""
    title: str = "What the features see"
    """Headline of the report."""
