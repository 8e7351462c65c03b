"""The means that FVU is measured against, and that a decoder's bias may start from: those of the training rows."""

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from store.shards import Pack
from store.sites import Point, Site
from store.strata import CODE_COLUMNS, CODES, Group
from train.rows.read_ahead import in_order
from train.rows.reading import ROWS_AT_ONCE
from train.rows.recompute import Recompute
from train.rows.tensors import to_torch


class TrainingMeans:
    """Means of one point of a site over the rows of each step of a pack, float64.

    A pack carries those of its columns.  For recomputed targets one pass over the pack computes mlp_out of every row
    (float32) and sums it in float64, when a mean is first asked for; a bar shows it, and it is done once.
    """

    def __init__(self, pack: Pack, site: Site, point: Point, device: torch.device | str = "cpu") -> None:
        """`device` is where recomputed targets are computed; the means lie on the CPU."""
        pack.require(site, point)
        self.pack, self.site, self.point, self.device = pack, site, point, torch.device(device)

    def of(self, step: int, group: Group = "all") -> Float[Tensor, " d_model"] | None:
        """The mean over the rows of a step, or over its tokens of one kind; None where there are none."""
        if self.point not in self.pack.points:
            return self._computed.get((step, group))
        mean = self.pack.mean(self.site, step, self.point, group)
        return None if mean is None else to_torch(mean)

    @cached_property
    def _computed(self) -> dict[tuple[int, Group], Float[Tensor, " d_model"]]:
        recompute = Recompute(self.pack, self.site, self.device)
        keys = [(step, group) for step in self.pack.steps for group in self.pack.groups(self.site)]
        totals = torch.zeros(len(keys), self.pack.d_model, dtype=torch.float64, device=self.device)
        counts = torch.zeros(len(keys), dtype=torch.float64)
        columns = recompute.columns([self.point])
        with tqdm(total=self.pack.rows(self.site), unit="row", unit_scale=True, desc=f"means of {self.site}",
                  mininterval=0.5) as bar:  # fmt: skip
            for shard, there in in_order(self.pack.shards(self.site), columns):
                for start in range(0, shard.rows, ROWS_AT_ONCE):
                    block = {name: column[start : start + ROWS_AT_ONCE] for name, column in there.items()}
                    y = recompute.points({point: block[point] for point in columns})[self.point]
                    member = torch.stack([_members(block, self.site, *key) for key in keys]).double()
                    totals += member.to(self.device) @ y.double()
                    counts += member.sum(dim=1)
                    bar.update(len(y))
        return {key: totals[i].cpu() / counts[i] for i, key in enumerate(keys) if counts[i]}


def _members(rows: dict[str, Tensor], site: Site, step: int, group: Group) -> Tensor:
    chosen = rows["step"] == step
    return chosen if group == "all" else chosen & (rows[CODE_COLUMNS[site.stream]] == CODES[group])
