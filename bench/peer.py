"""What is asked of every trainer in the comparison of `bench.peers`, and how it is timed; each runs in a process of its own.

A trainer gives batches of its own making from the same rows, and trains on whatever batches it is handed.  So its loader alone
is to take its batches and do nothing, its step alone is to train on one batch again and again, and both together is to train
on its own batches, several times anew.  The clock runs from the third batch to the last.
"""

import contextlib
import io
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from bench.groups import TRAIN_PEERS

WARM_UP = 2
"""batches before the clock runs"""


@dataclass(frozen=True)
class Task:
    """What a trainer is to do."""

    rows: str
    """.npy of the training rows, float32, in the order of the pack"""
    pack: str
    """the same rows as a pack"""
    activation: str
    """topk, or relu with L1"""
    n_features: int
    k: int
    l1: float
    batch: int
    lr: float
    bfloat16: bool
    """matrix products under autocast"""
    threads: int
    seconds: float
    """a measurement; of all the training where `weights` are asked for"""
    repeats: int = 1
    """how often both together are measured"""
    apart: bool = True
    """measure loader and step alone as well"""
    weights: str | None = None
    """train for `seconds` and write what was learned here, as safetensors named as an SAE of the second family is"""


@dataclass
class Answer:
    """Rows a second, and what else is to be said."""

    rates: dict[str, float] = field(default_factory=dict)
    """loader and step where they were measured apart; or minute"""
    both: list[float] = field(default_factory=list)
    """loader and step together, each time"""
    steps: int = 0
    why_not: str | None = None
    """the reason where it could not be done"""


class Trainer(Protocol):
    """One trainer, as `Task` asks for."""

    def batches(self) -> Iterator[Any]:
        """Batches for ever, made as that trainer makes them."""

    def train(self, batches: Iterable[Any]) -> None:
        """Train on these until they end."""

    def weights(self) -> dict[str, Any]:
        """`encoder.weight` (n_features, d_model), `encoder.bias`, `decoder.weight` (d_model, n_features), `pre_bias`."""


class NotSupportedError(Exception):
    """A trainer cannot do that."""


class Watched:
    """An iterator that ends when the time is over, and knows how fast it was drawn from."""

    def __init__(self, batches: Iterator[Any], seconds: float, rows: int, warm_up: int = WARM_UP) -> None:
        self.source, self.seconds, self.rows, self.warm_up = batches, seconds, rows, warm_up
        self.taken = 0
        self.begun = self.ended = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        now = time.perf_counter()
        if self.taken == self.warm_up:
            self.begun = now
        if self.taken > self.warm_up and now - self.begun > self.seconds:
            self.ended = now
            raise StopIteration
        self.taken += 1
        return next(self.source)

    @property
    def rate(self) -> float:
        """Rows a second."""
        return (self.taken - self.warm_up) * self.rows / (self.ended - self.begun)


def answer(task: Task, make: Callable[[Task], Trainer]) -> Answer:
    """Do the task with the trainer that `make` gives."""
    trainer, found = make(task), Answer()
    if task.weights is not None:
        from safetensors.torch import save_file

        watched = Watched(trainer.batches(), task.seconds, task.batch, warm_up=0)
        trainer.train(watched)
        found.rates["minute"], found.steps = watched.rate, watched.taken
        save_file(
            {name: tensor.detach().float().contiguous() for name, tensor in trainer.weights().items()}, task.weights
        )
        return found
    if task.apart:
        loader = Watched(trainer.batches(), task.seconds, task.batch)
        for _ in loader:
            pass
        step = Watched(itertools.repeat(next(trainer.batches())), task.seconds, task.batch)
        trainer.train(step)
        found.rates = {"loader": loader.rate, "step": step.rate}
    for _ in range(task.repeats):
        trainer = make(task)
        both = Watched(trainer.batches(), task.seconds, task.batch)
        trainer.train(both)
        found.both.append(both.rate)
    return found


def main(make: Callable[[Task], Trainer]) -> None:
    """Answer the task that the first argument spells in JSON, on the last line of stdout."""
    task = Task(**json.loads(sys.argv[1]))
    sys.path.append(str(TRAIN_PEERS.installed.parent))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            import torch

            torch.set_num_threads(task.threads)
            torch.manual_seed(0)
            found = answer(task, make)
    except NotSupportedError as error:
        found = Answer(why_not=str(error))
    except Exception as error:
        traceback.print_exc()
        found = Answer(why_not=f"{type(error).__name__}: {error}"[:200])
    print(json.dumps(asdict(found)))
