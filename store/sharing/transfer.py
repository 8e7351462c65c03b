"""Copies what belongs together from one place to another, file by file, so that nothing partial ever looks whole.

1. Metadata goes first, then the files of each part, then that part's commit; whatever makes the whole visible goes last.
2. Every byte is hashed while it is copied; a file appears at the target only if it is the one that was committed.
3. The same command goes on: parts whose commit is at the target are skipped, and files of the others that are there already.
4. Before the last file is written, the target is read back; what arrived damaged is copied once more.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from tqdm import tqdm

from store.errors import DamagedError, MismatchError
from store.places import Folder, Place
from store.remote import Remote
from store.sharing.cargo import Batch, Cargo, File

Verify = Literal["full", "sizes"]
READINGS = 3
"""how often a file is asked for that does not arrive as it was committed, from a place that is not on this machine"""


@dataclass
class Tally:
    """What was done."""

    copied: int = 0
    copied_bytes: int = 0
    kept: int = 0
    kept_bytes: int = 0
    verified: int = 0
    again: list[str] = field(default_factory=list)
    """files that had arrived damaged and were copied once more"""
    labels: int = 0
    """labels of features that the target did not have"""


class Transfer:
    """One run of push or pull: `plan`, then `copy`, then `verify`, then `finish`."""

    def __init__(self, cargo: Cargo, target: Place, threads: int, resuming: bool) -> None:
        """With `resuming`, something of the same cargo is at the target already."""
        self.cargo, self.source, self.target = cargo, cargo.source, target
        self.threads, self.resuming = threads, resuming
        self.tally = Tally()
        self._done: set[int] = set()
        self._written: set[str] = set()

    def plan(self) -> tuple[int, int, int]:
        """Bytes and files in all, and bytes still to be copied: those of the batches that are not at the target yet."""
        with ThreadPoolExecutor(self.threads) as pool:
            found = list(pool.map(self._look, range(self.cargo.n_batches)))
        self._done = {batch for batch, (_, _, done) in enumerate(found) if done}
        left = sum(size for size, _, done in found if not done)
        return sum(size for size, _, _ in found), sum(files for _, files, _ in found), left

    def _look(self, batch: int) -> tuple[int, int, bool]:
        done = False
        if self.resuming:
            closing = self.cargo.batch(batch).closing
            done = closing is not None and self._there(closing)
        return (*self.cargo.sizes(batch), done)

    def _there(self, file: File) -> bool:
        """Whether a commit is at the target; `MismatchError` when another one is."""
        assert isinstance(file.source, bytes)
        try:
            found = self.target.read(file.name)
        except FileNotFoundError:
            return False
        if found != file.source:
            raise MismatchError(
                f"{self.target.where(file.name)} is that of another store than {self.cargo.name}, made with the same settings "
                "but not equal: choose another target"
            )
        return True

    def copy(self, bar: "tqdm[Any]") -> None:
        """Bring every batch to the target, several files at a time, each batch closed when its files are there."""
        first = self.cargo.first()
        if first is not None and not self.resuming:
            self.target.write(first.name, self._content(first), create_only=True)
            self._written.add(first.name)
        waiting: deque[tuple[Batch, list[Future[bool]]]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for index, batch in self._batches(pool):
                    if index in self._done:
                        for file in batch.all:
                            self._count(file, False)
                        continue
                    waiting.append((batch, [pool.submit(self._bring, file) for file in batch.files]))
                    while sum(not job.done() for _, jobs in waiting for job in jobs) > 4 * self.threads:
                        self._close(*waiting.popleft(), bar)
                while waiting:
                    self._close(*waiting.popleft(), bar)
            except BaseException:
                for place in (self.source, self.target):
                    if isinstance(place, Remote):
                        place.stop()
                pool.shutdown(cancel_futures=True)
                raise
        _complete(bar)

    def _batches(self, pool: ThreadPoolExecutor) -> Iterator[tuple[int, Batch]]:
        """Every batch with its number, some of them asked for in advance, for a source that answers slowly."""
        coming: deque[Future[Batch]] = deque()
        for index in range(self.cargo.n_batches + self.threads):
            if index < self.cargo.n_batches:
                coming.append(pool.submit(self.cargo.batch, index))
            if index >= self.threads and coming:
                yield index - self.threads, coming.popleft().result()

    def _close(self, batch: Batch, jobs: Sequence["Future[bool]"], bar: "tqdm[Any]") -> None:
        for file, job in zip(batch.files, jobs, strict=True):
            self._count(file, job.result())
            bar.update(file.length)
        if batch.closing is not None:
            self._count(batch.closing, self._bring(batch.closing))
            bar.update(batch.closing.length)

    def _count(self, file: File, copied: bool) -> None:
        if copied:
            self.tally.copied += 1
            self.tally.copied_bytes += file.length
        else:
            self.tally.kept += 1
            self.tally.kept_bytes += file.length

    def _bring(self, file: File) -> bool:
        """Copy a file, unless it is there already; whether it was copied."""
        if file.name in self._written:
            return True
        if self.resuming and self._equal(file):
            return False
        if self.resuming and not self.cargo.replaces and self.target.exists(file.name):
            raise MismatchError(
                f"{self.target.where(file.name)} is there already, and differs from that of {self.cargo.name}: "
                "remove it, or choose another target"
            )
        self._write(file)
        return True

    def _write(self, file: File) -> None:
        if isinstance(file.source, bytes):
            self.target.write(file.name, file.source)
            return
        for reading in range(1, READINGS + 1):
            try:
                self.target.write_pieces(file.name, file.length, self._checked(file, file.source))
                return
            except DamagedError:  # on the way, perhaps: a disk of this machine would say the same again
                if reading == READINGS or self.source.local is not None:
                    raise

    def _content(self, file: File) -> bytes:
        return file.source if isinstance(file.source, bytes) else b"".join(self._checked(file, file.source))

    def _checked(self, file: File, name: str) -> Iterator[bytes]:
        """The content of a file at the source; `DamagedError` after the last piece when it was not what was committed."""
        digest, length = hashlib.sha256(), 0
        try:
            for piece in self.source.pieces(name, file.length):
                digest.update(piece)
                length += len(piece)
                yield piece
        except FileNotFoundError:
            raise DamagedError(f"{self.source.where(name)} is missing. {self._remedy()}") from None
        if length != file.length:
            raise DamagedError(
                f"{self.source.where(name)} has {length} bytes where {file.length} were committed. {self._remedy()}"
            )
        if digest.hexdigest() != file.sha256:
            raise DamagedError(f"{self.source.where(name)} differs from its committed checksum. {self._remedy()}")

    def _remedy(self) -> str:
        return (
            "It was not copied, and the target does not look whole. Mend the source, then run the same command again."
        )

    def _equal(self, file: File, contents: bool = True) -> bool:
        """Whether the target has a file of that length and, with `contents`, that SHA-256."""
        if not contents:
            return self.target.size(file.name) == file.length
        digest, length = hashlib.sha256(), 0
        try:
            for piece in self.target.pieces(file.name, file.length):
                digest.update(piece)
                length += len(piece)
        except (FileNotFoundError, NotADirectoryError, DamagedError):
            return False
        return length == file.length and digest.hexdigest() == file.sha256

    def verify(self, how: Verify, bar: "tqdm[Any]") -> None:
        """Read the target back, or with `sizes` ask for lengths only; what differs is copied once more, and then must be right."""
        check = partial(self._verified, contents=how == "full")
        with ThreadPoolExecutor(self.threads) as pool:
            for _, batch in self._batches(pool):
                for file, right in zip(batch.all, pool.map(check, batch.all), strict=True):
                    if not right:
                        self.tally.again.append(file.name)
                    self.tally.verified += 1
                    bar.update(file.length)
        _complete(bar)

    def _verified(self, file: File, contents: bool) -> bool:
        """Whether a file was right at once; `DamagedError` when it is not after another copy."""
        if self._equal(file, contents):
            return True
        self._write(file)
        if not self._equal(file, contents):
            raise DamagedError(
                f"{self.target.where(file.name)} does not read back as it was written, twice: the target, or the way to it, "
                "damages data. Use another target, or run the same command again."
            )
        return False

    def finish(self) -> None:
        """Write what makes the whole visible, each file only where no other one is, and read it back."""
        if self.resuming and isinstance(self.target, Folder):
            self.target.clear()
        for file in self.cargo.last():
            content = self._content(file)
            there = self.resuming and self.target.exists(file.name)
            self.target.write(file.name, content, create_only=True)
            if self.target.read(file.name) != content:
                raise DamagedError(
                    f"{self.target.where(file.name)} does not read back as it was written: run the command again"
                )
            self._count(file, not there)
            self.tally.verified += 1


def _complete(bar: "tqdm[Any]") -> None:
    """Let a bar end full: its total was an estimate where tables are made anew."""
    bar.total = bar.n
    bar.refresh()
