"""What a training will take, printed before it begins; what cannot fit is refused then.

Memory is estimated (`train.memory`), and is the greater of what training takes and what measuring takes.
"""

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from store.errors import StoreError, UsageError
from store.shards import Pack, shard_file
from store.sites import Point, Site
from store.sizes import human_size, many
from train.dictionaries.checkpoint import RESUME
from train.distributed import Ranks
from train.learning.learner import Group
from train.memory import PYTHON, Need, counts_of
from train.models import Model, points_of
from train.rows.read_ahead import in_order
from train.rows.recompute import ROWS_AT_ONCE, ROWS_ON_DEVICE, Recompute
from train.settings import TrainSettings

AHEAD = 10**9
"""bytes of shards that a `Loader` holds, by its default"""
SHOWN = 12
FILES_BYTES = 1 << 20
"""of a dictionary, beside its weights: log, metrics and config, generously"""


def announce(
    settings: TrainSettings, pack: Pack, val: Pack | None, models: Sequence[Model], everyones: Sequence[Sequence[Group]],
    ranks: Ranks,
) -> None:  # fmt: skip
    """Print the plan of what is still to be trained of all `models`, the groups of every rank; refuse what does not fit.

    `UsageError` for memory, which fewer models together or a smaller batch help, `StoreError` for a disk that is too small.
    """
    shares = [[GroupPlan.of(settings, pack, val, group) for group in groups] for groups in everyones]
    if ranks.first:
        print("\n".join(_lines(settings, models, shares, ranks)), flush=True)
    for plan in (plan for plans in shares for plan in plans):
        _refuse_memory(plan, ranks)
    if any(shares):
        _refuse_disk(settings, shares)


@dataclass(frozen=True)
class GroupPlan:
    """What the models of a group take together, in bytes."""

    group: Group
    needs: dict[str, Need]
    buffers: int
    """in RAM: the shard that is read from and, where the loader reads ahead, the next one"""
    recomputing: int
    """the MLP that recomputes targets, and its hidden layer"""
    held_out: int
    """in RAM while measuring: the shard that is measured"""
    counts: int
    """of active features, while measuring"""
    read: int
    """of the site, as often as its rows are seen"""
    checkpoints: int
    """how many of each model"""

    @classmethod
    def of(cls, settings: TrainSettings, pack: Pack, val: Pack | None, group: Group) -> "GroupPlan":
        """The plan of one group."""
        course, every = group.course, settings.checkpoint_steps
        shards = _shard_bytes(pack, group.site)
        held_out = max(val.shard_rows(group.site.stream)) if val else 0
        ahead = len(shards) > 1 and 2 * max(shards) <= AHEAD
        recomputes = any(point not in pack.points for point in points_of(group.models))
        at_once = ROWS_AT_ONCE if course.device.type == "cpu" else ROWS_ON_DEVICE
        return cls(
            group,
            {model.name: Need.of(model, settings.batch, held_out, course.device) for model in group.models},
            max(shards) * (2 if ahead else 1),
            4 * (8 * pack.d_model**2 + 2 * 4 * pack.d_model * at_once) if recomputes else 0,
            max(_shard_bytes(val, group.site)) if val else 0,
            counts_of(group.models, val) if val else 0,
            round(sum(shards) * course.steps * course.batch / pack.rows(group.site)),
            (course.steps - 1) // every + (course.steps > every),
        )

    @property
    def lasting(self) -> int:
        """Weights and moments of all models."""
        return sum(need.lasting for need in self.needs.values())

    @property
    def passing(self) -> int:
        """Gradients and activations of the model that takes a step."""
        return max(need.passing for need in self.needs.values())

    @property
    def measuring(self) -> int:
        """On the device while measuring: weights of all models, and what one of them makes of a block; 0 without `--val`."""
        if not self.held_out:
            return 0
        weights = sum(need.weights for need in self.needs.values())
        return weights + self.counts + max(need.measuring for need in self.needs.values()) + self.recomputing

    @property
    def memory(self) -> int:
        """On the device; on the CPU with the rows that lie in RAM."""
        training, measuring = self.lasting + self.passing + self.recomputing, self.measuring
        if self.group.course.device.type == "cpu":
            training, measuring = training + self.buffers, measuring + self.held_out
        return max(training, measuring)

    @property
    def ram(self) -> int:
        """In RAM beside a device of its own: rows, and the copy of a state while it is saved."""
        return max(self.buffers + max(need.checkpoint for need in self.needs.values()), self.held_out)

    @property
    def states(self) -> int:
        """Checkpoints that lie there at once, and one that is being written."""
        if not self.checkpoints:
            return 0
        sizes = [need.checkpoint for need in self.needs.values()]
        return sum(sizes) + max(sizes)


def _lines(
    settings: TrainSettings, models: Sequence[Model], shares: Sequence[Sequence[GroupPlan]], ranks: Ranks
) -> list[str]:
    plans = [plan for share in shares for plan in share]
    left = [(model, plan.needs[model.name]) for plan in plans for model in plan.group.models]
    lines = [_head(models, shares, len(left), ranks)]
    for model, need in left[:SHOWN]:
        recipe = model.recipe
        sparsity = f"k {recipe.k}" if recipe.k is not None else f"l1 {recipe.l1:g}"
        lines.append(
            f"  {model.name}: {model.config.n_features:,} features, {recipe.activation}, {sparsity}, seed {recipe.seed}, "
            f"{need.parameters:,} parameters"
        )
    if len(left) > SHOWN:
        lines.append(f"  … and {len(left) - SHOWN} more")
    if not left:
        return lines
    largest = max(plans, key=lambda plan: plan.memory)
    course = largest.group.course
    steps = sorted({plan.group.course.steps for plan in plans})
    return [
        *lines,
        f"  reading      {human_size(sum(plan.read for plan in plans))}, each row once for up to "
        f"{many(max(len(plan.group.models) for plan in plans), 'model')}",
        f"  steps        {' to '.join(f'{count:,}' for count in (steps if len(steps) == 1 else (steps[0], steps[-1])))} of "
        f"{course.batch:,} rows; {max(plan.checkpoints for plan in plans)} checkpoints of each model",
        *_memory_lines(largest, ranks),
        f"  disk         at most {human_size(_disk(shares))} in {settings.out} while it runs, {human_size(_free(settings.out))} "
        "are free",
        *_long_warmups(plans),
    ]


def _head(models: Sequence[Model], shares: Sequence[Sequence[GroupPlan]], left: int, ranks: Ranks) -> str:
    head = f"plan: {many(len(models), 'model')} at {many(len({model.site for model in models}), 'site')}"
    if ranks.size > 1:
        most = max(sum(len(plan.group.models) for plan in share) for share in shares)
        head += f"; {ranks.size} ranks, --parallel {ranks.parallel}"
        head += f", at most {many(most, 'model')} on one" if ranks.parallel == "models" else ""
    return head + (f", {len(models) - left} of them complete already" if left < len(models) else "")


def _memory_lines(plan: GroupPlan, ranks: Ranks) -> list[str]:
    """Of the group that takes most."""
    device = plan.group.course.device
    there = _available(device, ranks)
    free = "what is free is not known" if there is None else f"{human_size(there)} are free"
    each = " of each rank" if ranks.size > 1 else ""
    on_cpu = device.type == "cpu"
    parts = {
        "weights and moments": plan.lasting, "gradients and activations": plan.passing,
        "recomputing targets": plan.recomputing, "rows": plan.buffers * on_cpu,
    }  # fmt: skip
    training = ", ".join(f"{human_size(size)} {what}" for what, size in parts.items() if size)
    lines = [
        f"  memory       about {human_size(plan.memory)} of {device}{each}, beside about {PYTHON / 1e9:g} GB for Python; {free}",
        f"    training   {training}",
    ]
    if plan.held_out:
        measuring = human_size(plan.measuring + plan.held_out * on_cpu)
        lines.append(f"    measuring  {measuring}, weights, a shard and what a block of its rows makes")
    return lines if on_cpu else [*lines, f"    RAM        {human_size(plan.ram)} for rows and saving"]


def _long_warmups(plans: Sequence[GroupPlan]) -> list[str]:
    """A note where a warm-up does not end in the run: small data with the recipe of a large run would hardly learn."""
    for plan in plans:
        rows = plan.group.course.steps * plan.group.course.batch
        for model in plan.group.models:
            if model.recipe.lr_warmup_rows > rows:
                return [
                    f"  note         the learning rate of {model.name} rises over {model.recipe.lr_warmup_rows:,} rows and the run "
                    f"has {rows:,}: it ends at {rows / model.recipe.lr_warmup_rows:.1%} of it; see --lr-warmup-rows"
                ]
    return []


def _shard_bytes(pack: Pack, site: Site) -> list[int]:
    return [pack.files[shard_file(site, shard.index)]["bytes"] for shard in pack.shards(site)]


def _refuse_memory(plan: GroupPlan, ranks: Ranks) -> None:
    group = plan.group
    there = _available(group.course.device, ranks)
    fewer = f"--together {len(group.models) // 2}, " if len(group.models) > 1 else ""
    if group.course.device.type == "cuda":
        free = _available(torch.device("cpu"), ranks)
        if free is not None and plan.ram > free:
            raise UsageError(
                f"rows and the copy of a state while it is saved need about {human_size(plan.ram)} of RAM and {human_size(free)} are "
                "free: use a smaller --expansion, or a pack of smaller shards"
            )
    if there is not None and plan.memory > there:
        raise UsageError(
            f"{many(len(group.models), 'model')} of {group.site} at once need about {human_size(plan.memory)} and "
            f"{human_size(there)} are free on {group.course.device}: use {fewer}a smaller --batch or --expansion"
        )


def _refuse_disk(settings: TrainSettings, shares: Sequence[Sequence[GroupPlan]]) -> None:
    folders = [settings.out / name / RESUME for plans in shares for plan in plans for name in plan.needs]
    found = _disk(shares) - sum(path.stat().st_size for path in folders if path.exists())
    free = _free(settings.out)
    if found > free:
        raise StoreError(
            f"{settings.out}: dictionaries and checkpoints take {human_size(found)} and {human_size(free)} are free on that "
            "disk: make room, choose another --out, or train fewer models --together"
        )


def _disk(shares: Sequence[Sequence[GroupPlan]]) -> int:
    """The most that lies there at once: all dictionaries, and the checkpoints of one group of every rank."""
    finished = sum(need.weights + FILES_BYTES for plans in shares for plan in plans for need in plan.needs.values())
    return finished + sum(max((plan.states for plan in plans), default=0) for plans in shares)


def _free(out: Path) -> int:
    absolute = out.absolute()
    return shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists())).free


def _available(device: torch.device, ranks: Ranks) -> int | None:
    """Bytes that this process can still get on a device; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        words = Path("/proc/meminfo").read_text().split()
        found = int(words[words.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError, ValueError):  # a container's own limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        words = Path("/sys/fs/cgroup/memory.stat").read_text().split()
        found = min(
            found, limit - used + int(words[words.index("file") + 1])
        )  # what files occupy is given back when asked for
    return found // ranks.here


def check_rows(val: Pack, wanted: Mapping[Site, Sequence[Point]]) -> None:
    """Read the held-out rows once, before the first step: `NonFiniteError` or `DamagedError` then, and not after hours."""
    rows = sum(val.rows(site) for site in wanted)
    with tqdm(total=rows, unit="row", unit_scale=True, desc="held-out rows", mininterval=0.5) as bar:
        for site, points in wanted.items():
            columns = Recompute(val, site).columns(points)
            for shard, _ in in_order(val.shards(site), columns):
                bar.update(shard.rows)
