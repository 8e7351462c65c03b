"""The store: activations on disk, opened alone, trusted by checksum.  Imports nothing else of ours, and no torch.

`from store import open_store` and `Site` are what most readers need.  What touches Zarr is imported on
first use, because reading a pack must not import it (Zarr hangs in forked loader processes).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from store.errors import GranaryError, StoreError, UsageError
from store.sites import Point, Site, Stream, parse_sites

if TYPE_CHECKING:
    from store.reader import Store

__all__ = ["GranaryError", "Point", "Site", "Store", "StoreError", "Stream", "UsageError", "open_store", "parse_sites"]


def open_store(path: str | Path, unfinished: bool = False) -> "Store":
    """The store at a path or URL (`s3://`, `hf://`, `https://`), checked; with `unfinished` also one whose parts are not all there."""
    from store.reader import Store

    return Store.open(path, unfinished)


def __getattr__(name: str) -> Any:
    if name == "Store":
        from store.reader import Store

        return Store
    raise AttributeError(f"module 'store' has no attribute {name!r}")
