"""Score matrices on disk: `OUT/<name>/step.K/` is a Zarr group, with `features.parquet` beside its two arrays.

    scores        float32 or float16 (image, feature)    S: the largest activation over the counted tokens of the image
    argmax_token  int32 (image, feature)                 where it was found, a position in the stream; -1: no token counted
    scores_image  as `scores`                            of a joint site: over its image tokens alone; 0 where none counted
    scores_real   as `scores`                            over its real text tokens; `scores_padding`, where padding counted

All are chunked by blocks of images and features, so that one feature over all images is a cheap read, and
carry a crc32c per chunk.  A folder is written elsewhere and renamed when whole: it is all there or not.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from jaxtyping import Float, Int
from zarr.codecs import Crc32cCodec, ZstdCodec

from store.errors import DamagedError, ForeignError, NonFiniteError, UsageError
from store.files import fsync_file, temporary_of
from store.strata import Group
from store.tables import write_table

IMAGE_BLOCK = 512
FEATURE_BLOCK = 256
FORMAT = "granary score matrix"
VERSION = 2
FEATURES = "features.parquet"
SCORES, TOKENS = "scores", "argmax_token"
CONFIG: Any = {"write_empty_chunks": True}
"""Of our arrays: a chunk whose every value is the fill value is a file like any other, and one that is not there is missed."""
UNFINISHED = "unfinished"
"""Folder of OUT where matrices lie until they are whole."""
DType = Literal["float32", "float16"]


def scores_of(kind: Group) -> str:
    """The name of the array of scores over one kind of tokens: `scores_image`; of all, `scores`."""
    return SCORES if kind == "all" else f"{SCORES}_{kind}"


def step_folder(out: Path, name: str, step: int) -> Path:
    """Where the score matrix of one dictionary and step lies."""
    return out / name / f"step.{step}"


@dataclass(frozen=True)
class ScoreWriter:
    """A score matrix being written block by block, in any order, by any number of processes."""

    folder: Path
    n_images: int
    n_features: int
    dtype: DType
    attributes: dict[str, Any]
    kinds: tuple[Group, ...] = ()
    """of tokens, each of which has a matrix of its own beside that of all"""

    @property
    def arrays(self) -> dict[str, str]:
        """Every array and its dtype."""
        return {SCORES: self.dtype, TOKENS: "int32", **{scores_of(kind): self.dtype for kind in self.kinds}}

    def begin(self) -> None:
        """Make the folder, or go on with it; one of other attributes is thrown away with all that lies beside it."""
        if self.folder.exists() and self._is_mine():
            return
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        temporary = temporary_of(self.folder, "new")
        shutil.rmtree(temporary, ignore_errors=True)
        group = zarr.create_group(temporary, zarr_format=3, attributes=self._every_attribute())
        shape = (self.n_images, self.n_features)
        for name, dtype in self.arrays.items():
            _create(group, name, shape, dtype, -1 if name == TOKENS else float("nan"))
        temporary.replace(self.folder)

    def _every_attribute(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **self.attributes}

    def _is_mine(self) -> bool:
        try:
            group = zarr.open_group(self.folder, mode="r")
            scores = group[SCORES]
            return (
                dict(group.attrs) == self._every_attribute()
                and (str(scores.dtype), scores.shape) == (self.dtype, (self.n_images, self.n_features))  # type: ignore[union-attr]
                and all(name in group for name in self.arrays)
            )
        except (FileNotFoundError, KeyError, ValueError):
            return False

    def write(
        self,
        images: slice,
        features: slice,
        scores: Float[np.ndarray, "image feature"],
        tokens: Int[np.ndarray, "image feature"],
        by_kind: Mapping[Group, Float[np.ndarray, "image feature"]] = MappingProxyType({}),
    ) -> None:
        """Put a block of whole chunks onto the disk, names and all: what is written after it may say that it is there."""
        found = {SCORES: scores, **{scores_of(kind): by_kind[kind] for kind in self.kinds}}
        ready = {name: self.rounded(values).astype(self.dtype) for name, values in found.items()}
        for name, values in {**ready, TOKENS: tokens}.items():
            opened: Any = zarr.open_array(self.folder / name, mode="r+")
            array = opened.with_config(CONFIG)  # which an array that is opened has forgotten
            array[images, features] = values
            chunks = self.folder / name / "c"
            for row in _chunks(images, array.chunks[0]):
                for column in _chunks(features, array.chunks[1]):
                    fsync_file(chunks / str(row) / str(column))
                fsync_file(chunks / str(row))
            fsync_file(chunks)
            fsync_file(chunks.parent)

    def rounded(self, scores: Float[np.ndarray, "image feature"]) -> Float[np.ndarray, "image feature"]:
        """Scores as they will be read again, float32.  `NonFiniteError` for one that float16 does not hold."""
        if self.dtype == "float32":
            return scores
        with np.errstate(over="ignore"):
            found = scores.astype(self.dtype).astype(np.float32)
        if np.isinf(found).any():
            raise NonFiniteError(
                f"{self.attributes.get('dictionary_name')} reaches {scores.max():.6g} on this store, and float16 holds "
                "65504 at most: use --dtype float32, with another --out"
            )
        return found

    def finish(self, folder: Path, features: pa.Table) -> None:
        """Write the feature table, and make all appear as `folder`.  `DamagedError` where a chunk is not there."""
        for name in self.arrays:
            chunk = _missing_chunk(self.folder / name, (slice(0, self.n_images), slice(0, self.n_features)))
            if chunk is not None:
                raise DamagedError(
                    f"{chunk} was written and is not there any more: delete {self.folder.parent} and run the same command again"
                )
        write_table(self.folder / FEATURES, features)
        for path in [*self.folder.rglob("*"), self.folder]:
            if path.suffix in (".partial", ".tmp"):  # of a process that was killed
                path.unlink()
            elif path.is_dir() or path.suffix == ".json":
                fsync_file(path)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.replace(folder)
        fsync_file(folder.parent)


def _chunks(part: slice, size: int) -> range:
    return range(part.start // size, -(-part.stop // size))


def _missing_chunk(place: Path, chosen: tuple[slice, slice | int]) -> Path | None:
    """The first file that is not there of the chunks of an array that hold what is chosen; zarr reads it as the fill value."""
    array: Any = zarr.open_array(place, mode="r")
    parts = [
        slice(part % size, part % size + 1) if isinstance(part, int) else slice(*part.indices(size)[:2])
        for part, size in zip(chosen, array.shape, strict=True)
    ]
    for row in _chunks(parts[0], array.chunks[0]):
        for column in _chunks(parts[1], array.chunks[1]):
            chunk = place / "c" / str(row) / str(column)
            if not chunk.exists():
                return chunk
    return None


def chunk_shape(n_images: int, n_features: int) -> tuple[int, int]:
    """Images and features of a chunk."""
    return min(IMAGE_BLOCK, n_images), min(FEATURE_BLOCK, n_features)


def _create(group: zarr.Group, name: str, shape: tuple[int, int], dtype: str, fill: float | int) -> Any:
    return group.create_array(
        name,
        shape=shape,
        chunks=chunk_shape(*shape),
        dtype=dtype,
        fill_value=fill,
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        dimension_names=["image", "feature"],
        config=CONFIG,
    )


@dataclass(frozen=True)
class ScoreMatrix:
    """A score matrix that is whole on disk; reads are by blocks of features or by single features."""

    folder: Path
    attributes: dict[str, Any]
    n_images: int
    n_features: int
    dtype: str = "float32"
    """what scores are kept in"""

    @classmethod
    def open(cls, folder: Path) -> "ScoreMatrix":
        """The matrix in `folder`; `UsageError` when it was never computed, `ForeignError` when it is something else."""
        if not folder.exists():
            raise UsageError(f"there are no scores in {folder}: run python -m analyze scores with the same flags first")
        try:
            group = zarr.open_group(folder, mode="r")
            attributes = dict(group.attrs)
            scores: Any = group[SCORES]
            shape = scores.shape
        except (FileNotFoundError, KeyError, ValueError):
            raise ForeignError(
                f"{folder} is not a score matrix of ours: choose another --out, or delete that folder"
            ) from None
        if attributes.get("format") != FORMAT or attributes.get("version") != VERSION:
            found = f"{attributes.get('format')} version {attributes.get('version')}"
            raise ForeignError(f"{folder} holds {found}, expected {FORMAT} version {VERSION}: compute it again")
        return cls(folder, attributes, int(shape[0]), int(shape[1]), str(scores.dtype))

    @property
    def kinds(self) -> tuple[Group, ...]:
        """The kinds of tokens of which there are matrices: none but of joint sites."""
        return tuple(self.attributes.get("kinds", ()))

    def scores(self, features: slice | int = slice(None), kind: Group = "all") -> Float[np.ndarray, "..."]:
        """S of the given features over all images, float32: (image, feature), or (image,) for one feature.

        With a `kind`, one of `kinds`, the maxima over its tokens alone.
        """
        assert kind == "all" or kind in self.kinds, (kind, self.kinds)
        return self._read(scores_of(kind), (slice(None), features))

    def tokens(self, features: slice | int = slice(None)) -> Int[np.ndarray, "..."]:
        """The tokens of the maxima, in the shape of `scores`."""
        return self._read(TOKENS, (slice(None), features))

    def images(self, images: slice) -> tuple[Float[np.ndarray, "image feature"], Int[np.ndarray, "image feature"]]:
        """Scores and tokens of all features over some images; `image_blocks` are cheap to read."""
        return self._read(SCORES, (images, slice(None))), self._read(TOKENS, (images, slice(None)))

    def image_blocks(self) -> Iterator[slice]:
        """Slices of images that together cover the matrix, aligned to its chunks."""
        for start in range(0, self.n_images, IMAGE_BLOCK):
            yield slice(start, min(start + IMAGE_BLOCK, self.n_images))

    def blocks(self, size: int = 8 * FEATURE_BLOCK) -> Iterator[slice]:
        """Slices of features that together cover the matrix, aligned to its chunks."""
        for start in range(0, self.n_features, size):
            yield slice(start, min(start + size, self.n_features))

    def features(self) -> pa.Table:
        """The feature table beside the arrays, one row a feature."""
        try:
            return pq.read_table(self.folder / FEATURES)
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise DamagedError(
                f"{self.folder / FEATURES} cannot be read ({error}): delete {self.folder} and compute it again"
            ) from None

    def _read(self, name: str, chosen: tuple[slice, slice | int]) -> np.ndarray:
        try:
            array: Any = zarr.open_array(self.folder / name, mode="r")
            values = np.asarray(array[chosen])
            if (chunk := _missing_chunk(self.folder / name, chosen)) is not None:
                raise FileNotFoundError(f"its chunk {chunk.relative_to(self.folder / name)} is missing")
            if name != TOKENS and np.isnan(values).any():
                raise ValueError("it holds NaN")
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            raise DamagedError(
                f"{self.folder / name} is damaged ({error}): delete {self.folder} and compute it again"
            ) from None
        return values.astype(np.float32, copy=False) if name != TOKENS else values
