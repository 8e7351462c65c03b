"""What the store costs: writing against a raw file with fsync, reading against copying a memory map.

Fewest bytes: each activation once.  Ours also computes a CRC-32C over them (in the chunk), reads them
back once from the page cache for the commit's SHA-256, and keeps them in as many files as chunks.
"""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.timing import Comparison, by_turns
from store import open_store
from store.format import StreamTokens
from store.writer import StoreWriter
from tests.small_store import small_meta, small_part


def comparisons() -> list[Comparison]:
    """Write and read 8 arrays of one chunk each, about 190 MB together."""
    tokens = StreamTokens("all", 192, 192)
    meta = small_meta(
        n_images=64, sites=("img_0", "img_1"), d_model=1024, image_tokens=tokens, chunk_images=64, pictures="none"
    )
    meta = replace(meta, height=96, width=128)
    rng = np.random.default_rng(0)
    values = {
        (site, step, point): rng.normal(size=(64, 192, 1024)).astype(np.float32).astype(meta.carrier.logical)
        for site in meta.site_objects
        for step in meta.steps
        for point in meta.points
    }
    raw = np.stack(list(values.values())).view(np.uint16)
    part = small_part(meta, 0, values, ["p"] * 64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        turns = iter(range(100))

        def write_ours() -> None:
            writer = StoreWriter.open_or_create(folder / f"store-{next(turns)}", meta)
            writer.write_part(0, part)
            writer.seal()

        def write_raw() -> None:
            with (folder / "raw").open("wb") as file:
                file.write(raw.data)
                file.flush()
                os.fsync(file.fileno())

        written = by_turns(write_ours, write_raw)
        store = open_store(folder / "store-0")

        def read_ours() -> None:
            for site, step, point in values:
                store.read(site, step, point)

        def read_raw() -> None:
            np.array(np.memmap(folder / "raw", np.uint16, "r"))

        read = by_turns(read_ours, read_raw)
    size = f"{raw.nbytes / 1e6:.0f} MB once"
    return [
        Comparison("store: write, commit, seal", written[0], "one raw file, fsync", written[1], size),
        Comparison("store: read, CRC-32C checked", read[0], "copy of a memory map, unchecked", read[1], size),
    ]
