"""Packs whose shards are written directly, row by row as the caller says, without a store."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from store.files import self_checked, write_json
from store.shards import FORMAT, METADATA_KEY, Pack, crc32c_hex, open_pack, shard_file, weights_name
from store.sites import POINTS, Site

SITE = Site.parse("img_0")


def written_pack(path: Path, shards: Sequence[Mapping[str, np.ndarray]], mlp: bytes | None = None) -> Pack:
    """A pack of `img_0` of these shards; their first point decides width and dtype.

    A shard has one or two points and may have sigma, image, step and token, which are 1, 0, 0 and the number of the row where
    they are left out.  With `mlp` targets are recomputed by it.
    """
    points = [point for point in POINTS if point in shards[0]]
    first = shards[0][points[0]]
    weights = {str(SITE): f"sha256-{0:064d}.safetensors"} if mlp is not None else {}
    plan: dict[str, Any] = {
        "store": "none", "model": {}, "split": "train", "seed": 0, "shard_mb": 1, "points": points, "sites": [str(SITE)],
        "steps": [0], "d_model": first.shape[1], "dtype": first.dtype.name, "weights": weights,
        "targets": "stored" if mlp is None else "recomputed",
    }  # fmt: skip
    files = {}

    def write(name: str, data: bytes) -> None:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
        files[name] = {"bytes": len(data), "crc32c": crc32c_hex(data)}

    for index, shard in enumerate(shards):
        write(shard_file(SITE, index), _shard(index, shard))
    if mlp is not None:
        write(weights_name(weights[str(SITE)]), mlp)
    rows = [len(shard[points[0]]) for shard in shards]
    manifest = {
        "format": FORMAT, "format_version": 1, "key": "written", "plan": plan, "files": files,
        "streams": {"img": {"rows": sum(rows), "shards": rows, "images": 1}},
    }  # fmt: skip
    write_json(path / "manifest.json", self_checked(manifest))
    return open_pack(path)


def _shard(index: int, given: Mapping[str, np.ndarray]) -> bytes:
    rows = len(next(iter(given.values())))
    columns = {
        "sigma": np.ones(rows, np.float32), "image": np.zeros(rows, np.int32), "step": np.zeros(rows, np.int16),
        "token": np.arange(rows, dtype=np.int32),
    }  # fmt: skip
    about = json.dumps({"pack": "written", "site": str(SITE), "shard": index})
    return bytes(safetensors.numpy.save(columns | dict(given), {METADATA_KEY: about}))


def telling_rows(shard: int, rows: int, d_model: int = 4, dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    """Both points of a shard; a row of `mlp_in` is (shard, row / 128, row % 128, …), exact in bfloat16, `mlp_out` its negative."""
    row = np.arange(rows)
    channels = np.stack([np.full(rows, shard + 1), row // 128, row % 128, np.ones(rows)], axis=1)
    x = np.tile(channels, d_model // 4).astype(dtype)
    return {"mlp_in": x, "mlp_out": -x}
