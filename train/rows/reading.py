"""Reads a shard of a pack into RAM, checked: length and header, CRC-32C, and that every value is finite.

Plain reads into a buffer that is used again, not page faults of a memory map: a map over a network reads a page at a
time, and one that is truncated under our feet kills the process.
"""

import os
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import crc32c
import numpy as np
from torch import Tensor

from store.errors import DamagedError, NonFiniteError
from store.shards import MANIFEST, REPACK, Shard, shard_file
from store.sites import POINTS, Point
from train.rows.tensors import to_torch

BLOCK = 1 << 18
"""bytes of one read: checksum and look for NaNs find them in the cache.  From the page cache 4.9 GB/s without the two, 3.6 GB/s
with them, and 2.4 GB/s in blocks of 4 MB; so cheap that every shard is checked every time that it is read"""
ROWS_AT_ONCE = 4096
"""rows of a shard that are computed with at once, where order does not matter"""
ALIGNMENT = 64
"""of the first column in the buffer, in bytes"""
_INTEGERS: dict[int, tuple[Any, Any]] = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32)}


class Stopped(Exception):
    """The reading was told to stop; whoever told it waits for that."""


class Column(NamedTuple):
    """Where a column lies in a shard's file, in bytes, and what it is."""

    first: int
    last: int
    dtype: np.dtype
    shape: tuple[int, ...]


def read_shard(
    shard: Shard,
    points: Sequence[Point],
    buffer: np.ndarray | None = None,
    whole: bool = True,
    stop: threading.Event | None = None,
) -> dict[str, Tensor]:
    """The columns of `points`, and all columns that say where a row comes from, in the dtypes of the pack.

    `whole` reads the file from end to end and compares its CRC-32C with the manifest's; otherwise only those columns are
    read.  With `buffer`, from `buffer_for`, the tensors lie in it and live until it is used again.
    Errors: `UsageError` (a point without a column), `MismatchError` (a shard of another pack or place), `DamagedError`
    (missing, truncated, another checksum, wrong columns), `NonFiniteError` (site, step, image and token of a row with a
    NaN or an infinity), `Stopped` (`stop` was set).
    """
    shard.pack.require_stored(*(point for point in points if point not in shard.pack.points))
    columns = {
        name: Column(column.offset, column.offset + column.nbytes, column.dtype, column.shape)  # type: ignore[attr-defined]
        for name, column in shard.columns().items()
        if name in points or name not in POINTS
    }
    entry = shard.pack.files[shard_file(shard.site, shard.index)]
    size: int = entry["bytes"]
    if buffer is None:
        buffer = buffer_for(size)
    lead = -min(column.first for column in columns.values()) % ALIGNMENT
    file = buffer[lead : lead + size]
    reading = _Reading(shard, file, columns, stop)
    for first, last in [(0, size)] if whole else sorted((column.first, column.last) for column in columns.values()):
        reading.read(first, last)
    if whole and f"{reading.checksum:08x}" != entry["crc32c"]:
        raise DamagedError(f"{shard.path} differs from the checksum in {MANIFEST}. {REPACK}")
    found = {name: file[c.first : c.last].view(c.dtype).reshape(c.shape) for name, c in columns.items()}
    for name in reading.odd:
        raise _non_finite(shard, name, found)
    return {name: to_torch(column) for name, column in found.items()}


def buffer_for(size: int) -> np.ndarray:
    """A buffer for shard files of up to `size` bytes.  NumPy asks for huge pages, which random gathering is faster on."""
    return np.empty(size + ALIGNMENT, np.uint8)


class _Reading:
    """A shard's file on its way into RAM, looked at while each block is in the cache."""

    def __init__(
        self, shard: Shard, file: np.ndarray, columns: dict[str, Column], stop: threading.Event | None
    ) -> None:
        self.shard, self.file, self.stop = shard, file, stop
        self.checksum = 0
        self.floats = {name: column for name, column in columns.items() if name in (*POINTS, "sigma")}
        self.odd: list[str] = []
        """columns with a NaN or an infinity"""

    def read(self, first: int, last: int) -> None:
        """Fill those bytes from the same bytes of the file."""
        try:
            with self.shard.path.open("rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), first, last - first, os.POSIX_FADV_SEQUENTIAL)
                file.seek(first)
                for start in range(first, last, BLOCK):
                    if self.stop is not None and self.stop.is_set():
                        raise Stopped
                    self._block(file, start, min(start + BLOCK, last))
        except DamagedError:
            raise
        except OSError as error:
            raise DamagedError(f"{self.shard.path} cannot be read ({error})") from None

    def _block(self, file: Any, first: int, last: int) -> None:
        block, filled = self.file[first:last].data, 0
        while filled < len(block):
            count = file.readinto(block[filled:])
            if not count:
                raise DamagedError(f"{self.shard.path} ended at byte {first + filled} while it was read. {REPACK}")
            filled += count
        self.checksum = crc32c.crc32c(block, self.checksum)
        for name, column in self.floats.items():
            size = column.dtype.itemsize
            # a value that two blocks share is looked at with the second
            start, stop = (column.first + max(edge - column.first, 0) // size * size for edge in (first, last))
            values = self.file[start : min(stop, column.last)].view(column.dtype)
            if len(values) and name not in self.odd and not is_finite(values):
                self.odd.append(name)


def is_finite(values: np.ndarray) -> bool:
    """Whether bfloat16, float16 or float32 `values` hold no NaN and no infinity; fast where they are in the cache.

    Read as integers, infinity and the NaNs above it are the greatest signed values, the negative ones the greatest
    unsigned: two maxima, and no array of booleans.
    """
    signed, above, unsigned, below = _infinities(values.dtype)
    return bool(values.view(signed).max() < above and values.view(unsigned).max() < below)


@cache
def _infinities(dtype: np.dtype) -> tuple[Any, Any, Any, Any]:
    signed, unsigned = _INTEGERS[dtype.itemsize]
    infinities = np.array([np.inf, -np.inf], np.float32).astype(dtype)
    return signed, infinities.view(signed)[0], unsigned, infinities.view(unsigned)[1]


def _non_finite(shard: Shard, name: str, columns: dict[str, np.ndarray]) -> NonFiniteError:
    """Says where the first row with a NaN or an infinity comes from."""
    values = columns[name].reshape(shard.rows, -1)
    odd = np.concatenate([~np.isfinite(block.astype(np.float32)).all(axis=1) for block in _blocks(values)])
    row = int(odd.argmax())
    where = {key: int(columns[key][row]) for key in ("step", "image", "token")}
    return NonFiniteError(
        f"{shard.path}: {shard.site} {name} at step {where['step']} of image {where['image']}, "
        f"token {where['token']} holds a NaN or an infinity (row {row}; {int(odd.sum())} such rows in "
        "this shard). No step was taken on this shard: restore or harvest the store again, and pack it again"
    )


def _blocks(values: np.ndarray) -> list[np.ndarray]:
    return [values[start : start + 4096] for start in range(0, len(values), 4096)]
