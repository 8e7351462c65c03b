"""One file against the length and SHA-256 that a commit lists, and many such checks at once."""

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from store.care.findings import Kind
from store.files import READ_BLOCK, sha256_bytes
from store.places import PIECE, Place

Item = TypeVar("Item")
Result = TypeVar("Result")
Entry = dict[str, Any]
"""{"bytes", "sha256"} of a file; {} where nothing is known but that it must be there"""

OF_A_DISK = {errno.EIO, errno.EISDIR, errno.ELOOP, errno.EUCLEAN, errno.EBADMSG}
"""errors that say that a file is no more what it was; others (EACCES, ESTALE, …) say nothing about it"""


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a file, and how many of its bytes were read to know."""

    kind: Kind
    detail: str
    read: int = 0


def entry_of(data: bytes) -> Entry:
    """Length and SHA-256, as commits list them."""
    return {"bytes": len(data), "sha256": sha256_bytes(data)}


def differs(data: bytes, entry: Entry) -> str | None:
    """How a content differs from what was committed, in words; None when it does not."""
    return _differs(len(data), entry, sha256_bytes(data))


def check_file(place: Place, name: str, entry: Entry, whole: bool = True) -> Verdict | int:
    """The bytes read of a file that is as it was committed, or what is wrong with it; without `whole` only its length is looked at."""
    try:
        if place.local is not None:
            read, detail = _check_local(place.local / name, entry, whole)
        else:
            read, detail = _check_remote(place, name, entry, whole)
    except (FileNotFoundError, NotADirectoryError):
        return Verdict("missing", "is missing")
    except OSError as error:
        return Verdict(*refused(error))
    return read if detail is None else Verdict("damaged", detail, read)


def _check_local(path: Path, entry: Entry, whole: bool) -> tuple[int, str | None]:
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if not entry or not whole or size != entry["bytes"]:
            return 0, _differs(size, entry, None)
        digest, read = hashlib.sha256(), 0
        buffer = memoryview(bytearray(min(READ_BLOCK, max(size, 1))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            read += count
    return read, _differs(read, entry, digest.hexdigest())


def _check_remote(place: Place, name: str, entry: Entry, whole: bool) -> tuple[int, str | None]:
    if not entry or not whole or entry["bytes"] > PIECE:  # a small file shows its length when it is read
        size = place.size(name)
        if size is None:
            raise FileNotFoundError(name)
        if not entry or not whole or size != entry["bytes"]:
            return 0, _differs(size, entry, None)
    digest, read = hashlib.sha256(), 0
    for piece in place.pieces(name, entry["bytes"]):
        digest.update(piece)
        read += len(piece)
    return read, _differs(read, entry, digest.hexdigest())


def refused(error: OSError) -> tuple[Kind, str]:
    """What it means that a file cannot be read."""
    if isinstance(error, IsADirectoryError):
        return "damaged", "is a folder"
    reason = error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
    return "damaged" if error.errno in OF_A_DISK else "unreadable", f"cannot be read: {reason}"


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """The results in order; few are under way at a time, so that millions of items take no memory."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _differs(length: int, entry: Entry, digest: str | None) -> str | None:
    """`digest` None: only the length is compared."""
    if entry and length != entry["bytes"]:
        return f"has {length:,} bytes where {entry['bytes']:,} were committed"
    return "differs from its committed SHA-256" if digest is not None and digest != entry["sha256"] else None
