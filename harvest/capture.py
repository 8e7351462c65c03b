"""Reads a transformer's MLPs while it runs: hooks as data, installed by one context manager.

A hook body checks the shape, detaches and hands over; it does not count calls.  The sampling loop says
when a step has ended, and takes what was captured in it.

Where a model's MLPs are read is the affair of `harvest.models.architectures`.  A single-stream block has no MLP of its own output: what
its hidden layer contributes is that layer times some columns of the output matrix.  That product is computed here, and only of
the rows that are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harvest.models.architectures import Architecture, Spot, architecture_of
from harvest.models.compiling import outside
from harvest.models.matrices import columns_of, refuse_inexact
from store.errors import GranaryError, UsageError
from store.sites import POINTS, Point, Site


@dataclass(frozen=True)
class Rows:
    """One point of one site of one forward pass, as the hook finds it, on the model's device."""

    source: Tensor
    """(image, token, width), detached, the model's own: choose rows of this …"""
    then: Callable[[Tensor], Tensor] | None = None
    """… and put the chosen rows through this (…, width) -> (…, d_model); None: they are the values"""

    def select(self, positions: Tensor | None) -> Tensor:
        """The values at `positions` (image, kept), NaN where a position is -1; all of them for None: (image, kept, d_model)."""
        chosen = select_tokens(self.source, positions)
        if self.then is None:
            return chosen
        values = self.then(chosen)
        return values if positions is None else values.masked_fill((positions < 0).unsqueeze(-1), float("nan"))


Keep = Callable[[Site, Point, Rows], None]
"""takes rows while the block that they come from is computed; afterwards they are gone"""


@dataclass
class Captured:
    """What one forward pass of the transformer left: (site, point) -> (image, token, d_model), and sigma (image,)."""

    values: dict[tuple[Site, Point], Tensor] = field(default_factory=dict)
    """empty where a `keep` took them"""
    sigma: Tensor | None = None
    inputs: dict[str, Any] | None = None
    """what the transformer was called with, by name: calling it so again is that pass again"""

    def take(self) -> "Captured":
        """Hand over what was captured since the last `take`, and begin anew."""
        taken = Captured(self.values, self.sigma, self.inputs)
        self.values, self.sigma, self.inputs = {}, None, None
        return taken


def mlp_of(transformer: nn.Module, site: Site) -> nn.Module:
    """The MLP of a double block's stream: its input is mlp_in, after the adaLN shift and scale; its output mlp_out, before the gate.

    `UsageError` for a single-stream block, whose MLP writes through the output layer that it shares with the attention.
    """
    architecture = architecture_of(transformer)
    spot = architecture.spot(site)
    if spot.fused:
        raise UsageError(f"{site}: the MLP of a single-stream block is no module of its own; choose double blocks")
    mlp: nn.Module = architecture.module(transformer, site, spot.reads)
    return mlp


@contextmanager
def capture(
    transformer: nn.Module, sites: Sequence[Site], keep: Keep | None = None, guided: bool = False
) -> Iterator[Captured]:
    """While the context lasts, the last forward pass's mlp_in and mlp_out of `sites`, and sigma as the transformer received it.

    With `keep`, each site's points are handed to it as the model computes them, and nothing of them is held here.  Without, the
    tensors are the model's own, detached, on its device: copy what outlives the step.  `guided`: the batch is doubled for
    classifier-free guidance, and only its second half, which knows the prompt, is handed out (`inputs` are whole).  The hooks
    are gone afterwards, also after an exception.  `UsageError` for a site that the model has not; `GranaryError` in a
    forward pass that did not compute one.
    """
    architecture = architecture_of(transformer)
    captured, read = Captured(), set[tuple[Site, Point]]()

    def receive_sigma(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.clear()
        timestep = half(kwargs["timestep"]) if guided else kwargs["timestep"]
        sigma = timestep.detach().float()
        captured.sigma = sigma if architecture.sigma_divisor == 1 else sigma / architecture.sigma_divisor
        captured.inputs = kwargs

    def hold(site: Site, point: Point, rows: Rows) -> None:
        captured.values[site, point] = rows.select(None)

    def receive(site: Site, point: Point, rows: Rows) -> None:
        read.add((site, point))
        (keep or hold)(site, point, rows)

    def check(_module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        missing = [f"{point} of {site}" for site in sites for point in POINTS if (site, point) not in read]
        if missing:  # a cache that leaves blocks out, or code that was compiled without hooks
            raise GranaryError(
                f"the transformer ran without computing {missing[0]} where it can be read: nothing was captured"
            )

    apart: Callable[[Any], Any] = outside(transformer)
    with ExitStack() as hooks:
        hooks.callback(transformer.register_forward_pre_hook(receive_sigma, with_kwargs=True).remove)
        for site in sites:
            _install(hooks, transformer, architecture, site, receive, guided, apart)
        hooks.callback(transformer.register_forward_hook(check).remove)
        yield captured


def _install(
    hooks: ExitStack,
    transformer: nn.Module,
    architecture: Architecture,
    site: Site,
    keep: Keep,
    guided: bool,
    apart: Callable[[Any], Any],
) -> None:
    """The hooks of one site; `apart` keeps them out of compiled code."""
    spot: Spot = architecture.spot(site)
    reads = architecture.module(transformer, site, spot.reads)

    def rows(point: Point, value: Tensor, then: Callable[[Tensor], Tensor] | None = None) -> None:
        assert value.ndim == 3, (str(site), point, tuple(value.shape))
        keep(site, point, Rows(half(value.detach()) if guided else value.detach(), then))

    def receive(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows("mlp_in", inputs[0])
        if not spot.fused:
            rows("mlp_out", output)

    hooks.callback(reads.register_forward_hook(apart(receive)).remove)
    if spot.hidden is None or spot.writes is None:
        return
    writes, what = architecture.module(transformer, site, spot.writes), f"the output layer of {site}"
    refuse_inexact(writes.weight, what)

    def receive_hidden(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows("mlp_out", output, lambda hidden: product(writes, hidden, what))

    hidden = architecture.module(transformer, site, spot.hidden)
    hooks.callback(hidden.register_forward_hook(apart(receive_hidden)).remove)


@torch.no_grad()
def product(writes: nn.Module, hidden: Tensor, what: str) -> Tensor:
    """What a hidden layer (…, width) contributes to the output of `writes`, whose last columns it meets; without the bias."""
    columns = columns_of(writes, hidden.shape[-1], what)
    return nn.functional.linear(hidden, columns.to(device=hidden.device, dtype=hidden.dtype))


def half(batch: Tensor) -> Tensor:
    """The second half of a batch that was doubled for guidance: the one that knows the prompt."""
    assert len(batch) % 2 == 0, tuple(batch.shape)
    return batch[len(batch) // 2 :]


def select_tokens(values: Tensor, positions: Tensor | None) -> Tensor:
    """The rows at `positions` (image, kept) of (image, token, width), NaN where a position is -1; all rows for None."""
    if positions is None:
        return values
    index = positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, values.shape[-1])
    chosen = torch.gather(values, 1, index)
    return chosen.masked_fill((positions < 0).unsqueeze(-1), float("nan"))
