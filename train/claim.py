"""Where a program may write: in no store and no pack, and alone.

A lock on a file beside OUT keeps a second one out; the kernel frees it when its holder ends, however it ends.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from store.errors import StoreError, UsageError
from store.layout import ROOT
from store.shards import MANIFEST

LOCK = ".lock"


@contextmanager
def claimed(out: Path, runs: Path, another: str = "training writes into") -> Iterator[None]:
    """Inside, nobody else does so: `StoreError`, "another training writes into OUT", when one does.

    The lock is a file in `runs`, which stays.
    """
    runs.mkdir(parents=True, exist_ok=True)
    file = os.open(runs / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"another {another} {out}: wait until it ends, or choose another --out") from None
        except OSError as error:
            print(f"note: {runs} cannot be locked ({error.strerror}): start no second one with --out {out}")
        yield
    finally:
        os.close(file)


def refuse_place(out: Path) -> None:
    """`UsageError` for an `--out` that is no folder, or that lies in a store or a pack: what is written there would be foreign."""
    for place in (out, *out.absolute().parents):
        if place.exists() and not place.is_dir():
            raise UsageError(f"--out {out}: {place} is a file; choose a folder")
        for name, what in ((ROOT, "store"), (MANIFEST, "pack")):
            if (place / name).exists():
                raise UsageError(
                    f"--out {out} lies in the {what} {place}, which holds nothing else: choose a folder beside it"
                )
