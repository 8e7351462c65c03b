"""The scratch file of a run: its rows by destination, so that each shard finds its share of them in one place.

    bounds    int64 (shards + 1)     where, among the run's rows, those of each shard begin
    checks    uint32 (shards)        CRC-32C of each segment
    sums      float64 (units that have rows, points, groups, d_model)
    segments  one a shard: destinations int64 (row), tokens int32 (row), then the activations (row, d_model) of each point

The file is proved by its length and the CRC-32C of all before the segments; a segment when it is read.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import crc32c
import numpy as np

from store.errors import DamagedError
from store.packing.sink import Advance, Sink, as_bytes

DESTINATION, TOKEN = np.dtype(np.int64), np.dtype(np.int32)


@dataclass(frozen=True)
class Layout:
    """What the scratch files of a site have in common."""

    shards: int
    points: int
    groups: int
    d_model: int
    dtype: Any

    @property
    def record(self) -> int:
        """Bytes of a row in a segment."""
        return int(DESTINATION.itemsize + TOKEN.itemsize + self.points * self.d_model * np.dtype(self.dtype).itemsize)

    @property
    def sums_at(self) -> int:
        return 12 * self.shards + 8

    def sums_shape(self, units: int) -> tuple[int, int, int, int]:
        return units, self.points, self.groups, self.d_model

    def head(self, units: int) -> int:
        """Bytes before the segments."""
        return self.sums_at + units * self.points * self.groups * self.d_model * 8

    def size(self, units: int, rows: int) -> int:
        """Bytes of a whole file."""
        return self.head(units) + rows * self.record


def write_run(
    path: Path,
    layout: Layout,
    cuts: np.ndarray,
    destinations: np.ndarray,
    tokens: np.ndarray,
    columns: Sequence[np.ndarray],
    sums: np.ndarray,
    block: np.ndarray,
    advance: Advance,
) -> str:
    """Write a run whose rows are in any order; CRC-32C of the head, 8 hex digits."""
    order = np.argsort(destinations)
    arranged = destinations[order]
    bounds = np.searchsorted(arranged, cuts)
    checks = np.zeros(layout.shards, np.uint32)
    sources = [as_bytes(column) for column in columns]
    with Sink(path, block, advance) as sink:
        sink.leave(layout.head(len(sums)))
        for shard, (first, last) in enumerate(pairwise(bounds)):
            sink.restart()
            sink.put(arranged[first:last])
            sink.put(tokens[order[first:last]])
            for source in sources:
                sink.gather(source, order[first:last])
            checks[shard] = sink.crc
        head = [part.reshape(-1).view(np.uint8) for part in (bounds.astype(np.int64), checks, sums)]
        sink.at_start(head)
    return f"{_crc_of(head):08x}"


def _crc_of(parts: Sequence[np.ndarray]) -> int:
    """CRC-32C of arrays of bytes, one after another."""
    found = 0
    for part in parts:
        found = crc32c.crc32c(part.data, found)
    return found


class RunFile:
    """A scratch file opened for reading."""

    def __init__(self, path: Path, layout: Layout, units: int) -> None:
        self.path, self.layout, self.units = path, layout, units
        self._file = os.open(path, os.O_RDONLY)

    def __enter__(self) -> "RunFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def head_crc(self) -> str:
        """CRC-32C of what is before the segments."""
        return f"{crc32c.crc32c(self._exactly(self.layout.head(self.units), 0).data):08x}"

    def sums(self) -> np.ndarray:
        """(unit, point, group, d_model) float64."""
        data = self._exactly(self.layout.head(self.units) - self.layout.sums_at, self.layout.sums_at)
        return np.frombuffer(data, np.float64).reshape(self.layout.sums_shape(self.units))

    def rows(self, shard: int) -> int:
        """How many rows of a shard the run has."""
        first, last = self._bounds(shard)
        return last - first

    def segment(self, shard: int, destinations: np.ndarray, tokens: np.ndarray, columns: Sequence[np.ndarray]) -> int:
        """Read a shard's rows into the beginnings of these arrays, checked; how many there were."""
        first, last = self._bounds(shard)
        parts = [each[: last - first].reshape(-1).view(np.uint8) for each in (destinations, tokens, *columns)]
        self._fill([part for part in parts if len(part)], self.layout.head(self.units) + first * self.layout.record)
        (expected,) = np.frombuffer(self._exactly(4, 8 * (self.layout.shards + 1) + 4 * shard), np.uint32)
        if _crc_of(parts) != expected:
            raise self._damaged()
        return last - first

    def _bounds(self, shard: int) -> tuple[int, int]:
        first, last = np.frombuffer(self._exactly(16, 8 * shard), np.int64)
        return int(first), int(last)

    def _exactly(self, count: int, offset: int) -> np.ndarray:
        data = np.empty(count, np.uint8)
        self._fill([data], offset)
        return data

    def _fill(self, parts: list[np.ndarray], offset: int) -> None:
        while parts:
            count = os.preadv(self._file, [part.data for part in parts], offset)
            if not count:
                raise self._damaged()
            offset += count
            while parts and count >= len(parts[0]):
                count -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][count:]

    def _damaged(self) -> DamagedError:
        self.path.unlink(missing_ok=True)
        return DamagedError(
            f"{self.path}, a scratch file, was not what had been written: the machine or the disk failed, or a program "
            "changed it. It is removed now: run the same command again, it is made anew"
        )
