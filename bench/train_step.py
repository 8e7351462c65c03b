"""What training costs: `python -m train` on a pack, against a loop written as the reference's is described.

Fewest operations: 12 * d_model * n_features a row, forward and backward of encoder and decoder; fewest
bytes: each row read once.  The reference's loop gathers rows at random, with replacement, from a buffer
in RAM, steps AdamW parameter by parameter, and divides the decoder's columns by their norms after each
step; ours also reads its rows from disk.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bench.timing import Comparison, by_turns
from store import Site
from store.format import StreamTokens
from store.pack import PackSettings
from store.pack import run as pack
from tests.small_store import make_store
from train import TrainSettings, Transcoder
from train import run as train
from train.config import DictionaryConfig
from train.loss import loss_of_record

D_MODEL, EXPANSION, BATCH = 256, 8, 1024


def comparisons() -> list[Comparison]:
    """One pass over about 12,000 rows of width 256 with 2,048 features."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name)
        tokens = StreamTokens("all", 64, 64)
        made = make_store(
            folder / "store", n_images=100, sites=("img_0",), d_model=D_MODEL, image_tokens=tokens, pictures="none"
        )
        with contextlib.redirect_stdout(io.StringIO()):
            pack(PackSettings(store=made.path, out=folder / "pack"))
        turns = iter(range(100))
        rows = (
            _rows(made.values[made.store.sites[0], 0, "mlp_in"]),
            _rows(made.values[made.store.sites[0], 0, "mlp_out"]),
        )
        done: list[int] = []

        def ours() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                settings = TrainSettings(
                    pack=folder / "pack", out=folder / f"out-{next(turns)}", expansion=EXPANSION, batch=BATCH
                )
                (dictionary,) = train(settings)
            done[:] = [dictionary.config.steps]

        ours()
        taken = by_turns(ours, lambda: _reference(rows[0], rows[1], done[0]))
    gflop = 12 * D_MODEL * D_MODEL * EXPANSION * done[0] * BATCH / 1e9
    return [
        Comparison(
            "train: read and step", taken[0], "the reference's loop, rows in RAM", taken[1], f"{gflop:.0f} GFLOP"
        )
    ]


def _rows(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).flatten(0, 1)


def _reference(x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
    model = Transcoder(
        DictionaryConfig("transcoder", Site.parse("img_0"), D_MODEL, D_MODEL * EXPANSION, time_embed_dim=256)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0, foreach=False)
    for index in _gathers(len(x), steps):
        batch, target, sigma = x[index], y[index], torch.full((BATCH,), 0.5)
        z = model.encode(batch, sigma)
        loss = loss_of_record(target, model.decode(z), z, 3e-4).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.decoder.weight.div_(model.decoder.weight.norm(dim=0, keepdim=True))


def _gathers(count: int, steps: int) -> Iterator[torch.Tensor]:
    for _ in range(steps):
        yield torch.randint(count, (BATCH,))
