"""Batches from a pack: which rows they hold is decided by (seed, epoch, k) alone.

1. Shards are read in order, one at a time, wholly into RAM.
2. Their rows are permuted there by a permutation that depends on (seed, epoch, shard).
3. Batch k is the next run of rows; it never crosses a shard.  The remainder of a shard, less than one
   batch, is left out of the epoch; another epoch leaves out other rows.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from store.errors import NonFiniteError, UsageError
from store.shards import Pack, Shard
from store.sites import Point, Site
from train.recompute import PackPoints
from train.tensors import to_torch

ROWS_AT_ONCE = 4096
"""rows of a shard that are computed with at once, where order does not matter"""


class Batch(NamedTuple):
    """Rows of one site, float32."""

    x: Float[Tensor, "row d_model"]
    y: Float[Tensor, "row d_model"]
    """the targets, read or recomputed; the same tensor as x where input and target are one point"""
    sigma: Float[Tensor, " row"]


class Rows(NamedTuple):
    """A whole shard in RAM, in the dtype of the pack."""

    x: Tensor
    y: Tensor
    sigma: Tensor


def read_rows(shard: Shard, input_point: Point, target_point: Point) -> Rows:
    """A shard's rows; `NonFiniteError` names site, step, image and token of a row with a NaN or an infinity."""
    columns = shard.columns(*dict.fromkeys((input_point, target_point)), "sigma")
    tensors = {name: to_torch(column) for name, column in columns.items()}
    for point in dict.fromkeys((input_point, target_point)):
        finite = torch.isfinite(tensors[point]).all(dim=-1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            where = {name: int(column[row]) for name, column in shard.columns("step", "image", "token").items()}
            raise NonFiniteError(
                f"{shard.path}: {shard.site} {point} at step {where['step']} of image {where['image']}, "
                f"token {where['token']} holds a NaN or an infinity (row {row}; {int((~finite).sum())} such rows in "
                "this shard). No step was taken on this shard: restore or harvest the store again, and pack it again"
            )
    return Rows(tensors[input_point], tensors[target_point], tensors["sigma"])


class Loader:
    """The batches of one site."""

    def __init__(self, pack: Pack, site: Site, input_point: Point, target_point: Point, batch: int, seed: int) -> None:
        self.points = PackPoints(pack, site, input_point, target_point)
        self.shards, self.batch_rows, self.seed = pack.shards(site), batch, seed
        counts = [shard.rows // batch for shard in self.shards]
        if min(counts) == 0:
            least = min(shard.rows for shard in self.shards)
            raise UsageError(
                f"--batch {batch} is more than the {least} rows of a shard of {pack.path}, and a batch never crosses "
                f"a shard: use --batch {least} or less"
            )
        self._ends = list(accumulate(counts))
        self._rows: tuple[int, Rows] | None = None
        self._order: tuple[tuple[int, int], Tensor] | None = None

    def __len__(self) -> int:
        """Batches an epoch."""
        return self._ends[-1]

    def batch(self, epoch: int, k: int) -> Batch:
        """Batch `k` of `epoch`; reading them in order touches each shard once an epoch."""
        shard = bisect_right(self._ends, k)
        first = (k - (self._ends[shard - 1] if shard else 0)) * self.batch_rows
        rows, order = self._shard(shard), self._permutation(epoch, shard)
        chosen = order[first : first + self.batch_rows]
        x = rows.x.index_select(0, chosen)
        y = x if rows.y is rows.x else rows.y.index_select(0, chosen)
        return Batch(*self.points.pair(x, y), rows.sigma.index_select(0, chosen))

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Batches `first` to `last`, counted through all epochs."""
        for number in range(first, last):
            yield self.batch(*divmod(number, len(self)))

    def release(self) -> None:
        """Let go of the shard and the MLP that are held in RAM; they are read again when they are needed again."""
        self._rows = self._order = None
        self.points.release()

    def _shard(self, index: int) -> Rows:
        if self._rows is None or self._rows[0] != index:
            self._rows = None  # let go of the old shard before the new one is read
            self._rows = index, read_rows(self.shards[index], *self.points.columns)
        return self._rows[1]

    def _permutation(self, epoch: int, shard: int) -> Tensor:
        if self._order is None or self._order[0] != (epoch, shard):
            digest = hashlib.sha256(f"granary-batches-1:{self.seed}:{epoch}:{shard}".encode()).digest()
            raw = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")).random_raw(self.shards[shard].rows)
            self._order = (epoch, shard), torch.from_numpy(np.argsort(raw, kind="stable"))
        return self._order[1]
