"""The means that FVU is measured against, and that a decoder's bias may start from: those of the training rows."""

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from store.shards import GROUPS, Group, Pack
from store.sites import Point, Site
from train.loader import ROWS_AT_ONCE, read_rows
from train.recompute import PackPoints
from train.tensors import to_torch


class TrainingMeans:
    """Means of one point of a site over the rows of each step of a pack, float64.

    A pack carries those of its columns.  For recomputed targets one pass over the pack computes mlp_out of every row
    (float32) and sums it in float64, when a mean is first asked for; a bar shows it, and it is done once.
    """

    def __init__(self, pack: Pack, site: Site, point: Point) -> None:
        pack.require(site, point)
        self.pack, self.site, self.point = pack, site, point

    def of(self, step: int, group: Group = "all") -> Float[Tensor, " d_model"] | None:
        """The mean over the rows of a step, or over its real or padding tokens; None where there are none."""
        if self.point not in self.pack.points:
            return self._computed.get((step, group))
        mean = self.pack.mean(self.site, step, self.point, group)
        return None if mean is None else to_torch(mean)

    @cached_property
    def _computed(self) -> dict[tuple[int, Group], Float[Tensor, " d_model"]]:
        points = PackPoints(self.pack, self.site, self.point, self.point)
        keys = [(step, group) for step in self.pack.steps for group in GROUPS[self.site.stream]]
        totals = torch.zeros(len(keys), self.pack.d_model, dtype=torch.float64)
        counts = torch.zeros(len(keys), dtype=torch.float64)
        with tqdm(total=self.pack.rows(self.site), unit="row", unit_scale=True, desc=f"means of {self.site}",
                  mininterval=0.5) as bar:  # fmt: skip
            for shard in self.pack.shards(self.site):
                rows = read_rows(shard, *points.columns)
                labels = {name: to_torch(column) for name, column in shard.columns("step", *self._real).items()}
                for start in range(0, shard.rows, ROWS_AT_ONCE):
                    block = slice(start, min(start + ROWS_AT_ONCE, shard.rows))
                    _, y = points.pair(rows.x[block], rows.y[block])
                    member = torch.stack([self._members(labels, block, *key) for key in keys]).double()
                    totals += member @ y.double()
                    counts += member.sum(dim=1)
                    bar.update(len(y))
        return {key: totals[i] / counts[i] for i, key in enumerate(keys) if counts[i]}

    @property
    def _real(self) -> tuple[str, ...]:
        return ("real",) if len(GROUPS[self.site.stream]) > 1 else ()

    @staticmethod
    def _members(labels: dict[str, Tensor], block: slice, step: int, group: Group) -> Tensor:
        chosen = labels["step"][block] == step
        return chosen if group == "all" else chosen & (labels["real"][block] == int(group == "real"))
