"""Where a store can lie: a folder of this machine, or anything that fsspec reaches (`s3://`, `hf://`, `https://`, …).

A place gives and takes bytes by name and never lists folders: whoever reads knows the names.  What is missing is a
`FileNotFoundError`, for the caller to explain; a server that does not answer is an `UnreachableError`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from store.errors import MismatchError
from store.files import is_temporary, publish, write_bytes

PIECE = 32 * 2**20
"""bytes of a file that are held at once while it is copied"""


class Place(ABC):
    """A folder or bucket prefix, read and written by name."""

    local: Path | None
    """the folder, when it is on this machine"""
    read_only = False

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole file; `FileNotFoundError` when it is missing."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Length in bytes, None when it is missing."""

    @abstractmethod
    def where(self, name: str) -> str:
        """The full name of a file, for messages."""

    def read_into(self, name: str, buffer: memoryview) -> tuple[int, bytes]:
        """Fill `buffer` with the beginning of a file; how many bytes it took, and the bytes that follow."""
        data = memoryview(self.read(name))
        count = min(len(data), len(buffer))
        buffer[:count] = data[:count]
        return count, bytes(data[count:])

    @abstractmethod
    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """A file that should have `size` bytes, in order, at most about `PIECE` bytes at a time.

        `FileNotFoundError` when it is missing; where its length was found to be another, that many bytes or `DamagedError`.
        """

    @abstractmethod
    def write(self, name: str, data: bytes, create_only: bool = False) -> None:
        """Let a file appear, whole.  With `create_only`, `MismatchError` where another content is there; an equal one is fine."""

    @abstractmethod
    def write_pieces(self, name: str, size: int, pieces: Iterator[bytes]) -> None:
        """Let a file of `size` bytes appear once `pieces` has given them all; nothing appears when it raises."""

    def exists(self, name: str) -> bool:
        return self.size(name) is not None


class Folder(Place):
    """A folder of this machine, or of a file system that it mounts."""

    def __init__(self, path: Path) -> None:
        self.local = path

    def __str__(self) -> str:
        return str(self.local)

    def where(self, name: str) -> str:
        return str(self._path(name))

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def size(self, name: str) -> int | None:
        try:
            return self._path(name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_into(self, name: str, buffer: memoryview) -> tuple[int, bytes]:
        with self._path(name).open("rb", buffering=0) as file:
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    break
                done += count
            return done, file.read()

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        with self._path(name).open("rb") as file:
            while piece := file.read(PIECE):
                yield piece

    def write(self, name: str, data: bytes, create_only: bool = False) -> None:
        if create_only and self._path(name).exists():
            if self.read(name) != data:
                raise MismatchError(f"{self.where(name)} is there already, with another content: choose another folder")
            return
        write_bytes(self._path(name), data)

    def write_pieces(self, name: str, size: int, pieces: Iterator[bytes]) -> None:
        def fill(temporary: Path) -> None:
            with temporary.open("wb", buffering=0) as file:
                for piece in pieces:
                    view = memoryview(piece)
                    while view:
                        view = view[file.write(view) :]

        publish(self._path(name), fill)

    def clear(self) -> None:
        """Remove what killed processes left half-written."""
        assert self.local is not None
        for folder, _, names in os.walk(self.local):
            for file in (Path(folder, name) for name in names):
                if is_temporary(file):
                    file.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        assert self.local is not None
        return self.local / name


def place_of(location: str | Path | Place) -> Place:
    """The place that a path or a URL names."""
    if isinstance(location, Place):
        return location
    text = str(location)
    if text.startswith("file://"):
        return Folder(Path(text.removeprefix("file://")))
    if "://" in text:
        from store.remote import remote_of

        return remote_of(text)
    return Folder(Path(location))
