"""How good dictionaries are on rows that they were not trained on; one read of the pack serves all those of a site.

    FVU of a step = sum |y - y_hat|^2 / sum |y - mean_step|^2,   mean_step from the *training* split
    pooled FVU    = sum over steps of the residuals / sum over steps of the deviations

Rows are counted in cells: one denoising step, and for text real tokens apart from padding.  Text is judged whole, and each
kind of token against its own means (where training has none of that kind, against those of all tokens, and the metrics say
so).  Every row gives a few figures in float64; a block's are added to its cells by one product with a 0/1 matrix of (cell,
row), and so are active features, whose counts are exact.  Blocks are the same whatever is measured beside, so a dictionary
has the same figures, bit for bit, alone and among others.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from store.errors import MismatchError, UsageError
from store.shards import Pack
from store.sites import POINTS, Point, Site
from store.strata import CODE_COLUMNS, CODES, Group
from train.dictionaries.config import DictionaryConfig
from train.dictionaries.dictionary import Dictionary
from train.dictionaries.provenance import check_same_model
from train.rows.means import TrainingMeans
from train.rows.reading import ROWS_AT_ONCE, read_shard
from train.rows.recompute import Recompute

ENTRIES_AT_ONCE = 1 << 25
"""entries of a (row, n_features) matrix held at once: 128 MiB in float32, 682 rows of 49,152 features"""

DENSITY_LOG10_EDGES: tuple[float, ...] = tuple(place / 4 for place in range(-32, 1))
"""A quarter of a decade each, from 1e-8 to 1.  A bin holds its upper edge; the first one also what lies below it."""


class Cells:
    """Which rows are added up together: those of one step, and for txt and joint of one kind of token."""

    def __init__(self, pack: Pack, site: Site) -> None:
        self.steps, self.groups, self.stream = pack.steps, pack.groups(site), site.stream
        self.kinds: tuple[Group, ...] = self.groups[1:] or self.groups
        """what a step's cells are of, in their order: `all`; or `real`, `padding` and, of a joint sequence, `image`"""

    def __len__(self) -> int:
        return len(self.steps) * len(self.kinds)

    def of(self, columns: Mapping[str, Tensor]) -> Int[Tensor, " row"]:
        """The cell of every row of a shard, from its column `step` and the one that says what kind of token it is."""
        place = torch.searchsorted(torch.tensor(self.steps), columns["step"].long())
        if len(self.kinds) == 1:
            return place
        kind = torch.empty(len(CODES), dtype=torch.int64)
        kind[[CODES[each] for each in self.kinds]] = torch.arange(len(self.kinds))
        return len(self.kinds) * place + kind[columns[CODE_COLUMNS[self.stream]].long()]

    def members(self, group: Group, step: int | None = None) -> list[int]:
        """The cells of a group, of one step or of all."""
        steps = range(len(self.steps)) if step is None else [self.steps.index(step)]
        kinds = range(len(self.kinds)) if group == "all" else [self.kinds.index(group)]
        return [place * len(self.kinds) + kind for place in steps for kind in kinds]


class Block(NamedTuple):
    """Some rows of a shard, on a device."""

    points: Mapping[Point, Tensor]
    """float32 (row, d_model)"""
    sigma: Float[Tensor, " row"]
    cell: Int[Tensor, " row"]


class Deviations:
    """Of one target point: sum |y - mean|^2 by cell, against the mean of the step and, for txt and joint, that of the cell's own kind."""

    def __init__(self, means: TrainingMeans, cells: Cells, device: torch.device) -> None:
        every: Group = "all"
        whole = (every,) * len(cells.kinds)
        against = [whole] if cells.kinds == whole else [whole, cells.kinds]
        self.missing: dict[tuple[int, Group], None] = {}
        """cells' steps and tokens of which training has no row, in their order: they are judged against the step's mean"""
        self.means = torch.stack(
            [
                torch.stack([self._mean(means, step, kind) for step in cells.steps for kind in kinds])
                for kinds in against
            ]
        ).to(device)
        self.sums = torch.zeros(len(cells), len(against), dtype=torch.float64, device=device)

    def _mean(self, means: TrainingMeans, step: int, group: Group) -> Float[Tensor, " d_model"]:
        mean = means.of(step, group)
        if mean is None:
            self.missing[step, group] = None
            mean = means.of(step)
        if mean is None:
            raise MismatchError(
                f"{means.pack.path} has no row of {means.site} at step {step}, which is to be measured: FVU needs the "
                "mean of every step from training"
            )
        return mean

    def add(
        self, y: Float[Tensor, "row d_model"], cell: Int[Tensor, " row"], member: Float[Tensor, "cell row"]
    ) -> None:
        """Add targets (float64)."""
        rows = [torch.linalg.vector_norm(y - mean[cell], dim=-1).square() for mean in self.means]
        self.sums += member @ torch.stack(rows, dim=-1)


class Tally:
    """Sums of one dictionary, by cell."""

    def __init__(self, dictionary: Dictionary, cells: Cells, device: torch.device) -> None:
        self.dictionary, n_features = dictionary, dictionary.config.n_features
        self.block = min(ROWS_AT_ONCE, max(1, ENTRIES_AT_ONCE // n_features))
        self.sums = torch.zeros(len(cells), 2, dtype=torch.float64, device=device)
        """squared residuals, cosines"""
        self.active = torch.zeros(len(cells), n_features, dtype=torch.int64, device=device)

    def add(
        self,
        x: Float[Tensor, "row d_model"],
        y: Float[Tensor, "row d_model"],
        sigma: Float[Tensor, " row"],
        member: Float[Tensor, "cell row"],
    ) -> None:
        """Add rows: inputs (float32) and targets (float64)."""
        for first in range(0, len(x), self.block):
            some = slice(first, first + self.block)
            self._add(x[some], y[some], sigma[some], member[:, some])

    def _add(self, x: Tensor, y: Tensor, sigma: Tensor, member: Tensor) -> None:
        z = self.dictionary.encode(x, sigma)
        y_hat = self.dictionary.decode(z)
        linear = self.dictionary.linear(x, sigma)
        y_hat = (y_hat if linear is None else y_hat + linear).double()
        residual = torch.linalg.vector_norm(y - y_hat, dim=-1).square()
        lengths = torch.linalg.vector_norm(y, dim=-1) * torch.linalg.vector_norm(y_hat, dim=-1)
        cosine = torch.linalg.vecdot(y, y_hat) / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
        self.sums += member @ torch.stack([residual, cosine], dim=-1)
        self.active += (member.float() @ z.gt_(0)).long()  # whole numbers far below 2^24: exact in float32


@torch.no_grad()
def evaluate(
    dictionaries: Sequence[Dictionary],
    means: Mapping[Point, TrainingMeans],
    val_pack: Pack,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """What `metrics.json` holds, for each dictionary: figures over all rows of `val_pack`, and over its `steps` apart.

    All dictionaries are of one site; for txt there are figures over `real` and `padding` tokens as well, for joint over
    these and `image` tokens.  `means` are those of the target points in the pack that was trained on.  The dictionaries are
    moved to `device`.  A dead feature is active on none of the `rows` rows.  Memory: a shard, the weights, a count a cell and
    feature, and for one block of rows at a time three matrices of `ENTRIES_AT_ONCE` entries, however many dictionaries there are.

    Where training has no row of one kind of token at a step, the held-out ones are judged against the mean of all tokens of
    that step, and `means_missing` lists such cells, as `["padding 2"]`; otherwise there is no such key.
    """
    (site,) = {dictionary.site for dictionary in dictionaries}
    device, cells = torch.device(device), Cells(val_pack, site)
    targets = {d.target_point: Deviations(means[d.target_point], cells, device) for d in dictionaries}
    tallies = [Tally(dictionary.to(device), cells, device) for dictionary in dictionaries]
    rows = torch.zeros(len(cells), dtype=torch.float64, device=device)
    points = {point for d in dictionaries for point in (d.input_point, d.target_point)}
    what = f"measuring {site}" + (f" x {len(dictionaries)}" if len(dictionaries) > 1 else "")
    with torch.autocast(device.type, enabled=False):
        for block in blocks(val_pack, site, points, cells, device, what):
            member = (torch.arange(len(cells), device=device)[:, None] == block.cell).double()
            rows += member.sum(dim=1)
            exact = {point: block.points[point].double() for point in targets}
            for point, deviations in targets.items():
                deviations.add(exact[point], block.cell, member)
            for tally in tallies:
                config = tally.dictionary.config
                tally.add(block.points[config.input_point], exact[config.target_point], block.sigma, member)
    about = {
        "pack": val_pack.id,
        "split": val_pack.split,
        "targets": val_pack.targets,
        "density_log10_edges": list(DENSITY_LOG10_EDGES),
    }
    return [
        {**about, **_missing(cells, rows, against), **_metrics(cells, rows.cpu(), against, t)}
        for t in tallies
        for against in [targets[t.dictionary.target_point]]
    ]


def _missing(cells: Cells, rows: Tensor, against: Deviations) -> dict[str, list[str]]:
    """`means_missing`, of the cells that have rows; empty where nothing is missing."""
    there = [(step, kind) for step, kind in against.missing if rows[cells.members(kind, step)].sum() > 0]
    return {"means_missing": [f"{kind} {step}" for step, kind in there]} if there else {}


def blocks(
    pack: Pack, site: Site, points: Collection[Point], cells: Cells, device: torch.device, what: str
) -> Iterator[Block]:
    """All rows of a site in the order of the pack, `ROWS_AT_ONCE` at a time; the last block of a shard is what remains of it."""
    recompute = Recompute(pack, site, device)
    columns = recompute.columns([point for point in POINTS if point in points])
    with tqdm(total=pack.rows(site), unit="row", unit_scale=True, desc=what, mininterval=0.5) as bar:
        for shard in pack.shards(site):
            there = read_shard(shard, columns)
            cell = cells.of(there)
            for first in range(0, shard.rows, ROWS_AT_ONCE):
                some = slice(first, first + ROWS_AT_ONCE)
                found = recompute.points({point: there[point][some] for point in columns})
                yield Block(found, there["sigma"][some].to(device), cell[some].to(device))
                bar.update(len(cell[some]))
            del there  # before the next shard is read


def _metrics(cells: Cells, rows: Tensor, deviations: Deviations, tally: Tally) -> dict[str, Any]:
    """The figures of every group and step of one dictionary."""
    sums, active = tally.sums.cpu().numpy(), tally.active.cpu().numpy()
    against = deviations.sums.cpu().numpy()

    def of(group: Group, step: int | None = None) -> dict[str, Any] | None:
        chosen = cells.members(group, step)
        deviation = against[chosen, 0 if group == "all" else -1].sum()
        residual, cosine = sums[chosen].sum(axis=0)
        return figures(int(rows[chosen].sum()), residual, cosine, deviation, active[chosen].sum(axis=0))

    by_group: dict[str, Any] = {}
    for group in cells.groups:
        pooled = of(group)
        by_group[group] = pooled and {**pooled, "steps": {str(step): of(group, step) for step in cells.steps}}
    return {**(by_group.pop("all") or {}), **by_group}


def figures(rows: int, residual: float, cosine: float, deviation: float, active: np.ndarray) -> dict[str, Any] | None:
    """FVU, cosine, L0, density, dead share, and how dense features are, from sums over rows; None without rows."""
    if rows == 0:
        return None
    l0 = int(active.sum()) / rows
    return {
        "fvu": float(residual / deviation) if deviation > 0 else None,
        "cosine": float(cosine / rows),
        "l0": l0,
        "density": l0 / len(active),
        "dead": int((active == 0).sum()) / len(active),
        "rows": rows,
        "density_histogram": density_histogram(active, rows),
    }


def density_histogram(active: Int[np.ndarray, " n_features"], rows: int) -> dict[str, Any]:
    """How many features are active on which share of `rows` rows: `counts` in the bins of `DENSITY_LOG10_EDGES`, and `never`."""
    edges = np.array([10.0**edge for edge in DENSITY_LOG10_EDGES])
    ever = active[active > 0]
    bins = np.clip(np.searchsorted(edges, ever / rows, side="left") - 1, 0, None)
    return {"counts": np.bincount(bins, minlength=len(edges) - 1).tolist(), "never": int(len(active) - len(ever))}


def check_packs(train_pack: Pack, val_pack: Pack) -> None:
    """Refuse a validation pack whose figures would mean nothing; a note where it cannot be known."""
    if val_pack.split == train_pack.split:
        raise UsageError(
            f"--val {val_pack.path} is of the split {val_pack.split!r}, which is trained on: pack --split val"
        )
    if val_pack.d_model != train_pack.d_model:
        raise MismatchError(
            f"--val {val_pack.path} has rows of width {val_pack.d_model}, --pack {train_pack.path} of width "
            f"{train_pack.d_model}: pack both from stores of one model"
        )
    known = check_same_model(
        f"--pack {train_pack.path}", train_pack.model, f"--val {val_pack.path}", val_pack.model,
        "pack both from stores of one model",
    )  # fmt: skip
    if not known:
        print(f"note: whether {val_pack.path} and {train_pack.path} are of one model is not known: they do not say")
    if not set(val_pack.steps) <= set(train_pack.steps):
        raise MismatchError(
            f"--val {val_pack.path} has steps {', '.join(map(str, val_pack.steps))}, --pack {train_pack.path} has "
            f"{', '.join(map(str, train_pack.steps))}: FVU needs the mean of every step from training"
        )


def check_site(pack: Pack, site: Site, config: DictionaryConfig) -> None:
    """Refuse a pack without the points or rows of the site."""
    if config.kind == "transcoder" and pack.points == ("mlp_out",):
        raise UsageError(
            f"{pack.path} has mlp_out alone, which SAEs read and write: add --kind sae, or pack again with --points "
            "mlp_in,mlp_out for transcoders"
        )
    pack.require(site, config.input_point, config.target_point)
    if pack.rows(site) == 0:
        raise UsageError(f"{pack.path} has no rows of {site}: pack more images")


def check_sigmas(train_pack: Pack, val_pack: Pack, site: Site) -> None:
    """Refuse a validation pack whose steps are not those of training: the same number, another sigma."""
    trained, held_out = sigmas_of(train_pack, site), sigmas_of(val_pack, site)
    for step in sorted(set(trained) & set(held_out)):
        if trained[step] != held_out[step]:
            raise MismatchError(
                f"step {step} is at sigma {held_out[step]:g} in --val {val_pack.path} and at {trained[step]:g} in --pack "
                f"{train_pack.path}: pack both from stores of one schedule (steps, resolution and dtype decide it)"
            )


def sigmas_of(pack: Pack, site: Site) -> dict[int, float]:
    """Sigma of every step that occurs in the first shard of a site."""
    columns = pack.shards(site)[0].columns("step", "sigma")
    steps, first = np.unique(columns["step"], return_index=True)
    return {int(step): float(columns["sigma"][row]) for step, row in zip(steps, first, strict=True)}
