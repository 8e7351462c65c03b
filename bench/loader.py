"""What reading a pack costs, against a sequential memory-mapped read with permutation.

Least work: each row once from the file, and one CRC-32C of it: a pack is shuffled, so that a batch may be a piece of what was
read.  The alternative copies each column of a
shard out of its map, which reads it in order, and gathers batches from the copy by a permutation; it checks nothing.  Ours
compares the checksum of every shard and looks at every value besides, in the thread that reads ahead, so that on a machine whose
cores are busy it wins less.
"""

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from bench.lines import Line, Need, Peer, Rate, Size
from bench.timing import by_turns, forget
from store.shards import Pack
from store.sites import POINTS
from tests.written_pack import SITE, written_pack
from train.rows.loader import Loader

BATCH = 4096
WARM: tuple[Rate, ...] = ("cached",)
BOTH: tuple[Rate, ...] = ("cached", "read")
SIZES: dict[Size, tuple[int, int, dict[int, tuple[Rate, ...]], int]] = {
    "tiny": (1, 10**6, {32: BOTH}, 1),
    "quick": (2, 256 * 10**6, {512: WARM, 3072: BOTH}, 3),
    "full": (4, 256 * 10**6, {512: BOTH, 3072: BOTH}, 5),
}
"""shards, bytes of each, from where at each width, rounds"""
GOAL = 1 / 0.8


def lines(size: Size) -> Iterator[Line]:
    """A pack of bfloat16 pairs, at two widths, from the page cache and from the disk."""
    shards, shard_bytes, widths, rounds = SIZES[size]
    for d_model, places in widths.items():
        with tempfile.TemporaryDirectory() as name:
            pack = random_pack(Path(name) / "pack", d_model, shards, shard_bytes)
            files = [shard.path for shard in pack.shards(SITE)]
            batch = min(BATCH, pack.rows(SITE) // 4)
            loader = Loader(pack, SITE, POINTS, batch, 0)
            works = (partial(_exhaust, loader), partial(mapped_batches, pack, batch))
            rows = batch * len(loader)
            moved = rows * 4 * d_model
            for what in places:
                cold = what == "read"
                ours, its = by_turns(*works, rounds=rounds, before=partial(forget, files) if cold else None)
                needs = (Need(what, moved), Need("crc32c", moved))
                yield Line(
                    f"batches, {'cold' if cold else 'page cache'}, d_model {d_model}", ours,
                    (Peer("memory map in order, permuted in RAM", its, GOAL),), needs, f"{rows / min(ours) / 1e3:,.0f} k rows/s",
                )  # fmt: skip


def _exhaust(loader: Loader) -> None:
    for _ in loader.batches(0, len(loader)):
        pass  # the buffers stay, as they do in a training


def mapped_batches(pack: Pack, batch: int) -> None:
    """Batches of both points and sigma: columns copied from the map in order, rows taken by a permutation."""
    rng = np.random.default_rng(0)
    for shard in pack.shards(SITE):
        columns = {name: np.array(column) for name, column in shard.columns(*POINTS, "sigma").items()}
        order = rng.permutation(shard.rows)
        for first in range(0, shard.rows - batch + 1, batch):
            chosen = order[first : first + batch]
            _ = {name: column[chosen] for name, column in columns.items()}


def random_pack(path: Path, d_model: int, shards: int, shard_bytes: int) -> Pack:
    """A pack of one site, bfloat16 pairs; every shard holds the same random rows."""
    rows = shard_bytes // (4 * d_model)
    rng = np.random.default_rng(0)
    shard: Mapping[str, np.ndarray] = {
        point: rng.standard_normal((rows, d_model), np.float32).astype(ml_dtypes.bfloat16) for point in POINTS
    }
    return written_pack(path, [shard] * shards)
