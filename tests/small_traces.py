"""A small store with traces of random numbers, written by the real writer: no model, and nothing that replays."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from store import Store, open_store
from store.format import StoreMeta
from store.sites import POINTS
from store.traces import (
    MATRICES,
    TRACE_FORMAT,
    TRACE_VERSION,
    Traced,
    TraceDtype,
    parse_trace_file,
    trace_files,
    trace_shapes,
)
from store.writer import StoreWriter
from tests.small_store import small_meta, small_part

HEADS = 4
SITES = ("img_0", "img_1", "txt_0", "txt_1")


def traced_meta(
    images: tuple[int, ...] = (1, 2, 9), steps: tuple[int, ...] = (0, 1), dtype: TraceDtype = "bfloat16", **options: Any
) -> StoreMeta:
    """The metadata of a small store with traces of two blocks; `options` are those of `small_meta`."""
    meta = small_meta(**{"sites": SITES, **options})
    names = tuple(f"sha256-{'0' * 60}-attention-{block}.safetensors" for block in (0, 1))
    return replace(meta, traces=Traced(images, steps, (0, 1), dtype, names).attributes())


def trace_content(meta: StoreMeta, name: str) -> bytes:
    """The content of a trace's file: numbers drawn by its name."""
    found = parse_trace_file(name)
    assert found is not None
    image, step, block = found
    rng = np.random.default_rng(found)
    tensors = {}
    for key, (dtype, shape) in trace_shapes(meta, block).items():
        values = torch.from_numpy(rng.normal(size=shape).astype(np.float32)).to(getattr(torch, dtype))
        tensors[key] = values.reshape(shape[0], HEADS, -1) if key in ("q", "k") else values
    replay = {f"{point}.{stream}": 1e-3 for point in ("attn", "mlp_in", "resid") for stream in ("img", "txt")}
    about = {
        "format": TRACE_FORMAT, "version": TRACE_VERSION, "image": image, "step": step, "block": block, "sigma": 0.5,
        "replay": replay,
    }  # fmt: skip
    return bytes(safetensors.torch.save(tensors, {"granary": json.dumps(about, sort_keys=True)}))


def matrices(name: str) -> bytes:
    """The matrices of a block whose file's name ends with its number."""
    rng = np.random.default_rng(int(name.removesuffix(".safetensors").rpartition("-")[2]))
    shapes = {f"{matrix}.weight": (16, 16) for matrix in MATRICES} | {f"{matrix}.bias": (16,) for matrix in MATRICES}
    tensors = {key: torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for key, shape in shapes.items()}
    return bytes(safetensors.torch.save(tensors))


def write_traced(path: Path, meta: StoreMeta | None = None, parts: int | None = None) -> StoreWriter:
    """Write the first `parts` (or all, and the seal) of a small store with traces."""
    meta = meta or traced_meta()
    rng = np.random.default_rng(meta.seed)
    values = {
        (site, step, point): rng.normal(size=(meta.n_images, meta.tokens[site.stream].kept, meta.d_model)).astype(
            meta.carrier.logical
        )
        for site in meta.site_objects
        for step in meta.steps
        for point in POINTS
    }
    words = [f"prompt number {image}" for image in range(meta.n_images)]
    writer = StoreWriter.open_or_create(path, meta, matrices)
    for part in writer.missing()[:parts]:
        with writer.claim(part) as lease:
            assert lease is not None
            replay = {"attn": 1e-3, "mlp_in": 2e-3, "resid": 3e-3}
            entries = {
                name: writer.put_trace(lease, name, trace_content(meta, name), replay)
                for name in trace_files(meta, meta.part_images(part))
            }
            writer.write_part(part, replace(small_part(meta, part, values, words), traces=entries), lease)
    if parts is None:
        assert writer.seal()
    return writer


def make_traced(path: Path, **options: Any) -> Store:
    """A finished small store with traces; `options` are those of `traced_meta`."""
    write_traced(path, traced_meta(**options))
    return open_store(path)
