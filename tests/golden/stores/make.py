"""Writes the golden stores, which every later version must read: `python -m tests.golden.stores.make`.

To be run once for a format version, when it is settled, and then never again: the point of these files is that they are old.
For a new format version another set is added beside them.
"""

import hashlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
import torch

from harvest.models.model import tensors_hash
from store import Store, open_store
from store.files import json_bytes
from store.format import StoreMeta, StreamTokens
from store.layout import runs_folder
from store.writer import Key, StoreWriter
from tests.small_store import small_meta, small_part

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.json"
MOST_BYTES = 100_000
D_MODEL = 4
WORDS = ["a red circle on white", "zwei Quadrate, blau 🟦", "", "a red circle on white --ar 16:9", "ein Haus"]


def metas() -> dict[str, StoreMeta]:
    """The stores, by the names of their folders: every dtype, codec, token policy, target, and kind of picture."""
    small: dict[str, Any] = {"d_model": D_MODEL, "chunk_images": 2}
    few, real = StreamTokens("sample", 5, 12), StreamTokens("real+1", 7, 8)
    made = {
        "v1-bfloat16": small_meta(3, ("img_0", "txt_12"), (1,), text_tokens=real, pictures="png", **small),
        "v1-float16": small_meta(2, ("img_0",), (0, 1), store_dtype="float16", image_tokens=few, codec="zstd",
                                 pictures="none", **small),
        "v1-float32": small_meta(2, ("img_3",), (0,), store_dtype="float32", pictures="webp", **small),
        "v1-fp8": small_meta(3, ("txt_0",), (0,), store_dtype="fp8-e4m3", text_tokens=real, codec="zstd", pictures="none", **small),
    }  # fmt: skip
    files = {"img_3": f"sha256-{tensors_hash(_torch(weights()))}.safetensors"}
    made["v1-float32"] = replace(
        made["v1-float32"], targets="recomputed", points=("mlp_in",), weights={"policy": "copy", "files": files}
    )
    return made


def values_of(meta: StoreMeta) -> dict[Key, np.ndarray]:
    """What is stored: multiples of a quarter from -2 to 2, which every dtype holds exactly; and in the last image, sevenths."""
    logical = meta.carrier.logical
    found: dict[Key, np.ndarray] = {}
    for site in meta.site_objects:
        for step in meta.steps:
            for point in meta.points:
                kept = meta.tokens[site.stream].kept
                image, token, channel = np.ogrid[: meta.n_images, :kept, : meta.d_model]
                number = 31 * image + 7 * token + 3 * channel + 5 * step + 2 * site.layer + (point == "mlp_out")
                exact = (number % 17 - 8) / 4.0
                exact[-1] = (number[-1] % 17 - 8) / 7.0
                found[site, step, point] = exact.astype(np.float32).astype(logical)
    return found


def weights() -> dict[str, np.ndarray]:
    """The matrices of an MLP, small enough to look at."""
    count = 4 * D_MODEL * D_MODEL
    ramp = ((np.arange(count) % 13 - 6) / 8).astype(np.float32)
    return {
        "net.0.proj.weight": ramp.reshape(4 * D_MODEL, D_MODEL), "net.0.proj.bias": ramp[: 4 * D_MODEL].copy(),
        "net.2.weight": ramp[::-1].reshape(D_MODEL, 4 * D_MODEL).copy(), "net.2.bias": ramp[:D_MODEL].copy(),
    }  # fmt: skip


def _torch(tensors: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in tensors.items()}


def write(folder: Path) -> None:
    """Write all of them below a folder."""
    for name, meta in metas().items():
        path, values = folder / name, values_of(meta)
        writer = StoreWriter.open_or_create(path, meta, lambda _: bytes(safetensors.numpy.save(weights())))
        for part in writer.missing():
            writer.write_part(part, small_part(meta, part, values, WORDS))
        assert writer.seal()
        shutil.rmtree(runs_folder(path))


def reading(store: Store) -> dict[str, str]:
    """What a store says, as hashes by name; pictures of a lossy format by their size alone."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in _said(store)}


def _said(store: Store) -> Iterator[tuple[str, bytes]]:
    yield "id", store.id.encode()
    yield "prompts", json_bytes(store.prompts().to_pylist())
    for image in range(store.n_images):
        picture = store.picture(image)
        if picture is not None:
            yield (
                f"picture {image}",
                f"{picture.size}".encode() + (picture.tobytes() if store.meta.pictures == "png" else b""),
            )
    for site in store.sites:
        yield f"weights of {site}", store.weights_file(site) or b""
        for step in store.steps:
            yield f"tokens {site.stream} {step}", store.tokens(site.stream, step).astype("<i4").tobytes()
            for point in store.points:
                values = store.read(site, step, point)
                carried = values.view(np.uint16) if values.dtype == ml_dtypes.bfloat16 else values
                yield f"{site} {step} {point}", carried.astype(carried.dtype.newbyteorder("<")).tobytes()
                found = store.statistics(site, step, point)
                yield f"statistics of {site} {step} {point}", np.concatenate([found.sum, found.square_sum]).tobytes()


def main() -> None:
    """Remove the old ones, write new ones, and what they must say."""
    for name in metas():
        shutil.rmtree(HERE / name, ignore_errors=True)
    write(HERE)
    EXPECTED.write_bytes(json_bytes({name: reading(open_store(HERE / name)) for name in metas()}))
    size = sum(file.stat().st_size for file in HERE.rglob("*") if file.is_file() and file.suffix != ".py")
    print(f"{len(metas())} stores of {size:,} bytes in {HERE}")
    if size > MOST_BYTES:
        sys.exit(f"that is more than {MOST_BYTES:,}")


if __name__ == "__main__":
    main()
