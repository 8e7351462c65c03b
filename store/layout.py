"""Where things lie in a store: names relative to its root, the same on a disk and in a bucket."""

import os
from pathlib import Path

from store.format import part_name

ROOT = "zarr.json"
"""the group's metadata: the attribute `granary` in it is the StoreMeta"""
CARD = "README.md"
"""the dataset card"""
STORE_COMMIT = "commits/store.json"
"""checksums of everything written at creation"""
SEAL = "seal.json"
"""the hash of every commit"""


def part_commit(part: int) -> str:
    """`commits/part-00000.json`"""
    return f"commits/{part_name(part)}.json"


def runs_folder(path: Path) -> Path:
    """Beside the store, never in it: command lines, rates, hosts and leases, on which no byte of the store depends.

    Symbolic links are followed, of what is not there yet too: whichever path names a store, it has one place for its leases.
    """
    whole = Path(os.path.realpath(path))  # unlike `resolve` it leaves a link that leads in a circle to whoever opens it
    return whole.with_name(f"{whole.name}.runs")
