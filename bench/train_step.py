"""What one training step costs, rows in RAM: our `Learner` against a loop written as the reference's is described.

Least work: 12 * d_model * n_features operations a row for a dense dictionary conditioned on sigma (4 forward, 4 for the
gradients of the weights, 2 for those of z, 2 for those of the input), which is what GFLOP/s count, for TopK as well.

The reference's loop gathers float32 rows at random, with replacement, from a buffer in RAM, makes every product in float32,
steps AdamW parameter by parameter, and divides the decoder's columns by their norms after each step.  Ours takes batches as
the loader hands them over (bfloat16 rows).  The dense alternative to our TopK is the same loop with `torch.topk`, a scattered
matrix, autocast and fused AdamW.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.timing import Comparison, by_turns
from store import Site
from train.dictionaries.config import DictionaryConfig
from train.dictionaries.dictionary import build
from train.distributed import Ranks
from train.learning.learner import Course, Learner
from train.models import Model
from train.recipe import Recipe
from train.rows.loader import Batch

D_MODEL, BATCH, K = 512, 4096, 64
BUFFER_ROWS, SIGMAS = 4 * BATCH, (1.0, 0.75390625, 0.5, 0.25)
SITE = Site.parse("img_0")


def comparisons(expansion: int = 16, wide: int = 64) -> Iterator[Comparison]:
    """The recipe of record in float32 and under autocast, then TopK sparse against dense; about two minutes, 3 GB."""
    rows = Rows()
    for autocast in (False, True):
        name = "bfloat16 autocast" if autocast else "float32"
        ours, other = Ours(Recipe(l1=3e-4, expansion=expansion), autocast, rows), Plain(None, expansion, False, rows)
        yield _compare(f"step: recipe of record, {name}", ours, "the reference's loop, float32", other, expansion)
    for width, autocast in ((expansion, False), (expansion, True), (wide, True)):
        name = "bfloat16" if autocast else "float32"
        ours = Ours(Recipe(activation="topk", k=K, expansion=width), autocast, rows)
        other = Plain(K, width, autocast, rows)
        what = f"step: TopK {K} of {width * D_MODEL:,}, {name}"
        yield _compare(what, ours, f"dense products, {name}", other, width)


def _compare(what: str, ours: "Ours", alternative: str, other: "Plain", expansion: int) -> Comparison:
    mine, its = by_turns(ours.step, other.step)
    gflop = 12 * D_MODEL * D_MODEL * expansion * BATCH / 1e9
    rates = (
        f"{gflop:.0f} GFLOP: {gflop / mine:.0f} against {gflop / its:.0f} a second, "
        f"{BATCH / mine / 1e3:.1f} k against {BATCH / its / 1e3:.1f} k rows/s"
    )
    return Comparison(what, mine, alternative, its, rates)


class Rows:
    """Rows of random features, as a training buffer holds them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(BUFFER_ROWS, D_MODEL, generator=generator)
        self.y = torch.randn(BUFFER_ROWS, D_MODEL, generator=generator)
        self.sigma = torch.tensor(SIGMAS)[torch.randint(len(SIGMAS), (BUFFER_ROWS,), generator=generator)]

    def batch(self, step: int) -> Batch:
        part = slice(first := step * BATCH % BUFFER_ROWS, first + BATCH)
        columns = {"mlp_in": self.x[part].bfloat16(), "mlp_out": self.y[part].bfloat16(), "sigma": self.sigma[part]}
        return Batch(columns, None)


class Ours:
    """A model as `python -m train` trains it."""

    def __init__(self, recipe: Recipe, autocast: bool, rows: Rows) -> None:
        if autocast:
            recipe = Recipe(**{**vars(recipe), "autocast": "bfloat16"})
        n_features = recipe.expansion * D_MODEL
        config = DictionaryConfig(
            "transcoder", SITE, D_MODEL, n_features, recipe.activation, recipe.k, recipe.time_embed_dim
        )
        course = Course(10**6, BATCH, 100, torch.device("cpu"), Ranks())
        with tempfile.TemporaryDirectory() as folder:
            self.learner = Learner(Model(SITE, recipe, Path(config.name), config), Path(folder), course, None)
        self.rows = rows

    def step(self) -> None:
        self.learner.learn(self.rows.batch(self.learner.step))


class Plain:
    """The same model with plain operations; `k` None: ReLU and L1 by the reference's loop, else dense TopK."""

    def __init__(self, k: int | None, expansion: int, autocast: bool, rows: Rows) -> None:
        activation = "relu" if k is None else "topk"
        self.model = build(DictionaryConfig("transcoder", SITE, D_MODEL, expansion * D_MODEL, activation, k, 256))
        self.model.initialise(0)
        how = {"foreach": False} if k is None else {"fused": True}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-4, weight_decay=0.0, **how)
        self.l1, self.rows = 3e-4 if k is None else 0.0, rows
        self.cast: Callable[[], contextlib.AbstractContextManager[None]] = (
            (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else contextlib.nullcontext
        )

    def step(self) -> None:
        index = torch.randint(BUFFER_ROWS, (BATCH,))
        x, y, sigma = (column[index] for column in (self.rows.x, self.rows.y, self.rows.sigma))
        with self.cast():
            z = self.model.encode(x, sigma)
            y_hat = self.model.decode(z)
        self.optimizer.zero_grad()
        residual = (y - y_hat.float()).square().sum(dim=1).mean() / (y.var(dim=0, correction=0).sum() + 1e-6)
        torch.autograd.backward(residual + self.l1 * z.sum(dtype=torch.float32) / len(z) if self.l1 else residual)
        self.optimizer.step()
        with torch.no_grad():
            weight: Tensor = self.model.decoder.weight
            weight.div_(weight.norm(dim=0, keepdim=True))


def main() -> None:
    """Print the comparisons: `python -m bench.train_step`."""
    for comparison in comparisons():
        print(comparison.line(), flush=True)


if __name__ == "__main__":
    main()
