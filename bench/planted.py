"""Rows whose causes are known: sparse sums of random directions and a little noise, as a pack to train on and one to measure on.

Each row has `ACTIVE` of `CAUSES` causes, each with a strength between 0.5 and 1.5.  A cause adds one unit
direction to mlp_in and another to mlp_out, and each point has noise of its own.  A dictionary that has found the directions
explains all but the noise.
"""

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from store.format import StoreMeta, StreamTokens
from store.pack import PackSettings
from store.pack import run as make_pack
from store.shards import Pack, open_pack
from store.sites import Point, Site
from store.writer import Key, StoreWriter
from tests.small_store import small_meta, small_part

SITE = Site.parse("img_0")
CAUSES, ACTIVE, NOISE = 2048, 16, 0.02
TOKENS = 64
"""rows an image"""


def planted_store(path: Path, rows: int, d_model: int, **changes: Any) -> Path:
    """A finished store of one site and step and so many rows; the same each time.  `changes` are to its metadata."""
    tokens = StreamTokens("all", TOKENS, TOKENS)
    meta = small_meta(rows // TOKENS, (str(SITE),), (0,), d_model, "bfloat16", tokens, chunk_images=64, pictures="none")
    meta = replace(meta, height=64, width=64, num_inference_steps=1, **changes)
    writer = StoreWriter.open_or_create(path, meta)
    values: dict[Key, np.ndarray] = {(SITE, 0, point): planted_rows(meta, point) for point in meta.points}
    for part in writer.missing():
        writer.write_part(part, small_part(meta, part, values, [f"prompt {i}" for i in range(meta.n_images)]))
    assert writer.seal()
    return path


def planted_rows(meta: StoreMeta, point: Point) -> np.ndarray:
    """The rows of a point, (image, token, d_model), bfloat16."""
    chance = np.random.default_rng((0, 0))  # the same causes at both points
    noise, fixed = (np.random.default_rng((0, draw, point == "mlp_in")) for draw in (1, 2))
    directions = fixed.standard_normal((CAUSES, meta.d_model), np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows = np.empty((meta.n_images, TOKENS, meta.d_model), meta.carrier.logical)
    for image in range(meta.n_images):
        causes = chance.integers(CAUSES, size=(TOKENS, ACTIVE))
        strengths = chance.random((TOKENS, 1, ACTIVE), np.float32) + np.float32(0.5)
        clean = (strengths @ directions[causes])[:, 0]
        rows[image] = clean + np.float32(NOISE) * noise.standard_normal(clean.shape, np.float32)
    return rows


def packs_of(store: Path, folder: Path) -> tuple[Pack, Pack]:
    """The training pack and the held-out pack of a store, below `folder`."""
    packs = []
    for split in ("train", "val"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_pack(PackSettings(store=store, out=folder / split, split=split))
        packs.append(open_pack(folder / split))
    return packs[0], packs[1]
