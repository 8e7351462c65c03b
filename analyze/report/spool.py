"""A temporary file of small texts, each found again by two numbers: packed heat waits here until its feature is written.

The pass over the store goes image by image, the files of the report feature by feature; between them lie up to some hundred MB.
"""

import tempfile
from types import TracebackType
from typing import IO

import numpy as np


class Spool:
    """Texts at (row, column); only where each lies is kept in memory."""

    def __init__(self, rows: int, columns: int) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(buffering=1 << 20)  # noqa: SIM115, closed at the end of `with`
        self._starts = np.full((rows, columns), -1, np.int64)
        self._lengths = np.zeros((rows, columns), np.int32)
        self._end = 0

    def add(self, row: int, column: int, text: str) -> None:
        """Keep the text."""
        data = text.encode()
        self._file.write(data)
        self._starts[row, column], self._lengths[row, column] = self._end, len(data)
        self._end += len(data)

    def get(self, row: int, column: int) -> str | None:
        """The text there, or None."""
        start = int(self._starts[row, column])
        if start < 0:
            return None
        self._file.seek(start)
        return self._file.read(int(self._lengths[row, column])).decode()

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
