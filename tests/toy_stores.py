"""Small stores whose rows can be told apart, or whose mlp_out is a function of mlp_in that a dictionary can learn."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

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
) -> Path:
    """A finished store at `path`, 4 inference steps; each row says where it comes from, unless it is `learnable`."""
    meta = small_meta(
        n_images, sites, steps, d_model, store_dtype, StreamTokens("all", img_tokens, img_tokens),
        StreamTokens(text_policy, 8, 8), chunk_images, "none", seed,
    )  # fmt: skip
    meta = replace(meta, num_inference_steps=4)
    fill = _learnable if learnable else _telling
    values = {
        (site, step, point): fill(meta, site, step, point).astype(meta.carrier.logical)
        for site in meta.site_objects
        for step in steps
        for point in meta.points
    }
    prompts = [f"prompt {image} of {seed}" for image in range(n_images)]
    writer = StoreWriter.open_or_create(path, meta)
    for part in writer.missing():
        content = small_part(meta, part, values, prompts)
        sigma = pa.array([list(SIGMAS)] * len(content.prompts), pa.list_(pa.float32()))
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
