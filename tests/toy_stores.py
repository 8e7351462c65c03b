"""Small stores whose rows can be told apart, or whose mlp_out is a function of mlp_in that a dictionary can learn."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.numpy

from store.format import StoreDtype, StoreMeta, StreamTokens
from store.sites import Point, Site
from store.writer import StoreWriter
from tests.small_store import small_meta, small_part

SIGMAS = (1.0, 0.75390625, 0.5, 0.25)


def toy_store(
    path: Path,
    n_images: int = 24,
    sites: tuple[str, ...] = ("img_0", "img_1", "txt_0"),
    steps: tuple[int, ...] = (0, 2),
    d_model: int = 4,
    img_tokens: int = 6,
    text_policy: str = "all",
    store_dtype: StoreDtype = "bfloat16",
    chunk_images: int = 4,
    seed: int = 0,
    learnable: bool = False,
    mlp: bool = False,
    sigmas: tuple[float, ...] = SIGMAS,
    **changes: Any,
) -> Path:
    """A finished store at `path`, 4 inference steps; each row says where it comes from, unless it is `learnable`.

    With `mlp` mlp_out is what the MLP of the site makes of mlp_in (learnable), and `targets="recomputed"` leaves it out;
    the other `changes` are to the store's metadata.
    """
    meta = small_meta(
        n_images, sites, steps, d_model, store_dtype, StreamTokens("all", img_tokens, img_tokens),
        StreamTokens(text_policy, 8, 8), chunk_images, "none", seed,
    )  # fmt: skip
    meta = replace(meta, num_inference_steps=4, **changes)
    contents: dict[str, bytes] = {}
    if meta.targets == "recomputed":
        contents = {f"sha256-{hashlib.sha256(c).hexdigest()}.safetensors": c for c in _mlp_files(meta).values()}
        files = dict(zip(meta.sites, contents, strict=True))
        meta = replace(meta, points=("mlp_in",), weights={"policy": "copy", "files": files})
    fill = _computed if mlp else _learnable if learnable else _telling
    values = {
        (site, step, point): fill(meta, site, step, point).astype(meta.carrier.logical)
        for site in meta.site_objects
        for step in steps
        for point in meta.points
    }
    prompts = [f"prompt {image} of {seed}" for image in range(n_images)]
    writer = StoreWriter.open_or_create(path, meta, contents.__getitem__)
    for part in writer.missing():
        content = small_part(meta, part, values, prompts)
        sigma = pa.array([list(sigmas)] * len(content.prompts), pa.list_(pa.float32()))
        table = content.prompts.drop_columns(["sigma", "scheduler_sigma"])
        table = table.append_column("sigma", sigma).append_column("scheduler_sigma", sigma)
        writer.write_part(part, replace(content, prompts=table))
    assert writer.seal()
    return path


def _telling(meta: StoreMeta, site: Site, step: int, point: Point) -> np.ndarray:
    """Channels: image, slot, step, site and point; small whole numbers, exact in every dtype."""
    kept = meta.tokens[site.stream].kept
    image, slot = np.meshgrid(np.arange(meta.n_images), np.arange(kept), indexing="ij")
    place = np.full_like(image, 2 * site.layer + (point == "mlp_out"))
    channels = np.stack([image, slot, np.full_like(image, step), place], axis=-1)
    return np.tile(channels, meta.d_model // 4)


def _learnable(meta: StoreMeta, site: Site, step: int, point: Point) -> np.ndarray:
    """A few of many causes at a time; each reads one direction and writes another; mlp_out also moves with the step."""
    shape = (meta.n_images, meta.tokens[site.stream].kept, 2 * meta.d_model)
    fixed = np.random.default_rng((meta.seed, site.layer, site.stream == "txt"))
    reads, writes = fixed.normal(size=(2, 2 * meta.d_model, meta.d_model))
    draw = np.random.default_rng((meta.seed, step, 7))
    strength = draw.uniform(0.5, 1.5, shape) * (draw.uniform(size=shape) < 3 / shape[-1])
    return np.asarray(strength @ (reads if point == "mlp_in" else writes) + (0.5 * step if point == "mlp_out" else 0.0))


def mlp_of_site(site: Site, d_model: int) -> dict[str, np.ndarray]:
    """Made-up MLP matrices, other ones at every site."""
    rng = np.random.default_rng((d_model, site.layer, site.stream == "txt"))
    shapes = {
        "net.0.proj.weight": (4 * d_model, d_model), "net.0.proj.bias": (4 * d_model,),
        "net.2.weight": (d_model, 4 * d_model), "net.2.bias": (d_model,),
    }  # fmt: skip
    return {name: (rng.normal(size=shape) / d_model**0.5).astype(np.float32) for name, shape in shapes.items()}


def mlp_in_numpy(site: Site, x: np.ndarray) -> np.ndarray:
    """What the site's MLP writes, float64, as its formula says."""
    into, into_bias, out, out_bias = (tensor.astype(np.float64) for tensor in mlp_of_site(site, x.shape[-1]).values())
    h = x.astype(np.float64) @ into.T + into_bias
    h = 0.5 * h * (1 + np.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))
    return np.asarray(h @ out.T + out_bias)


def _mlp_files(meta: StoreMeta) -> dict[Site, bytes]:
    return {site: bytes(safetensors.numpy.save(mlp_of_site(site, meta.d_model))) for site in meta.site_objects}


def _computed(meta: StoreMeta, site: Site, step: int, point: Point) -> np.ndarray:
    x = _learnable(meta, site, step, "mlp_in").astype(meta.carrier.logical)
    return x if point == "mlp_in" else mlp_in_numpy(site, x)
