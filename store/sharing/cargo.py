"""What push and pull copy: batches of files, each made visible by one more file, and the last files, which make it whole."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from store.files import sha256_bytes
from store.places import Place


@dataclass(frozen=True)
class File:
    """One file that is to be at the target."""

    name: str
    length: int
    sha256: str
    source: str | bytes
    """its name at the source, or its content where it is made on the way"""

    @classmethod
    def of(cls, name: str, content: bytes) -> "File":
        """A file with this content."""
        return cls(name, len(content), sha256_bytes(content), content)


@dataclass(frozen=True)
class Batch:
    """Files that one more file makes visible."""

    files: tuple[File, ...]
    closing: File | None
    """written when all of `files` are there: a commit; None where nothing but the end of it all does that"""

    @property
    def all(self) -> tuple[File, ...]:
        return self.files if self.closing is None else (*self.files, self.closing)


class Cargo(ABC):
    """What is copied: batches, and last files."""

    source: Place
    name: str
    """kind and content id, for messages"""
    n_batches: int
    replaces: bool
    """whether a file at the target that differs can only be a damaged one of this cargo, and is written again"""

    @abstractmethod
    def sizes(self, batch: int) -> tuple[int, int]:
        """About how many bytes and files a batch has, without making any of it."""

    @abstractmethod
    def batch(self, batch: int) -> Batch:
        """The files of a batch."""

    def first(self) -> File | None:
        """The file that takes possession of an empty target, where there is one: of two pushes, one alone can write it."""
        return None

    @abstractmethod
    def last(self) -> tuple[File, ...]:
        """The files that make the whole visible, in order; asked for when every batch is at the target."""
