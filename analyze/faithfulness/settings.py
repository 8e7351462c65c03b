"""What `faithfulness` can be told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from store.errors import UsageError

Scope = Literal["site", "cumulative", "all"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
IMAGES = 32
"""how many of the store's first images are drawn when nothing is said"""


@dataclass(frozen=True, kw_only=True)
class FaithfulnessSettings:
    """Run the model with dictionaries in the place of its MLPs and compare with itself; RUNS FLUX, --plan says how often."""

    store: Annotated[str | Path, tyro.conf.arg(metavar="STORE")]
    """The store whose images are drawn again, a folder or a URL (s3://, hf://, https://)."""
    dictionaries: tuple[Path, ...]
    """Folders of dictionaries, one or several: those of one kind in one folder are spliced in together, and make a line of the
    table of sparsity against faithfulness."""
    out: Path
    """Folder of the results; the same command goes on in it where it was stopped."""
    model: str | None = None
    """Folder of the model that made the store, where the store's id does not lead to it."""

    images: str | None = None
    """Images to draw, such as 0-9,12; default: the first 32."""
    sites: str = "all"
    """Sites to splice, such as img_6,img_12; all: every site that has a dictionary."""
    scope: str = "site,all"
    """Of site, cumulative and all: each site alone; block by block from the first on; all sites of a kind and folder together."""
    steps: str = "all"
    """Denoising steps at which the dictionaries stand in, such as 0,2-3; at the others the MLPs are left alone."""
    each_step: bool = False
    """Also at each of these steps alone: once more the number of steps in runs."""
    baseline: bool = True
    """Also with the mean of each MLP's outputs in its place: what a dictionary that explains nothing would do to the picture."""
    exact: int = 2
    """With so many images show that errors added back reproduce the plain latents, site by site and at all; 0: leave it out."""
    pictures: bool = True
    """Decode the pictures and compare them too; without, only latents and MLP outputs are compared."""
    clip: str | None = None
    """CLIP model that compares pictures too: a folder, or an id of the Hugging Face hub. Default: tiny-flux's own for a store of
    tiny-flux, else none."""

    batch_size: int | None = None
    """Pictures drawn at once; part of what decides the last digits. Default: as the store was drawn."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """What the model computes in. Default: as the store was drawn."""
    device: str | None = None
    """cuda, cuda:1, cpu; default: cuda where there is one."""
    plan: bool = False
    """Print how many pictures would be drawn and how often the transformer would run, and stop."""

    def __post_init__(self) -> None:
        if not self.dictionaries:
            raise UsageError("--dictionaries names no folder: give one or several, as train --out made them")
        _ = self.scopes
        if self.exact < 0:
            raise UsageError(f"--exact is {self.exact}: a number of images, or 0 to leave it out")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"--batch-size is {self.batch_size}: it must be at least 1")
        if self.clip is not None and not self.pictures:
            raise UsageError("--clip compares pictures: leave out --no-pictures")

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """Which sites stand in together, in the order of `SCOPES`; `UsageError` for a word that is none."""
        words = {word.strip() for word in self.scope.split(",")}
        unknown = sorted(words - set(SCOPES))
        if unknown:
            raise UsageError(f"--scope {unknown[0]!r} is none: choose of {', '.join(SCOPES)}")
        return tuple(scope for scope in SCOPES if scope in words)
