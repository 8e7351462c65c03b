"""Ours in the comparison: `Loader` over the pack's files, `Learner` with its `Objective`, as `python -m train` uses them."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peer import Task, Trainer, main
from store.shards import open_pack
from train.distributed import Ranks
from train.learning.learner import Course, Learner
from train.models import models_of
from train.recipe import usual_log_steps
from train.rows.loader import Batch, Loader
from train.rows.means import TrainingMeans
from train.settings import TrainSettings


class Ours:
    """An SAE of the second family, whose form the peers' have; the loss of record."""

    def __init__(self, task: Task) -> None:
        pack = open_pack(task.pack)
        flags: dict[str, Any] = {"k": task.k} if task.activation == "topk" else {"l1": task.l1}
        settings = TrainSettings(
            pack=pack.path, out=Path(tempfile.mkdtemp()), recipe="flux-sae", activation=task.activation, loss="record",
            expansion=task.n_features // pack.d_model, lr=task.lr, lr_warmup_rows=20 * task.batch, schedule="constant",
            decoder_bias="mean", batch=task.batch, autocast="bfloat16" if task.bfloat16 else "none", **flags,
        )  # fmt: skip
        (model,) = models_of(settings, pack)
        mean = TrainingMeans(pack, model.site, "mlp_out").of(pack.steps[0])
        assert mean is not None
        course = Course(10**6, task.batch, usual_log_steps(10**6), torch.device("cpu"), Ranks())
        self.learner = Learner(model, settings.out, course, mean.float())
        self.loader = Loader(pack, model.site, ("mlp_out",), task.batch, 0)

    def batches(self) -> Iterator[Batch]:
        return iter(self.loader)

    def train(self, batches: Iterable[Batch]) -> None:
        for batch in batches:
            self.learner.learn(batch)

    def weights(self) -> dict[str, Tensor]:
        return dict(self.learner.dictionary.state_dict())


def make(task: Task) -> Trainer:
    return Ours(task)


if __name__ == "__main__":
    main(make)
