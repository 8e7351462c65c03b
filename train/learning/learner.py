"""One model in training: dictionary, AdamW, objective and log.  Several learn from the same batches, and none sees another.

A step is: terms and their gradient (products in bfloat16 under autocast), the mean of the gradients over ranks that share the
model, fused AdamW on float32 weights, decoder columns back to unit norm.  What a step does is a function of the batch, the
number of the step, and the state that a checkpoint carries, so a resumed training ends with the same bits on a CPU.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from store.errors import GranaryError, NonFiniteError
from store.sites import Site
from train.dictionaries.checkpoint import LogLine, Progress, load_progress, save_progress
from train.dictionaries.dictionary import Dictionary, build
from train.distributed import Ranks
from train.learning.objective import Objective, Terms, learning_rate
from train.models import Model
from train.rows.loader import Batch

_DIVERGED = "the training diverged: use a lower --lr, or a longer --lr-warmup-rows"

THRESHOLD_SPEED = 50.0
"""jumprelu: log thresholds learn so many times as fast as weights.  A step of AdamW moves them by about the learning rate, and
from 0.001 to the size of pre-activations it is a factor of e seven times: 35,000 steps at the rate of the weights"""


@dataclass(frozen=True)
class Course:
    """What all models of a group have in common."""

    steps: int
    batch: int
    """rows a step, of all ranks that share a model together"""
    log_steps: int
    device: torch.device
    ranks: Ranks


@dataclass(frozen=True)
class Group:
    """Models of one site that are trained at once, on one read of its rows."""

    site: Site
    models: tuple[Model, ...]
    course: Course


class Learner:
    """The training of one model, at the step where its last checkpoint left it, or at its start."""

    def __init__(
        self, model: Model, folder: Path, course: Course, decoder_bias: Float[Tensor, " d_model"] | None
    ) -> None:
        """`folder` is where its checkpoints lie; the errors are those of `load_progress`."""
        self.model, self.folder, self.course = model, folder, course
        self.dictionary: Dictionary = build(model.config)
        self.dictionary.initialise(model.recipe.seed, decoder_bias)
        self.dictionary.to(course.device)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.dictionary), lr=model.recipe.lr, weight_decay=model.recipe.weight_decay, fused=True
        )
        self.objective = Objective(self.dictionary, model.recipe, course.steps, course.batch)
        self.progress: Progress = load_progress(folder, self.dictionary, self.optimizer, self.objective.load_state)
        self._agree_with_ranks()
        self._total = torch.zeros((), device=course.device)

    @property
    def step(self) -> int:
        """The step that comes next."""
        return self.progress.step

    @property
    def log(self) -> list[LogLine]:
        """The lines so far."""
        return self.progress.log

    def learn(self, batch: Batch, check: bool = False) -> LogLine | None:
        """Take one step; the line of the log where one is due.

        `NonFiniteError` for a loss that is no number: looked for at each line of the log, and with `check`; and for such
        weights: looked for with `check`, and after the last step.
        """
        course, recipe, step = self.course, self.model.recipe, self.step
        x, y = batch.at(self.dictionary.input_point), batch.at(self.dictionary.target_point)
        logged = step % course.log_steps == 0 or step == course.steps - 1
        lr = learning_rate(recipe, step, course.steps, course.batch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["speed"]
        with torch.autocast(course.device.type, torch.bfloat16, enabled=recipe.autocast == "bfloat16"):
            terms = self.objective.terms(x, y, batch.sigma, step, logged)
        terms.total.backward()  # type: ignore[no-untyped-call]
        self._share_with_ranks()
        self.objective.before_step()
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.dictionary.parameters(), recipe.clip)
        self.optimizer.step()
        self.objective.after_step(self.optimizer, x, y, batch.sigma, step)
        self.optimizer.zero_grad(set_to_none=True)  # only one model at a time holds gradients
        self._total = terms.total.detach()
        self.progress.step += 1
        if logged or check:
            self._check_finite()
        if check or self.step == course.steps:
            self._check_weights()
        if not logged:
            return None
        line = self._line(step, terms, lr)
        self.progress.log.append(line)
        return line

    def save(self) -> None:
        """Publish a checkpoint; of ranks that share a model the first does.  Call it where the loss was looked at."""
        if self.course.ranks.sharers == 1 or self.course.ranks.first:
            save_progress(self.folder, self.dictionary, self.optimizer, self.objective.state(), self.progress)

    def release(self) -> None:
        """Let go of gradients and moments: the dictionary is all that is left."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()

    def give_up(self) -> None:
        """Let go of weights, gradients and moments: nothing can be asked of this learner any more."""
        self.release()
        with torch.no_grad():
            for tensor in (*self.dictionary.parameters(), *self.dictionary.buffers()):
                tensor.set_()  # type: ignore[call-overload]

    def finite(self) -> bool:
        """Whether the last loss and the weights are numbers, on every rank that shares the model: all of them ask, or none."""
        total = self._total.clone()
        self.course.ranks.sum(total)
        return bool(total.isfinite()) and self._sound()

    def _sound(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self.dictionary.state_dict().values())

    def _check_weights(self) -> None:
        if not self._sound():
            raise NonFiniteError(
                f"{self.model.name}: weights are no numbers any more after step {self.step - 1}, {_DIVERGED}"
            )

    def _agree_with_ranks(self) -> None:
        ranks = self.course.ranks
        step = torch.tensor(self.step, device=self.course.device)
        ranks.copy_of_first([step, *self.dictionary.state_dict().values()])
        if int(step) != self.step:
            raise GranaryError(
                f"{self.model.name}: rank 0 goes on at step {int(step)}, rank {ranks.rank} at step {self.step}: --out must be a "
                "folder that all ranks see"
            )

    def _share_with_ranks(self) -> None:
        ranks = self.course.ranks
        if ranks.sharers == 1:
            return
        gradients = []
        for parameter in self.dictionary.parameters():
            if parameter.grad is None:  # on this rank alone, perhaps
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        ranks.average(gradients)
        self.objective.merge(ranks.sum, ranks.rank, ranks.size)

    def _check_finite(self) -> None:
        total = self._total.clone()
        self.course.ranks.sum(total)
        if not math.isfinite(float(total)):
            raise NonFiniteError(f"{self.model.name}: the loss is {float(total)} at step {self.step - 1}, {_DIVERGED}")

    def _line(self, step: int, terms: Terms, lr: float) -> LogLine:
        values = torch.stack([value.detach().float() for value in terms])
        self.course.ranks.average([values])
        named = dict(zip(("loss", "residual", "sparsity", "auxiliary", "l0"), values.tolist(), strict=True))
        dead = self.objective.dead_line(step)
        return {"step": step, "rows": (step + 1) * self.course.batch, **named, "lr": lr, **dead}


def _parameter_groups(dictionary: Dictionary) -> list[dict[str, Any]]:
    """The parameters for AdamW, each with its `speed` as a multiple of the learning rate."""
    found = dict(dictionary.named_parameters())
    thresholds = [found.pop(name) for name in ("log_threshold",) if name in found]
    groups: list[dict[str, Any]] = [{"params": list(found.values()), "speed": 1.0}]
    return [*groups, {"params": thresholds, "speed": THRESHOLD_SPEED}] if thresholds else groups
