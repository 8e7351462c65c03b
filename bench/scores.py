"""What score matrices cost, against one plain torch pass over the same activations in RAM.

The plain pass does what S needs and no more: product, activation, maximum over tokens, batch by batch of images, with torch's
threads.  Ours is the whole command: it reads the store and proves every chunk, finds the tokens of the maxima, takes all
statistics, histograms and top images, and writes everything.

Least work: 2 * d_model operations an image, token and feature; the activations out of the page cache.  What is written is not counted:
it is compressed, and next to nothing beside the product.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from analyze.scoring import scores
from analyze.scoring.settings import ScoresSettings
from bench.lines import Line, Need, Peer, Size
from bench.timing import by_turns, quiet
from store import open_store
from store.format import StreamTokens
from store.sites import Site
from store.writer import Key, StoreWriter
from tests.small_store import small_meta, small_part
from train import Dictionary, DictionaryConfig
from train.dictionaries.activations import keep_top
from train.dictionaries.checkpoint import frozen, save_dictionary
from train.dictionaries.dictionary import build

SIZES = {"tiny": (32, 16, 16, 64, 1), "quick": (128, 256, 512, 8192, 2), "full": (256, 256, 512, 8192, 3)}
"""images, tokens of each, d_model, features, rounds"""
GOAL = 1.5
BATCH = 4
"""images of a batch of the plain pass: 32 MiB of z, the quickest of 1 to 32 here"""


@dataclass(frozen=True)
class Case:
    """A dictionary to be measured."""

    what: str
    bias: float
    """of every feature; rows and encoder rows are such that pre-activations have variance 1"""
    k: int | None = None


CASES = (Case("ReLU, 5 % active", -1.645), Case("ReLU, half active", 0.0), Case("TopK 64", 0.0, 64))


def lines(size: Size) -> Iterator[Line]:
    """S with all statistics, one dictionary of each kind."""
    images, tokens, d_model, features, rounds = SIZES[size]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = random_store(folder / "store", images, tokens, d_model)
        x = torch.from_numpy(open_store(store).read(Site.parse("img_0"), 0, "mlp_in").astype(np.float32))
        needs = (
            Need("cached", 2 * x.numel()),
            Need("float32", 2 * x.numel() * features),
        )
        for case in CASES:
            dictionary = random_dictionary(case, d_model, features)
            save_dictionary(folder / case.what / dictionary.name, dictionary, None, [])
            ours, plain = by_turns(
                partial(score, store, folder / case.what), partial(plain_pass, x, dictionary), rounds=rounds
            )
            peer = Peer("plain torch pass in RAM, S alone", plain, GOAL)
            yield Line(f"S {images} x {features:,}: {case.what}", ours, (peer,), needs)


def plain_pass(x: torch.Tensor, dictionary: Dictionary) -> torch.Tensor:
    """S (image, feature) of activations (image, token, d_model) in RAM."""
    weight, bias, k = dictionary.encoder.weight.T, dictionary.encoder.bias, dictionary.config.k
    found = []
    with torch.inference_mode():
        for batch in torch.split(x, BATCH):
            z = torch.relu(batch.reshape(-1, x.shape[2]) @ weight + bias)
            if k is not None:
                z = keep_top(z, k)
            found.append(z.view(len(batch), x.shape[1], -1).amax(dim=1))
    return torch.cat(found)


def score(store: Path, dictionaries: Path) -> None:
    """The whole command, into a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as out, quiet():
        scores.run(ScoresSettings(store=store, dictionaries=dictionaries, out=Path(out) / "out"))


def random_dictionary(case: Case, d_model: int, n_features: int) -> Dictionary:
    """A transcoder of normally distributed encoder weights."""
    kind = {"activation": "topk", "k": case.k} if case.k is not None else {}
    dictionary = build(DictionaryConfig("transcoder", Site.parse("img_0"), d_model, n_features, **kind))  # type: ignore[arg-type]
    with torch.no_grad():
        dictionary.initialise(0)
        dictionary.encoder.weight.normal_(std=d_model**-0.5, generator=torch.Generator().manual_seed(0))
        dictionary.encoder.bias.fill_(case.bias)
    return frozen(dictionary)


def random_store(path: Path, n_images: int, tokens: int, d_model: int) -> Path:
    """A finished store of one site and step, normally distributed bfloat16 rows, the same in every chunk."""
    side = 8 * round(tokens**0.5)
    kept = StreamTokens("all", tokens, tokens)
    meta = small_meta(n_images, ("img_0",), (0,), d_model, "bfloat16", kept, chunk_images=16, pictures="none")
    meta = replace(meta, height=side, width=side, num_inference_steps=1, points=("mlp_in",))
    rows = np.random.default_rng(0).standard_normal((16, tokens, d_model), np.float32).astype(ml_dtypes.bfloat16)
    key: Key = (Site.parse("img_0"), 0, "mlp_in")
    writer = StoreWriter.open_or_create(path, meta)
    for part in writer.missing():
        images = meta.part_images(part)
        every = np.broadcast_to(rows, (-(-images.stop // 16), *rows.shape)).reshape(-1, tokens, d_model)
        writer.write_part(part, small_part(meta, part, {key: every}, [f"prompt {i}" for i in range(n_images)]))
    assert writer.seal()
    return path
