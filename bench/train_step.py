"""What one training step costs, rows in RAM: our `Learner` against a loop written as the reference's is described.

Least work of a dense dictionary conditioned on sigma: 12 * d_model * n_features operations a row (4 forward, 4 for the gradients of
the weights, 2 for those of z, 2 for those of the input; without sigma not these).  Of TopK: the encoder forward, 2 * d_model *
n_features, and 8 * d_model * k for the k features that are active (decoder, gradients of both matrices and of z).

The reference's loop gathers float32 rows at random, with replacement, from a buffer in RAM, makes every product in float32,
steps AdamW parameter by parameter, and divides the decoder's columns by their norms after each step.  Ours takes batches as
the loader hands them over (bfloat16 rows).  The dense alternative to our TopK is the same loop with `torch.topk`, a scattered
matrix, autocast and fused AdamW.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.lines import Line, Need, Peer, Seconds, Size
from bench.timing import by_turns
from store import Site
from train.dictionaries.config import DictionaryConfig
from train.dictionaries.dictionary import build
from train.distributed import Ranks
from train.learning.learner import Course, Learner
from train.models import Model, autocast_on
from train.recipe import Recipe
from train.rows.loader import Batch

K, SIGMAS = 64, (1.0, 0.75390625, 0.5, 0.25)
SITE = Site.parse("img_0")


@dataclass(frozen=True)
class Case:
    """A step: the recipe of record (`k` None) or TopK, so wide, under bfloat16 autocast or not."""

    k: int | None
    expansion: int
    bfloat16: bool
    goal: float | None = None
    """of ours / its"""


RECORD = (Case(None, 16, False), Case(None, 16, True, goal=1 / 3))
TOPK = (Case(K, 16, False), Case(K, 16, True), Case(K, 64, True))
SIZES = {
    "tiny": (32, 64, RECORD, 1), "quick": (512, 4096, (*RECORD, TOPK[1], TOPK[2]), 3), "full": (512, 4096, (*RECORD, *TOPK), 10)
}  # fmt: skip
"""d_model, rows of a batch, cases, rounds"""


def lines(size: Size) -> Iterator[Line]:
    """The recipe of record in float32 and under autocast, then TopK sparse against dense; 3 GB at most."""
    d_model, batch, cases, rounds = SIZES[size]
    rows = Rows(d_model, batch)
    for case in cases:
        recipe = Recipe(l1=3e-4, expansion=case.expansion)
        if case.k is not None:
            recipe = Recipe(activation="topk", k=case.k, expansion=case.expansion)
        ours = Ours(recipe, case.bfloat16, rows)
        other = Plain(case.k, case.expansion, case.bfloat16 and case.k is not None, rows)
        yield _line(case, rows, *by_turns(ours.step, other.step, rounds=rounds))


def _line(case: Case, rows: "Rows", ours: Seconds, its: Seconds) -> Line:
    precision, n_features = "bfloat16" if case.bfloat16 else "float32", rows.d_model * case.expansion
    name = "recipe of record" if case.k is None else f"TopK {case.k}"
    alternative = "the reference's loop, float32" if case.k is None else f"dense products, {precision}"
    operations = least_work(rows.d_model, n_features, case.k, True) * rows.batch_rows
    note = f"{rows.batch_rows / min(ours) / 1e3:.1f} k rows/s against {rows.batch_rows / min(its) / 1e3:.1f} k"
    if case.bfloat16 and autocast_on(torch.device("cpu"), "auto") == "none":
        note += "; this processor has no matrix units for bfloat16, so `--autocast auto` stays with float32 here"
    return Line(
        f"{name}, {n_features:,} features, {precision}", ours, (Peer(alternative, its, case.goal),), (Need(precision, operations),), note,
    )  # fmt: skip


def least_work(d_model: int, n_features: int, k: int | None, conditioned: bool) -> float:
    """Operations of a step a row, as counted above."""
    if k is not None:
        return 2 * d_model * n_features + 8 * d_model * k
    return (12 if conditioned else 10) * d_model * n_features


class Rows:
    """Rows of random features, as a training buffer holds them."""

    def __init__(self, d_model: int, batch_rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.d_model, self.batch_rows, self.count = d_model, batch_rows, 4 * batch_rows
        self.x = torch.randn(self.count, d_model, generator=generator)
        self.y = torch.randn(self.count, d_model, generator=generator)
        self.sigma = torch.tensor(SIGMAS)[torch.randint(len(SIGMAS), (self.count,), generator=generator)]

    def batch(self, step: int) -> Batch:
        part = slice(first := step * self.batch_rows % self.count, first + self.batch_rows)
        columns = {"mlp_in": self.x[part].bfloat16(), "mlp_out": self.y[part].bfloat16(), "sigma": self.sigma[part]}
        return Batch(columns, None)


class Ours:
    """A model as `python -m train` trains it."""

    def __init__(self, recipe: Recipe, autocast: bool, rows: Rows) -> None:
        if autocast:
            recipe = Recipe(**{**vars(recipe), "autocast": "bfloat16"})
        n_features = recipe.expansion * rows.d_model
        config = DictionaryConfig(
            "transcoder", SITE, rows.d_model, n_features, recipe.activation, recipe.k, recipe.time_embed_dim
        )
        course = Course(10**6, rows.batch_rows, 100, torch.device("cpu"), Ranks())
        with tempfile.TemporaryDirectory() as folder:
            self.learner = Learner(Model(SITE, recipe, Path(config.name), config), Path(folder), course, None)
        self.rows = rows

    def step(self) -> None:
        self.learner.learn(self.rows.batch(self.learner.step))


class Plain:
    """The same model with plain operations; `k` None: ReLU and L1 by the reference's loop, else dense TopK."""

    def __init__(self, k: int | None, expansion: int, autocast: bool, rows: Rows) -> None:
        activation = "relu" if k is None else "topk"
        self.model = build(
            DictionaryConfig("transcoder", SITE, rows.d_model, expansion * rows.d_model, activation, k, 256)
        )
        self.model.initialise(0)
        how = {"foreach": False} if k is None else {"fused": True}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-4, weight_decay=0.0, **how)
        self.l1, self.rows = 3e-4 if k is None else 0.0, rows
        self.cast: Callable[[], contextlib.AbstractContextManager[None]] = (
            (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else contextlib.nullcontext
        )

    def step(self) -> None:
        index = torch.randint(self.rows.count, (self.rows.batch_rows,))
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
