"""How well a pack is mixed: pairs of rows of one image in a batch, against the number under a perfect shuffle.

Of N rows of which n_i come from image i, a batch is under a perfect shuffle any B of them with equal chance, so that

    expected pairs of a batch = B (B - 1) / 2 * sum_i n_i (n_i - 1) / (N (N - 1))

Rows of one image are alike; a batch that holds more pairs of them than that says less than its number of rows.
"""

from dataclasses import dataclass

import numpy as np

from store.shards import Pack
from store.sites import Site
from train.rows.loader import Loader


@dataclass(frozen=True)
class Mixing:
    """What was counted, and what a perfect shuffle gives."""

    batches: int
    rows: int
    """rows of a batch"""
    pairs: int
    """pairs of rows of one image in those batches together"""
    expected: float
    """the same under a perfect shuffle"""

    @property
    def ratio(self) -> float | None:
        """1 where the pack is mixed, more where rows of one image lie together; None where no image has two rows."""
        return self.pairs / self.expected if self.expected else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the ratio under a perfect shuffle, as far as pairs are independent of each other."""
        return self.expected**-0.5 if self.expected else None

    def __str__(self) -> str:
        where = f"{self.batches} batches of {self.rows:,} rows"
        if self.ratio is None:
            return f"mixing: no image has two rows, so that {where} hold no pair of one image"
        return (
            f"mixing: {self.pairs:,} pairs of rows of one image in {where}, a perfect shuffle gives {self.expected:,.1f} "
            f"(ratio {self.ratio:.3f} ± {self.deviation:.3f})"
        )


def mixing(pack: Pack, site: Site, batch: int, seed: int, batches: int = 16) -> Mixing:
    """Counted in so many batches of a `Loader` with that batch and seed, which lie evenly in its first epoch.

    Reads the column `image`, 4 bytes a row, and no activation, of the shards of those batches and of at most 16, from which
    the number under a perfect shuffle is estimated where there are more.
    """
    loader = Loader(pack, site, pack.points[:1], batch, seed)
    chosen = np.unique(np.linspace(0, len(loader) - 1, batches).astype(np.int64))
    pairs, column = 0, (-1, np.zeros(0, np.int32))
    for number in chosen:
        shard, rows = loader.rows_of(int(number))
        if shard != column[0]:
            column = shard, np.array(loader.shards[shard].columns("image")["image"])
        pairs += _pairs(np.bincount(column[1][rows.numpy()]))
    total = pack.rows(site)
    expected = len(chosen) * batch * (batch - 1) / 2 * pairs_of_images(pack, site) / max(total * (total - 1) / 2, 1)
    return Mixing(len(chosen), batch, pairs, expected)


def pairs_of_images(pack: Pack, site: Site, most: int = 16) -> float:
    """Pairs of rows of one image in a site, within shards and between them; estimated from `most` shards where there are more.

    Every `of / taken`-th shard is looked at: pairs within one count `of / taken` times, pairs of two shards
    `of (of - 1) / (taken (taken - 1))` times.
    """
    shards = pack.shards(site)
    chosen = np.unique(np.linspace(0, len(shards) - 1, most).astype(np.int64))
    counts, within = np.zeros(0, np.int64), 0
    for number in chosen:
        found = np.bincount(shards[number].columns("image")["image"], minlength=len(counts))
        within += _pairs(found)
        found[: len(counts)] += counts
        counts = found
    of, taken = len(shards), len(chosen)
    between = (_pairs(counts) - within) * (of * (of - 1) / (taken * (taken - 1)) if taken > 1 else 1)
    return within * of / taken + between


def _pairs(counts: np.ndarray) -> int:
    return int((counts * (counts - 1) // 2).sum())
