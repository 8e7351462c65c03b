"""A small store of random activations, written by the real writer: ten images, two sites, two steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import safetensors.numpy
from PIL import Image

from harvest.rows import picture_table
from store import Site, Store, open_store
from store.format import Codec, StoreDtype, StoreMeta, StreamTokens, carrier_of
from store.sites import POINTS, Point
from store.split import split_of
from store.tokens import joint_policy, kept_positions
from store.writer import Part, StoreWriter


@dataclass
class SmallStore:
    """A finished store and the float32 values that went into it, rounded to the store's dtype."""

    path: Path
    store: Store
    values: dict[tuple[Site, int, Point], np.ndarray]


def small_meta(
    n_images: int = 10,
    sites: Sequence[str] = ("img_0", "txt_0"),
    steps: Sequence[int] = (0, 1),
    d_model: int = 16,
    store_dtype: StoreDtype = "bfloat16",
    image_tokens: StreamTokens | None = None,
    text_tokens: StreamTokens | None = None,
    chunk_images: int = 4,
    pictures: str = "png",
    seed: int = 0,
    codec: Codec = "none",
    weights: bool = False,
) -> StoreMeta:
    """A StoreMeta for a 24 x 32 pixel model with 12 image tokens of 8 pixels and 8 text tokens."""
    streams = dict.fromkeys(Site.parse(name).stream for name in sites)
    tokens = {"img": image_tokens or StreamTokens("all", 12, 12), "txt": text_tokens or StreamTokens("all", 8, 8)}
    tokens["joint"] = joint_policy(tokens["txt"], tokens["img"])
    return StoreMeta(
        n_images=n_images,
        chunk_images=chunk_images,
        sites=tuple(sites),
        points=POINTS,
        steps=tuple(steps),
        d_model=d_model,
        store_dtype=store_dtype,
        codec=codec,
        targets="stored",
        tokens={stream: tokens[stream] for stream in streams},
        height=24,
        width=32,
        pixels_per_token=8,
        num_inference_steps=2,
        max_sequence_length=8,
        guidance=0.0,
        seed=seed,
        seeds_per_prompt=1,
        cycle=False,
        batch_size=4,
        threads=1,
        dtype="float32",
        device="cpu",
        pictures=pictures,  # type: ignore[arg-type]
        model={"id": "random", "revision": None, "weights_sha256": {"transformer": "0" * 64}, "transformer": {}},
        scheduler={"class": "none", "config": {}},
        prompts={"source": "made up", "sha256": "0" * 64, "count": n_images, "split": "all"},
        weights={"policy": "copy", "files": {site: weights_name(d_model) for site in sites}}
        if weights
        else {"policy": "none"},
        versions={},
    )


def weights_content(name: str) -> bytes:
    """MLP matrices for a small store: of the width that the name ends with, the same at every site."""
    d_model = int(name.removesuffix(".safetensors").rpartition("-")[2])
    rng = np.random.default_rng(d_model)
    shapes = {"net.0.proj.weight": (4 * d_model, d_model), "net.0.proj.bias": (4 * d_model,)}
    shapes |= {"net.2.weight": (d_model, 4 * d_model), "net.2.bias": (d_model,)}
    tensors = {key: (rng.normal(size=shape) / 4).astype(np.float32) for key, shape in shapes.items()}
    return bytes(safetensors.numpy.save(tensors))


def weights_name(d_model: int) -> str:
    return f"sha256-{'0' * 60}-{d_model}.safetensors"


def make_store(
    path: Path, prompts: Sequence[str] | None = None, truths: Sequence[str] | None = None, **options: object
) -> SmallStore:
    """Write and open a small store; `options` are those of `small_meta`, `truths` adds the column of that name."""
    meta = small_meta(**options)  # type: ignore[arg-type]
    rng = np.random.default_rng(meta.seed)
    words = list(prompts) if prompts is not None else [f"prompt number {i}" for i in range(meta.n_images)]
    logical = carrier_of(meta.store_dtype).logical
    values = {
        (site, step, point): rng.normal(size=(meta.n_images, meta.tokens[site.stream].kept, meta.d_model)).astype(
            logical
        )
        for site in meta.site_objects
        for step in meta.steps
        for point in meta.points
    }
    writer = StoreWriter.open_or_create(path, meta, weights_content if meta.weights["policy"] == "copy" else None)
    for part in writer.missing():
        writer.write_part(part, small_part(meta, part, values, words, truths))
    assert writer.seal()
    return SmallStore(path, open_store(path), {key: value.astype(np.float32) for key, value in values.items()})


def small_part(
    meta: StoreMeta,
    part: int,
    values: dict[tuple[Site, int, Point], np.ndarray],
    words: Sequence[str],
    truths: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
) -> Part:
    """One part of a small store: text lengths (of all images) run from 3 to 8 unless given, pictures are flat grey."""
    images = meta.part_images(part)
    lengths = [3 + i % 6 if lengths is None else lengths[i] for i in images]
    positions = {
        (stream, step): np.stack(
            [
                kept_positions(meta.tokens[stream], meta.seed, i, step, stream, n)
                for i, n in zip(images, lengths, strict=True)
            ]
        )
        for stream in meta.streams
        if not meta.tokens[stream].all_kept
        for step in meta.steps
    }
    activations = {}
    for (site, step, point), array in values.items():
        chosen = array[images.start : images.stop].copy()
        empty = positions.get((site.stream, step))
        if empty is not None:
            chosen[empty < 0] = np.nan
        activations[site, step, point] = chosen
    table = {
        "image": pa.array(images, pa.int64()),
        "prompt": pa.array([words[i] for i in images]),
        "seed": pa.array(images, pa.int64()),
        "split": pa.array([split_of(words[i]) for i in images]),
        "text_ids": pa.array([list(range(n)) for n in lengths], pa.list_(pa.int32())),
        "text_pieces": pa.array([[f"▁w{k}" for k in range(n)] for n in lengths], pa.list_(pa.string())),
        "text_length": pa.array(lengths, pa.int32()),
        "sigma": pa.array([[1.0, 0.5]] * len(images), pa.list_(pa.float32())),
        "scheduler_sigma": pa.array([[1.0, 0.5]] * len(images), pa.list_(pa.float32())),
    }
    if truths is not None:
        table["truth"] = pa.array([truths[i] for i in images])
    pictures = None
    if meta.pictures != "none":
        grey = [Image.new("RGB", (meta.width, meta.height), (20 * (i % 12),) * 3) for i in images]
        pictures = picture_table(images, grey, meta.pictures)
    return Part(activations, positions, pa.table(table), pictures)
