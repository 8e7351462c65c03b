"""Files that are either whole or absent: publish by temporary file, fsync, rename, fsync of the folder.

Nothing here knows what the bytes mean.  The order matters: the data is on the disk before the name
is, and the name is on the disk before anything that trusts it is written.
"""

import contextlib
import glob
import hashlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from store.errors import DamagedError, ForeignError

READ_BLOCK = 1 << 20
RESTORE = "Restore it from a copy"
"""what to do about a damaged file of which nothing more is known"""


def fsync_file(path: Path) -> None:
    """Put a file that somebody else wrote onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


fsync_folder = fsync_file  # a folder is opened and synced like a file: its names are its content


def forget_cached(descriptor: int) -> None:
    """Let the system drop a file that is on the disk from its page cache, where it can.

    A store is read again when it is finished, and is larger than the memory as a rule: what is cached of it meanwhile costs a
    page of memory for each of its own, and pushes out what others read.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a hint, which not every file system takes
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then make it appear under its name, whole.

    A crash at any moment leaves either no `path` or the old one; a temporary file left behind by a
    killed process starts with a dot, ends in `.tmp`, and is nobody's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path, secrets.token_hex(4))
    try:
        write(temporary)
        fsync_file(temporary)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # which a full disk does not say
        raise
    fsync_folder(path.parent)


def temporary_of(path: Path, tag: str) -> Path:
    """The name beside `path` under which it is written before it is renamed."""
    return path.with_name(f".{path.name}.{tag}.tmp")


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed left of `path` half written.  Only for who alone writes it: others may be at work."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a file is the leftover of a killed process: `.name.….tmp`."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def write_bytes(path: Path, data: bytes) -> None:
    """Publish `data` as the file `path`."""
    publish(path, lambda temporary: _dump(temporary, data))


def _dump(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def json_bytes(value: Any) -> bytes:
    """The one way that we write JSON: sorted keys, so that equal content is equal bytes; NaN is refused."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Publish `value` as JSON with sorted keys."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """The content of a JSON file; `DamagedError` when it is missing or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing. {RESTORE}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedError(f"{path} is not JSON any more ({error}). {RESTORE}") from None


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of `data`, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex, reading 1 MiB at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def parse_self_checked(data: bytes, where: str, remedy: str = RESTORE) -> dict[str, Any]:
    """A JSON object written from `self_checked`; `DamagedError` when it was changed since, `ForeignError` when it is not ours.

    `remedy` is what `DamagedError` tells to do.
    """
    try:
        content = json.loads(data)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DamagedError(f"{where} is not JSON any more ({error}). {remedy}") from None
    if not isinstance(content, dict) or "sha256" not in content:
        raise ForeignError(f"{where} holds no checksum of its own: it was not written by Granary")
    try:
        whole = self_checked(content) == content and json_bytes(content) == data
    except (ValueError, RecursionError):  # a NaN, half a surrogate, or too deep: we write none of these
        whole = False
    if not whole:
        raise DamagedError(f"{where} differs from the checksum that it carries: it was damaged or edited. {remedy}")
    return content


def self_checked(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with its own SHA-256 under `sha256`: a file that can say whether it is whole."""
    body = {key: value for key, value in content.items() if key != "sha256"}
    return {**body, "sha256": sha256_bytes(json_bytes(body))}


def read_self_checked(path: Path, remedy: str = RESTORE) -> dict[str, Any]:
    """The JSON object in a file written from `self_checked`; `DamagedError` when it is missing or was changed since."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing. {remedy}") from None
    return parse_self_checked(data, str(path), remedy)
