"""Writes a file from one reused block of memory: rows gathered in any order, a CRC-32C as they pass."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import crc32c
import numpy as np

Advance = Callable[[int], object]
"""told of every byte that was read or written; raises when the work is to stop"""


class Sink:
    """A file being written from its beginning to its end."""

    def __init__(self, path: Path, block: np.ndarray, advance: Advance) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._block, self._filled, self._advance = block, 0, advance
        self.crc, self.bytes = 0, 0
        """CRC-32C since `restart`; length of the file so far"""

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
        finally:
            os.close(self._file)

    def restart(self) -> None:
        """Begin a new CRC-32C: what was written until now is another piece."""
        self.crc = 0

    def put(self, values: np.ndarray) -> None:
        """Append an array, little endian, row by row."""
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        while len(flat):
            room = self._room(1)
            self._block[self._filled : self._filled + room][: len(flat)] = flat[:room]
            self._took(min(room, len(flat)))
            flat = flat[room:]

    def gather(self, rows: np.ndarray, order: np.ndarray) -> None:
        """Append `rows[order]`, (row, byte) uint8, without a copy of more than a block."""
        width = rows.shape[1]
        while len(order):
            count = min(self._room(width) // width, len(order))
            part = self._block[self._filled : self._filled + count * width].reshape(count, width)
            np.take(rows, order[:count], axis=0, out=part, mode="clip")  # "raise" would gather into a buffer first
            self._took(count * width)
            order = order[count:]

    def leave(self, count: int) -> None:
        """Leave so many bytes at the beginning of the file for `at_start`."""
        assert not self.bytes
        self.bytes = os.lseek(self._file, count, os.SEEK_SET)

    def at_start(self, head: Iterable[np.ndarray]) -> None:
        """Write these bytes, one array after another, over the beginning of the file, without a copy."""
        self._flush()
        os.lseek(self._file, 0, os.SEEK_SET)
        for part in head:
            self._write(part)

    def _room(self, least: int) -> int:
        if len(self._block) - self._filled < least:
            self._flush()
        return len(self._block) - self._filled

    def _took(self, count: int) -> None:
        self.crc = crc32c.crc32c(self._block[self._filled : self._filled + count].data, self.crc)
        self._filled += count
        self.bytes += count

    def _flush(self) -> None:
        self._write(self._block[: self._filled])
        self._filled = 0

    def _write(self, view: np.ndarray) -> None:
        while len(view):
            count = os.write(self._file, view.data)
            self._advance(count)
            view = view[count:]


def as_bytes(rows: np.ndarray) -> np.ndarray:
    """A contiguous (row, …) array as (row, byte) uint8, the same memory."""
    width = rows.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
    return rows.reshape(-1).view(np.uint8).reshape(len(rows), width)
