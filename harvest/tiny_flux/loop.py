"""The training loop of every stage: checkpoints that go on exactly where they were, whatever killed the program.

A stage is a loss as a function of the step alone (all its randomness is seeded by the step), so a run that was killed
and resumed ends in the same bytes as one that was not.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from store.errors import UsageError

EVERY = 50
"""Steps between two checkpoints: half a minute of work may be lost."""


def ramp(step: int, steps: int, warm: int = 20, decay: float = 0.3) -> float:
    """Share of the full learning rate: up over `warm` steps, flat, then linearly to zero over the last `decay`."""
    return min(1.0, (step + 1) / warm, max(0.0, (steps - step) / max(1.0, decay * steps)))


def save(path: Path, state: Any) -> None:
    """Write a torch file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    torch.save(state, temporary)
    temporary.replace(path)


class Averaged:
    """A running average of a model's weights, which draws better than the last step's."""

    def __init__(self, model: nn.Module, decay: float = 0.995) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of `step`; the average is shorter in the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - decay)


def train(
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    *,
    steps: int,
    path: Path,
    settings: object,
    rate: Callable[[int], float],
    averaged: bool = False,
) -> nn.Module:
    """The model after `steps` (its average if `averaged`), resumed from `path` when that holds the same `settings`.

    Raises UsageError when `path` was made with other settings: going on would mix two recipes.
    """
    said = json.dumps({"settings": repr(settings), "steps": steps}, sort_keys=True)
    average = Averaged(model) if averaged else None
    base = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["said"] != said:
            raise UsageError(
                f"{path} was made with {state['said']}, now asked for {said}: remove it, or use another --build"
            )
        start = state["step"]
        model.load_state_dict(state["model"])
        for optimiser, inner in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(inner)
        if average is not None:
            average.weights = state["average"]
    model.train()
    bar = tqdm(range(start, steps), desc=path.stem, initial=start, total=steps, mininterval=2.0)
    for step in bar:
        for optimiser, rates in zip(optimisers, base, strict=True):
            for group, lr in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = lr * rate(step)
        value, shown = loss(step)
        value.backward()  # type: ignore[no-untyped-call]
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if average is not None:
            average.update(model, step)
        if step % 10 == 0:
            bar.set_postfix({name: f"{number:.4g}" for name, number in shown.items()}, refresh=False)
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            state = {"said": said, "step": step + 1, "model": model.state_dict()}
            state["optimisers"] = [optimiser.state_dict() for optimiser in optimisers]
            state["average"] = None if average is None else average.weights
            save(path, state)
    if average is not None:
        model.load_state_dict(average.weights)
    return model.eval()
