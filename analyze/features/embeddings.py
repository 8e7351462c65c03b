"""One unit vector an image: made by CLIP from the store's pictures and kept in `OUT/embeddings/`, or given in a file.

A cached file is named after what decides its content, the store's id and the identity of the model, and carries both with a
checksum: another store's, another model's or a damaged file is never taken for it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from analyze.features.clip import Clip, clip_for, load_clip
from analyze.features.settings import CoherenceSettings
from analyze.inputs import Analysis
from store import Store
from store.errors import DamagedError, ForeignError, MismatchError, NonFiniteError, UsageError
from store.files import json_bytes, sha256_bytes, write_bytes

BATCH = 32
"""pictures embedded at once; fixed, because the last bits of a product may depend on it"""
FORMAT, VERSION = "granary image embeddings", 1
RECORD = "granary"
"""the one word of a cached file's metadata, for safetensors writes several in any order"""
KEY = "image_embedding"
"""the array of a safetensors file that is taken when it holds several"""


@dataclass(frozen=True)
class Embeddings:
    """Image embeddings of a store, and where they come from."""

    values: Float[np.ndarray, "image dim"]
    """Unit vectors, float64."""
    id: str
    """Equal exactly for the same embeddings: a hash of store and model, or of the given numbers."""
    source: str
    """In words, without a path."""
    cached: bool = False
    """Whether they were there already."""


def image_embeddings(analysis: Analysis, settings: CoherenceSettings) -> Embeddings:
    """The embeddings that the settings ask for: given, cached, or made now.

    `UsageError` when the store holds no pictures, `NonFiniteError` for NaN or for a vector without a direction, and what
    `given_embeddings` and `load_clip` raise.
    """
    if settings.embeddings is not None:
        return given_embeddings(settings.embeddings, analysis.store.n_images)
    refuse_without_pictures(analysis.store)
    clip = load_clip(clip_for(analysis.store, settings.clip), settings.device)
    identity = sha256_bytes(f"{FORMAT} {VERSION} {analysis.store.id} {clip.identity}".encode())
    path = analysis.out / "embeddings" / f"{identity[:16]}.safetensors"
    says = {"format": FORMAT, "version": VERSION, "store": analysis.store.id, "model": clip.identity}
    cached = path.exists()
    if not cached:
        values = _embedded(analysis.store, clip)
        _unit(values, f"--clip {clip.name}")  # refuses what must not be kept
        record = json_bytes({**says, "sha256": sha256_bytes(values.tobytes())}).decode()
        write_bytes(path, safetensors.numpy.save({KEY: values}, {RECORD: record}))
    unit = _unit(_cached(path, says, analysis.store.n_images), str(path))
    return Embeddings(unit, f"sha256-{identity}", f"CLIP model sha256-{clip.identity[:16]}", cached)


def refuse_without_pictures(store: Store) -> None:
    """`UsageError` for a store that kept no pictures to embed."""
    if store.meta.pictures == "none":
        raise UsageError(
            f"{store.path} holds no pictures to embed: give --embeddings FILE (.npy or .safetensors, one row an image), or harvest with "
            "--pictures webp"
        )


def _embedded(store: Store, clip: Clip) -> Float[np.ndarray, "image dim"]:
    """The embeddings of all pictures, read and embedded batch by batch."""
    found = []
    with tqdm(total=store.n_images, desc="embeddings", unit="image", mininterval=0.5) as progress:
        for start in range(0, store.n_images, BATCH):
            images = range(start, min(start + BATCH, store.n_images))
            pictures = [picture for image in images if (picture := store.picture(image)) is not None]
            if len(pictures) < len(images):
                raise UsageError(
                    f"{store.path} holds no picture of some of the images {images.start} to {images.stop - 1}"
                )
            found.append(clip.embed(pictures))
            progress.update(len(images))
    return np.concatenate(found).astype(np.float32)


def _cached(path: Path, says: dict[str, Any], n_images: int) -> Float[np.ndarray, "image dim"]:
    again = f"delete {path} and run this again"
    try:
        with safe_open(path, "np") as file:
            said, values = json.loads((file.metadata() or {})[RECORD]), file.get_tensor(KEY)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DamagedError(f"{path} holds no embeddings any more ({error}): {again}") from None
    if {key: said.get(key) for key in says} != says:
        raise ForeignError(f"{path} holds the embeddings of another store or model than its name says: {again}")
    if said.get("sha256") != sha256_bytes(values.tobytes()) or len(values) != n_images:
        raise DamagedError(f"{path} differs from the checksum that it carries: {again}")
    return np.asarray(values)


def given_embeddings(name: str, n_images: int) -> Embeddings:
    """The embeddings in `FILE.npy` or `FILE.safetensors[#KEY]`, one row for each of the `n_images` images.

    `UsageError` for a file that is not there or an array of another kind, `ForeignError` for what is neither format, `MismatchError` for
    another number of images, `NonFiniteError` for NaN, an infinity or a vector of length 0.
    """
    values, file = _given(name)
    if values.ndim != 2 or values.dtype.kind != "f":
        raise UsageError(
            f"--embeddings {name} is {values.dtype} of shape {values.shape}: expected floating-point numbers, (image, dim)"
        )
    if len(values) != n_images:
        raise MismatchError(
            f"--embeddings {name} has {len(values)} rows, the store has {n_images} images: one row an image, in the order of the images"
        )
    unit = _unit(values, f"--embeddings {name}")
    digest = hashlib.sha256(
        f"given {values.shape}".encode() + np.ascontiguousarray(values, "<f8").tobytes()
    ).hexdigest()
    return Embeddings(unit, f"sha256-{digest}", f"given: {file}")


def _given(name: str) -> tuple[np.ndarray, str]:
    path, key = Path(name), None
    if "#" in name and not path.exists():
        file, _, key = name.rpartition("#")
        path = Path(file)
    if not path.is_file():
        raise UsageError(f"--embeddings {name}: there is no file {path}")
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False), path.name
        if path.suffix != ".safetensors":
            raise UsageError(f"--embeddings {name}: expected a .npy or a .safetensors file")
        with safe_open(path, "np") as tensors:
            return tensors.get_tensor(_key(sorted(tensors.keys()), key, name)), path.name
    except (SafetensorError, ValueError, EOFError) as error:
        if isinstance(error, UsageError):
            raise
        raise ForeignError(f"--embeddings {name} cannot be read as {path.suffix} ({error}): write it again") from None


def _key(there: list[str], asked: str | None, name: str) -> str:
    if asked is None and len(there) == 1:
        return there[0]
    wanted = asked or KEY
    if wanted not in there:
        raise UsageError(
            f"--embeddings {name}: it holds {', '.join(there) or 'no array'}; say which as FILE.safetensors#KEY"
        )
    return wanted


def _unit(values: Float[np.ndarray, "image dim"], what: str) -> Float[np.ndarray, "image dim"]:
    """The rows as unit vectors in float64; `NonFiniteError` names the first image that has no direction."""
    exact = values.astype(np.float64)
    length = np.linalg.norm(exact, axis=1, keepdims=True)
    odd = np.flatnonzero(~np.isfinite(length[:, 0]) | (length[:, 0] == 0))
    if len(odd):
        found = "only zeros" if length[odd[0], 0] == 0 else "a NaN or an infinity"
        raise NonFiniteError(
            f"{what}: the embedding of image {odd[0]} holds {found}, and {len(odd) - 1} more such: make them again"
        )
    return np.asarray(exact / length)
