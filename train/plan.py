"""What a training will take, printed before it begins; what cannot fit is refused then.

Memory is estimated: weights, gradients and AdamW's moments are counted, activations of one model at a time are a handful of
(batch, n_features) matrices.
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
from store.sizes import human_size
from train.dictionaries.checkpoint import RESUME, progress_bytes
from train.dictionaries.dictionary import build
from train.distributed import Ranks
from train.learning.learner import Group
from train.models import Model, points_of
from train.rows.read_ahead import in_order
from train.rows.recompute import ROWS_AT_ONCE, ROWS_ON_DEVICE, Recompute
from train.settings import TrainSettings

AHEAD = 10**9
"""bytes of shards that a `Loader` holds, by its default"""
MATRICES = 4
"""(batch, n_features) matrices alive at once in a step: pre-activations, activations and a gradient of each"""
SHOWN = 12
FILES_BYTES = 1 << 20
"""of a dictionary, beside its weights: log, metrics and config, generously"""


@dataclass(frozen=True)
class Need:
    """What one model takes, in bytes."""

    parameters: int
    """how many, not bytes"""
    weights: int
    lasting: int
    """weights and moments, while its group is trained"""
    passing: int
    """gradients and activations, while it takes a step"""
    checkpoint: int

    @classmethod
    def of(cls, model: Model, batch: int) -> "Need":
        """Of a model with so many rows a step on one device."""
        dictionary = build(model.config, empty=True)
        parameters = sum(value.numel() for value in dictionary.parameters())
        state = progress_bytes(dictionary)
        width = 2 if model.recipe.autocast == "bfloat16" else 4
        copies = 2 * parameters if width == 2 else 0  # the matrices in bfloat16
        activations = batch * (MATRICES * width * model.config.n_features + 6 * 4 * model.config.d_model)
        return cls(parameters, state // 3, state, 4 * parameters + copies + activations, state)


def announce(
    settings: TrainSettings, pack: Pack, models: Sequence[Model], groups: Sequence[Group], ranks: Ranks
) -> None:
    """Print the plan of what is still to be trained of all `models`, the `groups` of this rank; refuse what does not fit.

    `UsageError` for memory, which fewer models together or a smaller batch help, `StoreError` for a disk that is too small.
    """
    plans = [GroupPlan.of(settings, pack, group) for group in groups]
    if ranks.first:
        print("\n".join(_lines(settings, models, plans, ranks)), flush=True)
    for plan in plans:
        _refuse_memory(plan, ranks)
    if plans:
        _refuse_disk(settings, plans)


@dataclass(frozen=True)
class GroupPlan:
    """What the models of a group take together, in bytes."""

    group: Group
    needs: dict[str, Need]
    buffers: int
    """in RAM: the shard that is read from and, where the loader reads ahead, the next one"""
    recomputing: int
    """the MLP that recomputes targets, and its hidden layer"""
    read: int
    """of the site, as often as its rows are seen"""
    checkpoints: int
    """how many of each model"""

    @classmethod
    def of(cls, settings: TrainSettings, pack: Pack, group: Group) -> "GroupPlan":
        """The plan of one group."""
        course, every = group.course, settings.checkpoint_steps
        shards = [pack.files[shard_file(group.site, shard.index)]["bytes"] for shard in pack.shards(group.site)]
        ahead = len(shards) > 1 and 2 * max(shards) <= AHEAD
        recomputes = any(point not in pack.points for point in points_of(group.models))
        at_once = ROWS_AT_ONCE if course.device.type == "cpu" else ROWS_ON_DEVICE
        return cls(
            group,
            {model.name: Need.of(model, settings.batch) for model in group.models},
            max(shards) * (2 if ahead else 1),
            4 * (8 * pack.d_model**2 + 2 * 4 * pack.d_model * at_once) if recomputes else 0,
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
    def memory(self) -> int:
        """On the device; on the CPU with all that lies in RAM."""
        device = self.lasting + self.passing + self.recomputing
        return device + (self.ram if self.group.course.device.type == "cpu" else 0)

    @property
    def ram(self) -> int:
        """In RAM beside weights and moments: rows, and what is copied there while a state or a dictionary is saved."""
        on_device = self.group.course.device.type == "cuda"
        return self.buffers + max(need.checkpoint if on_device else need.weights for need in self.needs.values())

    @property
    def states(self) -> int:
        """Checkpoints that lie there at once, and one that is being written."""
        if not self.checkpoints:
            return 0
        sizes = [need.checkpoint for need in self.needs.values()]
        return sum(sizes) + max(sizes)


def _lines(settings: TrainSettings, models: Sequence[Model], plans: Sequence[GroupPlan], ranks: Ranks) -> list[str]:
    left = [(model, plan.needs[model.name]) for plan in plans for model in plan.group.models]
    head = f"plan: {_many(len(models), 'model')} at {_many(len({model.site for model in models}), 'site')}"
    if ranks.size > 1:
        head += f"; {ranks.size} ranks, --parallel {ranks.parallel}, {len(left)} models on this one"
    elif len(left) < len(models):
        head += f", {len(models) - len(left)} of them complete already"
    lines = [head]
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
    there = _available(course.device, ranks)
    free = "what is free is not known" if there is None else f"{human_size(there)} are free"
    return [
        *lines,
        f"  reading      {human_size(sum(plan.read for plan in plans))}, each row once for up to "
        f"{_many(max(len(plan.group.models) for plan in plans), 'model')}",
        f"  steps        {' to '.join(f'{count:,}' for count in (steps if len(steps) == 1 else (steps[0], steps[-1])))} of "
        f"{course.batch:,} rows; {max(plan.checkpoints for plan in plans)} checkpoints of each model",
        f"  memory       about {human_size(largest.memory)} of {course.device}: {human_size(largest.lasting)} weights and moments, "
        f"{human_size(largest.passing)} gradients and activations, {human_size(largest.recomputing)} recomputing targets, "
        f"{human_size(largest.ram)} in RAM for rows and saving; {free}",
        f"  disk         {human_size(_disk(plans))} in {settings.out}, {human_size(_free(settings.out))} are free",
        *_long_warmups(plans),
    ]


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


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


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
            f"{_many(len(group.models), 'model')} of {group.site} at once need about {human_size(plan.memory)} and "
            f"{human_size(there)} are free on {group.course.device}: use {fewer}a smaller --batch or --expansion"
        )


def _refuse_disk(settings: TrainSettings, plans: Sequence[GroupPlan]) -> None:
    folders = [settings.out / name / RESUME for plan in plans for name in plan.needs]
    found = _disk(plans) - sum(path.stat().st_size for path in folders if path.exists())
    free = _free(settings.out)
    if found > free:
        raise StoreError(
            f"{settings.out}: dictionaries and checkpoints take {human_size(found)} and {human_size(free)} are free on that "
            "disk: make room, choose another --out, or train fewer models --together"
        )


def _disk(plans: Sequence[GroupPlan]) -> int:
    """The most that lies there at once: all dictionaries, and a group's checkpoints."""
    finished = sum(need.weights + FILES_BYTES for plan in plans for need in plan.needs.values())
    return finished + max(plan.states for plan in plans)


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
