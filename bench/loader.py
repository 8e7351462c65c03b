"""What reading a pack costs, against a sequential memory-mapped read with permutation: `make bench`.

Fewest bytes: each row once from the file, once into its batch.  The alternative copies each column of a shard out of its map,
which reads it in order, and gathers batches from the copy by a permutation; it checks nothing.  Ours compares the checksum of
every shard and looks at every value besides, in the thread that reads ahead, so that on a machine whose cores are busy it wins less.
"""

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from bench.timing import Comparison
from store.shards import Pack
from store.sites import POINTS
from tests.written_pack import SITE, written_pack
from train.rows.loader import Loader
from train.rows.reading import buffer_for

SHARDS, SHARD_BYTES, BATCH = 4, 256 * 10**6, 4096


def comparisons() -> list[Comparison]:
    """A pack of 1 GB of bfloat16 pairs, at two widths, from the page cache and from the disk."""
    lines = []
    for d_model in (512, 3072):
        with tempfile.TemporaryDirectory() as name:
            pack = random_pack(Path(name) / "pack", d_model)
            loader = Loader(pack, SITE, POINTS, BATCH, 0)
            rows = BATCH * len(loader)
            works = (partial(_exhaust, loader), partial(mapped_batches, pack), partial(plain_read, pack))
            for what, cold in (("warm", False), ("cold", True)):
                ours, mapped, plain = by_turns_from(pack, cold, *works)
                lines.append(
                    Comparison(
                        f"read {what}, d_model {d_model}", ours, "memory map in order, permuted in RAM", mapped,
                        f"{rows * 4 * d_model / 1e9:.2f} GB in and out; a plain read takes {plain:.3f} s; "
                        f"{rows / ours / 1e3:,.0f} k rows/s",
                    )
                )  # fmt: skip
    return lines


def _exhaust(loader: Loader) -> None:
    for _ in loader.batches(0, len(loader)):
        pass  # the buffers stay, as they do in a training


def mapped_batches(pack: Pack) -> None:
    """Batches of both points and sigma: columns copied from the map in order, rows taken by a permutation."""
    rng = np.random.default_rng(0)
    for shard in pack.shards(SITE):
        columns = {name: np.array(column) for name, column in shard.columns(*POINTS, "sigma").items()}
        order = rng.permutation(shard.rows)
        for first in range(0, shard.rows - BATCH + 1, BATCH):
            chosen = order[first : first + BATCH]
            _ = {name: column[chosen] for name, column in columns.items()}


def plain_read(pack: Pack) -> None:
    """The shards into one buffer, and nothing done with them: the floor."""
    buffer = buffer_for(max(entry["bytes"] for entry in pack.files.values()))
    for shard in pack.shards(SITE):
        with shard.path.open("rb", buffering=0) as file:
            file.readinto(buffer.data)


def random_pack(path: Path, d_model: int) -> Pack:
    """A pack of one site, about 1 GB of bfloat16 pairs; every shard holds the same random rows."""
    rows = SHARD_BYTES // (4 * d_model)
    rng = np.random.default_rng(0)
    shard = {point: rng.standard_normal((rows, d_model), np.float32).astype(ml_dtypes.bfloat16) for point in POINTS}
    return written_pack(path, [shard] * SHARDS)


def by_turns_from(pack: Pack, cold: bool, *works: Callable[[], object], rounds: int = 3) -> list[float]:
    """Best seconds of each, by turns after one warm-up; if `cold`, with nothing of the pack in the page cache."""
    best = [float("inf")] * len(works)
    for turn in range(rounds + 1):
        for index, work in enumerate(works):
            if cold:
                forget(pack)
            begun = time.perf_counter()
            work()
            if turn:
                best[index] = min(best[index], time.perf_counter() - begun)
    return best


def forget(pack: Pack) -> None:
    """Drop the shards of a pack from the page cache."""
    for shard in pack.shards(SITE):
        descriptor = os.open(shard.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    for comparison in comparisons():
        print(comparison.line())
