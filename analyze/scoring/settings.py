"""What `scores` can be told."""

import math
from dataclasses import dataclass
from typing import Literal

from analyze.scoring.matrices import DType
from analyze.scoring.statistics import ACTIVE_ABOVE
from analyze.settings import Inputs
from store.errors import UsageError
from store.sizes import parse_size

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class ScoresSettings(Inputs):
    """Score matrices and the statistics of every feature, in one pass over the store."""

    padding: bool = False
    """Count the padding tokens of the text too (FLUX has no text mask; by default only real tokens count)."""
    top: int = 16
    """How many top images, and of text top words, to keep with each feature."""
    active_above: float = ACTIVE_ABOVE
    """A feature is active where z is above this, in every figure of the analysis."""
    dtype: DType = "float32"
    """What scores are written in: float32, or float16, half the bytes (refused where a score exceeds 65504)."""
    memory: str = "2GB"
    """Bound on what is held at once, weights of dictionaries included (Python and its libraries come on top: about 400 MB a process). Where
    it is too little for all dictionaries of a site, the store is read several times. With --scheduler of each worker."""
    workers: int | None = None
    """Threads of this machine that do the work, one block of images each; default: one a core. Fewer where the memory is too little
    for so many. The bytes are the same for any number."""
    scheduler: str | None = None
    """tcp://HOST:PORT of a dask scheduler whose workers do the work; they must see the store, --dictionaries and --out under the same
    paths, and run this version of Granary."""
    device: Device = "auto"
    """Where activations are computed: auto (a GPU where there is one), cpu or cuda."""
    plan: bool = False
    """Print what would be read, computed and written, and stop."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UsageError(f"--top is {self.top}: keep at least 1 top image per feature")
        if not (math.isfinite(self.active_above) and self.active_above >= 0):
            raise UsageError(f"--active-above is {self.active_above}: activations are 0 or more, so give 0 or more")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"--workers {self.workers} must be at least 1")
        if self.scheduler is not None and self.workers is not None:
            raise UsageError(
                "--workers starts threads on this machine, --scheduler uses the workers of a cluster: give one of them"
            )
        if self.scheduler is not None and "://" not in self.scheduler:
            raise UsageError(f"--scheduler {self.scheduler!r} is no address: write tcp://HOST:PORT")
        parse_size(self.memory)

    @property
    def choices(self) -> dict[str, object]:
        """What decides the figures, as `run.json` keeps it."""
        return {"padding": self.padding, "top": self.top, "active_above": self.active_above, "dtype": self.dtype}
