"""How we time: ours and its peers by turns, so that all see the same machine; every run is kept."""

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bench.lines import Seconds


def by_turns(
    *works: Callable[[], object], rounds: int = 3, warm_up: bool = True, before: Callable[[], object] | None = None
) -> list[Seconds]:
    """The seconds of every run of each: one turn to warm up, which is not counted, then `rounds` turns.

    `before` is called before every run, and not counted either.
    """
    found: list[list[float]] = [[] for _ in works]
    for turn in range(rounds + warm_up):
        for work, seconds in zip(works, found, strict=True):
            if before is not None:
                before()
            begun = time.perf_counter()
            work()
            if turn >= warm_up:
                seconds.append(time.perf_counter() - begun)
    return [tuple(seconds) for seconds in found]


def forget(files: Iterable[Path]) -> None:
    """Drop files from this machine's page cache: the next reading comes from the disk."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Say nothing, neither on stdout nor on stderr."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
