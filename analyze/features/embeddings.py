"""One unit vector an image: made by CLIP from the store's pictures and kept in `OUT/embeddings/`, or given in a file.

A cached file is named after what decides its content, the store's id and the identity of the model, and carries both with a
checksum: another store's, another model's or a damaged file is never taken for it.

Nothing is copied whole: a file is mapped into memory, in the numbers that it holds, and read block by block of images.  What stays is
O(images x dim x 4 B) of pages that the system may take back, and, while CLIP embeds, an array of that size.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from analyze.features.clip import Clip, clip_for, load_clip
from analyze.features.settings import CoherenceSettings
from analyze.inputs import Analysis
from store import Store
from store.errors import DamagedError, ForeignError, MismatchError, NonFiniteError, UsageError
from store.files import json_bytes, publish, sha256_bytes

BATCH = 32
"""pictures embedded at once; fixed, because the last bits of a product may depend on it"""
FORMAT, VERSION = "granary image embeddings", 1
RECORD = "granary"
"""the one word of a cached file's metadata, for safetensors writes several in any order"""
BLOCK_BYTES = 4 * 2**20
"""of embeddings that are looked at at once"""
LEAST, MOST = 1e-150, 1e150
"""lengths whose squares are exact in float64"""
MAPPED = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
KEY = "image_embedding"
"""the array of a safetensors file that is taken when it holds several"""


@dataclass(frozen=True)
class Embeddings:
    """Image embeddings of a store, and where they come from."""

    values: Float[np.ndarray, "image dim"]
    """As the model made them or as they were given, of any length and in any floating-point type."""
    lengths: Float[np.ndarray, " image"]
    """The length of each, float64; none is 0."""
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
        _keep(path, _embedded(analysis.store, clip), says, f"--clip {clip.name}")
    values = _cached(path, says, analysis.store.n_images)
    lengths = _lengths(values, str(path))
    return Embeddings(values, lengths, f"sha256-{identity}", f"CLIP model sha256-{clip.identity[:16]}", cached)


def refuse_without_pictures(store: Store) -> None:
    """`UsageError` for a store that kept no pictures to embed."""
    if store.meta.pictures == "none":
        raise UsageError(
            f"{store.path} holds no pictures to embed: give --embeddings FILE (.npy or .safetensors, one row an image), or harvest with "
            "--pictures webp"
        )


def _embedded(store: Store, clip: Clip) -> Float[np.ndarray, "image dim"]:
    """The embeddings of all pictures, read and embedded batch by batch."""
    found = np.empty((0, 0), np.float32)
    with tqdm(total=store.n_images, desc="embeddings", unit="image", mininterval=0.5) as progress:
        for start in range(0, store.n_images, BATCH):
            images = range(start, min(start + BATCH, store.n_images))
            pictures = [picture for image in images if (picture := store.picture(image)) is not None]
            if len(pictures) < len(images):
                raise UsageError(
                    f"{store.path} holds no picture of some of the images {images.start} to {images.stop - 1}"
                )
            batch = clip.embed(pictures)
            if not start:
                found = np.empty((store.n_images, batch.shape[1]), np.float32)
            found[images.start : images.stop] = batch
            progress.update(len(images))
    return found


def _keep(path: Path, values: Float[np.ndarray, "image dim"], says: dict[str, Any], what: str) -> None:
    """Publish embeddings as a safetensors file, without a copy of them; what has no direction is refused and not kept."""
    _lengths(values, what)
    record = json_bytes({**says, "sha256": hashlib.sha256(values.data).hexdigest()}).decode()
    tensor = {"dtype": "F32", "shape": values.shape, "data_offsets": [0, values.nbytes]}
    head = json.dumps(
        {"__metadata__": {RECORD: record}, KEY: tensor}, separators=(",", ":"), ensure_ascii=False
    ).encode()
    head += b" " * (-len(head) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.write(values.data)

    publish(path, write)


def _cached(path: Path, says: dict[str, Any], n_images: int) -> Float[np.ndarray, "image dim"]:
    again = f"delete {path} and run this again"
    try:
        with safe_open(path, "np") as file:
            said = json.loads((file.metadata() or {})[RECORD])
        values = _mapped(path, KEY)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DamagedError(f"{path} holds no embeddings any more ({error}): {again}") from None
    if {key: said.get(key) for key in says} != says:
        raise ForeignError(f"{path} holds the embeddings of another store or model than its name says: {again}")
    if said.get("sha256") != hashlib.sha256(values.data).hexdigest() or len(values) != n_images:
        raise DamagedError(f"{path} differs from the checksum that it carries: {again}")
    return values


def _mapped(path: Path, key: str) -> np.ndarray:
    """An array of a safetensors file that `safe_open` has found sound: mapped, not read."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[key]
    if entry["dtype"] not in MAPPED or 0 in entry["shape"]:
        with safe_open(path, "np") as tensors:
            return np.asarray(tensors.get_tensor(key))
    start = 8 + size + entry["data_offsets"][0]
    return np.asarray(np.memmap(path, MAPPED[entry["dtype"]], "r", start, tuple(entry["shape"])))


def given_embeddings(name: str, n_images: int) -> Embeddings:
    """The embeddings in `FILE.npy` or `FILE.safetensors[#KEY]`, one row for each of the `n_images` images.

    `UsageError` for a file that is not there or an array of another kind, `ForeignError` for what is neither format, `MismatchError` for
    another number of images, `NonFiniteError` for NaN, an infinity or a vector of length 0.
    """
    values = _given(name)
    if values.ndim != 2 or values.dtype.kind != "f":
        raise UsageError(
            f"--embeddings {name} is {values.dtype} of shape {values.shape}: expected floating-point numbers, (image, dim)"
        )
    if len(values) != n_images:
        raise MismatchError(
            f"--embeddings {name} has {len(values)} rows, the store has {n_images} images: one row an image, in the order of the images"
        )
    lengths = _lengths(values, f"--embeddings {name}")
    digest = hashlib.sha256(f"given {values.shape}".encode())
    for block in _blocks(values):
        digest.update(np.ascontiguousarray(values[block], "<f8").data)
    return Embeddings(values, lengths, f"sha256-{digest.hexdigest()}", "given")


def _given(name: str) -> np.ndarray:
    path, key = Path(name), None
    if "#" in name and not path.exists():
        file, _, key = name.rpartition("#")
        path = Path(file)
    if not path.is_file():
        raise UsageError(f"--embeddings {name}: there is no file {path}")
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        if path.suffix != ".safetensors":
            raise UsageError(f"--embeddings {name}: expected a .npy or a .safetensors file")
        with safe_open(path, "np") as tensors:
            chosen = _key(sorted(tensors.keys()), key, name)
        return _mapped(path, chosen)
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


def _blocks(values: Float[np.ndarray, "image dim"]) -> Iterator[slice]:
    size = max(1, BLOCK_BYTES // (8 * max(values.shape[1], 1)))
    for first in range(0, len(values), size):
        yield slice(first, first + size)


def _lengths(values: Float[np.ndarray, "image dim"], what: str) -> Float[np.ndarray, " image"]:
    """The length of each row in float64; `NonFiniteError` names the first image that has no direction."""
    length = np.empty(len(values))
    with np.errstate(over="ignore", invalid="ignore"):
        for block in _blocks(values):
            length[block] = np.linalg.norm(values[block].astype(np.float64), axis=1)
    odd = np.flatnonzero(~((length >= LEAST) & (length <= MOST)))
    if len(odd):
        raise NonFiniteError(
            f"{what}: the embedding of image {odd[0]} holds {_oddity(values[odd[0]])}, and {len(odd) - 1} more such: make them again"
        )
    return length


def _oddity(vector: Float[np.ndarray, " dim"]) -> str:
    if not np.isfinite(vector).all():
        return "a NaN or an infinity"
    if not vector.any():
        return "only zeros"
    greatest = float(np.abs(vector).max())
    return (
        f"numbers too {'great' if greatest > 1 else 'small'} for a length in float64 (the greatest is {greatest:.1e})"
    )
