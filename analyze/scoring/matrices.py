"""Score matrices on disk: `OUT/<name>/step.K/` is a Zarr group, with `features.parquet` beside its two arrays.

    scores        float32 (image, feature)    S: the largest activation over the counted tokens of the image
    argmax_token  int32   (image, feature)    the token that it was found at, a position in the stream; -1: no token counted

Both are chunked by blocks of images and features, so that one feature over all images is a cheap read, and
carry a crc32c per chunk.  A folder is written beside its place and renamed when whole: it is all there or not.
"""

import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from jaxtyping import Float, Int
from zarr.codecs import Crc32cCodec, ZstdCodec

from store.errors import DamagedError, ForeignError, UsageError
from store.files import fsync_file

IMAGE_BLOCK = 512
FEATURE_BLOCK = 256
FORMAT = "granary score matrix"
VERSION = 1
FEATURES = "features.parquet"


def step_folder(out: Path, name: str, step: int) -> Path:
    """Where the score matrix of one dictionary and step lies."""
    return out / name / f"step.{step}"


class ScoreWriter:
    """A score matrix being written, image block by image block; nothing shows under its name before `finish`."""

    def __init__(self, folder: Path, n_images: int, n_features: int, attributes: dict[str, Any]) -> None:
        self.folder = folder
        self.n_images = n_images
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        self._temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
        group = zarr.open_group(self._temporary, mode="w", zarr_format=3)
        group.attrs.update({"format": FORMAT, "version": VERSION, **attributes})
        shape = (n_images, n_features)
        self._scores = _create(group, "scores", shape, "float32", float("nan"))
        self._tokens = _create(group, "argmax_token", shape, "int32", -1)
        block = (min(IMAGE_BLOCK, n_images), n_features)
        self._score_block = np.empty(block, np.float32)
        self._token_block = np.empty(block, np.int32)
        self._start = self._filled = 0

    def append(self, scores: Float[np.ndarray, "image feature"], tokens: Int[np.ndarray, "image feature"]) -> None:
        """Add the next images; a full block goes to disk."""
        done = 0
        while done < len(scores):
            take = min(len(scores) - done, len(self._score_block) - self._filled)
            self._score_block[self._filled : self._filled + take] = scores[done : done + take]
            self._token_block[self._filled : self._filled + take] = tokens[done : done + take]
            self._filled += take
            done += take
            if self._filled == len(self._score_block):
                self._flush()

    def matrix(self) -> "ScoreMatrix":
        """What was written so far, to be read before it is published (for the feature table)."""
        self._flush()
        if self._start != self.n_images:
            raise AssertionError(f"{self._start} images were written, {self.n_images} announced")
        return ScoreMatrix.open(self._temporary)

    def finish(self, features: pa.Table) -> None:
        """Write the feature table, put everything onto the disk, and make the folder appear."""
        self._flush()
        pq.write_table(features, self._temporary / FEATURES, compression="zstd")
        for path in sorted(self._temporary.rglob("*")):
            if path.is_file():
                fsync_file(path)
        self._temporary.replace(self.folder)
        fsync_file(self.folder.parent)

    def _flush(self) -> None:
        if self._filled:
            stop = self._start + self._filled
            self._scores[self._start : stop] = self._score_block[: self._filled]
            self._tokens[self._start : stop] = self._token_block[: self._filled]
            self._start, self._filled = stop, 0

    def __enter__(self) -> "ScoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)


def _create(group: zarr.Group, name: str, shape: tuple[int, int], dtype: str, fill: float | int) -> Any:
    return group.create_array(
        name,
        shape=shape,
        chunks=(min(IMAGE_BLOCK, shape[0]), min(FEATURE_BLOCK, shape[1])),
        dtype=dtype,
        fill_value=fill,
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        dimension_names=["image", "feature"],
        config={"write_empty_chunks": True},
    )


@dataclass(frozen=True)
class ScoreMatrix:
    """A score matrix that is whole on disk; reads are by blocks of features or by single features."""

    folder: Path
    attributes: dict[str, Any]
    n_images: int
    n_features: int

    @classmethod
    def open(cls, folder: Path) -> "ScoreMatrix":
        """The matrix in `folder`; `UsageError` when it was never computed, `ForeignError` when it is something else."""
        if not folder.exists():
            raise UsageError(f"there are no scores in {folder}: run python -m analyze scores with the same flags first")
        try:
            group = zarr.open_group(folder, mode="r")
            attributes = dict(group.attrs)
            shape = group["scores"].shape  # type: ignore[union-attr]
        except (FileNotFoundError, KeyError, ValueError):
            raise ForeignError(
                f"{folder} is not a score matrix of ours: choose another --out, or delete that folder"
            ) from None
        if attributes.get("format") != FORMAT or attributes.get("version") != VERSION:
            found = f"{attributes.get('format')} version {attributes.get('version')}"
            raise ForeignError(f"{folder} holds {found}, expected {FORMAT} version {VERSION}: compute it again")
        return cls(folder, attributes, int(shape[0]), int(shape[1]))

    def scores(self, features: slice | int = slice(None)) -> Float[np.ndarray, "..."]:
        """S of the given features over all images: (image, feature), or (image,) for one feature."""
        return self._read("scores", features)

    def tokens(self, features: slice | int = slice(None)) -> Int[np.ndarray, "..."]:
        """The tokens of the maxima, in the shape of `scores`."""
        return self._read("argmax_token", features)

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

    def _read(self, name: str, features: slice | int) -> np.ndarray:
        try:
            array = zarr.open_array(self.folder / name, mode="r")
            return np.asarray(array[:, features])
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            raise DamagedError(
                f"{self.folder / name} is damaged ({error}): delete {self.folder} and compute it again"
            ) from None
