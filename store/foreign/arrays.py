"""Activations as others keep them, read an image at a time: `.npy`, `.safetensors`, and folders of either.

1. The header of a file says where its values lie, in what dtype and shape; the file's length is checked against it.
2. The shape says what is an image: (image, token, d_model), or rows in the order image, step, token when the caller
   says how many of each there are.  In a folder the files follow one another, and one of (token, d_model) is an image.
3. `read` reads the rows of one image and step, and nothing else.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from store.errors import UsageError
from store.files import json_bytes, sha256_bytes
from store.foreign.headers import SUFFIXES, TORCH_SUFFIXES, Stored, about, find_array, from_torch

PROBES, PROBE_BYTES = 64, 4096


@dataclass(frozen=True)
class Rows:
    """How the rows of an image lie in an array that does not say: `steps` times `tokens`, the step first."""

    steps: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> "Rows":
        """`20x4096`: 20 steps of 4096 tokens; `4096`: one step."""
        match = re.fullmatch(r"(?:(\d+)[x×*])?(\d+)", text.strip())
        if match is None or int(match[1] or 1) < 1 or int(match[2]) < 1:
            raise UsageError(f"--rows-per-image {text!r}: write STEPSxTOKENS such as 20x4096, or the number of tokens")
        return cls(int(match[1] or 1), int(match[2]))


@dataclass(frozen=True)
class ForeignArray:
    """Activations of one site and point as others keep them: (image, step, token, d_model), in one file or in several."""

    path: Path
    pieces: tuple[Stored, ...]
    counts: tuple[int, ...]
    """images of each piece"""
    steps: int
    tokens: int
    d_model: int

    @property
    def images(self) -> int:
        return sum(self.counts)

    @property
    def dtype(self) -> np.dtype:
        return self.pieces[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def shape(self) -> tuple[int, ...]:
        """(image, token, d_model), with the step after the image where there are several."""
        steps = (self.steps,) if self.steps > 1 else ()
        return (self.images, *steps, self.tokens, self.d_model)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.counts)])

    def where(self, image: int) -> Path:
        """The file that an image lies in."""
        return self.pieces[self._piece(image)].file

    def read(self, image: int, step: int) -> np.ndarray:
        """The rows of one image and step: (token, d_model), in the file's dtype."""
        piece = self._piece(image)
        place = (image - int(self._starts[piece])) * self.steps + step
        count = self.tokens * self.d_model
        return self.pieces[piece].read(place * count, count).reshape(self.tokens, self.d_model)

    def _piece(self, image: int) -> int:
        return int(np.searchsorted(self._starts, image, side="right")) - 1

    def facts(self) -> dict[str, Any]:
        """What tells this array from another, without reading all of it: name, length, dtype, shape, and a hash of probes.

        The probes are up to 64 blocks of 4 KiB, evenly spread, at least two a file.
        """
        return {
            "file": self.path.name,
            "key": self.pieces[0].key,
            "files": len(self.pieces),
            "bytes": sum(piece.file.stat().st_size for piece in self.pieces),
            "dtype": self.dtype.name,
            "shape": list(self.shape),
            "sampled_sha256": sha256_bytes(json_bytes([[piece.file.name, _probed(piece)] for piece in self.pieces]))
            if len(self.pieces) > 1
            else _probed(self.pieces[0], PROBES),
        }


def open_array(path: Path, key: str | None = None, rows: Rows | None = None) -> ForeignArray:
    """The activations in a file or folder; every refusal is a `UsageError` that says what to do."""
    alone = not path.is_dir()
    files = [path] if alone else _files_of(path)
    axes = (2, 3, 4) if rows is not None else (3,) if alone else (2, 3)
    pieces = tuple(find_array(file, key, axes) for file in files)
    shapes = [_arranged(piece, rows, alone) for piece in pieces]
    for piece, found in zip(pieces, shapes, strict=True):
        if found[1:] != shapes[0][1:] or piece.dtype != pieces[0].dtype:
            raise UsageError(
                f"{piece.file} holds {about(piece)}, which does not go with {pieces[0].file.name}, which holds "
                f"{about(pieces[0])}: all files of a folder need one dtype, and one number of tokens and channels"
            )
    return ForeignArray(path, pieces, tuple(found[0] for found in shapes), *shapes[0][1:])


def _files_of(folder: Path) -> list[Path]:
    """The arrays of a folder in natural order: `part-2.npy` before `part-10.npy`."""
    there = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    files = [file for file in there if file.suffix.lower() in SUFFIXES]
    if not files:
        pickled = next((file for file in sorted(there) if file.suffix.lower() in TORCH_SUFFIXES), None)
        hint = "" if pickled is None else f"; {pickled.name} is none: {from_torch(pickled)}"
        raise UsageError(f"{folder} holds no .npy and no .safetensors file{hint}")
    if len({file.suffix.lower() for file in files}) > 1:
        raise UsageError(
            f"{folder} holds .npy and .safetensors files: put what belongs together into a folder of its own"
        )
    return sorted(files, key=lambda file: (_words(file.name), file.name))


def _words(name: str) -> list[str | int]:
    """Text and numbers in turn, so that lists of them can be compared."""
    return [int(word) if place % 2 else word for place, word in enumerate(re.split(r"(\d+)", name))]


def _arranged(piece: Stored, rows: Rows | None, alone: bool) -> tuple[int, int, int, int]:
    """(images, steps, tokens, d_model) of an array; `UsageError` for a shape that is none of these."""
    shape, d_model = piece.shape, (piece.shape or (0,))[-1]
    if rows is None:
        if len(shape) == 3:
            return shape[0], 1, shape[1], d_model
        if len(shape) == 2 and not alone:
            return 1, 1, shape[0], d_model
        raise UsageError(
            f"{piece.file} holds {about(piece)} where (image, token, d_model) was expected. If its rows are those of one "
            "image after the other, step by step, token by token, say how many: --rows-per-image STEPSxTOKENS (20x4096)"
        )
    image = rows.steps * rows.tokens
    count = math.prod(shape[:-1])
    fits = len(shape) == 2 or shape[1:-1] in ((rows.tokens,), (image,), (rows.steps, rows.tokens))
    if not fits or count % image:
        raise UsageError(
            f"{piece.file} holds {about(piece)}, which is no whole number of images of {rows.steps} x {rows.tokens} rows "
            "(--rows-per-image)"
        )
    return count // image, rows.steps, rows.tokens, d_model


def _probed(piece: Stored, probes: int = 2) -> str:
    """SHA-256 over the array's place and evenly spread blocks of its values, first and last among them."""
    last = max(piece.nbytes - PROBE_BYTES, 0)
    offsets = sorted({last * number // (probes - 1) for number in range(probes)})
    place = f"{piece.offset} {piece.dtype} {piece.shape}".encode()
    with piece.file.open("rb") as file:
        return sha256_bytes(place + b"".join(_block(file, piece.offset + offset) for offset in offsets))


def _block(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.read(PROBE_BYTES)
