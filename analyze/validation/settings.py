"""What `validate` can be told."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from store.errors import UsageError

Hold = Literal["mlps", "nothing", "both"]
Kind = Literal["feature", "error", "rest"]
KINDS: tuple[Kind, ...] = ("feature", "error", "rest")
"""kinds of node that can be perturbed in the real model: what writes at an MLP's output"""


@dataclass(frozen=True, kw_only=True)
class ValidateSettings:
    """Perturb the nodes of attribution graphs in the real model, and compare with what the graphs say.  FLUX is run."""

    graphs: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="G [G …]")]
    """What `graph` has written: its --out, or several."""
    store: Annotated[str | Path, tyro.conf.arg(metavar="STORE")]
    """The store that the graphs explain: its prompts and seeds are drawn again."""
    dictionaries: Path
    """Folder of the transcoders that the graphs were made with."""
    out: Path
    """Folder of tables and pictures; the same command goes on in it where it was stopped."""
    model: str | None = None
    """Folder of the store's model, where the id in the store does not lead to it."""

    hold: Hold = "both"
    """mlps: MLP outputs after the source stay as they were, and edges are tested; nothing: everything answers, and total effects and
    influence are tested; both."""
    sources: str = "feature"
    """Kinds of node that are perturbed, of feature, error and rest: such as feature,error."""
    most: int | None = None
    """Perturb at most so many nodes of a graph, the most influential. Default: all."""
    eps: float = 1.0
    """Which part of what a node writes is taken away: 1 ablates it, 0.1 makes it a tenth smaller."""
    exactness: bool = True
    """Also run the transcoders with their errors added back, all in memory, and say how far that is from the model."""

    batch_size: int | None = None
    """Perturbations that run at once, the unperturbed run beside them. Default: the store's batch size, at least 8."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What perturbed runs compute in; small changes drown in the rounding of 16 bits. Pictures are drawn in the store's."""
    device: str | None = None
    """cuda, cuda:1, cpu; default: cuda where there is one."""
    plan: bool = False
    """Print how many runs of the transformer it takes, and stop."""

    def __post_init__(self) -> None:
        if not self.graphs:
            raise UsageError("--graphs names no folder: give what python -m analyze graph has written")
        if not (math.isfinite(self.eps) and self.eps != 0):
            raise UsageError(f"--eps is {self.eps}: give the part to take away, such as 1 or 0.1 (negative: to add)")
        for flag in ("most", "batch_size"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise UsageError(f"--{flag.replace('_', '-')} is {value}: give at least 1")
        _ = self.kinds

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of node that are perturbed; `UsageError` for one that cannot be."""
        words = [word.strip() for word in self.sources.split(",") if word.strip()]
        for word in words:
            if word not in KINDS:
                raise UsageError(f"--sources {word!r} cannot be perturbed at an MLP: choose of {', '.join(KINDS)}")
        if not words:
            raise UsageError(f"--sources names no kind of node: choose of {', '.join(KINDS)}")
        return tuple(kind for kind in KINDS if kind in words)

    @property
    def holds(self) -> tuple[bool, ...]:
        """Whether MLPs are held, of each run of a perturbation."""
        return {"mlps": (True,), "nothing": (False,), "both": (True, False)}[self.hold]

    @property
    def choices(self) -> dict[str, object]:
        """What decides the numbers, beside graphs, store and dictionaries."""
        return {name: getattr(self, name) for name in ("hold", "most", "eps", "exactness", "dtype")} | {
            "sources": list(self.kinds)
        }
