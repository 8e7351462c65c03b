"""What is sent to a cluster as text: it asks a worker what it has, and hands it its work.

It runs where there may be nothing of ours, a scheduler among them, so it imports the standard library alone.
"""

import hashlib
import pickle
from pathlib import Path
from typing import Any


def sources_of(folder: Path) -> str:
    """A hash of the sources below a folder: SHA-256 over names and contents, in order."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def probe(marks: list[str]) -> dict[str, Any]:
    """`files`: the SHA-256 of each marked file, None for one that is not seen; `sources` and `where`, or `error`."""
    files: dict[str, str | None] = {}
    for mark in marks:
        try:
            files[mark] = hashlib.sha256(Path(mark).read_bytes()).hexdigest()
        except OSError:
            files[mark] = None
    try:
        import store
        from store.packing.cluster import SOURCES  # of what this worker has loaded, whatever lies on the disk by now
    except Exception as error:  # whatever keeps it from being imported is said, and not raised elsewhere
        return {"files": files, "sources": None, "error": f"{type(error).__name__}: {error}"}
    return {"files": files, "sources": SOURCES, "where": str(Path(store.__file__ or "").parent)}


def deliver(packed: bytes) -> bytes:
    """What the pickled function makes of the pickled arguments, pickled: a scheduler in between need not understand them."""
    function, arguments = pickle.loads(packed)
    return pickle.dumps(function(*arguments))
