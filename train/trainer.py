"""Trains the models of a run from a pack: those of one site on one read, one group after the other.

1. Whatever can be refused is refused: settings, sites, packs, shards, folders, memory, disk.  The plan is printed.
2. A group's batches are read once; each of its models takes its step on every batch (`train.learning.learner`).
3. All models of a group are checkpointed at the same step.  A killed run goes on from there: a model whose last checkpoint is
   ahead skips the batches that it has seen.
4. Finished models are measured on the held-out rows, all of a site in one read, and saved; at the end comes the table.

A model whose loss is no longer a number is given up and the others go on; the run fails at its end, naming it.
"""

import contextlib
import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from store.errors import Interrupted, MismatchError, NonFiniteError, UsageError
from store.labels import FILE as LABELS
from store.labels import note_leftover
from store.shards import Pack, open_pack
from store.sites import Point, Site
from store.sizes import many
from train.claim import claimed, refuse_place
from train.dictionaries.checkpoint import (
    CONFIG,
    COVERED,
    RESUME,
    LogLine,
    check_progress,
    check_whole,
    clear,
    frozen,
    load_dictionary,
    outline,
    read_config,
    refuse_other,
    save_dictionary,
)
from train.dictionaries.dictionary import Dictionary
from train.distributed import Parallel, Ranks
from train.learning.kernels import release_buffers
from train.learning.learner import Course, Group, Learner
from train.models import Model, device_of, models_of, points_of, steps_of
from train.plan import announce, check_rows
from train.recipe import usual_log_steps
from train.results import sweep
from train.results.evaluate import check_packs, check_sigmas, check_site, evaluate
from train.results.logs import Logs
from train.rows.loader import Loader
from train.rows.means import TrainingMeans
from train.rows.mixing import mixing
from train.rows.recompute import Recompute
from train.settings import TrainSettings
from train.stopping import explained_memory, stopping_between_steps, thread_count

GRACE_SECONDS = 5.0
"""after a signal, in which a second one to one of several ranks is torchrun handing on the first"""


def run(settings: TrainSettings) -> list[Dictionary]:
    """The trained dictionaries, site by site, as `load_dictionary` gives them; none with `--plan`.

    What can be refused is refused before a step is taken.  Memory: the weights of all of them (`train` keeps none).
    """
    models = train(settings)
    return [] if settings.plan else [load_dictionary(settings.out / model.folder) for model in models]


def train(settings: TrainSettings) -> tuple[Model, ...]:
    """The models of a run, after they were trained and saved below `settings.out`; with `--plan` nothing was done."""
    ranks = Ranks.of_environment()
    with thread_count(settings.threads):
        with ranks.speaking_once():
            training = Training(settings, ranks)
        if not settings.plan:
            with contextlib.ExitStack() as stack:
                stack.callback(training.complain)  # whatever the table comes to
                with ranks.joined(training.device):
                    if ranks.first:
                        stack.enter_context(claimed(settings.out, settings.runs))
                    training.run()
                if ranks.first:
                    training.show()
    return training.models


class Training:
    """One run of `python -m train`: checked when it is made, nothing written before `run`."""

    def __init__(self, settings: TrainSettings, ranks: Ranks) -> None:
        self.settings, self.ranks = settings, ranks
        self.device = self._device()
        refuse_place(settings.out)
        self.pack, self.val = self._packs()
        ranks.parallel = "models" if ranks.size == 1 else settings.parallel or self._suggested()
        self.models = models_of(settings, self.pack, ranks.sharers)
        self.finished = {model.name for model in self.models if self._finished(model)}
        self.loaders: dict[Site, Loader] = {}
        self._means: dict[tuple[Site, Point], TrainingMeans] = {}
        for site in dict.fromkeys(model.site for model in self.models):
            self._check_site(site, [model for model in self.models if model.site == site])
        everyones = [self._groups_of(rank) for rank in range(ranks.size if ranks.parallel == "models" else 1)]
        self.groups = everyones[ranks.rank] if ranks.parallel == "models" else everyones[0]
        self.diverged: list[str] = []
        if ranks.first:
            for model in self.models:
                if model.name in self.finished:
                    print(f"{settings.out / model.folder} is complete already")
        announce(settings, self.pack, self.val, self.models, everyones, ranks)
        if self.val is None and ranks.first:
            print("no --val pack: the dictionaries are not measured, and their metrics.json says null")

    def run(self) -> None:
        """Train what is not finished; models that diverge are given up, and `complain` names them."""
        if self.ranks.first:
            for name in self.finished:
                clear(self.settings.out / name)
            for site in {group.site.stream: group.site for group in self.groups}.values():  # a stream has one order
                print(f"{site.stream}: {mixing(self.pack, site, self.settings.batch, self.settings.order_seed)}")
            if self.val is not None:
                check_rows(self.val, {group.site: points_of(group.models) for group in self.groups})
        for number, group in enumerate(self.groups):
            with explained_memory(group):
                GroupTraining(self, group).run()
            if self.ranks.sharers > 1:
                self.ranks.wait(f"the end of group {number}")

    def complain(self) -> None:
        """`NonFiniteError` when models were given up."""
        if self.diverged:
            count, of = len(self.diverged), len(self.models)
            others = "; the others are done" if count < of else ""
            raise NonFiniteError("\n".join([*self.diverged, f"{count} of {of} models diverged{others}"]))

    def show(self) -> None:
        """Print the table of this run's models; write that of all in `--out`, and the pictures, beside them."""
        trained = {each.folder: each for each in sweep.save(self.settings.out)}
        done = [trained[model.name] for model in self.models if model.name in trained]
        if done:
            print(sweep.text(done))
            print(f"this table of all in {self.settings.out}, with pictures: {self.settings.out / 'sweep.md'}")

    def reading(self) -> dict[str, Any]:
        """How every loader of this run reads, beside the site and its points."""
        ranks = self.ranks
        rank, world = (ranks.rank, ranks.size) if ranks.sharers > 1 else (0, 1)
        run = {"batch": self.settings.batch, "seed": self.settings.order_seed}
        return {**run, "rank": rank, "world": world, "device": self.device}

    def means(self, site: Site, point: Point) -> TrainingMeans:
        """The means of a point of the training rows; what must be computed for them is computed once in a run."""
        return self._means.setdefault((site, point), TrainingMeans(self.pack, site, point, self.device))

    def _device(self) -> torch.device:
        settings, ranks = self.settings, self.ranks
        if settings.parallel is not None and not ranks.launched:
            raise UsageError(
                f"--parallel {settings.parallel} is for several processes: start them with torchrun -m train, or leave it out"
            )
        if ranks.size > 1 and settings.device is not None and torch.device(settings.device).index is not None:
            raise UsageError(
                f"--device {settings.device} with {ranks.size} ranks: each takes the device of its own number, say --device cuda"
            )
        device = device_of(settings, ranks.local)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def _packs(self) -> tuple[Pack, Pack | None]:
        settings = self.settings
        pack = open_pack(settings.pack)
        if pack.split != "train":
            raise UsageError(
                f"--pack {pack.path} is of the split {pack.split!r}, which is held out: pack --split train"
            )
        val = None if settings.val is None else open_pack(settings.val)
        if val is not None:
            check_packs(pack, val)
        for found in (pack, val):
            if found is not None and found.recomputed and self.ranks.first:
                print(
                    f"{found.path}: targets are recomputed, mlp_out = MLP(mlp_in) in float32, by the MLPs in the pack"
                )
        return pack, val

    def _suggested(self) -> Parallel:
        return "models" if len(models_of(self.settings, self.pack)) >= self.ranks.size else "rows"

    def _check_site(self, site: Site, models: Sequence[Model]) -> None:
        for model in models:
            check_site(self.pack, site, model.config)
            if self.val is not None:
                check_site(self.val, site, model.config)
                Recompute(self.val, site).columns(points_of([model]))  # looks for its MLP
        if self.val is not None:
            check_sigmas(self.pack, self.val, site)
        self.loaders[site] = Loader(self.pack, site, points_of(models), **self.reading())
        self.loaders[site].check()

    def _groups_of(self, rank: int) -> list[Group]:
        """What a rank trains that is not finished."""
        mine = [self.models[i] for i in self.ranks.share(len(self.models), rank)]
        left = [model for model in mine if model.name not in self.finished]
        return [self._group(models) for models in together(left, self.settings.together)]

    def _group(self, models: Sequence[Model]) -> Group:
        settings, sharers, site = self.settings, self.ranks.sharers, models[0].site
        steps = steps_of(settings, self.pack, site, sharers)
        if steps == 0:
            raise UsageError(
                f"{site} has {len(self.loaders[site])} batches of {settings.batch} rows for {sharers} ranks: use a smaller --batch"
            )
        return Group(
            site, tuple(models),
            Course(steps, settings.batch * sharers, settings.log_steps or usual_log_steps(steps), self.device, self.ranks),
        )  # fmt: skip

    def _finished(self, model: Model) -> bool:
        """Whether the same training ended already; `UsageError` when another one lies there, begun or ended."""
        folder, asked = self.settings.out / model.folder, self.settings.log_steps is not None
        if (folder / CONFIG).exists():
            refuse_other(folder, read_config(folder), model.config, ended=True, log_steps_asked=asked)
            check_whole(folder)
            measured = (outline(folder).metrics or {}).get("pack")
            if self.val is not None and measured != self.val.id:
                kind = UsageError if measured is None else MismatchError
                raise kind(
                    f"{folder} is complete and was measured on {measured or 'no pack'}, not on {self.val.path} "
                    f"({self.val.id}): choose another --out, or remove it"
                )
            return True
        there = {path.name for path in folder.glob("*") if path.suffix != ".tmp"}
        if not there <= {RESUME, *COVERED, LABELS}:
            raise UsageError(f"{folder} exists and is no dictionary of ours: choose another --out, or remove it")
        if RESUME in there:
            # it is gone where a training ends just now; `claimed` says so if it does not
            with contextlib.suppress(FileNotFoundError):
                check_progress(folder, model.config, asked)
        if LABELS in there and self.ranks.first:
            note_leftover(folder / LABELS)
        return False


class GroupTraining:
    """The training of a group, from its last checkpoints to finished dictionaries."""

    def __init__(self, training: Training, group: Group) -> None:
        self.training, self.settings, self.group = training, training.settings, group
        self.course, self.ranks = group.course, training.ranks
        points = points_of(group.models)
        self.means = {point: training.means(group.site, point) for point in points}
        self.loader = Loader(training.pack, group.site, points, **training.reading())
        self.writes = self.ranks.sharers == 1 or self.ranks.first

    def run(self) -> None:
        """Train, measure and save the models."""
        folders = {model.name: self.settings.out / model.folder for model in self.group.models}
        for folder in folders.values():
            for leftover in folder.glob(".*.tmp") if self.writes else ():  # of a run that was killed while it wrote
                leftover.unlink(missing_ok=True)
        learners = [
            Learner(model, folders[model.name], self.course, self._decoder_bias(model)) for model in self.group.models
        ]
        with contextlib.ExitStack() as stack:
            stack.callback(self.loader.release)
            logs = {}
            for learner in learners if self.writes else ():
                logs[learner] = stack.enter_context(contextlib.closing(Logs(self.settings.runs, learner.model.name)))
            learners = self._train(learners, logs)
            if self.writes and learners:
                self._finish(learners, logs)

    def _train(self, learners: list[Learner], logs: dict[Learner, Logs]) -> list[Learner]:
        """The learners that came to the end."""
        course, every = self.course, self.settings.checkpoint_steps
        first = min(learner.step for learner in learners)
        reached = {learner: learner.step for learner in learners}
        since = dict.fromkeys(learners, time.monotonic())
        seen = {learner: learner.step * course.batch for learner in learners}
        sharers = self.ranks.sharers
        batches = self.loader.batches(first * sharers, course.steps * sharers)
        with (
            self._bar(learners) as bar,
            stopping_between_steps(grace=GRACE_SECONDS if self.ranks.size > 1 else 0.0) as asked,
        ):
            for step, batch in zip(range(first, course.steps), batches, strict=False):
                due = (step + 1) % every == 0 and step + 1 < course.steps
                for learner in [learner for learner in learners if learner.step == step]:
                    try:
                        line = learner.learn(batch, check=due)
                    except NonFiniteError as error:
                        learners.remove(learner)
                        self._give_up(learner, str(error), learners)
                        continue
                    bar.update(course.batch)
                    if line is not None:
                        if learner in logs:
                            now, rows = time.monotonic(), int(line["rows"])
                            rate = (rows - seen[learner]) / max(now - since[learner], 1e-9)
                            since[learner], seen[learner] = now, rows
                            logs[learner].line(line, rate)
                        said = {"loss": f"{line['loss']:.4f}", "L0": f"{line['l0']:.1f}", "dead": f"{line['dead']:.1%}"}
                        bar.set_postfix(said, refresh=False)
                if not learners:
                    return []
                if due:
                    for learner in [learner for learner in learners if learner.step == step + 1]:
                        learner.save()
                if number := self.ranks.greatest(asked()):
                    self._stop(learners, signal.Signals(number).name)
        if course.steps > every:  # measuring may take long, too
            for learner in learners:
                if learner.step > reached[learner]:
                    learner.save()
        return learners

    def _finish(self, learners: Sequence[Learner], logs: dict[Learner, Logs]) -> None:
        """Measure what was learned, all models in one read, and publish the dictionaries."""
        dictionaries = []
        for learner in learners:
            learner.dictionary.config = learner.model.config.trained(
                self.course.steps, self.course.steps * self.course.batch
            )
            dictionaries.append(frozen(learner.dictionary))
            learner.release()
        self.loader.release()
        release_buffers()
        val = self.training.val
        figures = [None] * len(learners) if val is None else evaluate(dictionaries, self.means, val, self.course.device)
        left = list(learners)
        for learner, dictionary, metrics in zip(learners, dictionaries, figures, strict=True):
            if odd := _odd(metrics, learner.log):
                left.remove(learner)
                self._give_up(learner, f"{learner.model.name}: {odd}", left)
                continue
            dictionary.metrics = metrics
            if metrics is not None:
                logs[learner].figures(metrics, self.course.steps)
            save_dictionary(learner.folder, dictionary, metrics, learner.log)

    def _give_up(self, learner: Learner, why: str, others: Sequence[Learner]) -> None:
        """Forget a learner, and say so; `others` are those that are left of the group."""
        learner.give_up()
        self.training.diverged.append(why)
        if self.writes and (others or self.group is not self.training.groups[-1]):
            tqdm.write(f"{why}. The other models go on")

    def _stop(self, learners: Sequence[Learner], name: str) -> None:
        """Save what is worth going on from, and end."""
        kept = [learner for learner in learners if learner.finite()]
        for learner in kept:
            learner.save()
        if self.ranks.sharers > 1:
            self.ranks.wait("the stop")  # until rank 0 has saved
        raise Interrupted(
            f"stopped by {name} at step {max(learner.step for learner in learners):,} of {self.course.steps:,}; the state of "
            f"{many(len(kept), 'model')} of {self.group.site} is saved: the same command goes on from there"
        )

    def _bar(self, learners: Sequence[Learner]) -> tqdm:
        name = learners[0].model.name if len(learners) == 1 else f"{self.group.site} x {len(learners)} models"
        ranks = self.ranks
        return tqdm(
            total=self.course.steps * self.course.batch * len(learners),
            initial=sum(learner.step for learner in learners) * self.course.batch,
            unit="row", unit_scale=True, mininterval=0.5,
            desc=name if ranks.size == 1 else f"rank {ranks.rank}: {name}",
            disable=not self.writes,
        )  # fmt: skip

    def _decoder_bias(self, model: Model) -> Tensor | None:
        if model.recipe.decoder_bias == "zero":
            return None
        of = self.means[model.config.target_point].of
        means = [mean for step in self.training.pack.steps if (mean := of(step)) is not None]
        return torch.stack(means).mean(dim=0).float()


def _odd(metrics: Mapping[str, Any] | None, log: Sequence[LogLine]) -> str:
    """What is no number among the figures of a model; empty where all are."""
    for what, content in (("figures on held-out rows", metrics), ("lines of the log", log)):
        try:
            json.dumps(content, allow_nan=False)
        except ValueError:
            return f"{what} are no numbers, the training diverged: use a lower --lr, or a longer --lr-warmup-rows"
    return ""


def together(models: Sequence[Model], most: int | None) -> Iterator[Sequence[Model]]:
    """Runs of models of one site, of at most so many."""
    for site in dict.fromkeys(model.site for model in models):
        mine = [model for model in models if model.site == site]
        for start in range(0, len(mine), most or len(mine)):
            yield mine[start : start + (most or len(mine))]
