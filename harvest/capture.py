"""Reads a transformer's MLPs while it runs: hooks as data, installed by one context manager.

A hook body checks the shape, detaches and hands over; it does not count calls.  The sampling loop says
when a step has ended, and takes what was captured in it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from store.errors import UsageError
from store.sites import Point, Site


def mlp_of(transformer: nn.Module, site: Site) -> nn.Module:
    """The MLP of a double block's stream: its input is mlp_in, after the adaLN shift and scale; its output mlp_out, before the gate."""
    if site.kind != "double":
        raise UsageError(f"{site}: single-stream blocks are not harvested yet; choose double blocks (--layers 0-15)")
    block = transformer.transformer_blocks[site.layer]  # type: ignore[index, union-attr]
    mlp: nn.Module = block.ff if site.stream == "img" else block.ff_context  # type: ignore[union-attr, assignment]
    return mlp


@dataclass
class Captured:
    """What one forward pass of the transformer left: (site, point) -> (image, token, d_model), and sigma (image,)."""

    values: dict[tuple[Site, Point], Tensor] = field(default_factory=dict)
    sigma: Tensor | None = None
    inputs: dict[str, Any] | None = None
    """what the transformer was called with, by name: calling it so again is that pass again"""

    def take(self) -> "Captured":
        """Hand over what was captured since the last `take`, and begin anew."""
        taken = Captured(self.values, self.sigma, self.inputs)
        self.values, self.sigma, self.inputs = {}, None, None
        return taken


@contextmanager
def capture(transformer: nn.Module, sites: Sequence[Site]) -> Iterator[Captured]:
    """While the context lasts, the last forward pass's mlp_in and mlp_out of `sites`, and sigma as the transformer received it.

    The tensors are the model's own, detached, on its device: copy what outlives the step.  The hooks are
    gone afterwards, also after an exception.
    """
    captured = Captured()

    def receive_sigma(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.sigma = kwargs["timestep"].detach().float()
        captured.inputs = kwargs

    with ExitStack() as hooks:
        hooks.callback(transformer.register_forward_pre_hook(receive_sigma, with_kwargs=True).remove)
        for site in sites:
            hooks.callback(mlp_of(transformer, site).register_forward_hook(_receiver(captured, site)).remove)
        yield captured


def _receiver(captured: Captured, site: Site) -> Any:
    def receive(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for point, value in (("mlp_in", inputs[0]), ("mlp_out", output)):
            assert value.ndim == 3, (str(site), point, tuple(value.shape))
            captured.values[site, point] = value.detach()  # type: ignore[index]

    return receive


def select_tokens(values: Tensor, positions: Tensor | None) -> Tensor:
    """The rows at `positions` (image, kept) of (image, token, d_model), NaN where a position is -1; all rows for None."""
    if positions is None:
        return values
    index = positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, values.shape[-1])
    chosen = torch.gather(values, 1, index)
    return chosen.masked_fill((positions < 0).unsqueeze(-1), float("nan"))
