"""Batches from a pack: which rows they hold is decided by (seed, epoch, k) alone.

1. Shards are read in order, wholly into RAM; a thread reads the next one meanwhile.
2. Their rows are permuted there by a permutation that depends on (seed, epoch, shard).
3. Batch k is the next run of rows; it never crosses a shard.  The remainder of a shard, less than one
   batch, is left out of the epoch; another epoch leaves out other rows.
4. Numbers count on through the epochs; of them rank r of w takes k * w + r.
"""

import hashlib
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from store.errors import UsageError
from store.shards import Pack
from store.sites import POINTS, Point, Site
from train.rows.read_ahead import ReadAhead
from train.rows.recompute import Recompute
from train.rows.staging import Sent, Staging
from train.rows.tensors import gathered


class Batch:
    """Rows of one site: columns in the dtype of the pack, and from them any point in float32, all on one device."""

    def __init__(self, columns: Mapping[str, Tensor], recompute: Recompute | None) -> None:
        self.columns: dict[Point, Tensor] = {point: columns[point] for point in POINTS if point in columns}
        self.sigma: Float[Tensor, " row"] = columns["sigma"]
        self._recompute = recompute
        self._points: dict[Point, Tensor] = {}

    def __len__(self) -> int:
        """Rows."""
        return len(self.sigma)

    def at(self, point: Point) -> Float[Tensor, "row d_model"]:
        """The rows at a point in float32: converted or recomputed once, and shared by all who ask."""
        if point not in self._points:
            if self._recompute is None:
                self._points[point] = self.columns[point].float()
            else:
                self._points[point] = self._recompute.point(point, self.columns)
        return self._points[point]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_recompute": None}  # what was recomputed travels, pack and MLP do not


class Loader(IterableDataset[Batch]):
    """The batches of one site of a pack.

    `batch` and `batches` are functions of their arguments.  Iterating goes on for ever, epoch after epoch, from where
    `load_state_dict` or the last iteration left it; one iterator at a time.  In workers of a `torch.utils.data.DataLoader`
    (`batch_size=None`) each takes its share, and they come back in the order that they have without workers.  The state of
    the loader outside moves only where it is iterated itself: who iterates workers counts for himself.  Every worker reads
    every shard, so workers pay only where gathering or recomputing is what takes the time.

    Memory: `ahead` bounds the shards that are held, the one in use and the next, read by a thread.  Where two do not fit,
    one is held and nothing is read ahead.  An MLP that recomputes targets, and batches, come on top.
    """

    def __init__(
        self,
        pack: Pack,
        site: Site,
        points: Sequence[Point],
        batch: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        ahead: int = 10**9,
        device: torch.device | str = "cpu",
    ) -> None:
        """`UsageError` for a site or point that the pack lacks, a batch greater than a shard, a rank outside the world."""
        self.recompute = Recompute(pack, site, device)
        self.points, self.columns = tuple(points), self.recompute.columns(points)
        self.pack, self.site, self.batch_rows, self.seed = pack, site, batch, seed
        self.rank, self.world, self.device = rank, world, torch.device(device)
        if not 0 <= rank < world:
            raise UsageError(f"rank {rank} of {world}: ranks are counted from 0 to {world - 1}")
        self.shards = pack.shards(site)
        counts = [shard.rows // batch for shard in self.shards]
        if min(counts) == 0:
            least = min(shard.rows for shard in self.shards)
            raise UsageError(
                f"--batch {batch} is more than the {least} rows of a shard of {pack.path}, and a batch never crosses "
                f"a shard: use --batch {least} or less"
            )
        self._ends = list(accumulate(counts))
        self._window = ReadAhead(self.shards, self.columns, ahead)
        self._order: tuple[tuple[int, int, int], Tensor] | None = None
        self._staging: Staging | None = None
        self._number = 0

    def __len__(self) -> int:
        """Batches an epoch, those of all ranks together."""
        return self._ends[-1]

    def check(self) -> None:
        """Look at length and header of every shard of the site: `DamagedError` or `MismatchError` before a step is taken."""
        for shard in self.shards:
            shard.columns(*self.columns)

    def batch(self, epoch: int, k: int) -> Batch:
        """Batch `k` of `epoch`; reading them in order reads each shard once an epoch."""
        if not (epoch >= 0 and 0 <= k < len(self)):
            raise IndexError(f"batch {k} of epoch {epoch}: an epoch has batches 0 to {len(self) - 1}")
        return self._end(self._begin(epoch * len(self) + k, None))

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Of the batches `first` to `last`, counted through all epochs, those of this rank: number % world == rank."""
        return self._over(range(first + (self.rank - first) % self.world, last, self.world))

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this rank, and of this worker, from the state on, without end."""
        worker = get_worker_info()
        share, of = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:
            self._begin_in_worker()
        start = self._number + (self.rank - self._number) % self.world + share * self.world
        with closing(self._over(range(start, sys.maxsize, self.world * of))) as batches:
            for batch in batches:
                if worker is not None:
                    for point in self.points:
                        if point not in batch.columns:
                            batch.at(point)  # recomputed here: the MLP does not travel
                self._number += self.world * of
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Where iterating goes on: three integers, the same on every rank after as many batches."""
        epoch, batch = divmod(self._number, len(self))
        return {"seed": self.seed, "epoch": epoch, "batch": batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Iterate from there; the seed is taken over too.  `UsageError` for a batch that no epoch of this loader has."""
        if not (state["epoch"] >= 0 and 0 <= state["batch"] < len(self)):
            raise UsageError(
                f"{dict(state)} is no state of this loader, whose epochs have {len(self)} batches: "
                "load it with the pack, the site and the batch that it was saved with"
            )
        self.seed, self._number = state["seed"], state["epoch"] * len(self) + state["batch"]

    def release(self) -> None:
        """Give back the memory of shards and MLP; they are read again when they are needed again."""
        self._window.release()
        self._order = self._staging = None
        self.recompute.release()

    def rows_of(self, number: int) -> tuple[int, Tensor]:
        """The shard of a batch, counted through all epochs, and its rows there."""
        epoch, k = divmod(number, len(self))
        shard = self._shard_of(number)
        first = (k - (self._ends[shard - 1] if shard else 0)) * self.batch_rows
        return shard, self._permutation(epoch, shard)[first : first + self.batch_rows]

    def _over(self, numbers: range) -> Generator[Batch, None, None]:
        """Those batches; on CUDA each is on its way while the one before it is used."""
        under_way: deque[dict[str, Tensor] | Sent] = deque()
        try:
            for number in numbers:
                under_way.append(self._begin(number, self._shard_after(number, numbers)))
                if len(under_way) > (self.device.type == "cuda"):
                    yield self._end(under_way.popleft())
            while under_way:
                yield self._end(under_way.popleft())
        finally:
            self._window.stop()

    def _begin(self, number: int, then: int | None) -> "dict[str, Tensor] | Sent":
        """The columns of a batch, or their way to the device begun; the reading of shard `then` begins too."""
        shard, rows = self.rows_of(number)
        there = self._window.take(shard, then)
        columns = {name: there[name] for name in (*self.columns, "sigma")}
        if self.device.type == "cuda":
            if self._staging is None:
                self._staging = Staging(self.device)
            return self._staging.send(columns, rows)
        return {name: gathered(column, rows) for name, column in columns.items()}

    def _end(self, begun: "dict[str, Tensor] | Sent") -> Batch:
        return Batch(begun.columns() if isinstance(begun, Sent) else begun, self.recompute)

    def _begin_in_worker(self) -> None:
        if self.device.type == "cuda":
            raise UsageError(
                "workers of a DataLoader cannot fill a CUDA device: make the Loader with device='cpu' and move what "
                "its batches give, or iterate it without workers, which reads ahead in a thread"
            )
        self._window = ReadAhead(self.shards, self.columns, self._window.ahead)  # a fork copies no thread

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_order": None, "_staging": None}

    def _shard_of(self, number: int) -> int:
        return bisect_right(self._ends, number % len(self))

    def _shard_after(self, number: int, numbers: range) -> int | None:
        """The shard that is read from after that of `number`; None where no more follow."""
        epoch, k = divmod(number, len(self))
        end = epoch * len(self) + self._ends[bisect_right(self._ends, k)]
        following = end + (number - end) % numbers.step
        return self._shard_of(following) if following < numbers.stop else None

    def _permutation(self, epoch: int, shard: int) -> Tensor:
        key = (self.seed, epoch, shard)
        if self._order is None or self._order[0] != key:
            digest = hashlib.sha256(f"granary-batches-1:{self.seed}:{epoch}:{shard}".encode()).digest()
            raw = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")).random_raw(self.shards[shard].rows)
            self._order = key, torch.from_numpy(stable_order(raw))
        return self._order[1]


def stable_order(keys: np.ndarray) -> np.ndarray:
    """The order that sorts `keys`, equal ones as they stand: 3 ms where `kind="stable"` takes 23 (125,000 keys, AVX-512)."""
    order = np.argsort(keys)
    ranked = keys[order]
    if (ranked[1:] == ranked[:-1]).any():  # of 64 random bits as good as never
        return np.argsort(keys, kind="stable")
    return order
